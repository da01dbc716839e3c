"""``distserve serve`` on cards that are not there, and NCCL over sockets: ``python -m tests.cluster.rehearsed_cards``.

Ray, the instances and the transports are what a user starts; what opens a card is named in the settings, and here is
the function below. The directory in REHEARSAL gets a file ``made`` with a line per communicator and rank, and is where
faults are ordered: a file ``hang_in_send.PID`` has process PID hang in its next operation.
"""

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from distserve.cluster.config import load_config
from distserve.cluster.gpu import Hardware
from distserve.cluster.serve import serve
from distserve.demo import model_dir
from distserve.engine.device.backend import HostBackend
from tests.transfer.fake_device import FakeDevice
from tests.transfer.nccl.ranks import Faults, FaultyCollectives

HERE = "tests.cluster.rehearsed_cards"
REHEARSAL = "DISTSERVE_TEST_REHEARSAL"


def open_card(_: str) -> Hardware:
    """A card that no other process has access to."""
    directory = Path(os.environ[REHEARSAL])
    return Hardware(FakeDevice(f"fake-{os.getpid()}"), HostBackend(), lambda _: RehearsedNccl(directory))


class OrderedFaults(Faults):
    """Those that a file orders for this process, once each."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def takes(self, fault: str) -> bool:
        try:
            (self._directory / f"{fault}.{os.getpid()}").unlink()
        except FileNotFoundError:
            return False
        return True


class RehearsedNccl(FaultyCollectives):
    """Writes down who makes which communicator."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.faults = OrderedFaults(directory)
        self._made = directory / "made"

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> Any:
        made = super().communicator(unique_id, rank, num_ranks)
        with self._made.open("a") as file:
            file.write(f"{unique_id.hex()} {rank} {os.getpid()}\n")
        return made


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

    def hangs(self, pid: int) -> bool:
        """Whether it does, or did."""
        return not (self.directory / f"hang_in_send.{pid}").exists()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ray-address")
    options = parser.parse_args()
    flags = {"serving.port": options.port, "serving.ray_address": options.ray_address}
    config = load_config(options.config, flags, model_dir())
    serve(replace(config, engine=replace(config.engine, hardware=f"{HERE}:open_card")), Console(stderr=True))


if __name__ == "__main__":
    main()
