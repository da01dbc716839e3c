"""Placement groups in a Ray cluster of two nodes (both on this machine): ranks sit where the plan has them."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, pathlib, subprocess, sys
import ray
from ray.cluster_utils import Cluster

from distserve.cluster.ray_cluster import RayCluster
from distserve.cluster.reservation import RankResources, Reservation
from distserve.cluster.seats import WantedInstance, group_by_node
from distserve.core.config import ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec, Gpu

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
for _ in range(2):
    nodes.add_node(num_cpus=4, num_gpus=4)
ray.init(address=nodes.address, log_to_driver=False)
cluster = RayCluster("127.0.0.1", is_local=False)

# A prefill of two stages of two shards, one stage beside each decode instance: DistServe's low-affinity placement.
prefill = WantedInstance(Role.PREFILL, ParallelConfig(2, 2), (Gpu(0, 0), Gpu(0, 1), Gpu(1, 0), Gpu(1, 1)))
decodes = [WantedInstance(Role.DECODE, ParallelConfig(2, 1), (Gpu(n, 2), Gpu(n, 3))) for n in (0, 1)]
instances = [prefill, *decodes]
groups = group_by_node(instances)
spec = ClusterSpec("h100-sxm", 2, 4, 1.0, 1.0)

mapping = cluster.match(groups, spec, 0, print)
reservation = Reservation(groups, mapping, RankResources(0.5, 1))
reservation.wait(20)

@ray.remote(num_cpus=0.5, num_gpus=1)
class Rank:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]

seats = [(i, rank) for i, one in enumerate(instances) for rank in range(one.parallel.num_ranks)]
ranks = [Rank.options(scheduling_strategy=reservation.seat(*seat)).remote() for seat in seats]
where = ray.get([rank.where.remote() for rank in ranks])
planned = [mapping[instances[i].gpus[rank].node].node_id for i, rank in seats]

second = Reservation(groups, mapping, RankResources(0.5, 1))
try:
    second.wait(0.5)
    full = ""
except ConfigError as error:
    full = str(error)
second.close()
for rank in ranks:
    ray.kill(rank)
reservation.close()
try:
    cluster.match([*groups, *(type(g)(g.node + 2, g.seats) for g in groups)], spec, 0.1, print)
except ConfigError as error:
    missing = str(error)

# The same as a user meets it: `distserve serve` joins, is refused, and leaves no actor and no reservation behind.
plan = pathlib.Path(sys.argv[1])
command = [sys.executable, "-m", "distserve.cli", "serve", "--config", plan, "--port", "0"]
refused = subprocess.run([*command, "--ray-address", nodes.address], capture_output=True, text=True)
left = [actor["State"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
left += [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps({"where": where, "planned": planned, "full": full, "missing": missing,
    "refused": [refused.returncode, refused.stderr], "left": left}))
ray.shutdown()
nodes.shutdown()
"""


PLAN = f"""
placement:
  prefill: {{instances: 2, tp: 8, gpus: [{[[0, i] for i in range(8)]}, {[[1, i] for i in range(8)]}]}}
  decode: {{instances: 2, tp: 8, gpus: [{[[2, i] for i in range(8)]}, {[[3, i] for i in range(8)]}]}}
cluster: {{gpu: a100-80g-sxm, nodes: 4, gpus_per_node: 8}}
"""


def test_ranks_sit_on_the_nodes_they_were_planned_for(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_enable_metrics_collection": "0",
        # As `ray start` does it; whether this user has a token of their own must not matter.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "plan.yaml")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [node for node, _ in result["where"]] == result["planned"]
    assert len(set(result["planned"])) == 2
    # Eight ranks, eight GPUs.
    assert len({tuple(seat) for seat in result["where"]}) == 8
    assert "does not have 2 CPUs and 4 GPUs free" in result["full"]
    assert "the plan needs 4 nodes of 4 h100-sxm GPUs" in result["missing"]
    assert "2 nodes of 4 GPUs and 4 CPUs, 1 node of 1 CPU (no GPU)" in result["missing"]
    status, said = result["refused"]
    assert status == 1
    assert "the plan needs 4 nodes of 8 a100-80g-sxm GPUs, the cluster has 2 nodes of 4 GPUs" in said
    assert result["left"] == []
