"""What a reader sees of a plan: every promised figure, in words that say who won, by how much, and what limits it."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.document import SCHEMA, to_document
from placement.outlook import Change, Outlook
from placement.plan import Evaluation, Interval, Plan
from placement.report import print_report
from tests.placement import plans


def shown(plan: Plan, outlook: Outlook | None = None) -> str:
    """The report as one line, without the breaks that a console's width makes."""
    console = Console(file=io.StringIO(), width=140)
    print_report(console, plan, outlook)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def with_goodput(found: Evaluation, goodput: float) -> Evaluation:
    return replace(found, goodput=Interval(goodput, 0.99 * goodput, 1.01 * goodput))


def test_every_figure_is_there() -> None:
    text = shown(plans.plan(), plans.outlook())
    for part in (
        "2 prefill TP2 + 1 decode TP1 PP2",
        "6 of 32 x a100-80g-sxm, on 2 of 4 nodes",
        "step times from: analytic roofline of toy-13b",
        "prefill-1 tp 2 x pp 1 0: 2,3 71% 8.4 52.4 GB 62% - - 3",
        "TTFT, ms 110 90 200 410 250 94.0%",
        "TPOT, ms 50 48 60 90 100 98.5%",
        "attainment 93.1% (95% interval 91.9% to 94.3%) over 3,000 requests in 5 runs; holds",
        "goodput 12.5 requests/s (12.25 to 12.75), 2.08 requests/s per GPU",
        "TTFT (72% within): prompts queue at prefill instances, 93% busy",
        "13.8 210 ms 80 ms 20 ms 1 ms 9.6 s 31% 5.0%",
        "node 0 NIC 0 out 3.12 GB/s 1.9 GB/s 61% 70%",
        "The runner-up lost by 2 GPUs: 4 mixed TP2 needs 8 where 6 are enough.",
        "At the rate asked for colocated (splitfuse) takes 8 GPUs where disaggregated takes 6.",
        "rate +20% 6 14.4/s 71.0%, overloaded",
        "one prefill more 8 12/s 98.5% 200 60 14.9/s",
        "Goodput with one prefill more (+2 GPUs): +19%; one prefill lost (-2 GPUs): -51%.",
        "A single GPU more or less is no instance of these shapes, which take 2.",
        "It is not N+1 safe: it has a single instance of a role",
        "note: the trace's requests are used from the start again",
        "412 placements considered, 300 ruled out by bounds, 112 simulated over 240,000 requests in 21.3 s",
    ):
        assert part in text


def test_a_promise_whose_interval_reaches_below_the_target_is_not_called_held() -> None:
    plan = plans.plan()
    point = replace(plan.chosen.point, attainment=Interval(0.905, 0.89, 0.92))
    assert "not certain" in shown(replace(plan, chosen=replace(plan.chosen, point=point)))
    overloaded = replace(
        plan.chosen.point, instability="the backlog grows: 3 requests in the first third, 40 in the last"
    )
    assert "overloaded: the backlog grows: 3 requests" in shown(
        replace(plan, chosen=replace(plan.chosen, point=overloaded))
    )


def test_n_plus_one_is_told_by_the_worst_loss() -> None:
    held = replace(plans.outlook(), variants=tuple(v for v in plans.outlook().variants if v.change is not Change.LOSS))
    loss = plans.outlook().of(Change.LOSS)[0]
    assert "N+1" not in shown(plans.plan(), held)
    only = replace(held, variants=(loss,))
    assert "one prefill lost leaves a goodput of 6.1 of 12.5 requests/s" in shown(plans.plan(), only)
    fine = replace(loss, point=plans.point(12, 0.95, 0.96, 0.99))
    assert "It is N+1 safe" in shown(plans.plan(), replace(held, variants=(fine,)))


@pytest.mark.parametrize(
    ("goodput", "num_gpus_words", "rate"),
    [
        (8.0, "lost by 108.3% of goodput per GPU.", None),
        (16.4, "lost by 1.6% of goodput per GPU (their intervals overlap).", None),
        (16.6, "has the same goodput per GPU within 1%; ties go to fewer GPUs", None),
        (18.0, "has 8.0% more goodput per GPU; it lost because it takes 8 GPUs", None),
        (0.0, "reaches the objective at no rate that was tried", None),
        (18.0, "lost by 2 GPUs", 12.0),
    ],
)
def test_the_runner_up_and_by_how_much_it_lost(goodput: float, num_gpus_words: str, rate: float | None) -> None:
    plan = plans.plan(rate)
    assert plan.runner_up is not None
    assert num_gpus_words in shown(replace(plan, runner_up=with_goodput(plan.runner_up, goodput)))


def test_without_rivals_it_says_so() -> None:
    text = shown(replace(plans.plan(), runner_up=None, colocated=None))
    assert "No other placement came into question." in text
    assert "No colocated placement reaches the objective" in text


def test_colocated_can_win() -> None:
    plan = plans.plan(None)
    assert plan.colocated is not None
    winner = with_goodput(plan.colocated, 30.0)
    text = shown(replace(plan, chosen=winner, runner_up=plan.chosen, colocated=winner))
    assert "Colocated serves 1.80 times the requests per GPU of disaggregated" in text


def test_hybrids_are_rivals_or_it_says_that_none_was_found() -> None:
    prefill = plans.instance("prefill-0", Role.PREFILL, 2, [(0, 0), (0, 1)])
    mixed = plans.instance("mixed-0", Role.MIXED, 2, [(0, 2), (0, 3)])
    placement = Placement(plans.CLUSTER, (prefill, mixed))
    hybrid = plans.evaluation("1 prefill TP2 + 1 mixed TP2", placement, 10.0, 10.0)
    text = shown(replace(plans.plan(None), hybrid=hybrid))
    assert "best hybrid 1 prefill TP2 + 1 mixed TP2 4 10/s 2.5/s" in text
    assert "serves 1.20 times the requests per GPU of 2 prefill TP2 + 1 decode TP1 PP2." in text
    assert "was found that serves more per GPU" in shown(plans.plan(None))
    assert "was found that holds the rate on fewer GPUs" in shown(plans.plan(12.0))
    document = to_document(replace(plans.plan(None), hybrid=hybrid), None)
    assert [instance["role"] for instance in document["hybrid"]["placement"]] == ["prefill", "mixed"]


def test_the_document_is_json_and_has_every_instance_and_rate() -> None:
    document = json.loads(json.dumps(to_document(plans.plan(), plans.outlook()), allow_nan=False))
    assert document["schema"] == SCHEMA
    assert document["holds"] is True
    chosen = document["chosen"]
    assert chosen["placement"][2] == {
        "instance_id": "decode-0", "role": "decode", "tp": 1, "pp": 2, "gpus": [[1, 0], [1, 1]],
    }  # fmt: skip
    assert [point["rate"] for point in chosen["curve"]] == sorted(point["rate"] for point in chosen["curve"])
    assert chosen["goodput_per_gpu"] == pytest.approx(12.5 / 6, rel=1e-5)
    assert document["outlook"]["variants"][4]["point"] is None
    assert to_document(plans.plan(), None)["outlook"] is None


def test_markup_in_names_is_shown_as_it_is() -> None:
    plan = plans.plan()
    model = replace(plan.problem.model, name="[red]model")
    assert "[red]model" in shown(replace(plan, problem=replace(plan.problem, model=model)))
