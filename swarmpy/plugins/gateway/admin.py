"""The admin routes: what the command line asks the node that runs.

Answers are the records of `swarmpy.status` as JSON; long tasks answer with a line of JSON for each
report of progress and a last one with the result or the error. Page: docs/http-api.md, "Admin".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import trio
from fastapi import FastAPI, Response

from swarmpy.abc import Progress
from swarmpy.config import INVITE_TTL_S
from swarmpy.errors import SwarmError
from swarmpy.plugins.gateway.bodies import (
    CodeRequest,
    InviteRequest,
    ModelRequest,
    PullRequest,
    RenameRequest,
    RevokeRequest,
)
from swarmpy.plugins.gateway.errors import INTERNAL, SHUTTING_DOWN, Refusal, refusal_of
from swarmpy.plugins.gateway.guard import (
    ClientGone,
    Receive,
    Scope,
    Send,
    json_response,
    wait_gone,
)

if TYPE_CHECKING:
    from swarmpy.node import Node

logger = logging.getLogger(__name__)

Task = Callable[[Callable[[Progress], None]], Awaitable[msgspec.Struct]]
"""Work that reports its progress and gives a record."""

LINE_INTERVAL_S = 0.1
"""Time between two lines of progress: a download reports every few milliseconds."""


def add_routes(app: FastAPI, node: Node) -> None:
    """Add the admin routes to an application."""
    _add_views(app, node)
    _add_membership(app, node)

    @app.post("/admin/models/pull")
    async def pull(body: PullRequest) -> TaskResponse:
        return TaskResponse(
            lambda progress: node.pull(body.model, layers=body.layers, on_progress=progress),
            node.wait_stopping,
        )

    @app.post("/admin/models/rename")
    async def rename(body: RenameRequest) -> Response:
        return json_response(await node.rename(body.model, body.name))

    @app.post("/admin/prepare")
    async def prepare(body: ModelRequest) -> TaskResponse:
        return TaskResponse(
            lambda progress: node.prepare(body.model, on_progress=progress), node.wait_stopping
        )

    @app.post("/admin/stop")
    async def stop() -> Response:
        node.request_stop()
        return json_response({"status": "stopping"})


def _add_views(app: FastAPI, node: Node) -> None:
    @app.get("/admin/status")
    async def status() -> Response:
        return json_response(node.status())

    @app.get("/admin/peers")
    async def peers() -> Response:
        return json_response(node.peers())

    @app.get("/admin/models")
    async def models() -> Response:
        return json_response(node.models())

    @app.get("/admin/pipelines")
    async def pipelines() -> Response:
        return json_response(node.pipelines())


def _add_membership(app: FastAPI, node: Node) -> None:
    @app.post("/admin/invites")
    async def invite(body: InviteRequest) -> Response:
        return json_response(
            await node.create_invite(
                ttl_s=INVITE_TTL_S if body.ttl_s is None else body.ttl_s,
                uses=body.uses,
                can_invite=body.can_invite,
            )
        )

    @app.post("/admin/invites/inspect")
    async def inspect(body: CodeRequest) -> Response:
        return json_response(await node.inspect_invite(body.code))

    @app.post("/admin/join")
    async def join(body: CodeRequest) -> Response:
        return json_response(await node.join(body.code))

    @app.post("/admin/revoke")
    async def revoke(body: RevokeRequest) -> Response:
        return json_response(
            node.revoke(body.peer, network=body.network, is_rehearsal=body.is_rehearsal)
        )


class TaskResponse(Response):
    """ASGI response of a long task: newline-delimited JSON; a client that leaves cancels it."""

    def __init__(self, task: Task, wait_stopping: Callable[[], Awaitable[None]]) -> None:
        """Args: wait_stopping: Returns when the node stops: a download does not keep it waiting."""
        super().__init__()
        self._task = task
        self._wait_stopping = wait_stopping
        self._progress: Progress | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the task and tell how it goes."""
        lines = _Lines(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_gone, receive, nursery.cancel_scope)
            with suppress(ClientGone):
                await lines.begin()
                await lines.send(await self._told(lines))
                await lines.end()
            nursery.cancel_scope.cancel()

    async def _told(self, lines: _Lines) -> object:
        """Run the task, telling its progress meanwhile; return the last line."""
        last: object = SHUTTING_DOWN.body()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, lines, nursery.cancel_scope)
            nursery.start_soon(self._end_when_stopping, nursery.cancel_scope)
            last = await self._result()
            nursery.cancel_scope.cancel()
        return last

    async def _result(self) -> object:
        refusal: Refusal = INTERNAL
        try:
            return {"result": await self._task(self._note)}
        except SwarmError as error:
            refusal = refusal_of(error)
        except Exception:  # the border to the node: logged, and told to the client
            logger.exception("gateway.task_failed")
        return refusal.body()

    def _note(self, progress: Progress) -> None:
        self._progress = progress

    async def _tell(self, lines: _Lines, scope: trio.CancelScope) -> None:
        """Send the latest progress, at most every `LINE_INTERVAL_S`."""
        try:
            while True:
                if self._progress is not None:
                    told, self._progress = self._progress, None
                    await lines.send(told)
                await trio.sleep(LINE_INTERVAL_S)
        except ClientGone:
            scope.cancel()

    async def _end_when_stopping(self, scope: trio.CancelScope) -> None:
        await self._wait_stopping()
        scope.cancel()


class _Lines:
    """A response of JSON lines; each is sent whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = trio.Lock()

    async def begin(self) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, value: object) -> None:
        async with self._turn:
            line = msgspec.json.encode(value) + b"\n"
            await self._send({"type": "http.response.body", "body": line, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
