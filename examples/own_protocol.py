"""An application's own protocol on a swarmpy node: members of a network send each other notes.

    python examples/own_protocol.py FOLDER                    # prints an invite, shows what comes
    python examples/own_protocol.py FOLDER INVITE "a note"    # joins, sends it to all members

The page to read with it: docs/own-protocols.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import trio

import swarmpy
from swarmpy.abc import ProtocolId, Stream
from swarmpy.identity import PeerId
from swarmpy.net.messages import MessageStream

NOTES = ProtocolId("/example/notes/1")


class Note(msgspec.Struct, frozen=True):
    """Sent by whoever opens the stream."""

    text: Annotated[str, msgspec.Meta(max_length=1000)]


class Noted(msgspec.Struct, frozen=True):
    """The answer."""

    characters: int


async def take_note(stream: Stream) -> None:
    """Handle one stream of a member's: a note, an answer, the end."""
    messages = MessageStream(stream)
    note = await messages.receive(Note)
    print(f"{stream.peer} says {note.text!r}", flush=True)
    await messages.send(Noted(characters=len(note.text)))


async def send_note(node: swarmpy.Node, peer: PeerId, text: str) -> int:
    """Send a note to a connected member, and return how many characters it took."""
    stream = await node.host.open_stream(peer, [NOTES])
    try:
        messages = MessageStream(stream)
        await messages.send(Note(text=text))
        await stream.close_write()
        answer = await messages.receive(Noted)
        if await stream.receive_some():  # to its end: until then the stream takes a place
            raise ValueError("more than one answer")
    except BaseException:
        stream.reset()
        raise
    return answer.characters


async def main(arguments: list[str]) -> None:
    folder, invite, text = [*arguments, "", ""][:3]
    config = swarmpy.load_config(Path(folder))
    async with swarmpy.Node.open(config, swarmpy.local_environment(Path(folder))) as node:
        node.host.set_handler(NOTES, take_note)
        if not invite:
            print((await node.create_invite()).code, flush=True)
            await trio.sleep_forever()
        await node.join(invite)
        await node.wait_members(1)
        for member in node.membership.members():
            print(f"{member} took {await send_note(node, member, text)} characters", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
