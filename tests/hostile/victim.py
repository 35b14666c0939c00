"""A node's host in a process of its own, which tells on stdout what an attack does to it.

Run as a program: the first line says where it listens; each line on stdin is answered by one line
of JSON (`count`, `memory`, ...). It ends with its stdin.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from hostile.attackers import identity
from hostile.processes import Child, child

from swarmpy.abc import Address, ProtocolId, Stream
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork

ECHO = ProtocolId("/swarmpy-test/echo/1")
HOLD = ProtocolId("/swarmpy-test/hold/1")

VICTIM = identity("victim")


async def echo(stream: Stream) -> None:
    """Handler that sends back what it receives."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def hold(stream: Stream) -> None:
    """Handler that never reads."""
    await trio.sleep_forever()


@asynccontextmanager
async def victim(*options: str) -> AsyncIterator[tuple[Child, Address]]:
    """Run a victim; gives it and where it listens. It must still live at the end.

    Args:
        options: "traced" measures memory; "files=N" allows N open files.
    """
    async with child("hostile.victim", *options) as made:
        yield made, Address(await made.line())
        assert made.expects_end or made.process.poll() is None, "the attack ended the process"


# In the process ------------------------------------------------------------------------------


async def main(options: list[str]) -> None:
    """Serve until stdin ends."""
    host = NativeHost(VICTIM, TcpNetwork(), random=random.SystemRandom())
    host.set_handler(ECHO, echo)
    host.set_handler(HOLD, hold)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        address = await host.listen(Address("/ip4/127.0.0.1/tcp/0"))
        if "traced" in options:
            tracemalloc.start()
        for option in options:
            if option.startswith("files="):
                count = int(option.removeprefix("files="))
                resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
        print(address, flush=True)
        stdin = trio.lowlevel.FdStream(os.dup(0))
        async for data in stdin:
            for line in data.decode().split():
                await trio.testing.wait_all_tasks_blocked()  # everything that came was taken
                print(json.dumps(_numbers(host, line)), flush=True)
        nursery.cancel_scope.cancel()


def _numbers(host: NativeHost, what: str) -> dict[str, Any]:
    traced, peak = tracemalloc.get_traced_memory() if tracemalloc.is_tracing() else (0, 0)
    if what == "memory":
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
    return {
        "connections": len(host.connections),
        "streams": sum(item.stream_count for item in host.connections),  # type: ignore[attr-defined]
        "half_open": host._handshakes.count,
        "is_out_of_files": _is_out_of_files(),
        "traced_bytes": traced,
        "peak_bytes": peak,
        "cpu_s": time.process_time(),
    }


def _is_out_of_files() -> bool:
    try:
        os.close(os.dup(0))
    except OSError as error:
        return error.errno == errno.EMFILE
    return False


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
