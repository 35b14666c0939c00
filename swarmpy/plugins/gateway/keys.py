"""The two keys of the local HTTP API, and the proof that a server knows the second.

`api` opens `/v1`, `admin` opens everything. Each is a file of its own, readable by the owner alone
from its first byte. Page: docs/http-api.md, "Keys".
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from swarmpy.errors import ConfigError
from swarmpy.identity import RandomBytes
from swarmpy.store import write_file

KEY_BYTES = 32
"""Random bytes of a key: nothing short of reading the file finds it."""

PROOF_LABEL = b"swarmpy-proof"
"""What a proof is a MAC of, before port and nonce: no other use of the key makes these bytes."""

NONCE_BYTES_MIN = 16
NONCE_BYTES_MAX = 64
"""A nonce must not repeat by chance; beyond 64 bytes it only makes the server work."""

_KEY_TEXT = re.compile(r"sk-swarmpy-(api|admin)-[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets of one node's HTTP API. Neither is ever logged or shown in a `repr`."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    def opens_v1(self, key: str) -> bool:
        """Whether `key` is one of the two, compared in constant time."""
        return _is_equal(key, self.api) | _is_equal(key, self.admin)

    def opens_all(self, key: str) -> bool:
        """Whether `key` is the admin key, compared in constant time."""
        return _is_equal(key, self.admin)


def load_or_create_keys(folder: Path, random: RandomBytes) -> Keys:
    """Read `keys/api` and `keys/admin` in a node's data folder, making those that are missing.

    Raises:
        ConfigError: A key file is damaged, or others may read it or its folder.
    """
    keys = folder / "keys"
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(keys, "700", keys.stat().st_mode)
    return Keys(
        api=_load_or_create(keys / "api", random), admin=_load_or_create(keys / "admin", random)
    )


def key_path(folder: Path, name: str) -> Path:
    """Return where a node with this data folder keeps its "api" or "admin" key."""
    return folder / "keys" / name


def read_key(path: Path) -> str:
    """Return the key in a file.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: It holds no key, or others may read it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        _check_private(path, "600", os.fstat(file.fileno()).st_mode)
        text = file.read(256).decode("ascii", "replace").strip()
    if not _KEY_TEXT.fullmatch(text):
        raise ConfigError(
            f"{path} holds no key", fix=f"Delete {path} and start the node again: it makes one."
        )
    return text


def proof(admin_key: str, nonce: bytes, *, port: int) -> str:
    """Return what only a holder of the admin key can say to a nonce, as 64 hex digits.

    A client on TCP asks for it before it sends the key: whoever took the node's port while the node
    was away cannot answer, nor have the node answer from the port it listens on now.

    Args:
        port: Of the socket the server answers on; the client's is the one it connected to.
    """
    message = PROOF_LABEL + port.to_bytes(2, "big") + nonce
    return hmac.new(admin_key.encode(), message, hashlib.sha256).hexdigest()


def _load_or_create(path: Path, random: RandomBytes) -> str:
    try:
        return read_key(path)
    except FileNotFoundError:
        key = f"sk-swarmpy-{path.name}-{random.randbytes(KEY_BYTES).hex()}"
        write_file(path, key.encode() + b"\n", mode=0o600)
        return key


def _check_private(path: Path, wanted: str, mode: int) -> None:
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path} is open to others", fix=f"chmod {wanted} {path}")


def _is_equal(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode())
