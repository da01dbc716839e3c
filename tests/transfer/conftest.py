"""Ranks in processes of their own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_PEER = Path(__file__).with_name("peer.py")


class Peer:
    """A ``peer.py`` process."""

    def __init__(self, **options):
        self.process = subprocess.Popen(
            [sys.executable, str(_PEER), json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self.read()["address"]

    def read(self):
        return json.loads(self.process.stdout.readline())

    def call(self, name, *arguments):
        """Call a method of the peer's transport and return its answer."""
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def release(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start():
    peers = []

    def starter(**options):
        peers.append(Peer(**options))
        return peers[-1]

    yield starter
    for peer in peers:
        peer.release()
