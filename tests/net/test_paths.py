"""Several connections to one peer: which carries what, which drains, which are replaced."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from circuits import joined
from net_hosts import ECHO, World, connect, echo, exchange, receive_all

from swarmpy import config
from swarmpy.abc import Address, Priority, ProtocolId
from swarmpy.errors import ConnectionLost, DialFailed, RemoteProtocolError
from swarmpy.net.host import NativeHost
from swarmpy.net.paths import AGE_LOOK_S, DRAIN_S, RETIRE_PAUSE_S
from swarmpy.testing import Link

FRUGAL = ProtocolId("/swarmpy-test/frugal/1")
LIMIT = 128 * 1024


async def hosts(world: World) -> tuple[NativeHost, NativeHost]:
    """Return two hosts that serve echo, and a second echo on limited paths too."""
    alice, bob = await world.host("alice"), await world.host("bob")
    for host in (alice, bob):
        host.set_handler(ECHO, echo)
        host.set_handler(FRUGAL, echo, allow_limited=True)
    return alice, bob


async def hello(alice: NativeHost, bob: NativeHost) -> str:
    """Exchange bytes on a new stream, and return the path it took."""
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO])
    assert await exchange(stream, b"hello") == b"hello"
    await stream.close_write()
    assert await receive_all(stream) == b""
    return stream.connection.path


# The best path ----------------------------------------------------------------------


async def test_new_streams_take_the_direct_path(sim: World, autojump_clock: object) -> None:
    alice, bob = await hosts(sim)
    await joined(alice, bob, path="relayed")
    assert await hello(alice, bob) == await hello(bob, alice) == "relayed"
    await joined(alice, bob)
    assert await hello(alice, bob) == await hello(bob, alice) == "direct"


async def test_a_direct_path_stays_the_better_one_when_a_relayed_one_comes(
    sim: World, autojump_clock: object
) -> None:
    """Whoever initiated: the path counts before the tie-break."""
    alice, bob = await hosts(sim)
    direct, _ = await joined(alice, bob)
    await joined(alice, bob, path="relayed")
    await joined(bob, alice, path="relayed")
    assert alice.connection_to(bob.identity.peer_id) is direct
    await trio.sleep(3 * RETIRE_PAUSE_S)  # the last one came during the first pause
    assert [item.path for item in alice.connections] == ["direct"]


async def test_an_unlimited_relayed_path_is_better_than_a_limited_one(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    unlimited, _ = await joined(alice, bob, path="relayed")
    await joined(alice, bob, path="relayed", limit=LIMIT)
    assert alice.connection_to(bob.identity.peer_id) is unlimited


@pytest.mark.parametrize(("after_s", "is_open"), [(-1.5, True), (1.5, False)])
async def test_streams_on_the_worse_path_may_finish_for_a_while(
    sim: World, autojump_clock: object, after_s: float, is_open: bool
) -> None:
    """Goal: sessions have time to move. Method: one stream stays; look before and after."""
    alice, bob = await hosts(sim)
    old, _ = await joined(alice, bob, path="relayed")
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO])
    await exchange(stream, b"hello")
    await joined(alice, bob)
    await trio.sleep(DRAIN_S + after_s)
    assert old.is_open is is_open
    if is_open:
        assert await exchange(stream, b"still there") == b"still there"
    else:
        with pytest.raises(ConnectionLost):
            await stream.send_all(b"too late")
    assert await hello(alice, bob) == "direct"


async def test_a_worse_path_closes_as_soon_as_its_streams_have_finished(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    old, _ = await joined(alice, bob, path="relayed")
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO])
    await exchange(stream, b"hello")
    await joined(alice, bob)
    await trio.sleep(10)
    assert old.is_open
    await stream.close_write()
    assert await receive_all(stream) == b""
    await trio.sleep(2 * RETIRE_PAUSE_S)
    assert not old.is_open
    assert len(alice.connections) == len(bob.connections) == 1


async def test_a_worse_path_lives_on_where_the_better_one_breaks(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    old, _ = await joined(alice, bob, path="relayed")
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO])
    await exchange(stream, b"hello")
    direct, _ = await joined(alice, bob)
    await trio.sleep(DRAIN_S / 2)
    direct.close()
    await trio.sleep(DRAIN_S)
    assert await exchange(stream, b"still there") == b"still there"
    assert alice.connection_to(bob.identity.peer_id) is old


async def test_a_better_path_finds_a_place_where_worse_ones_have_taken_all(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    for _ in range(config.CONNECTIONS_PER_PEER_MAX):
        near, _ = await joined(alice, bob, path="relayed")
        near.open_stream(ECHO, Priority.BULK)
    with pytest.raises(ExceptionGroup) as refused:
        await joined(alice, bob, path="relayed")
    assert "one too many" in str(refused.value.exceptions[0])
    await trio.testing.wait_all_tasks_blocked()
    await joined(alice, bob)
    assert len(alice.connections) == config.CONNECTIONS_PER_PEER_MAX
    assert await hello(alice, bob) == "direct"


# Limited paths ----------------------------------------------------------------------


async def test_a_limited_path_carries_what_was_allowed_on_it(sim: World) -> None:
    alice, bob = await hosts(sim)
    await joined(alice, bob, path="relayed", limit=LIMIT)
    peer = bob.identity.peer_id
    stream = await alice.open_stream(peer, [FRUGAL], allow_limited=True)
    assert await exchange(stream, b"hello") == b"hello"
    assert ECHO in (await alice.wait_identified(peer)).protocols
    assert await alice.ping(peer) < 5


async def test_a_limited_path_carries_nothing_else_outbound(sim: World) -> None:
    alice, bob = await hosts(sim)
    await joined(alice, bob, path="relayed", limit=LIMIT)
    with pytest.raises(ConnectionLost, match="limited path alone"):
        await alice.open_stream(bob.identity.peer_id, [FRUGAL])


async def test_a_limited_path_carries_nothing_else_inbound(sim: World) -> None:
    alice, bob = await hosts(sim)
    await joined(alice, bob, path="relayed", limit=LIMIT)
    stream = await alice.open_stream(bob.identity.peer_id, [ECHO], allow_limited=True)
    await stream.send_all(b"hello")
    with pytest.raises(RemoteProtocolError, match="does not serve"):
        await stream.receive_some()


async def test_a_peer_on_a_limited_path_is_dialled_for_a_better_one(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    limited, _ = await joined(alice, bob, path="relayed", limit=LIMIT)
    direct = await alice.dial(bob.identity.peer_id, bob.addresses)
    assert direct.path == "direct"
    assert await hello(alice, bob) == "direct"
    await trio.sleep(2 * RETIRE_PAUSE_S)
    assert not limited.is_open


async def test_a_peer_on_an_unlimited_relayed_path_is_connected(sim: World) -> None:
    alice, bob = await hosts(sim)
    relayed, _ = await joined(alice, bob, path="relayed")
    assert await alice.dial(bob.identity.peer_id, bob.addresses) is relayed


# Age --------------------------------------------------------------------------------


@pytest.fixture
def age_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """An hour instead of a day: what a day adds is 16,000 pings."""
    monkeypatch.setattr(config, "CONNECTION_AGE_S_MAX", 3600.0)
    return 3600.0


async def test_an_old_connection_is_replaced_once_it_is_idle(
    sim: World, autojump_clock: object, age_s: float
) -> None:
    """Method: nothing happens just before its time; a stream then holds it; then it is idle."""
    alice, bob = await hosts(sim)
    peer = await connect(alice, bob)
    first = alice.connection_to(peer)
    await trio.sleep(age_s - 1)
    assert alice.connection_to(peer) is first
    stream = await alice.open_stream(peer, [ECHO])
    await exchange(stream, b"hello")
    await trio.sleep(4 * AGE_LOOK_S)
    assert alice.connection_to(peer) is first
    assert await exchange(stream, b"still there") == b"still there"
    await stream.close_write()
    assert await receive_all(stream) == b""
    await trio.sleep(AGE_LOOK_S + 3 * RETIRE_PAUSE_S)
    (near,), (far,) = alice.connections, bob.connections
    assert near is not first
    assert near.channel_binding == far.channel_binding
    assert await hello(alice, bob) == "direct"


async def test_an_old_connection_stays_where_its_peer_cannot_be_dialled(
    sim: World, autojump_clock: object, age_s: float
) -> None:
    alice, bob = await hosts(sim)
    peer = await connect(alice, bob)
    first = alice.connection_to(peer)
    for listener in bob._listeners:
        listener.close()
    await trio.sleep(age_s + 3 * AGE_LOOK_S)
    assert alice.connection_to(peer) is first
    assert await hello(alice, bob) == "direct"


# Dials ------------------------------------------------------------------------------


async def test_a_redial_after_a_failure_is_immediate(sim: World, autojump_clock: object) -> None:
    alice, bob = await hosts(sim)
    peer, addresses = bob.identity.peer_id, bob.addresses
    for listener in list(bob._listeners):
        listener.close()
    with pytest.raises(DialFailed):
        await alice.dial(peer, addresses)
    before_s = trio.current_time()
    await bob.listen(addresses[0])
    await alice.dial(peer, addresses)
    assert trio.current_time() == before_s


async def test_a_redial_after_a_lost_connection_is_immediate(
    sim: World, autojump_clock: object
) -> None:
    alice, bob = await hosts(sim)
    peer = await connect(alice, bob)
    for connection in bob.connections:
        connection.close()
    events = alice.connection_events()
    while alice.connections:
        await anext(events)
    before_s = trio.current_time()
    await connect(alice, bob)
    assert trio.current_time() == before_s
    assert alice.connection_to(peer) is not None


async def test_the_first_address_that_answers_wins_and_the_others_are_closed(
    sim: World, autojump_clock: object
) -> None:
    """Method: three addresses of one host, all slow enough that all are dialled before one wins."""
    alice, bob = await hosts(sim)
    for _ in range(2):
        await bob.listen(Address("/ip4/0.0.0.0/tcp/0"))
    for ends in (("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1")):
        sim.sim.set_link(*ends, Link(latency_s=0.4))
    assert len(bob.addresses) == 3
    dialled = await alice.dial(bob.identity.peer_id, bob.addresses)
    assert dialled.remote_address == bob.addresses[0]
    await trio.sleep(5)
    assert alice.connections == [dialled]
    assert len(bob.connections) == 1
    assert bob._handshakes.count == 0


@pytest.mark.parametrize("count", [config.DIAL_ADDRESSES_MAX, config.DIAL_ADDRESSES_MAX + 1])
async def test_a_dial_tries_so_many_addresses_and_no_more(
    sim: World, autojump_clock: object, count: int
) -> None:
    alice, bob = await hosts(sim)
    host = bob.addresses[0].rpartition("/")[0]
    addresses = [Address(f"{host}/{port}") for port in range(1, count)] + list(bob.addresses)
    if count <= config.DIAL_ADDRESSES_MAX:
        assert await alice.dial(bob.identity.peer_id, addresses)
    else:
        with pytest.raises(DialFailed):
            await alice.dial(bob.identity.peer_id, addresses)
