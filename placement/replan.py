"""From what was observed to the command that plans for it: a trace, and a configuration that names it."""

import shlex
from pathlib import Path

import yaml

from distserve.cluster.yaml_file import read_yaml
from placement.watch import LoadWatch


def write_replan(file: Path, watch: LoadWatch, now: float, profile: Path | None = None) -> str:
    """Write the observed load beside the configuration ``file``, and a copy of that which plans for it.

    Returns the command that does, with the ``profile`` it was launched with. What an earlier observation wrote is
    replaced. Raises OSError where nothing may be written.
    """
    data, _ = read_yaml(file)
    trace, config = (file.with_name(f"{file.stem}.observed.{suffix}") for suffix in ("csv", "yaml"))
    watch.write_trace(trace, now)
    observed = watch.observed(now)
    rate = float(f"{observed.num_arrivals / observed.span:.3g}")
    # The trace's own times, with whatever bursts they have. Beside the original, relative paths mean what they did.
    data["workload"] = {"trace": trace.name, "arrivals": {"rate": rate}}
    data["placement"] = "auto"
    data.pop("prediction", None)
    config.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    options = f" --profile {shlex.quote(str(profile))}" if profile is not None else ""
    return f"distserve plan {shlex.quote(str(config))}{options}"
