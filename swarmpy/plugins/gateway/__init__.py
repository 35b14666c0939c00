"""The gateway: an OpenAI-style HTTP endpoint, and the admin API of the command line.

`serve` runs it inside a node's own trio run; nothing heavy is imported before that.
Page: docs/http-api.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from swarmpy.node import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayAddress:
    """Where a node's HTTP API is, and where its keys are."""

    base_url: str
    """Without a path: "http://127.0.0.1:8420"."""
    openai_url: str
    """What OpenAI's clients call the base URL: the same with /v1."""
    api_key_path: Path
    admin_key_path: Path
    admin_socket: Path | None
    """The Unix socket that needs no key; None where there is none, or its path is too long."""


async def serve(
    node: Node, *, task_status: trio.TaskStatus[GatewayAddress] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve a node's HTTP API until the node is asked to stop and the last request has ended.

    From `node.request_stop()` on, new requests get 503 and running replies finish; then this
    returns. Cancelling it ends all requests at once. Started with a `GatewayAddress`.

    Raises:
        ConfigError: The address is taken or malformed, or beyond loopback without host names.
    """
    from swarmpy.plugins.gateway.server import serve as run

    await run(node, task_status=task_status)
