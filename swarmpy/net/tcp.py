"""TCP as a `Network`: sockets shaped as byte streams, and the border that maps socket errors.

Reading and writing are plain non-blocking calls; trio only waits.
Spec: protocols/multistream.md, sections 1-2.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import trio

from swarmpy.abc import Address, ByteStream, Listener, Network
from swarmpy.errors import BadMessage, ConfigError, ConnectionLost, DialFailed
from swarmpy.proto.multiaddr import format_tcp, parse_tcp

BACKLOG = 256
"""Connections the kernel completes before we accept them; more than `HANDSHAKES_MAX`."""

UNSENT_BYTES_MAX = 64 * 1024
"""Unsent bytes the kernel may hold: an urgent frame can no longer overtake what lies there."""

SIOCOUTQNSD = 0x894B if sys.platform == "linux" else None
"""Asks Linux for the unsent bytes of a socket. It minds `TCP_NOTSENT_LOWAT` when it says whether a
socket is writable, but its `send` fills a segment it has begun, up to 64 KiB, whatever was set."""

ACCEPT_PAUSE_S = 0.1
"""Pause when the process is out of file descriptors; others must close some first."""

_GONE_BEFORE_ACCEPT = {errno.ECONNABORTED, errno.EPROTO, errno.ECONNRESET, errno.ETIMEDOUT}
"""Errors of one connection that accept reports; a flood of them must not slow down the others."""

_PORT_IN_USE = {errno.EADDRNOTAVAIL, errno.EADDRINUSE}
"""What connecting from a given port reports where the same two ports are connected already, or were
a moment ago."""

_ANY = ("0.0.0.0", "::")

_CONNECTING = {0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0)}


class TcpStream(ByteStream):
    """A connected TCP socket."""

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket.

        Raises:
            ConnectionLost: It is no longer connected.
        """
        self._socket = connected
        self._is_open = True
        self._unsent_bytes_max = UNSENT_BYTES_MAX
        connected.setblocking(False)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
            self.local_address = _address_of(connected.getsockname())
            self.remote_address = _address_of(connected.getpeername())
        except OSError as error:
            connected.close()
            raise _lost(error) from error

    def send_nowait(self, data: memoryview) -> int:
        if not self._is_open:
            raise ConnectionLost("the TCP connection was closed here")
        try:
            if self._unsent_bytes_max < UNSENT_BYTES_MAX:
                if self._unsent_bytes() >= self._unsent_bytes_max:
                    return 0
                data = data[:UNSENT_BYTES_MAX]
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise _lost(error) from error

    async def wait_writable(self) -> None:
        if not self._is_open:
            return await trio.lowlevel.checkpoint()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except (trio.ClosedResourceError, OSError):
            return None

    def limit_unsent(self, bytes_max: int) -> None:
        """Take no more once so much is unsent; `wait_writable` ends at half of it (Linux)."""
        if self._is_open and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            self._unsent_bytes_max = bytes_max
            with suppress(OSError):  # some systems refuse it on a broken socket: its use will tell
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, bytes_max)

    def _unsent_bytes(self) -> int:
        if SIOCOUTQNSD is None:
            return 0
        import fcntl  # not on Windows

        return int.from_bytes(fcntl.ioctl(self._socket, SIOCOUTQNSD, bytes(4)), sys.byteorder)

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        try:
            return self._socket.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise _lost(error) from error

    async def wait_readable(self) -> None:
        if not self._is_open:
            return await trio.lowlevel.checkpoint()
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, OSError):
            return None

    def wake_reader(self) -> None:
        if self._is_open:
            # Wakes who waits to write as well: it finds that it must wait on.
            trio.lowlevel.notify_closing(self._socket)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class TcpListener(Listener):
    """A listening TCP socket.

    Attributes:
        endpoint: Host and port as bound.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        self._is_open = True
        self.endpoint = listening.getsockname()
        self.address = _address_of(self.endpoint)

    @property
    def is_open(self) -> bool:
        """Whether it still listens."""
        return self._is_open

    def lend_port(self, dialling: socket.socket) -> bool:
        """Bind a socket that will dial to this listener's port; False where the system refuses.

        Sharing is on only while the other socket binds: whoever else wants to listen on the port is
        refused before and after, as without it (docs/decisions/0012).
        """
        if not (self._is_open and hasattr(socket, "SO_REUSEPORT")):
            return False
        try:
            # The address too: a listener that starts again must not wait for these to time out.
            dialling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            dialling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                dialling.bind(self.endpoint)
            finally:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        except OSError:
            return False
        return True

    async def accept(self) -> ByteStream:
        """Wait for the next connection.

        Raises:
            ConnectionLost: The listener was closed.
        """
        # Before each one: a flood that fills the queue as fast as it is emptied stops nobody else.
        await trio.lowlevel.checkpoint()
        while self._is_open:
            try:
                accepted, _ = self._socket.accept()
                return TcpStream(accepted)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    break
            except OSError as error:
                is_gone = error.errno in _GONE_BEFORE_ACCEPT
                await trio.sleep(0 if is_gone else ACCEPT_PAUSE_S)
            except ConnectionLost:
                await trio.lowlevel.checkpoint()
        raise ConnectionLost(f"no longer listening on {self.address}")

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class TcpNetwork(Network):
    """The machine's own TCP/IP.

    Dials leave from a port that is listened on where that can be: then the address a peer sees is
    one that can be dialled, or at which a router can be punched.
    """

    def __init__(self) -> None:
        self._listeners: list[TcpListener] = []

    async def listen(self, address: Address) -> Listener:
        await trio.lowlevel.checkpoint()  # first: what is open then is returned
        listening: socket.socket | None = None
        try:
            host, port = parse_tcp(address)
            version = ipaddress.ip_address(host).version
            listening = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
            listening.setblocking(False)
            if socket.has_dualstack_ipv6() and version == 6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if hasattr(socket, "SO_REUSEPORT"):  # not Windows, where SO_REUSEADDR steals ports
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(BACKLOG)
        except (OSError, ValueError, BadMessage) as error:
            if listening is not None:
                listening.close()
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        listener = TcpListener(listening)
        self._listeners = [item for item in self._listeners if item.is_open] + [listener]
        return listener

    async def dial(self, address: Address) -> ByteStream:
        try:
            host, port = parse_tcp(address)
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, BadMessage) as error:
            raise DialFailed(f"cannot dial {address}: {error}") from error
        failure: OSError | ConnectionLost = OSError("no address")
        for family, _, _, _, endpoint in found:
            try:
                return await self._connect(family, endpoint)
            except (OSError, ConnectionLost) as error:
                failure = error
        raise DialFailed(f"cannot dial {address}: {failure}") from failure

    async def _connect(self, family: int, endpoint: tuple[object, ...]) -> TcpStream:
        """Connect from a port that is listened on, else from any port."""
        listener = self._listener_for(family, str(endpoint[0]))
        if listener is not None:
            dialling = socket.socket(family, socket.SOCK_STREAM)
            if listener.lend_port(dialling):
                try:
                    return await _connect(dialling, endpoint)
                except OSError as error:
                    if error.errno not in _PORT_IN_USE:
                        raise
            dialling.close()
        return await _connect(socket.socket(family, socket.SOCK_STREAM), endpoint)

    def _listener_for(self, family: int, target: str) -> TcpListener | None:
        """Return a listener whose port a dial to this address can leave from."""
        is_local = _is_loopback(target)
        for listener in self._listeners:
            host = listener.endpoint[0]
            is_same_family = (":" in host) == (family == socket.AF_INET6)
            reaches = host in _ANY or _is_loopback(host) == is_local
            if listener.is_open and is_same_family and reaches:
                return listener
        return None

    def interface_addresses(self) -> Sequence[str]:
        import ifaddr  # comes with zeroconf; imported only where it is needed

        found = []
        for adapter in ifaddr.get_adapters():
            for entry in adapter.ips:
                literal = entry.ip if isinstance(entry.ip, str) else entry.ip[0]
                address = ipaddress.ip_address(literal.partition("%")[0])
                if not address.is_link_local:
                    found.append(address)
        ordered = sorted(found, key=lambda item: (item.is_loopback, item.version))
        return [str(address) for address in ordered]


async def _connect(connecting: socket.socket, endpoint: tuple[object, ...]) -> TcpStream:
    """Connect a new socket; it is closed if that fails or is cancelled."""
    try:
        connecting.setblocking(False)
        code = connecting.connect_ex(endpoint)
        if code not in _CONNECTING:
            raise OSError(code, errno.errorcode.get(code, "error"))
        await trio.lowlevel.wait_writable(connecting)
        code = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, errno.errorcode.get(code, "error"))
        return TcpStream(connecting)
    except BaseException:
        connecting.close()
        raise


def _is_loopback(literal: str) -> bool:
    return ipaddress.ip_address(literal.partition("%")[0]).is_loopback


def _address_of(endpoint: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return Address(format_tcp(endpoint[0], endpoint[1]))


def _lost(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"the TCP connection broke: {error.strerror or error}")
