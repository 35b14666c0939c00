"""Ping: only the bytes that were sent are an answer."""

from __future__ import annotations

import pytest

from swarmpy.errors import BadMessage
from swarmpy.proto.ping import PAYLOAD_BYTES, check_pong


def test_the_same_bytes_are_a_pong() -> None:
    check_pong(b"a" * PAYLOAD_BYTES, b"a" * PAYLOAD_BYTES)


@pytest.mark.parametrize("received", [b"", b"a" * 31, b"b" * 32, b"a" * 33])
def test_other_bytes_are_not(received: bytes) -> None:
    with pytest.raises(BadMessage):
        check_pong(b"a" * PAYLOAD_BYTES, received)
