"""What a process owes to whoever supervises it."""

import os
import subprocess
import sys

FAILING_THREAD = """
import threading, time
from distserve.cluster.process import die_of_uncaught_errors
die_of_uncaught_errors()
threading.Thread(target=lambda: 1 / 0, name="engine").start()
time.sleep(60)
"""


def test_a_process_whose_thread_fails_ends_and_says_why() -> None:
    ended = subprocess.run([sys.executable, "-c", FAILING_THREAD], capture_output=True, text=True, check=False)
    assert ended.returncode == os.EX_SOFTWARE
    assert "ZeroDivisionError" in ended.stderr
