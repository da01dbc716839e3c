"""Probes of a running deployment: short closed loops, what they show of the machine's speed, their requests kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.load import bench
from benchmarks.common.servers import Server
from benchmarks.fidelity_cpu import timelines
from benchmarks.fidelity_cpu.predict import cluster_model
from benchmarks.fidelity_cpu.speed import PROBE, PROBE_MEAN_PROMPT, Speed, speed_of
from distserve.core.config import Role
from simulator.latency.measured import ProfileLatencyModel


@dataclass(frozen=True)
class Probe:
    """One probe: the speed found, and the name of the file that has its requests."""

    speed: Speed
    file: str


class Prober:
    """Probes a running deployment; ``latest`` is the last probe, of which there is one from the start.

    ``server`` serves ``pools`` (instances by role), ``model`` are its times by the profile. Probes' requests go to
    ``directory``, in files named for ``stem``, in place of those of an earlier deployment; the client's tables to
    ``log``.
    """

    def __init__(
        self,
        server: Server,
        model: ProfileLatencyModel,
        pools: Mapping[Role, int],
        directory: Path,
        stem: str,
        log: Path,
    ) -> None:
        self.server = server
        self.model = model
        self.pools = pools
        self.directory = directory
        self._stem = stem
        self.log = log
        self._num_probes = 0
        for old in directory.glob(f"probe-{stem}-*.csv.gz"):
            old.unlink()
        self.latest = self.probe()

    def probe(self) -> Probe:
        """Take one, and keep its requests."""
        self._num_probes += 1
        options = {**PROBE, "seed": self._num_probes, "return_timeline": True}
        document = bench(self.server.url, options, log=self.log)
        lines = sorted(timelines.rows(document["runs"][0]["requests"]), key=lambda line: line["arrival"])
        file = f"probe-{self._stem}-{self._num_probes}.csv.gz"
        timelines.write(self.directory / file, lines)
        self.latest = Probe(probed_speed(self.model, self.pools, lines), file)
        return self.latest


def probed_speed(model: ProfileLatencyModel, pools: Mapping[Role, int], lines: timelines.Lines) -> Speed:
    """What a probe's requests say of the machine's speed."""
    return speed_of(lines, lambda speed: cluster_model(model, pools, PROBE_MEAN_PROMPT, speed=speed))
