"""The operations of one step as a table, for ``distserve plan --explain-latency``."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from distserve.core.config import ParallelConfig
from distserve.core.latency import StepShape
from simulator.latency.analytic import AnalyticModel
from simulator.latency.operations import Operation

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def explain(model: AnalyticModel, parallel: ParallelConfig, steps: Sequence[StepShape], console: Console) -> None:
    """Print where the time of each step goes on one rank of the fullest pipeline stage.

    Raises ConfigError if the model cannot be split as ``parallel`` says.
    """
    for step in steps:
        console.print(step_table(model, parallel, step))
    console.print(f"Source: {model.source}.")
    console.print(
        "bound: what the data sheet says limits the operation; 'latency' is launches, waves that are not full, and "
        "shapes too small to saturate the GPU. peak: the share it reaches of the data sheet's rate of what limits it."
    )


def step_table(model: AnalyticModel, parallel: ParallelConfig, step: StepShape) -> Table:
    """The operations of one step, with their shares of its time."""
    operations = model.operations(parallel, step)
    total = sum(operation.total_seconds for operation in operations)
    stage = f", stage of {model.shape.layers_per_stage(parallel)} layers" if parallel.pp > 1 else ""
    table = Table(
        title=f"{describe(step)} on {model.gpu.name} tp {parallel.tp} pp {parallel.pp}{stage}: {total * 1e3:.2f} ms",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("operation")
    for column in ("launches", "ms each", "ms in all", "share", "flop each", "bytes each", "peak"):
        table.add_column(column, justify="right")
    table.add_column("bound")
    for operation in operations:
        table.add_row(
            operation.name,
            str(operation.count),
            f"{operation.seconds * 1e3:.4f}",
            f"{operation.total_seconds * 1e3:.3f}",
            f"{operation.total_seconds / total:.1%}",
            _quantity(operation.flops),
            _quantity(operation.bytes),
            _peak(operation, model),
            operation.bound,
        )
    return table


def describe(step: StepShape) -> str:
    """A step in words: its prompts' tokens and its decodes."""
    parts = []
    if step.num_prefill_tokens:
        parts.append(f"{step.num_prefill_tokens} tokens of {_counted(step.num_prefills, 'prompt')}")
    if step.num_decodes:
        mean = step.decode_context / step.num_decodes
        parts.append(f"{_counted(step.num_decodes, 'decode')} over {mean:.0f} tokens each")
    return " and ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _quantity(value: float) -> str:
    if not value:
        return ""
    size, unit = next(((size, unit) for size, unit in _UNITS if value >= size), (1.0, ""))
    return f"{value / size:.1f} {unit}".rstrip()


def _peak(operation: Operation, model: AnalyticModel) -> str:
    if operation.bound == "host" or not operation.seconds:
        return ""
    if operation.bound == "link":
        return f"{operation.bytes / model.cluster.intra_node_bandwidth / operation.seconds:.0%}"
    compute, memory = operation.flops / model.gpu.flops, operation.bytes / model.gpu.memory_bandwidth
    return f"{max(compute, memory) / operation.seconds:.0%}"
