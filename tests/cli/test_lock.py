"""One node per data folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swarmpy.errors import ConfigError
from swarmpy_cli.lock import LOCK_NAME, NodeRunning, folder_lock

HOLDER = """
import sys
from pathlib import Path
from swarmpy_cli.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_held_folder_is_refused_with_the_pid_of_its_holder(tmp_path: Path) -> None:
    refused = pytest.raises(NodeRunning, match=rf"pid {os.getpid()}\)")
    with folder_lock(tmp_path), refused, folder_lock(tmp_path):
        pass


def test_a_folder_is_free_again_after_the_block(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    """Goal: a crash leaves no folder behind that nobody can use. Method: kill -9 a real holder."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(NodeRunning, match=rf"pid {holder.pid}\)"), folder_lock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)

    assert (tmp_path / LOCK_NAME).read_text() == str(holder.pid)
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(ConfigError, match="cannot write the data folder")
    with refused, folder_lock(tmp_path / "file" / "home"):
        pass
