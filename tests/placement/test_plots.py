"""The plots are written whole, and the cluster's picture has every GPU and flow."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.drawing import draw_cluster, short_names
from placement.outlook import KvFlow
from placement.plots import plot_front, write_plots
from tests.placement import plans


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_all_plots_are_written(tmp_path: Path) -> None:
    written = write_plots(tmp_path, plans.plan(), plans.outlook())
    names = {"attainment_over_rate.png", "gpus_over_goodput.png", "cluster.png", "latency.png"}
    assert {path.name for path in written} == names == {path.name for path in tmp_path.iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_cluster_shows_every_instance_on_its_gpus_and_what_flows() -> None:
    shown = texts(draw_cluster(plans.disaggregated(), plans.outlook().flows, "a plan"))
    assert [shown.count(name) for name in ("P0", "P1", "D0")] == [2, 2, 2]
    assert {"node 0", "node 1"} <= set(shown)
    assert "node 2" not in shown
    assert {"P0→D0 3.1 GB/s", "P1→D0 2.9 GB/s"} <= set(shown)


def test_many_flows_are_summed_by_nodes() -> None:
    cluster = plans.CLUSTER
    prefill = [plans.instance(f"prefill-{i}", Role.PREFILL, 1, [(0, i)]) for i in range(6)]
    decode = [plans.instance(f"decode-{i}", Role.DECODE, 1, [(1, i)]) for i in range(6)]
    placement = Placement(cluster, (*prefill, *decode))
    flows = [KvFlow(i, 6 + j, 1e9) for i in range(6) for j in range(6)]
    shown = texts(draw_cluster(placement, flows, "many"))
    assert "36 GB/s" in shown
    assert not any("→" in text for text in shown)
    assert short_names(placement)[5:7] == ["P5", "D0"]


@pytest.mark.parametrize("rate", [None, 12.0])
def test_the_front_has_no_placement_that_another_beats(rate: float | None) -> None:
    figure = plot_front(plans.plan(rate), plans.outlook())
    (front,) = [line for line in figure.axes[0].lines if line.get_label() == "fewest GPUs of those measured"]
    # 8 GPUs of mixed instances serve less than 6 of the chosen ones: they are in the picture, not on the front.
    assert list(front.get_ydata()) == [4, 4, 6, 8]
    assert list(front.get_xdata()) == [0, 6.1, 12.5, 14.9]


def test_every_placement_is_numbered_and_named() -> None:
    axis = plot_front(plans.plan(), plans.outlook()).axes[0]
    assert {text.get_text() for text in axis.texts} == {"1", "2"}
    assert "1  chosen: 2 prefill TP2 + 1 decode TP1 PP2\n2  runner-up: 4 mixed TP2" in axis.get_xlabel()


def test_without_curves_there_is_no_picture_of_them(tmp_path: Path) -> None:
    written = write_plots(tmp_path, plans.plan(), replace(plans.outlook(), curves=()))
    assert "attainment_over_rate.png" not in {path.name for path in written}
