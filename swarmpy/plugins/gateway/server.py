"""Serves the HTTP application on a TCP port and on a Unix socket in the data folder.

hypercorn speaks HTTP on each connection. The connections themselves are accepted and ended here:
their number is bounded, a client that stops reading is given up, and ending the server ends them
all, which hypercorn's own loop does not do while a client does not read. Page: docs/http-api.md.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from hypercorn.config import Config as HttpConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from swarmpy.errors import ConfigError
from swarmpy.plugins.gateway import GatewayAddress
from swarmpy.plugins.gateway.app import create_app
from swarmpy.plugins.gateway.guard import CLIENT_STALL_S_MAX, TRUSTED, Traffic
from swarmpy.plugins.gateway.keys import key_path, load_or_create_keys

if TYPE_CHECKING:
    from fastapi import FastAPI

    from swarmpy.config import GatewayConfig
    from swarmpy.node import Node

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8420
PORTS_TRIED = 20
"""Ports from the default on, before the system picks one: so many nodes run on one machine."""

BACKLOG = 128
CONNECTIONS_MAX = 256
"""Open connections of one listener; beyond it new ones are closed at once."""

IDLE_TIMEOUT_S = 9.0
"""For the first request of a connection, and between two. Clients keep theirs for about five."""

HEADER_BYTES_MAX = 16 * 1024

SEND_BUFFER_BYTES = 64 * 1024
"""Kernel buffer of a connection: a client that stops reading is noticed after some hundred tokens,
not after as many as fit into the megabytes that systems grow it to."""

UNIX_PATH_BYTES_MAX = 103
"""Longest path of a Unix socket on every system (macOS: 104 bytes with the end)."""

SOCKET_NAME = "admin.sock"


async def serve(
    node: Node, *, task_status: trio.TaskStatus[GatewayAddress] = trio.TASK_STATUS_IGNORED
) -> None:
    """See `swarmpy.plugins.gateway.serve`."""
    folder = node.environment.folder
    keys = load_or_create_keys(folder, node.environment.random)
    traffic = Traffic()
    app = create_app(node, keys, traffic=traffic)
    with _tcp_socket(node.config.gateway) as tcp, _unix_socket(folder / SOCKET_NAME) as unix:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Server(app, is_admin=False).run, tcp)
            if unix is not None:
                nursery.start_soon(_Server(app, is_admin=True).run, unix)
            base_url = _base_url(tcp, node.config.gateway)
            task_status.started(
                GatewayAddress(
                    base_url=base_url,
                    openai_url=f"{base_url}/v1",
                    api_key_path=key_path(folder, "api"),
                    admin_key_path=key_path(folder, "admin"),
                    admin_socket=None if unix is None else folder / SOCKET_NAME,
                )
            )
            await node.wait_stopping()
            traffic.is_admitting = False
            await traffic.wait_idle()
            nursery.cancel_scope.cancel()


class _Server:
    """One listener and its connections."""

    def __init__(self, app: FastAPI, *, is_admin: bool) -> None:
        self._app = wrap_app(app, 0, "asgi")
        self._config = _http_config()
        self._context = WorkerContext(None)
        self._state = {TRUSTED: is_admin}
        self._open: set[_Connection] = set()

    async def run(self, listening: socket.socket) -> None:
        """Accept and serve until cancelled; then end every connection at once."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        async with trio.open_nursery() as nursery:
            accept = partial(trio.serve_listeners, handler_nursery=nursery)
            nursery.start_soon(accept, self._serve, [listener])
            try:
                await trio.sleep_forever()
            finally:  # while the connections are still being served, some of them shielded
                for connection in self._open:
                    connection.abort()

    async def _serve(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            return
        connection = _Connection(stream)
        self._open.add(connection)
        state = ConnectionState(dict(self._state))
        try:
            await TCPServer(self._app, self._config, self._context, state, connection)
        except* Exception:  # the border to hypercorn: an error costs its connection, not the node
            logger.warning("gateway.connection_failed", exc_info=True)
        finally:
            self._open.discard(connection)


class _Connection:
    """A connection as hypercorn uses it, which can be ended although hypercorn waits, shielded."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket

    async def receive_some(self, bytes_max: int) -> bytes:
        return bytes(await self._stream.receive_some(bytes_max))

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(CLIENT_STALL_S_MAX) as waiting:
            await self._stream.send_all(data)
        if waiting.cancelled_caught:
            self.abort()  # else hypercorn would go on waiting for the client's next request
            raise trio.BrokenResourceError("the client does not read")

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket now; whoever waits on it learns of it."""
        self.socket.close()


def _http_config() -> HttpConfig:
    config = HttpConfig()
    config.errorlog = logging.getLogger("swarmpy.plugins.gateway.http")
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_TIMEOUT_S
    config.h11_max_incomplete_size = HEADER_BYTES_MAX
    config.h2_max_concurrent_streams = 16
    config.h2_max_header_list_size = HEADER_BYTES_MAX
    config.websocket_max_message_size = 1  # the guard accepts no WebSocket
    return config


@contextmanager
def _tcp_socket(config: GatewayConfig) -> Iterator[socket.socket]:
    """Listen where the settings say; port 0 takes the default port or the next free one."""
    host, port = _parse(config)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = [port] if port else [*range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED), 0]
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        if os.name == "posix":  # elsewhere it would let two nodes share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        for tried in ports:
            try:
                listening.bind((host, tried))
                listening.listen(BACKLOG)
                break
            except OSError as error:
                reason = error
        else:
            raise ConfigError(
                f"gateway.listen: cannot listen on {config.listen}: {reason.strerror}",
                fix="Stop what uses the port, or set another one (port 0 takes a free one).",
            )
        yield listening


def _parse(config: GatewayConfig) -> tuple[str, int]:
    """Return the IP address and port to listen on.

    Raises:
        ConfigError: Malformed, or beyond this machine without `allowed_hosts`.
    """
    name, _, digits = config.listen.rpartition(":")
    host = "127.0.0.1" if name == "localhost" else name.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(host)
        port = int(digits)
    except ValueError:
        raise ConfigError(
            f"gateway.listen: expected an IP address and a port, got {config.listen!r}"
        ) from None
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"gateway.listen: port {port} is not in 0..65535")
    if not address.is_loopback and not config.allowed_hosts:
        raise ConfigError(
            f"gateway.listen: {host} can be reached by other machines, "
            "and gateway.allowed_hosts names no host",
            fix="Set gateway.allowed_hosts to the names or addresses clients will use.",
        )
    return host, port


def _base_url(listening: socket.socket, config: GatewayConfig) -> str:
    """The URL for clients; where every interface is listened on, by the first allowed name."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = config.allowed_hosts[0].partition(":")[0]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket | None]:
    """Listen on a Unix socket that only this user can open; None where that cannot be.

    Raises:
        ConfigError: Others may enter the folder it lies in.
    """
    if sys.platform == "win32" or len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        yield None
        return
    if path.parent.stat().st_mode & 0o077:
        raise ConfigError(f"{path.parent} is open to others", fix=f"chmod 700 {path.parent}")
    path.unlink(missing_ok=True)  # left by a node that was killed; the folder is ours alone
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with suppress(OSError):  # Linux: the file then has this mode from the beginning
            os.fchmod(listening.fileno(), 0o600)
        listening.bind(str(path))
        os.chmod(path, 0o600)
        listening.listen(BACKLOG)
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)
