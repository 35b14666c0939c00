"""The node's disk: what a crash or a damaged file must not cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmpy.errors import ConfigError
from swarmpy.store import open_database, write_file

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (text TEXT PRIMARY KEY);"


def test_database_is_private_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "node" / "node.db"
    first = open_database(path, SCHEMA)
    first.execute("INSERT INTO notes VALUES ('kept')")
    first.close()

    second = open_database(path, SCHEMA)
    try:
        assert second.execute("SELECT text FROM notes").fetchall() == [("kept",)]
    finally:
        second.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_database_is_set_aside_and_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    path.write_bytes(b"this is no database, " * 100)

    database = open_database(path, SCHEMA)
    try:
        assert database.execute("SELECT count(*) FROM notes").fetchone() == (0,)
    finally:
        database.close()
    assert (tmp_path / "node.db.damaged").read_bytes().startswith(b"this is no database")


def test_damage_behind_the_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    database = open_database(path, SCHEMA)
    database.executemany("INSERT INTO notes VALUES (?)", [("x" * 500 + str(n),) for n in range(99)])
    database.close()
    data = path.read_bytes()
    path.write_bytes(data[:8192] + bytes(len(data) - 8192))

    database = open_database(path, SCHEMA)
    try:
        assert database.execute("SELECT count(*) FROM notes").fetchone() == (0,)
    finally:
        database.close()


def test_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ConfigError):
        open_database(tmp_path / "file" / "node.db", SCHEMA)


def test_written_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_file(path, b"old")
    write_file(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["state.json"]
