"""Loads as a cluster of known costs would have served them: what is worked out of them is what it was made of."""

from array import array
from dataclasses import replace

import pytest

from distserve.bench.records import RequestRecord, Status
from distserve.cluster.cost_fit import PROMPTS_ALONE, Cpu, Load, Sample, Samples, work_out
from distserve.cluster.costs import _cpu, _instances, _Spent
from distserve.core.profile import MeasuredStepTime, StepFit, Surface, Table

DECODE, PROMPT = 0.010, 0.100
"""Seconds that any decode step and any prompt take the engine."""
FIT = StepFit(Surface((1, 16), (16, 2048), ((DECODE,) * 2,) * 2), Table((1, 2048), (PROMPT,) * 2), 0, 0, 0, 0, 0)
STEP, MESSAGE, TOKEN, REQUEST, WAKING = 0.001, 0.0005, 0.0002, 0.0007, 0.004
PER_REQUEST, PER_PROMPT_TOKEN, PER_STEP, PER_TOKEN = 0.003, 1e-5, 4e-4, 5e-5
PER_PULL, PER_PULLED_TOKEN = 0.002, 2e-6
IDLE = 0.02
OFFSET = 1000.0
PREFILL_ID, DECODE_ID = 10, 11


def serve(load: Load, gap: float = DECODE + STEP, late: float = 0.0) -> Sample:
    """Clients in lockstep: all prompts at once, then a token of each every ``gap`` seconds."""
    records = []
    num_steps = 0
    for index in range(load.num_requests):
        arrival = OFFSET + index // load.num_clients * 10.0
        start = arrival + 2 * MESSAGE
        first = start + PROMPT + STEP + late
        tokens = [first + i * gap for i in range(load.output_len)]
        num_steps += load.output_len if index % load.num_clients == 0 else 0
        record = RequestRecord(index, arrival - REQUEST - OFFSET, load.prompt_len, load.output_len, status=Status.OK)
        record.event_times = array("d", [at + TOKEN - OFFSET for at in tokens])
        record.timeline = {"arrival": arrival, "prefill_start": start, "first_token": first, "tokens": tokens}
        records.append(record)
    num, seconds = load.num_requests, 5.0
    light = (
        num * (PER_REQUEST + load.prompt_len * PER_PROMPT_TOKEN + load.output_len * PER_TOKEN) + num_steps * PER_STEP
    )
    beside = num * (PER_PULL + load.prompt_len * PER_PULLED_TOKEN)
    spent = {PREFILL_ID: (0.2, 0.0), DECODE_ID: (4.0, beside)}
    return Sample(load, records, Cpu(light + IDLE * seconds, spent), seconds, IDLE, OFFSET)


USUAL = [
    serve(Load(1, 4, 16, PROMPTS_ALONE)),
    serve(Load(1, 4, 1024, PROMPTS_ALONE)),
    *(serve(Load(batch, max(3, batch) if batch == 1 else batch, 256, 128)) for batch in (1, 2, 4, 12)),
    *(serve(Load(4, 4 * rounds, prompt, 32)) for rounds, prompt in ((3, 256), (8, 16), (4, 512))),
]
RESTED = [serve(Load(1, 1, 256, 32), late=WAKING)] * 3


def costs():
    return work_out(Samples(USUAL, RESTED), MeasuredStepTime(FIT), pull=0.0, pull_per_byte=0.0)


def test_delays_are_found():
    found = costs()
    assert (found.step, found.step_per_sequence) == (pytest.approx(STEP), pytest.approx(0, abs=1e-6))
    assert found.message == pytest.approx(MESSAGE)
    assert found.request == pytest.approx(REQUEST)
    assert found.token == pytest.approx(TOKEN)
    assert found.waking == pytest.approx(WAKING)


def test_light_work_is_shared_out():
    found = costs()
    assert found.idle_cores == IDLE
    assert found.cpu_per_request == pytest.approx(PER_REQUEST, rel=1e-3)
    assert found.cpu_per_prompt_token == pytest.approx(PER_PROMPT_TOKEN, rel=1e-3)
    assert found.cpu_per_step == pytest.approx(PER_STEP, rel=1e-3)
    assert found.cpu_per_token == pytest.approx(PER_TOKEN, rel=1e-3)
    assert found.cpu_per_pull == pytest.approx(PER_PULL, rel=1e-3)
    assert found.cpu_per_pulled_token == pytest.approx(PER_PULLED_TOKEN, rel=1e-3)


def test_what_one_mixed_instance_does_for_a_request_is_the_requests():
    def alone(sample: Sample) -> Sample:
        return replace(sample, cpu=Cpu(sample.cpu.light, {DECODE_ID: sample.cpu.instances[DECODE_ID]}))

    samples = Samples([alone(sample) for sample in USUAL], RESTED)
    found = work_out(samples, MeasuredStepTime(FIT), pull=0.0, pull_per_byte=0.0)
    assert (found.cpu_per_pull, found.cpu_per_pulled_token) == (0, 0)
    assert found.cpu_per_request == pytest.approx(PER_REQUEST + PER_PULL, rel=1e-3)
    assert found.cpu_per_prompt_token == pytest.approx(PER_PROMPT_TOKEN + PER_PULLED_TOKEN, rel=1e-3)
    assert found.cpu_per_step == pytest.approx(PER_STEP, rel=1e-3)


@pytest.mark.parametrize(
    ("num_threads", "num_cores", "roles"),
    [(1, 2, {"prefill", "decode"}), (2, 4, {"prefill", "decode"}), (2, 2, {"mixed"}), (1, 1, {"mixed"})],
)
def test_instances_that_are_profiled_have_cores_of_their_own(num_threads: int, num_cores: int, roles: set[str]) -> None:
    assert _instances(num_threads, num_cores).keys() == roles


@pytest.mark.parametrize(("num_threads", "engine"), [(1, 2.0), (2, 3.5)])
def test_all_threads_that_compute_are_the_engine(num_threads: int, engine: float) -> None:
    """What they spend is no light work, which would be laid on requests."""
    before = {DECODE_ID: _Spent(10.0, {1: 4.0, 2: 4.0, 3: 2.0})}
    after = {DECODE_ID: _Spent(13.75, {1: 6.0, 2: 5.5, 3: 2.1, 4: 0.15}), PREFILL_ID: _Spent(0.5, None)}
    cpu = _cpu(before, after, num_threads)
    assert cpu.light == 0.5
    assert cpu.instances == {DECODE_ID: pytest.approx((engine, 3.75 - engine))}
