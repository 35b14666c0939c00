"""Who may ask the local API anything: checked before a route sees a request.

Pure ASGI, so that streams pass through unbuffered. In this order: the Host header (a web page must
not reach the node by rebinding a name), Origin, the key, the body's type, size and pace. Whatever
goes wrong further in leaves as an error object, never as a traceback.
Page: docs/http-api.md, "Who may ask".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import trio
from starlette.responses import Response

from swarmpy.errors import SwarmError
from swarmpy.identity import RandomBytes
from swarmpy.plugins.gateway.errors import (
    INTERNAL,
    OVERLOADED,
    SHUTTING_DOWN,
    Refusal,
    RequestRefused,
    refusal_of,
    refuse,
)
from swarmpy.plugins.gateway.keys import Keys

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES_MAX = 2 * 1024 * 1024
"""Largest request body: far beyond the text that fits any model's context here."""

BODY_TIMEOUT_S = 10.0
"""A body must be complete in this time: 2 MB at 1.6 Mbit/s."""

DRAIN_BYTES_MAX = 8 * 1024 * 1024
DRAIN_TIMEOUT_S = 1.0
"""How much of a refused request's body is taken in, so that its sender reads the refusal."""

REQUESTS_MAX = 128
"""Requests under way. Each holds its body and, at a stage, a place in the queue."""

CLIENT_STALL_S_MAX = 30.0
"""A client that reads nothing for this long is gone: its reply holds a slot on every stage."""

TRUSTED = "swarmpy_is_admin"
"""Set in the scope's state by the listener on the Unix socket: who can open it may do anything."""

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")

OPEN_PATHS = frozenset({"/health", "/proof"})
"""Served without a key."""

API_PATHS = frozenset({"/health/ready"})
"""Beside /v1/, what the api key opens."""


class ClientGone(Exception):
    """Nobody is there to answer any more."""


class BrokenResponse(Exception):
    """A response broke after it had begun; only closing the connection can tell the client."""


class Traffic:
    """Requests under way, and whether more are admitted."""

    def __init__(self) -> None:
        self.is_admitting = True
        self._count = 0
        self._idle = trio.Event()
        self._idle.set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one request while the block runs.

        Raises:
            RequestRefused: The node is as busy as it may be.
        """
        if self._count >= REQUESTS_MAX:
            raise RequestRefused(OVERLOADED)
        self._count += 1
        if self._count == 1:
            self._idle = trio.Event()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is under way."""
        while self._count:
            await self._idle.wait()


class Guard:
    """ASGI middleware around all routes."""

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        allowed_hosts: Sequence[str],
        traffic: Traffic,
        random: RandomBytes,
    ) -> None:
        """Args: allowed_hosts: Names, with or without a port, accepted beside the loopback's."""
        self._app = app
        self._keys = keys
        self._names = (*LOOPBACK_NAMES, *(name.lower() for name in allowed_hosts))
        self._traffic = traffic
        self._random = random

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http":
            response = _Response(send, self._random.randbytes(12).hex())
            await self._serve(scope, _Request(receive), response)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, request: _Request, response: _Response) -> None:
        try:
            self._check(scope)
            with self._traffic.counted():
                body = await request.read_body()
                await self._app(scope, request.replay(body), response.send)
        except ClientGone:
            return
        except RequestRefused as error:
            await _refuse(error.refusal, request, response)
        except SwarmError as error:
            await _refuse(refusal_of(error), request, response)
        except Exception:  # the border to the handlers: log it, and answer without a traceback
            logger.exception("gateway.request_failed", extra={"path": scope["path"]})
            await _refuse(INTERNAL, request, response)

    def _check(self, scope: Scope) -> None:
        """Refuse whoever may not ask this.

        Raises:
            RequestRefused: Says why.
        """
        headers = _Headers(scope)
        is_trusted = scope.get("state", {}).get(TRUSTED) is True
        if not is_trusted:
            self._check_host(headers, scope)
        self._check_origin(headers, scope)
        if not is_trusted and scope["path"] not in OPEN_PATHS:
            self._check_key(headers, scope["path"])
        _check_type(headers, scope["method"])
        is_new_work = scope["method"] == "POST" and scope["path"] not in OPEN_PATHS
        if is_new_work and not self._traffic.is_admitting:
            raise RequestRefused(SHUTTING_DOWN)

    def _check_host(self, headers: _Headers, scope: Scope) -> None:
        host = headers.one("host").lower()
        if host not in self._hosts(scope):
            raise refuse(
                403,
                "host_not_allowed",
                f"host {host!r:.80} is not served here",
                fix="Use the address the node printed, or add the name to gateway.allowed_hosts.",
            )

    def _check_origin(self, headers: _Headers, scope: Scope) -> None:
        origins = headers.all("origin")
        ours = {f"{scope['scheme']}://{host}" for host in self._hosts(scope)}
        if any(origin.lower() not in ours for origin in origins):
            raise refuse(
                403,
                "origin_not_allowed",
                "web pages of other origins may not use this API",
            )

    def _hosts(self, scope: Scope) -> set[str]:
        """Host header values that mean this listener: a name with our port."""
        server = scope.get("server")
        if not server or server[1] is None:
            return set()
        port = server[1]
        hosts = {name if _has_port(name) else f"{name}:{port}" for name in self._names}
        return hosts | set(self._names) if port == 80 else hosts

    def _check_key(self, headers: _Headers, path: str) -> None:
        scheme, _, key = headers.one("authorization").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized("no API key was sent")
        if not self._keys.opens_v1(key):
            raise _unauthorized("the API key is not this node's")
        needs_admin = not path.startswith("/v1/") and path not in API_PATHS
        if needs_admin and not self._keys.opens_all(key):
            raise refuse(
                403,
                "admin_key_required",
                f"{path:.80} needs the admin key",
                fix="Send the key in keys/admin of the node's data folder.",
            )


