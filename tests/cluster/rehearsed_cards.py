"""Cards that are not there, and NCCL over sockets: what an instance finds that ``rehearsed_serve.py`` has started."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from distserve.cluster.gpu import Hardware
from distserve.engine.device.backend import HostBackend
from tests.cluster.rehearsed_serve import REHEARSAL
from tests.transfer.fake_device import FakeDevice
from tests.transfer.nccl.ranks import Faults, FaultyCollectives


def open_card(device: str) -> Hardware:
    """A card that no other process has access to, and NCCL."""
    directory = Path(os.environ[REHEARSAL])
    return replace(open_card_alone(device), open_nccl=lambda _: RehearsedNccl(directory))


def open_card_alone(device: str) -> Hardware:
    """Such a card, of those that Ray lets the process see, and whatever of NCCL there really is."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert seen is None or int(device.removeprefix("cuda:")) < len(seen.split(","))
    return Hardware(FakeDevice(f"fake-{os.getpid()}"), HostBackend())


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
