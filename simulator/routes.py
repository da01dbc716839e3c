"""The links of a cluster, which of them two GPUs talk over, and what a KV migration sends where.

Every GPU has a link out of it and one into it within its node (NVLink, or PCIe), every network card likewise to the
other nodes; the switches between them are taken to hold nothing up. A pull between two nodes therefore crosses the
cards, one between GPUs of a node their own links, and one on the same GPU nothing. Memory copies are free.
"""

from collections import defaultdict

from distserve.core.topology import ClusterSpec, Gpu
from distserve.transfer.reshard import reshard
from simulator.model import InstanceModel, KvGeometry
from simulator.network import Route


class Links:
    """All links of ``cluster``, by index: ``names`` such as ``node0/gpu3 out``, ``capacities`` in bytes/s."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self._cluster = cluster
        self.names: tuple[str, ...] = tuple(
            f"node{node}/{port} {way}"
            for node in range(cluster.num_nodes)
            for port in _ports(cluster)
            for way in ("out", "in")
        )
        self.capacities: tuple[float, ...] = tuple(
            cluster.intra_node_bandwidth if port < cluster.gpus_per_node else cluster.inter_node_bandwidth
            for _ in range(cluster.num_nodes)
            for port in range(cluster.gpus_per_node + cluster.nics_per_node)
            for _ in ("out", "in")
        )

    def route(self, src: Gpu, dst: Gpu) -> Route:
        """The links from ``src`` to ``dst``, outward first."""
        if src == dst:
            return ()
        if src.node == dst.node:
            return (self._out(src.node, src.index), self._out(dst.node, dst.index) + 1)
        first_nic = self._cluster.gpus_per_node
        return (
            self._out(src.node, first_nic + self._cluster.nic_of(src)),
            self._out(dst.node, first_nic + self._cluster.nic_of(dst)) + 1,
        )

    def _out(self, node: int, port: int) -> int:
        return 2 * (node * (self._cluster.gpus_per_node + self._cluster.nics_per_node) + port)


class PullRoutes:
    """What a token of KV cache takes from one instance to another over ``links``; found once for each pair.

    All bytes of one pull that take the same route are one flow, however many pairs of ranks they are between: pulls
    share links as equals, not in proportion to their ranks.
    """

    def __init__(self, links: Links, kv: KvGeometry) -> None:
        self._links = links
        self._kv = kv
        self._found: dict[tuple[str, str], tuple[tuple[Route, int], ...]] = {}

    def per_token(self, src: InstanceModel, dst: InstanceModel) -> tuple[tuple[Route, int], ...]:
        """(route, bytes per token) of a pull by ``dst`` from ``src``.

        Ranks on one GPU have the route (). An instance without GPUs stands for an ideal one, which nothing holds up:
        one flow with the route ().
        """
        pair = (src.spec.instance_id, dst.spec.instance_id)
        found = self._found.get(pair)
        if found is None:
            found = self._found[pair] = self._find(src, dst)
        return found

    def pull_flows(self, src: InstanceModel, dst: InstanceModel, num_tokens: int) -> list[tuple[Route, int]]:
        """(route, bytes) of a pull of ``num_tokens`` tokens."""
        return [(route, num_tokens * num_bytes) for route, num_bytes in self.per_token(src, dst)]

    def _find(self, src: InstanceModel, dst: InstanceModel) -> tuple[tuple[Route, int], ...]:
        kv = self._kv
        if not (src.gpus and dst.gpus):
            return (((), kv.bytes_per_token),)
        for model in (src, dst):
            assert len(model.gpus) == model.spec.parallel.num_ranks, "a GPU for each rank"
        flows: defaultdict[Route, int] = defaultdict(int)
        for share in reshard(src.spec.parallel, dst.spec.parallel, kv.num_layers, kv.num_kv_heads):
            route = self._links.route(src.gpus[share.src_rank], dst.gpus[share.dst_rank])
            flows[route] += share.num_cells * kv.token_bytes
        return tuple(flows.items())


def _ports(cluster: ClusterSpec) -> list[str]:
    """What a node's links are of: its GPUs, then its network cards."""
    return [f"gpu{i}" for i in range(cluster.gpus_per_node)] + [f"nic{i}" for i in range(cluster.nics_per_node)]
