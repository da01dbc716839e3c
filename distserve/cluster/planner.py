"""The hook through which a planner answers ``placement: auto``.

The planner is another package, which this one does not know: it joins through the entry point group
``distserve.planners``.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from distserve.core.errors import ConfigError
from distserve.core.topology import Placement

GROUP = "distserve.planners"

Planner = Callable[[Path, Path], Placement]
"""``planner(configuration file, model directory)`` finds a placement; raises DistserveError if there is none."""


def find_planner() -> Planner | None:
    """The installed planner, if there is one.

    Raises:
        ConfigError: there are several.
    """
    found = list(entry_points(group=GROUP))
    if len(found) > 1:
        raise ConfigError(f"placement: auto has several planners to ask: {', '.join(e.value for e in found)}")
    if not found:
        return None
    planner: Planner = found[0].load()
    return planner
