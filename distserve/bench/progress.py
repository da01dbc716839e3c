"""Progress on standard error while a run lasts: what is sent, done, in flight and wrong.

Drawn from the runner's own monitor a few times a second, not by a thread: a redraw must not delay a timestamp more
often than needed.
"""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from distserve.bench.records import Status
from distserve.bench.runner import Run


class Progress:
    """A bar per run on ``console``; nothing at all when it is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def run(self, label: str, seconds: float | None) -> Iterator[Callable[[Run], None]]:
        """Show one run; the function given redraws it. ``seconds``: the bar follows time, not requests."""
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(label, total=seconds, state="")

            def show(run: Run) -> None:
                if bar.disable:
                    return
                done = run.num_done
                bad = sum(r.status not in (Status.OK, Status.PENDING) for r in run.records)
                state = f"{len(run.records) - done} in flight" + (f", [red]{bad} failed[/red]" if bad else "")
                if seconds is None:
                    bar.update(task, total=run.num_planned, completed=done, state=state)
                else:
                    bar.update(task, completed=min(int(run.now), int(seconds)), state=f"{done} done, {state}")
                bar.refresh()

            yield show
