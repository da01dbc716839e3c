"""Latencies from a profile that ``distserve profile`` measured on the hardware at hand."""

from pathlib import Path

from distserve.cluster.profile_file import read_profile
from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.profile import ClusterCosts, MeasuredStepTime, Profile, shape_name
from distserve.core.scheduler import ROUTER
from simulator.client import CLIENT
from simulator.model import Delays, HostModel

SEVERAL_RANKS = (
    "instances of several ranks are predicted roughly: their steps as measured, but what scheduling, messages and KV "
    "pulls add as with one rank"
)
"""What is to be said of a prediction with such instances, from a profile of a whole cluster."""


class ProfileLatencyModel:
    """Implements :class:`simulator.latency.interface.LatencyModel` for the shapes that were measured."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._step_times: dict[ParallelConfig, MeasuredStepTime] = {}

    @classmethod
    def read(cls, path: Path) -> "ProfileLatencyModel":
        """From a file; raises ConfigError if it is no profile."""
        return cls(read_profile(path))

    @property
    def source(self) -> str:
        """Where the figures come from."""
        profile = self.profile
        machine = profile.machine.get("gpu") or self._threads
        shapes = [shape_name(shape.parallel) for shape in profile.shapes]
        several = "" if shapes == ["1x1"] else f", tp x pp {', '.join(shapes)}"
        return f"profile of {profile.model} in {profile.dtype}{several}, {machine}, measured {profile.created[:10]}"

    @property
    def _threads(self) -> str:
        profile = self.profile
        threads = f"{profile.num_threads} thread{'s' if profile.num_threads > 1 else ''}"
        return f"{threads} of {profile.machine.get('cpu', 'unknown hardware')}"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> MeasuredStepTime:
        """See :class:`simulator.latency.interface.LatencyModel`."""
        if parallel.pp > 1 and not stages_share_node:
            raise ConfigError(
                f"the profile of {self.profile.model} is of pipelines within one machine: what it takes to hand "
                "activations over between nodes was not measured"
            )
        found = self._step_times.get(parallel)
        if found is None:
            found = self._step_times[parallel] = self.profile.step_time(parallel)
        return found

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
            idle_cores=costs.idle_cores / num_threads,
            waking=costs.waking,
        )
