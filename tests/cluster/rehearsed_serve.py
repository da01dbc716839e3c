"""``distserve serve`` on cards that are not there: ``python -m tests.cluster.rehearsed_serve``.

Ray, the instances and the transports are what a user starts; what opens a card is named in the settings, and here it is
in ``rehearsed_cards.py``. The directory in REHEARSAL gets a file ``made`` with a line per communicator and rank, and is
where faults are ordered: a file ``hang_in_send.PID`` has process PID hang in its next operation.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from distserve.cluster.config import load_config
from distserve.cluster.serve import serve
from distserve.demo import model_dir

REHEARSAL = "DISTSERVE_TEST_REHEARSAL"


@dataclass(frozen=True)
class Rehearsal:
    """What a test sees of it."""

    directory: Path

    def pairs(self) -> list[tuple[int, int]]:
        """The processes at both ends of each communicator so far: the one that prefills, the one that decodes."""
        made: dict[str, dict[int, int]] = defaultdict(dict)
        for line in (self.directory / "made").read_text().splitlines():
            unique_id, rank, pid = line.split()
            made[unique_id][int(rank)] = int(pid)
        return [(ends[0], ends[1]) for ends in made.values() if len(ends) == 2]

    def hang(self, pid: int) -> None:
        """Have a process hang in its next operation, until it is aborted."""
        (self.directory / f"hang_in_send.{pid}").touch()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ray-address")
    parser.add_argument("--card", default="open_card", help="a function of rehearsed_cards.py")
    options = parser.parse_args()
    flags = {"serving.port": options.port, "serving.ray_address": options.ray_address}
    config = load_config(options.config, flags, model_dir())
    engine = replace(config.engine, hardware=f"tests.cluster.rehearsed_cards:{options.card}")
    serve(replace(config, engine=engine), Console(stderr=True))


if __name__ == "__main__":
    main()
