"""`make fast`: the modules that mypyc compiles give the very timelines that their sources give."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import hashlib, sys
from dataclasses import replace
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import parse_lengths
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec, Gpu
from simulator import engine
from simulator.latency.distserve_profile import DistServeStepTime
from simulator.model import ClusterModel, HostModel, InstanceModel, KvGeometry
from simulator.simulation import simulate

roles = [Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED]
def specs(caching):
    limits = SchedulerConfig(256, 16, prefix_caching=caching)
    return [InstanceSpec(f"{role}-{i}", role, KvConfig(60, 16), limits) for i, role in enumerate(roles)]
step = LinearStepTime(0.01, 1e-4, 1e-7, 1e-6)
lengths = parse_lengths("lognormal:mean=200,sigma=0.8,max=400")
digest = hashlib.sha256()
load = WorkloadSpec(Gamma(), lengths, lengths, num_requests=300, seed=3).at(4.0)
heads = tuple(tuple(range(i % 3 * 100, i % 3 * 100 + 30)) for i in range(300))
load = replace(load, prefix_blocks=heads, tokens_per_block=16)
for chosen in (specs(False)[:3], specs(False)[3:], specs(True)[:3], specs(True)[3:], specs(True)[::3]):
    for host in (None, HostModel(2, cpu_per_request=1e-3, cpu_per_token=1e-4)):
        model = ClusterModel(tuple(InstanceModel(spec, step) for spec in chosen), host=host)
        lines = simulate(model, load).timelines
        assert (lines.status == 200).any()
        for name in lines.__dataclass_fields__:
            digest.update(getattr(lines, name).tobytes())
step = DistServeStepTime((0.018, 1e-4, 7e-9), (0.0199, 6.3e-7, 3.9e-5), (0.0072, 5.8e-7, 1.6e-4), 12)
node = ClusterSpec("cpu", 1, 4, intra_node_bandwidth=3e6, inter_node_bandwidth=3e6)
placed = tuple(InstanceModel(spec, step, (Gpu(0, i),)) for i, spec in enumerate(specs(False)))
lines = simulate(ClusterModel(placed, node, KvGeometry(2, 2, 100)), load).timelines
assert (lines.status == 200).all()
for name in lines.__dataclass_fields__:
    digest.update(getattr(lines, name).tobytes())
print(engine.__file__.rpartition(".")[2], digest.hexdigest())
"""


def timelines(directory: Path) -> list[str]:
    """The suffix of a module that is compiled if any is, and the digest of what was simulated."""
    environment = os.environ | {"PYTHONPATH": f"{directory}:{directory / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler takes a minute
def test_compiled_modules_give_the_same_timelines(tmp_path):
    for name in ("distserve", "simulator", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    interpreted = timelines(tmp_path)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tmp_path, env=os.environ | {"DISTSERVE_COMPILE": "1"}, capture_output=True, check=True,
    )  # fmt: skip
    compiled = timelines(tmp_path)
    assert (interpreted[0], compiled[0]) == ("py", "so")
    assert interpreted[1] == compiled[1]
