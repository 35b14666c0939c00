"""What a host says about itself: signed once, and again only when it changes."""

from __future__ import annotations

import pytest
import trio
from net_hosts import World, connect

from swarmpy.abc import Address, WallSeconds
from swarmpy.identity import Identity


async def test_the_record_of_unchanged_addresses_is_signed_once(
    sim: World, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: no stranger makes a node sign. Method: count while peers come and ask."""
    signed: list[Identity] = []
    sign = Identity.sign

    def counted(identity: Identity, message: bytes) -> bytes:
        signed.append(identity)
        return sign(identity, message)

    host = await sim.host("host", wall_time=lambda: WallSeconds(1.8e9))
    peers = [await sim.host(f"peer {index}") for index in range(3)]
    monkeypatch.setattr(Identity, "sign", counted)
    for peer in peers:
        await peer.wait_identified(await connect(peer, host))
    assert signed == [host.identity]


async def test_a_changed_address_is_signed_under_a_higher_number(
    sim: World, autojump_clock: object
) -> None:
    """The clock stands still, and the number grows all the same."""
    host = await sim.host("host", wall_time=lambda: WallSeconds(1.8e9))
    peer = await sim.host("peer")
    peer_id = await connect(peer, host)
    before = await peer.wait_identified(peer_id)
    added = await host.listen(Address("/ip4/10.0.0.1/tcp/0"))
    with trio.fail_after(5):
        after = await peer.wait_identified(peer_id, after=before)
    assert added in after.addresses
    assert after.record_seq == before.record_seq + 1
