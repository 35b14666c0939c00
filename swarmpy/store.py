"""The node's disk: one SQLite database, and files written whole or not at all."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from swarmpy.errors import ConfigError


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open (or create, mode 0600) a database and apply a schema of CREATE ... IF NOT EXISTS.

    Every commit is on disk when it returns: a redeemed invite must survive a crash
    (`synchronous=FULL`). A damaged file is set aside as `*.damaged` and a new one is made.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return _open(path, schema)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            os.replace(path, path.with_suffix(path.suffix + ".damaged"))
            return _open(path, schema)
    except sqlite3.Error as error:
        raise ConfigError(f"cannot use the database {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _open(path: Path, schema: str) -> sqlite3.Connection:
    """Open a database and look at all of it: ours are small, and damage is to be found here."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(schema)
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Run a block as one transaction: on disk when it ends, undone where it raises.

    Raises:
        ConfigError: The disk refused; nothing was changed.
    """
    try:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")
    except sqlite3.Error as error:
        raise ConfigError(f"the database cannot be written: {error}") from error


def read_json(path: Path) -> Mapping[str, object]:
    """Return what a small file of ours holds; one that is missing or damaged holds nothing."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that after a crash it holds the old bytes or the new, never both.

    Raises:
        ConfigError: The folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
