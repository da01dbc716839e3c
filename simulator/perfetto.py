"""A run as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

A process per instance with a track per pipeline stage, whose slices are the steps with their batch; a process
"network" with a track per KV pull and a counter per link, the bytes/s that it carries. Format: "Trace Event Format" of
Google (JSON array form). Times are in microseconds there.

Everything goes to the file as it happens.
"""

import json
from collections.abc import Sequence
from typing import Any, TextIO

from distserve.core.latency import StepShape
from simulator.model import ClusterModel
from simulator.routes import Links

_NETWORK = 1
_FIRST_INSTANCE = 2


class PerfettoRecorder:
    """Implements :class:`simulator.recorder.Recorder`: writes to ``file`` until :meth:`close` completes the trace."""

    def __init__(self, file: TextIO, model: ClusterModel) -> None:
        self._file = file
        self._instances = {instance.spec.instance_id: instance for instance in model.instances}
        self._processes = {name: _FIRST_INSTANCE + number for number, name in enumerate(self._instances)}
        self._names = Links(model.cluster).names if model.cluster is not None else ()
        self._levels: dict[int, float] = {}  # what each link's counter stands at, GB/s
        self._links_until = 0.0
        self._num_pulls = 0
        file.write("[\n")
        self._write(_named("process_name", _NETWORK, 0, "network"), first=True)
        for name, process in self._processes.items():
            spec = self._instances[name].spec
            shape = f"TP{spec.parallel.tp} PP{spec.parallel.pp}"
            self._write(_named("process_name", process, 0, f"{name} ({shape})"))
            for stage in range(spec.parallel.pp):
                self._write(_named("thread_name", process, stage + 1, f"stage {stage}"))

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:
        """See :class:`simulator.recorder.Recorder`."""
        self._write(
            {
                "name": _step_name(shape),
                "ph": "X",
                "pid": self._processes[instance_id],
                "tid": stage + 1,
                "ts": _microseconds(start),
                "dur": _microseconds(end - start),
                "args": {
                    "prompts": shape.num_prefills,
                    "prompt tokens": shape.num_prefill_tokens,
                    "decodes": shape.num_decodes,
                    "decode context": shape.decode_context,
                },
            }
        )

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        """See :class:`simulator.recorder.Recorder`."""
        self._num_pulls += 1
        # Pulls overlap, so they are asynchronous slices: a track each, as many as there are at a time.
        event = {
            "cat": "KV pull",
            "id": self._num_pulls,
            "pid": _NETWORK,
            "tid": 0,
            "name": f"{source_id} > {puller_id}",
        }
        args = {"request": request_id, "bytes": num_bytes}
        self._write(event | {"ph": "b", "ts": _microseconds(start), "args": args})
        self._write(event | {"ph": "e", "ts": _microseconds(end)})

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        """See :class:`simulator.recorder.Recorder`."""
        for link, moved in enumerate(num_bytes):
            self._count(link, start, round(moved / (end - start) / 1e9, 6))
        self._links_until = end

    def _count(self, link: int, time: float, level: float) -> None:
        """From ``time`` on a link carries ``level`` GB/s; links that never carry anything have no counter."""
        if level == self._levels.get(link, 0.0):
            return
        self._levels[link] = level
        counter = {"name": self._names[link], "ph": "C", "pid": _NETWORK, "ts": _microseconds(time)}
        self._write(counter | {"args": {"GB/s": level}})

    def close(self) -> None:
        """Bring the links' counters down, and write the end."""
        for link in list(self._levels):
            self._count(link, self._links_until, 0.0)
        self._file.write("\n]\n")

    def _write(self, event: dict[str, Any], *, first: bool = False) -> None:
        if not first:
            self._file.write(",\n")
        self._file.write(json.dumps(event, separators=(",", ":")))


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _step_name(shape: StepShape) -> str:
    parts = []
    if shape.num_prefill_tokens:
        parts.append(f"prefill {shape.num_prefill_tokens} tokens")
    if shape.num_decodes:
        parts.append(f"decode {shape.num_decodes}")
    return " + ".join(parts) or "empty"
