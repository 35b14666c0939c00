"""A TCP forwarder that holds every byte for a while, in both directions: a long line of any rate.

Args: the address to forward to (host:port or a multiaddr), seconds. It prints {"address"} in the
form it was given. It shapes nothing and is for counting round trips; link.py makes whole links.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import trio

PIECES_MAX = 1024
"""Pieces on the way in one direction; the sender waits beyond them."""

RECEIVE_BYTES = 64 * 1024


async def hold(source: trio.SocketStream, target: trio.SocketStream, delay_s: float) -> None:
    """Pass on what comes, each piece `delay_s` after it came; at its end, end."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](PIECES_MAX)

    async def deliver() -> None:
        async for due_s, piece in receive:
            await trio.sleep_until(due_s)
            await target.send_all(piece)
        await target.send_eof()

    async with trio.open_nursery() as nursery, send:
        nursery.start_soon(deliver)
        while piece := await source.receive_some(RECEIVE_BYTES):
            await send.send((trio.current_time() + delay_s, bytes(piece)))


async def main(address: str, delay_s: float) -> None:
    plain, slash, peer = address.partition("/p2p/")
    multi = re.fullmatch(r"/ip4/([^/]+)/tcp/(\d+)", plain)
    host, port = multi.groups() if multi else address.split(":")

    async def forward(near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(host, int(port))
            async with near, far, trio.open_nursery() as nursery:
                nursery.start_soon(hold, near, far, delay_s)
                nursery.start_soon(hold, far, near, delay_s)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # one side is gone, so the other goes too

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, forward, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        name, bound = listener.socket.getsockname()
        shown = f"/ip4/{name}/tcp/{bound}{slash}{peer}" if multi else f"{name}:{bound}"
        print(json.dumps({"address": shown, "version": ""}), flush=True)
        async for _ in trio.lowlevel.FdStream(sys.stdin.fileno()):
            pass
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], float(sys.argv[2]))