class _Headers:
    """A request's headers; names are lower case in ASGI."""

    def __init__(self, scope: Scope) -> None:
        self._items: Sequence[tuple[bytes, bytes]] = scope["headers"]

    def all(self, name: str) -> Sequence[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._items if key.lower() == wanted]

    def one(self, name: str) -> str:
        """The header's value, "" where it is missing or there are several."""
        values = self.all(name)
        return values[0] if len(values) == 1 else ""


class _Request:
    """The way in: the body, bounded in size and time, and the client's leaving."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_complete = False

    async def read_body(self) -> bytes:
        """Read the whole body.

        Raises:
            RequestRefused: It is too large or too slow.
            ClientGone: The connection closed before it was complete.
        """
        body = bytearray()
        with trio.move_on_after(BODY_TIMEOUT_S):
            while not self._is_complete:
                body += await self._next_part()
                if len(body) > BODY_BYTES_MAX:
                    raise refuse(413, "body_too_large", f"the body exceeds {BODY_BYTES_MAX} bytes")
            return bytes(body)
        raise refuse(408, "body_timeout", f"the body took more than {BODY_TIMEOUT_S:g} seconds")

    def replay(self, body: bytes) -> Receive:
        """Return a `receive` that gives the body at once, and then the client's leaving."""
        waiting = [body]

        async def receive() -> Event:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            return await self._receive()

        return receive

    async def drain(self) -> None:
        """Take in what is left of the body, in bounds.

        Raises:
            ClientGone: The connection closed meanwhile.
        """
        size = 0
        with trio.move_on_after(DRAIN_TIMEOUT_S):
            while not self._is_complete and size <= DRAIN_BYTES_MAX:
                size += len(await self._next_part())

    async def discard(self) -> None:
        """Take in all that still comes: the server's queue must not be full when it answers."""
        with suppress(ClientGone):
            while not self._is_complete:
                await self._next_part()

    async def _next_part(self) -> bytes:
        event = await self._receive()
        if event["type"] == "http.disconnect":
            raise ClientGone("the connection closed before the body was complete")
        self._is_complete = not event.get("more_body", False)
        part: bytes = event.get("body", b"")
        return part


class _Response:
    """The way back: puts the request's id on the response and knows whether it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = [
            (b"x-request-id", f"req_{request_id}".encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        self.has_begun = False

    async def send(self, event: Event) -> None:
        """Send an event; a client that takes nothing for long counts as gone.

        With the last one the server ends the exchange and says so, as if the client had hung up:
        that must not cancel what the server is still doing to the connection.
        """
        is_last = event["type"] == "http.response.body" and not event.get("more_body", False)
        if event["type"] == "http.response.start":
            self.has_begun = True
            event = {**event, "headers": [*event.get("headers", ()), *self._headers]}
        # The connection gives up first, and then cleans up; this is for what waits elsewhere.
        with trio.move_on_after(2 * CLIENT_STALL_S_MAX, shield=is_last) as waiting:
            await self._send(event)
        if waiting.cancelled_caught:
            raise ClientGone(f"the client took nothing for {CLIENT_STALL_S_MAX:g} seconds")


def _unauthorized(message: str) -> RequestRefused:
    return RequestRefused(
        Refusal(
            status=401,
            code="invalid_api_key",
            message=message,
            fix="Send `Authorization: Bearer KEY`, never in the URL; the key is in the file "
            "keys/api of the node's data folder.",
            headers={"www-authenticate": "Bearer"},
        )
    )


def _has_port(name: str) -> bool:
    return name.rpartition(":")[2].isdigit() and not name.endswith("]")


def _check_type(headers: _Headers, method: str) -> None:
    """Refuse bodies that a web form could send, and packed ones, which may be any size inside."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return
    kind = headers.one("content-type").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refuse(
            415,
            "unsupported_media_type",
            f"content type must be application/json, got {kind!r:.80}",
        )
    if headers.all("content-encoding"):
        raise refuse(415, "unsupported_encoding", "packed bodies are not accepted")


async def _refuse(refusal: Refusal, request: _Request, response: _Response) -> None:
    """Answer with an error, taking in the rest of the body so that its sender comes to read it."""
    if response.has_begun:
        raise BrokenResponse(refusal.message)
    answer = json_response(refusal.body(), status=refusal.status)
    answer.headers.update(refusal.headers or {})
    try:
        await request.drain()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(request.discard)
            await response.send(
                {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": answer.raw_headers,
                }
            )
            await response.send({"type": "http.response.body", "body": answer.body})
            nursery.cancel_scope.cancel()
    except* ClientGone:
        pass


async def wait_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel `scope` when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def json_response(value: object, *, status: int = 200) -> Response:
    """Return a JSON response of plain values and msgspec structs."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
