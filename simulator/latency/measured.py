"""Latencies from a profile that ``distserve profile`` measured on the hardware at hand."""

from pathlib import Path

from distserve.cluster.profile_file import read_profile
from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepTime
from distserve.core.profile import ClusterCosts, Profile
from distserve.core.scheduler import ROUTER
from simulator.client import CLIENT
from simulator.model import Delays, HostModel


class ProfileLatencyModel:
    """Implements :class:`simulator.latency.interface.LatencyModel` for the one shape that was measured: TP 1, PP 1."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._step_time = profile.step_time()

    @classmethod
    def read(cls, path: Path) -> "ProfileLatencyModel":
        """From a file; raises ConfigError if it is no profile."""
        return cls(read_profile(path))

    @property
    def source(self) -> str:
        """Where the figures come from."""
        profile = self.profile
        machine = profile.machine.get("cpu", "unknown hardware")
        threads = f"{profile.num_threads} thread{'s' if profile.num_threads > 1 else ''}"
        return f"profile of {profile.model} in {profile.dtype}, {threads} of {machine}, measured {profile.created[:10]}"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:  # noqa: ARG002
        """See :class:`simulator.latency.interface.LatencyModel`."""
        if parallel != ParallelConfig():
            raise ConfigError(
                f"the profile of {self.profile.model} knows instances of TP 1 and PP 1, not TP {parallel.tp} and "
                f"PP {parallel.pp}: plan with an analytic latency model for other shapes"
            )
        return self._step_time

    def delays(self, instance_ids: tuple[str, ...], mean_prompt: float = 0.0) -> Delays:
        """The simulator's delays as measured, for instances of these names; raises ConfigError if they were not.

        ``mean_prompt`` tokens are what the time to take a request in is worked out for.
        """
        costs = self.costs
        out = {(instance_id, CLIENT): costs.message + costs.token for instance_id in instance_ids}
        taken_in = costs.message + costs.request + costs.request_per_token * mean_prompt
        return Delays(
            message=costs.message,
            pairs={(CLIENT, ROUTER): taken_in, **out},
            pull_latency=costs.pull,
            seconds_per_block=costs.pull_per_byte * self.profile.token_bytes * self.profile.block_size,
        )

    @property
    def costs(self) -> ClusterCosts:
        """What a cluster adds; raises ConfigError if the profile is of the engine alone."""
        if self.profile.cluster is None:
            raise ConfigError(
                f"the profile of {self.profile.model} is of the engine alone: take one without --engine-only"
            )
        return self.profile.cluster

    def host(self) -> HostModel:
        """The machine's cores and what surrounds the instances on them; raises ConfigError as :meth:`delays` does."""
        costs = self.costs
        num_threads = self.profile.num_threads
        return HostModel(
            num_cores=float(self.profile.machine["cores"]) / num_threads,
            cpu_per_request=costs.cpu_per_request / num_threads,
            cpu_per_prompt_token=costs.cpu_per_prompt_token / num_threads,
            cpu_per_step=costs.cpu_per_step / num_threads,
            cpu_per_token=costs.cpu_per_token / num_threads,
            cpu_per_pull=costs.cpu_per_pull / num_threads,
            cpu_per_pulled_block=costs.cpu_per_pulled_token * self.profile.block_size / num_threads,
            crowding=costs.crowding / num_threads,
            waking=costs.waking,
        )
