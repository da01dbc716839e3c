"""The cluster as a picture: which instance has which GPUs, and how much KV flows between them.

Knows a placement and the flows between its instances; not how either was found.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from distserve.core.config import Role
from distserve.core.topology import Gpu, PlacedInstance, Placement
from placement.outlook import KvFlow
from placement.words import gigabytes

ROLE_COLOURS = {Role.PREFILL: "#4c78a8", Role.DECODE: "#f58518", Role.MIXED: "#54a24b"}
_UNUSED = "#eeeeee"
_WITHIN = "#7b3294"
_ACROSS = "#c51b3b"
_MAX_ARROWS = 10
_ROW = 8
_GAP = 1.1
_LETTERS = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: "M"}


@dataclass(frozen=True, slots=True)
class _Point:
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class _Arrow:
    start: _Point
    end: _Point
    rate: float
    within: bool
    label: str


def short_names(placement: Placement) -> list[str]:
    """A short name of every instance, in order: ``P0``, ``P1``, ``D0``, ..."""
    seen: dict[Role, int] = defaultdict(int)
    names = []
    for instance in placement.instances:
        role = instance.spec.role
        names.append(f"{_LETTERS[role]}{seen[role]}")
        seen[role] += 1
    return names


def draw_cluster(placement: Placement, flows: Iterable[KvFlow], title: str) -> Figure:
    """Nodes as boxes, GPUs as squares in their instance's colour, KV flows as arrows as wide as they carry.

    Nodes without an instance are counted, not drawn. With many pairs of instances the flows are drawn summed by pair
    of nodes.
    """
    nodes = sorted({gpu.node for instance in placement.instances for gpu in instance.gpus})
    per_node = placement.cluster.gpus_per_node
    wide = min(per_node, _ROW)
    high = -(-per_node // wide)
    columns = 1 if len(nodes) <= 3 else math.ceil(math.sqrt(len(nodes) * (high + 1) / wide))
    rows = -(-len(nodes) // columns)
    width, height = wide + 1.0, high + _GAP
    origins = {
        node: _Point((number % columns) * width, -(number // columns) * height) for number, node in enumerate(nodes)
    }
    left, right = -0.8, (columns - 1) * width + wide - 0.2
    bottom, top = -(rows - 1) * height - high - _GAP / 2 + 0.5, 1.1
    scale = min(1.0, 14 / (right - left))
    # Room for the title and the legend beside the drawing itself, whose squares stay square.
    figure = Figure(figsize=(max((right - left) * scale, 6.5), (top - bottom) * scale + 1.3), layout="constrained")
    axis = figure.subplots()
    seats = {
        Gpu(node, index): _Point(origins[node].x + index % wide, origins[node].y - index // wide)
        for node in nodes
        for index in range(per_node)
    }
    for node in nodes:
        _draw_node(axis, origins[node], node, wide, high)
    names = short_names(placement)
    font = 8.5 * min(1.0, scale)
    owners = {
        gpu: (instance, rank, name)
        for instance, name in zip(placement.instances, names, strict=True)
        for rank, gpu in enumerate(instance.gpus)
    }
    for gpu, seat in seats.items():
        _draw_gpu(axis, seat, gpu, owners.get(gpu), font)
    handles: list[Patch | Line2D] = [
        Patch(color=ROLE_COLOURS[role], label=_kind(placement.of(role))) for role in Role if placement.of(role)
    ]
    handles += _draw_flows(axis, placement, list(flows), seats, names, font)
    spare = placement.cluster.num_nodes - len(nodes)
    note = f"; {spare} of {placement.cluster.num_nodes} nodes unused" if spare else ""
    figure.suptitle(f"{title}\n{placement.num_gpus} x {placement.cluster.gpu}{note}", fontsize=10.5)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_aspect("equal")
    axis.axis("off")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return figure


def _kind(placed: tuple[PlacedInstance, ...]) -> str:
    shape = placed[0].spec.parallel
    return f"{len(placed)} {placed[0].spec.role} (tp {shape.tp}, pp {shape.pp})"


def _draw_node(axis: Axes, origin: _Point, node: int, wide: int, high: int) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (origin.x - 0.5, origin.y - high + 0.5),
            wide,
            high,
            boxstyle="round,pad=0.08",
            facecolor="white",
            edgecolor="0.45",
        )
    )
    axis.annotate(f"node {node}", (origin.x - 0.5, origin.y + 0.66), fontsize=8.5, color="0.25")


def _draw_gpu(axis: Axes, seat: _Point, gpu: Gpu, owner: tuple[PlacedInstance, int, str] | None, font: float) -> None:
    colour = ROLE_COLOURS[owner[0].spec.role] if owner else _UNUSED
    axis.add_patch(Rectangle((seat.x - 0.45, seat.y - 0.45), 0.9, 0.9, facecolor=colour, edgecolor="white"))
    axis.annotate(str(gpu.index), (seat.x - 0.4, seat.y - 0.4), fontsize=font * 0.75, color="white" if owner else "0.5")
    if owner is None:
        return
    instance, rank, name = owner
    shape = instance.spec.parallel
    place = [f"stage {rank // shape.tp}"] * (shape.pp > 1) + [f"shard {rank % shape.tp}"] * (shape.tp > 1)
    axis.annotate(
        name, (seat.x, seat.y + 0.16), ha="center", va="center", fontsize=font * 1.25, color="white", weight="bold"
    )
    axis.annotate("\n".join(place), (seat.x, seat.y - 0.05), ha="center", va="top", fontsize=font * 0.75, color="white")


def _draw_flows(
    axis: Axes, placement: Placement, flows: list[KvFlow], seats: dict[Gpu, _Point], names: list[str], font: float
) -> list[Line2D]:
    """The arrows, and their legend. An arrow's width is its share of the widest."""
    flows = [flow for flow in flows if flow.rate > 0]
    if not flows:
        return []
    if len(flows) <= _MAX_ARROWS:
        arrows = [
            _Arrow(
                _centre(placement.instances[flow.source].gpus, seats),
                _centre(placement.instances[flow.target].gpus, seats),
                flow.rate,
                _stays_within(placement, flow),
                f"{names[flow.source]}→{names[flow.target]} {gigabytes(flow.rate)}",
            )
            for flow in flows
        ]
    else:
        arrows = _by_node(placement, flows, seats)
    most = max((arrow.rate for arrow in arrows), default=0.0)
    for number, arrow in enumerate(arrows):
        _draw_arrow(axis, arrow, number, arrow.rate / most, font)
    totals = {
        within: sum(flow.rate for flow in flows if _stays_within(placement, flow) is within) for within in (True, False)
    }
    return [
        Line2D([], [], color=colour, linewidth=2.5, label=f"KV {words}: {gigabytes(totals[within])} in all")
        for within, colour, words in ((True, _WITHIN, "within a node"), (False, _ACROSS, "between nodes"))
        if totals[within]
    ]


