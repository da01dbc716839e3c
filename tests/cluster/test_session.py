"""A session's processes and files are gone after it, however its launcher ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from distserve.cluster import reaper
from distserve.cluster.session import Session

LAUNCHER = """
import subprocess, sys, time
from distserve.cluster.session import Session
session = Session()
# A child that leaves the process group, ignores polite signals and would outlive everyone.
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
print(session.directory, child.pid, flush=True)
if sys.argv[1] == "close":
    session.close()
elif sys.argv[1] == "raise":
    raise RuntimeError("boom")
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(directory: Path, pid: int) -> bool:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if not is_alive(pid) and not directory.exists():
            return True
        time.sleep(0.05)
    return False


def start(how: str) -> tuple["subprocess.Popen[str]", Path, int]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert launcher.stdout is not None
    directory, pid = launcher.stdout.readline().split()
    launcher.stdout.close()
    return launcher, Path(directory), int(pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_survives_a_launcher_that_is_killed(number: signal.Signals) -> None:
    launcher, directory, pid = start("sleep")
    assert is_alive(pid)
    assert directory.stat().st_mode & 0o077 == 0
    launcher.send_signal(number)
    launcher.wait()
    assert wait_until_gone(directory, pid)


def test_nothing_survives_an_exception() -> None:
    launcher, directory, pid = start("raise")
    assert launcher.wait() == 1
    assert wait_until_gone(directory, pid)


def test_everything_is_gone_when_close_returns() -> None:
    directory_before = set(Path("/tmp").glob("distserve-*"))
    session = Session()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert os.environ[reaper.MARK] == str(session.directory)
    session.close()
    assert not session.directory.exists()
    assert child.wait(5) == -signal.SIGKILL
    assert reaper.MARK not in os.environ
    assert set(Path("/tmp").glob("distserve-*")) <= directory_before


def test_who_has_lost_its_mark_to_its_title_is_known_by_its_files(tmp_path: Path) -> None:
    """Ray's agents call themselves so; who merely reads a log of theirs is left alone."""
    (tmp_path / "log").touch()
    read = f"import sys; log = open('{tmp_path}/log'); print(1, flush=True); sys.stdin.read()"
    rename = "from ray._raylet import setproctitle; setproctitle('ray::Agent' + ' ' * 5000); "
    with ExitStack() as stack:
        processes = []
        for script in (rename + read, read):
            process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            processes.append(process)
        assert reaper.marked_processes(str(tmp_path)) == [processes[0].pid]
        assert reaper.marked_processes(str(tmp_path)[:-1]) == []


def test_sessions_do_not_touch_each_other() -> None:
    launcher, directory, pid = start("sleep")
    with Session():
        pass
    assert is_alive(pid)
    assert directory.exists()
    launcher.kill()
    launcher.wait()
    assert wait_until_gone(directory, pid)


def test_a_directory_left_by_a_crash_of_everything_is_swept() -> None:
    launcher, directory, pid = start("sleep")
    (reaping,) = [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_reaper_of(entry, directory)
    ]
    os.kill(reaping, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    launcher.kill()
    launcher.wait()
    while is_alive(reaping) or is_alive(pid):
        time.sleep(0.01)
    assert directory.exists()
    with Session():
        assert not directory.exists()


def is_reaper_of(entry: Path, directory: Path) -> bool:
    try:
        arguments = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return reaper.__file__.encode() in arguments and str(directory).encode() in arguments
