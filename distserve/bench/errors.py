"""What a user of the benchmark can do wrong.

::

    BenchError
    ├── WorkloadError   a trace, a length or an arrival process makes no sense; names the file and the line if any
    └── TargetError     the server cannot be reached or refuses the benchmark's requests; says what to change
"""


class BenchError(Exception):
    """Root of the errors the benchmark raises on purpose; the message is meant for the user."""


class WorkloadError(BenchError):
    """The load asked for cannot be made."""


class TargetError(BenchError):
    """The server under test cannot be measured."""
