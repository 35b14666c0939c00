"""The EchoEngine in a child process of its node, as engines that compute are run."""

from __future__ import annotations

from swarmpy.testing.engine import EchoEngine


class ChildEngine(EchoEngine):
    """Answers as the EchoEngine does, from another process."""

    name = "child"
    in_process = False