def _draw_arrow(axis: Axes, arrow: _Arrow, number: int, weight: float, font: float) -> None:
    """From edge to edge of the squares; within a row it arcs above them. ``number`` keeps neighbours apart."""
    drop = arrow.end.y - arrow.start.y
    edge = math.copysign(0.45, drop) if abs(drop) > 0.5 else 0.45
    start = _Point(arrow.start.x, arrow.start.y + edge)
    end = _Point(arrow.end.x, arrow.end.y - edge if abs(drop) > 0.5 else arrow.end.y + edge)
    bend = (-0.25 - 0.04 * (number % 3)) * math.copysign(1, end.x - start.x) if abs(drop) <= 0.5 else 0.1
    colour = _WITHIN if arrow.within else _ACROSS
    axis.add_patch(
        FancyArrowPatch(
            (start.x, start.y),
            (end.x, end.y),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=0.8 + 2.5 * weight,
            color=colour,
            alpha=0.8,
            shrinkA=0,
            shrinkB=0,
            zorder=3,
        )
    )
    # The middle of a quadratic curve lies half way to its control point; labels of neighbours are staggered along it.
    along = 0.5 if abs(drop) <= 0.5 else 0.4 + 0.2 * (number % 2)
    middle = _Point(
        start.x + along * (end.x - start.x) + bend * (end.y - start.y) / 2,
        start.y + along * (end.y - start.y) - bend * (end.x - start.x) / 2,
    )
    axis.annotate(
        arrow.label,
        (middle.x, middle.y),
        ha="center",
        va="center",
        fontsize=font * 0.85,
        color=colour,
        zorder=4,
        bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
    )


def _by_node(placement: Placement, flows: list[KvFlow], seats: dict[Gpu, _Point]) -> list[_Arrow]:
    """Flows summed by pair of nodes (the instances' first), those that stay within nodes apart."""
    sums: dict[tuple[int, int, bool], float] = defaultdict(float)
    ends: dict[tuple[int, int, bool], tuple[set[Gpu], set[Gpu]]] = defaultdict(lambda: (set(), set()))
    for flow in flows:
        gpus = [placement.instances[end].gpus for end in (flow.source, flow.target)]
        nodes = [side[0].node for side in gpus]
        key = (nodes[0], nodes[1], _stays_within(placement, flow))
        sums[key] += flow.rate
        for end, side, node in zip(ends[key], gpus, nodes, strict=True):
            end.update(gpu for gpu in side if gpu.node == node)
    return [
        _Arrow(_centre(tuple(ends[key][0]), seats), _centre(tuple(ends[key][1]), seats), rate, key[2], gigabytes(rate))
        for key, rate in sums.items()
    ]


def _centre(gpus: tuple[Gpu, ...], seats: dict[Gpu, _Point]) -> _Point:
    """The middle of an instance's GPUs on their first node."""
    here = [seats[gpu] for gpu in gpus if gpu.node == gpus[0].node]
    return _Point(sum(seat.x for seat in here) / len(here), sum(seat.y for seat in here) / len(here))


def _stays_within(placement: Placement, flow: KvFlow) -> bool:
    """Whether no layer's KV leaves its node."""
    source, target = (placement.instances[end].spec.instance_id for end in (flow.source, flow.target))
    return target in placement.near().get(source, ())
