"""Files are there whole or not at all, and what is no file is left what it is."""

import os
import threading
from pathlib import Path

import pytest

from distserve.bench.files import write_atomically


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "result.json", tmp_path / "latest"
    path.write_text("old")
    link.symlink_to(path)
    write_atomically(link, lambda file: file.write_text("new"))
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, lambda file: file.write_text("through"))
    reader.join(10)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_a_pipe_that_has_no_name_is_written_too() -> None:
    """As behind /dev/stdout in a shell's pipeline."""
    read, write = os.pipe()
    with os.fdopen(read) as reader:
        with os.fdopen(write, "w"):
            write_atomically(Path(f"/dev/fd/{write}"), lambda file: file.write_text("through"))
        assert reader.read() == "through"
