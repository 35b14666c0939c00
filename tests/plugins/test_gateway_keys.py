"""Keys of the local API: made once, readable by nobody else, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import random
from pathlib import Path

import pytest

from swarmpy.errors import ConfigError
from swarmpy.plugins.gateway.keys import key_path, load_or_create_keys, proof, read_key

RANDOM = random.Random(1)


def test_keys_are_made_once_and_differ(tmp_path: Path) -> None:
    keys = load_or_create_keys(tmp_path, RANDOM)

    assert keys.api != keys.admin
    assert load_or_create_keys(tmp_path, RANDOM) == keys
    assert read_key(key_path(tmp_path, "api")) == keys.api


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    load_or_create_keys(tmp_path, RANDOM)

    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    for name in ("api", "admin"):
        assert key_path(tmp_path, name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("name", "mode"), [("keys/api", 0o644), ("keys", 0o755)])
def test_keys_that_others_may_read_are_refused_with_the_fix(
    tmp_path: Path, name: str, mode: int
) -> None:
    load_or_create_keys(tmp_path, RANDOM)
    (tmp_path / name).chmod(mode)

    with pytest.raises(ConfigError) as caught:
        load_or_create_keys(tmp_path, RANDOM)
    assert caught.value.fix.startswith("chmod")


def test_a_damaged_key_file_is_refused(tmp_path: Path) -> None:
    load_or_create_keys(tmp_path, RANDOM)
    key_path(tmp_path, "api").write_text("")

    with pytest.raises(ConfigError, match="holds no key"):
        load_or_create_keys(tmp_path, RANDOM)


def test_the_admin_key_opens_v1_but_the_api_key_opens_nothing_else(tmp_path: Path) -> None:
    keys = load_or_create_keys(tmp_path, RANDOM)

    assert keys.opens_v1(keys.api)
    assert keys.opens_v1(keys.admin)
    assert keys.opens_all(keys.admin)
    assert not keys.opens_all(keys.api)
    assert not keys.opens_v1("")
    assert not keys.opens_v1("\udcff\u00e9")


def test_keys_do_not_show_in_a_repr(tmp_path: Path) -> None:
    keys = load_or_create_keys(tmp_path, RANDOM)
    assert keys.api not in repr(keys)
    assert keys.admin not in repr(keys)


def test_a_proof_is_a_mac_of_the_label_the_port_and_the_nonce() -> None:
    message = b"swarmpy-proof" + b"\x20\xe4" + b"n" * 16
    expected = hmac.new(b"key", message, hashlib.sha256).hexdigest()
    assert proof("key", b"n" * 16, port=8420) == expected
