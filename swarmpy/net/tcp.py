"""TCP as a `Network`: sockets shaped as byte streams, and the border that maps socket errors.

Reading and writing are plain non-blocking calls; trio only waits.
Spec: protocols/multistream.md, sections 1-2.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

import trio

from swarmpy.abc import Address, ByteStream, Listener, Network
from swarmpy.errors import BadMessage, ConfigError, ConnectionLost, DialFailed
from swarmpy.proto.multiaddr import format_tcp, parse_tcp

BACKLOG = 256
"""Connections the kernel completes before we accept them; more than `HANDSHAKES_MAX`."""

UNSENT_BYTES_MAX = 64 * 1024
"""Unsent bytes the kernel may hold: an urgent frame can no longer overtake what lies there."""

ACCEPT_PAUSE_S = 0.1
"""Pause when the process is out of file descriptors; others must close some first."""

_GONE_BEFORE_ACCEPT = {errno.ECONNABORTED, errno.EPROTO, errno.ECONNRESET, errno.ETIMEDOUT}
"""Errors of one connection that accept reports; a flood of them must not slow down the others."""

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
        try:
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

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class TcpListener(Listener):
    """A listening TCP socket."""

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        self._is_open = True
        self.address = _address_of(listening.getsockname())

    async def accept(self) -> ByteStream:
        """Wait for the next connection.

        Raises:
            ConnectionLost: The listener was closed.
        """
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
    """The machine's own TCP/IP."""

    async def listen(self, address: Address) -> Listener:
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
        await trio.lowlevel.checkpoint()
        return TcpListener(listening)

    async def dial(self, address: Address) -> ByteStream:
        try:
            host, port = parse_tcp(address)
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, BadMessage) as error:
            raise DialFailed(f"cannot dial {address}: {error}") from error
        failure: OSError | ConnectionLost = OSError("no address")
        for family, kind, protocol, _, endpoint in found:
            try:
                return await _connect(socket.socket(family, kind, protocol), endpoint)
            except (OSError, ConnectionLost) as error:
                failure = error
        raise DialFailed(f"cannot dial {address}: {failure}") from failure

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


def _address_of(endpoint: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return Address(format_tcp(endpoint[0], endpoint[1]))


def _lost(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"the TCP connection broke: {error.strerror or error}")
