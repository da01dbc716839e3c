"""Runs ``distserve bench``, the one client of every comparison, and reads its JSON document."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Document = dict[str, Any]


class LoadError(Exception):
    """The benchmark command failed, or requests did where none may."""


def bench(
    url: str, options: Mapping[str, object], *, log: Path, output_dir: Path | None = None, may_miss: bool = False
) -> Document:
    """Run ``distserve bench url`` with ``options`` (by their names, underscores for dashes; True for a flag).

    ``output_dir`` receives its plots. Its tables are appended to ``log``. Returns the document.

    Raises:
        LoadError: it failed; or a request did, unless ``may_miss``.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", "distserve.bench", url, "--output", str(result), *arguments(options)]
        if output_dir is not None:
            command += ["--output-dir", str(output_dir)]
        with log.open("a") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if not result.exists():
            raise LoadError(f"distserve bench {url} failed with status {status}: see {log}")
        document: Document = json.loads(result.read_text())
    if document["error"] or document["interrupted"]:
        raise LoadError(f"{url}: {document['error'] or 'interrupted'}: see {log}")
    if not may_miss:
        for run in document["runs"]:
            summary = run["summary"]
            if summary["num_ok"] != summary["num_offered"] or not summary["num_ok"]:
                raise LoadError(f"{url}: {summary['num_ok']} of {summary['num_offered']} requests succeeded: see {log}")
    return document


def arguments(options: Mapping[str, object]) -> list[str]:
    """``options`` as a command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def summary(document: Document) -> dict[str, Any]:
    """The figures of a document's only run."""
    (run,) = document["runs"]
    result: dict[str, Any] = run["summary"]
    return result
