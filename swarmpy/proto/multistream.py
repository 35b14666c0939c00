"""Multistream-select 1.0: how two peers agree on a protocol, line by line.

Sans-IO. The dialer proposes ids in order of preference, the listener echoes the first it serves and
says "na" to the others. A dialer with one id may send its data right behind the proposal (lazy).
Spec: libp2p specs, connections; protocols/multistream.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmpy.errors import BadMessage, FrameTooLarge, RemoteProtocolError
from swarmpy.proto.wire import decode_varint, encode_varint

HEADER = "/multistream/1.0.0"

LINE_BYTES_MAX = 1024
"""Longest line. The specification allows 64 KiB; the longest protocol id in use has under 100."""

PROPOSALS_MAX = 32
"""Proposals answered on one stream; a dialer knows few majors of one protocol."""

REFUSED = "na"
_LIST = "ls"


def encode_line(text: str) -> bytes:
    """Return one line behind its length, as both sides send it."""
    line = text.encode() + b"\n"
    return encode_varint(len(line)) + line


_HEADER_LINE = encode_line(HEADER)


class _Lines:
    """Cuts received bytes into lines; what lies behind the last line read stays in `rest`."""

    def __init__(self) -> None:
        self.rest = b""
        self.has_header = False

    def take(self, data: bytes) -> None:
        """Take received bytes, the first of which must be the header's: HTTP is refused at once."""
        self.rest += data
        if self.has_header:
            return
        start = self.rest[: len(_HEADER_LINE)]
        if not _HEADER_LINE.startswith(start):
            raise BadMessage(f"expected {HEADER}, got {start!r}")
        if len(start) == len(_HEADER_LINE):
            self.has_header = True
            self.rest = self.rest[len(_HEADER_LINE) :]

    def next(self) -> str | None:
        """Return the next line behind the header, None while bytes are missing."""
        if not self.has_header:
            return None
        decoded = decode_varint(self.rest)
        if decoded is None:
            return None
        size, offset = decoded
        if size > LINE_BYTES_MAX:
            raise FrameTooLarge(f"multistream line of {size} bytes exceeds {LINE_BYTES_MAX}")
        if len(self.rest) < offset + size:
            return None
        line, self.rest = self.rest[offset : offset + size], self.rest[offset + size :]
        if not line.endswith(b"\n"):
            raise BadMessage("multistream line does not end with a newline")
        try:
            return line[:-1].decode()
        except UnicodeDecodeError as error:
            raise BadMessage("multistream line is not UTF-8") from error


class Dialer:
    """The proposing side.

    Attributes:
        selected: The agreed protocol, None before the listener agreed.
        rest: Bytes received behind the agreement: they belong to the protocol.
    """

    def __init__(self, protocols: Sequence[str]) -> None:
        """Args: protocols: Ids in order of preference, at least one."""
        self._waiting = list(protocols)
        self._proposed = self._waiting.pop(0)
        self._lines = _Lines()
        self.selected: str | None = None

    @property
    def rest(self) -> bytes:
        return self._lines.rest

    def start(self) -> bytes:
        """Return the first bytes to send: header and first proposal."""
        return _HEADER_LINE + encode_line(self._proposed)

    def receive(self, data: bytes) -> bytes:
        """Take received bytes and return what to send now, often nothing.

        Raises:
            RemoteProtocolError: The listener refuses every id, or does not speak multistream.
        """
        self._lines.take(data)
        proposals = b""
        while self.selected is None and (line := self._lines.next()) is not None:
            if line == self._proposed:
                self.selected = line
            elif line == REFUSED:
                if not self._waiting:
                    raise RemoteProtocolError(f"the peer does not serve {self._proposed}")
                self._proposed = self._waiting.pop(0)
                proposals += encode_line(self._proposed)
            else:
                raise BadMessage(f"expected {self._proposed} or {REFUSED}, got {line[:64]!r}")
        return proposals


class Selector:
    """The answering side.

    Attributes:
        selected: The agreed protocol, None before a proposal was accepted.
        rest: Bytes received behind the agreement: they belong to the protocol.
    """

    def __init__(self, serves: Callable[[str], bool]) -> None:
        """Args: serves: Whether a protocol is served to this peer; asked per proposal."""
        self._serves = serves
        self._proposals = 0
        self._lines = _Lines()
        self.selected: str | None = None

    @property
    def rest(self) -> bytes:
        return self._lines.rest

    def receive(self, data: bytes) -> bytes:
        """Take received bytes and return the answers to send.

        Raises:
            RemoteProtocolError: The dialer does not speak multistream, or proposes without end.
        """
        had_header = self._lines.has_header
        self._lines.take(data)
        answer = b"" if had_header or not self._lines.has_header else _HEADER_LINE
        while self.selected is None and (line := self._lines.next()) is not None:
            self._proposals += 1
            if self._proposals > PROPOSALS_MAX:
                raise RemoteProtocolError(f"more than {PROPOSALS_MAX} protocols proposed")
            if line != _LIST and self._serves(line):
                self.selected = line
                answer += encode_line(line)
            else:
                answer += encode_line(REFUSED)
        return answer
