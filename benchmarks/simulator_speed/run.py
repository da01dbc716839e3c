"""How many requests a second of one core the simulator runs through, on two real traces; and where the time goes.

- ``azure2023_conv.csv``, whole, its own timestamps sped up, on 4 prefill + 4 decode instances timed by DistServe's fit
  of OPT-13B on one A100: at the rate at which the busier pool stands at 80% of what it can sustain (found here, by
  bisection on the share of requests that wait), and besides at the lowest rate at which that pool computes 80% of
  the time.
- Mooncake's conversation trace, whole, on 4 + 4 H200 that serve Llama-3.1-8B by the analytic model.

Measured as it is installed, and compiled (``make fast``), in a copy of the sources that is built for it.

    python -m benchmarks.simulator_speed.run --data DATA --opt-fits profiler-a100-80g.distserve.json
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.machine import ROOT, cpu_name

HEADER = (
    "| trace | requests | simulated/s, compiled | interpreted | events each | prefill computes | decode computes "
    "| decode batch | most KV in use | answered | peak RSS |"
)


def measure(args: argparse.Namespace, sources: Path, limit: float | None, *options: str) -> dict[str, Any]:
    """The measurements of ``sources``, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.simulator_speed.measure", "--repeats", str(args.repeats), *options]
    command += ["--data", str(args.data.resolve()), "--opt-fits", str(args.opt_fits.resolve())]
    command += ["--limit", str(limit)] if limit else []
    # The folder that it runs in comes first, and only this benchmark itself from here.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=sources, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compile_copy(folder: Path) -> None:
    """The sources, with the extensions of ``make fast`` beside them."""
    for name in (
        "distserve",
        "simulator",
        "placement",
        "kernels",
        "setup.py",
        "build_backend.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | {"DISTSERVE_COMPILE": "1"}, check=True, stdout=sys.stderr)


def main() -> None:
    """Measure both ways and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two traces")
    parser.add_argument("--opt-fits", type=Path, required=True, help="DistServe's fits")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, help="sustained rate, if known")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compile_copy(Path(folder))
        compiled = measure(args, Path(folder), args.limit)
    interpreted = measure(args, ROOT, compiled["sustained_rate"], "--profile")
    profile = interpreted.pop("profile")
    lines = [
        "# Simulated requests per second of one core",
        "",
        f"{time.strftime('%Y-%m-%d')}, one core of {cpu_name()}, Python {platform.python_version()}; repeat it with",
        "`python -m benchmarks.simulator_speed.run --data TRACES --opt-fits profiler-a100-80g.distserve.json`.",
        "",
        f"The sustained rate of the first deployment is {compiled['sustained_rate']:.1f} requests/s.",
        "",
        HEADER,
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in compiled["rows"].items():
        plain = interpreted["rows"][name]
        lines.append(
            f"| {name} ({row['rate']:.1f}/s) | {row['requests']:,} | **{row['requests_per_second']:,.0f}** "
            f"| {plain['requests_per_second']:,.0f} | {row['events_per_request']:.1f} | {row['prefill_busy']:.0%} "
            f"| {row['decode_busy']:.0%} | {row['decode_batch']:.1f} | {row['peak_kv']:.0%} | {row['answered']:.1%} "
            f"| {max(row['peak_rss_mb'], plain['peak_rss_mb']):.0f} MB |"
        )
    lines += ["", "Where the time goes (first row, interpreted, under cProfile):", "", profile, ""]
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "report.md").write_text("\n".join(lines))
    (results / "report.json").write_text(json.dumps({"compiled": compiled, "interpreted": interpreted}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
