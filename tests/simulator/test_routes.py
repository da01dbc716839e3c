from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import InstanceModel, KvGeometry
from simulator.routes import Links, PullRoutes

CLUSTER = ClusterSpec("a100-80g-sxm", 2, 4, 300e9, 3e9, nics_per_node=2)
KV = KvGeometry(num_layers=6, num_kv_heads=4, token_bytes=256)


def instance(name: str, tp: int, pp: int, *gpus: tuple[int, int]) -> InstanceModel:
    spec = InstanceSpec(name, Role.PREFILL, KvConfig(10), parallel=ParallelConfig(tp, pp))
    return InstanceModel(spec, LinearStepTime(0, 0, 0, 0), tuple(Gpu(*gpu) for gpu in gpus))


def named(links: Links, flows: list[tuple[tuple[int, ...], int]]) -> dict[tuple[str, ...], int]:
    return {tuple(links.names[link] for link in route): num_bytes for route, num_bytes in flows}


def test_every_gpu_and_card_has_a_link_each_way() -> None:
    links = Links(CLUSTER)
    assert len(links.names) == len(set(links.names)) == len(links.capacities) == 2 * (4 + 2) * 2
    for name, capacity in zip(links.names, links.capacities, strict=True):
        assert capacity == (300e9 if "gpu" in name else 3e9)


def test_routes_within_a_gpu_a_node_and_across_nodes() -> None:
    links = Links(CLUSTER)

    def route(src: Gpu, dst: Gpu) -> list[str]:
        return [links.names[link] for link in links.route(src, dst)]

    assert route(Gpu(1, 2), Gpu(1, 2)) == []
    assert route(Gpu(1, 2), Gpu(1, 0)) == ["node1/gpu2 out", "node1/gpu0 in"]
    assert route(Gpu(0, 1), Gpu(1, 2)) == ["node0/nic0 out", "node1/nic1 in"]


def test_a_pull_moves_each_rank_its_share() -> None:
    links = Links(CLUSTER)
    src, dst = instance("p", 2, 1, (0, 0), (0, 1)), instance("d", 1, 2, (0, 2), (0, 3))
    flows = PullRoutes(links, KV).pull_flows(src, dst, 10)
    quarter = 10 * 3 * 2 * 256
    assert named(links, flows) == {(f"node0/gpu{a} out", f"node0/gpu{b} in"): quarter for a in (0, 1) for b in (2, 3)}
    assert sum(num_bytes for _, num_bytes in flows) == 10 * KV.bytes_per_token


def test_flows_of_one_pull_over_the_same_cards_are_one() -> None:
    links = Links(CLUSTER)
    src, dst = instance("p", 2, 1, (0, 0), (0, 1)), instance("d", 2, 1, (1, 2), (1, 3))
    assert named(links, PullRoutes(links, KV).pull_flows(src, dst, 5)) == {
        ("node0/nic0 out", "node1/nic1 in"): 5 * KV.bytes_per_token
    }


def test_replicated_heads_are_sent_to_every_shard_that_holds_them() -> None:
    links = Links(ClusterSpec("l4", 1, 16, 1e9, 1e9))
    src = instance("p", 4, 1, *((0, i) for i in range(4)))
    dst = instance("d", 8, 1, *((0, 4 + i) for i in range(8)))
    flows = PullRoutes(links, KV).pull_flows(src, dst, 1)
    assert sum(num_bytes for _, num_bytes in flows) == 2 * KV.bytes_per_token


def test_what_shares_a_gpu_or_is_ideal_costs_nothing() -> None:
    routes = PullRoutes(Links(CLUSTER), KV)
    here, there = instance("p", 1, 1, (0, 0)), instance("d", 1, 1, (0, 0))
    ideal = instance("ideal", 1, 1)
    assert routes.pull_flows(here, there, 2) == [((), 2 * KV.bytes_per_token)]
    assert routes.pull_flows(here, ideal, 2) == [((), 2 * KV.bytes_per_token)]
