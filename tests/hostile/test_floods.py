"""Floods from one address cost the peers at other addresses, and the connected ones, under a tenth.

Method: the node, the flooder (niced) and the honest peers are processes of their own. Calm and
flood alternate within one run; honest peers ask at a steady rate and new ones keep coming. What a
flood takes of the node's time is also counted in CPU seconds of its process, which does not depend
on what else the machine does. Rates do: where they swing by more than a tenth in the calm alone,
other programs have the machine, and rates tell nothing of a flood.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import trio
from hostile.attackers import HONEST_IP, WINDOW, Attacker, attacker, dial, frame
from hostile.flood import flood
from hostile.processes import Child
from hostile.victim import ECHO, HOLD, victim

from swarmpy import config
from swarmpy.abc import Address

ROUNDS = 5
INTERVAL_S = 0.3
CONNECTED = 3
ASK_INTERVAL_S = 0.01
ARRIVE_INTERVAL_S = 0.05
QUESTION = bytes(4096)

KEPT_MIN = 0.9
"""Part of their rate that honest peers keep."""


class Honest:
    """Peers at another address that go on with what they do, and count it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.answers = 0
        self.arrivals = 0

    async def run(self) -> None:
        """Ask and arrive until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(CONNECTED):
                nursery.start_soon(self._ask_on, number)
            nursery.start_soon(self._arrive_on)

    async def _ask_on(self, number: int) -> None:
        async with attacker(self._address, f"honest {number}", source=HONEST_IP) as peer:
            stream_id = await peer.open(ECHO)
            next_s = trio.current_time()
            while True:
                await ask(peer, stream_id)
                self.answers += 1
                next_s += ASK_INTERVAL_S
                await trio.sleep_until(next_s)

    async def _arrive_on(self) -> None:
        next_s = trio.current_time()
        while True:
            with trio.fail_after(5):
                async with attacker(self._address, "newcomer", source=HONEST_IP) as peer:
                    await ask(peer, await peer.open(ECHO))
            self.arrivals += 1
            next_s += ARRIVE_INTERVAL_S
            await trio.sleep_until(next_s)


async def ask(peer: Attacker, stream_id: int) -> None:
    """Send a question and wait for its echo."""
    await peer.send(stream_id, QUESTION)
    await peer.wait(lambda: len(peer.content(stream_id)) >= len(QUESTION))
    assert len(peer.content(stream_id)) == len(QUESTION), "an honest peer was cut"
    del peer.received[stream_id][-len(QUESTION) :]
    await peer.secure.send(frame(WINDOW, 0, stream_id, len(QUESTION)))


@dataclass
class Interval:
    """What happened in one interval."""

    answers_per_s: float
    arrivals_per_s: float
    cpu_s: float


async def spend_burst(address: Address) -> None:
    """Come as often as one place may at once: what counts is what a flood costs that lasts."""
    for _ in range(config.HANDSHAKES_BURST_MAX):
        wire = await dial(address)
        await wire.send(b"?")
        await wire.wait_end()  # refused: it was accepted and counted
        wire.close()


async def observe(honest: Honest, child: Child, seconds: float) -> Interval:
    """Watch for some time."""
    answers, arrivals, start_s = honest.answers, honest.arrivals, trio.current_time()
    before = await child.ask("count")
    await trio.sleep(seconds)
    after = await child.ask("count")
    passed_s = trio.current_time() - start_s
    return Interval(
        answers_per_s=(honest.answers - answers) / passed_s,
        arrivals_per_s=(honest.arrivals - arrivals) / passed_s,
        cpu_s=after["cpu_s"] - before["cpu_s"],
    )


def is_steady(calm: list[Interval]) -> bool:
    """Whether nothing but the test changes the rate at which peers are answered."""
    rates = [item.answers_per_s for item in calm]
    return min(rates) >= KEPT_MIN * max(rates)


@dataclass
class Weather:
    """Calm and stormy intervals of one run, in pairs."""

    calm: list[Interval]
    stormy: list[Interval]
    made: int
    """Connections the flooder made in the storms."""

    @property
    def answers_kept(self) -> float:
        """What is left of the connected peers' rate in a storm, the median over the pairs."""
        pairs = zip(self.calm, self.stormy, strict=True)
        return statistics.median(b.answers_per_s / a.answers_per_s for a, b in pairs)

    @property
    def arrivals_kept(self) -> float:
        """What is left of the rate of newcomers: few in one interval, so all are taken together."""
        stormy = sum(item.arrivals_per_s for item in self.stormy)
        return stormy / sum(item.arrivals_per_s for item in self.calm)

    @property
    def cpu_share(self) -> float:
        """Part of the node's time that the storms took."""
        more_s = sum(b.cpu_s - a.cpu_s for a, b in zip(self.calm, self.stormy, strict=True))
        return more_s / (len(self.stormy) * INTERVAL_S)


async def alternate(child: Child, address: Address, flooder: Child, honest: Honest) -> Weather:
    """Let calm and storm take turns."""
    weather = Weather([], [], 0)
    await spend_burst(address)
    await observe(honest, child, INTERVAL_S)
    for _ in range(ROUNDS):
        await flooder.ask("stop")
        weather.calm.append(await observe(honest, child, INTERVAL_S))
        before = await flooder.ask("go")
        weather.stormy.append(await observe(honest, child, INTERVAL_S))
        weather.made += await flooder.ask("stop") - before
    return weather


@pytest.mark.parametrize(
    ("kind", "per_minute"),
    [
        ("prove", 10_000),
        ("begin", 50_000),
        ("stream", 180),
        ("churn", 60),
    ],
    ids=["proven", "1,000 half-open", "3,000 streams at once", "3,000 streams in turn"],
)
async def test_a_flood_from_one_address_costs_the_others_under_a_tenth(
    kind: str, per_minute: int
) -> None:
    """Connections proven by ever new identities, more than 1,000 left half-open, and streams.

    Streams at once are refused and cost the connection; in turn they are within what a peer may do.
    """
    async with victim() as (child, address), flood(address, kind, per_minute / 60) as flooder:
        honest = Honest(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(honest.run)
            weather = await alternate(child, address, flooder, honest)
            numbers = await child.ask("count")
            nursery.cancel_scope.cancel()
    assert weather.made > 0.5 * ROUNDS * INTERVAL_S * per_minute / 60
    if is_steady(weather.calm):
        assert weather.answers_kept >= KEPT_MIN
        assert weather.arrivals_kept >= KEPT_MIN
    assert numbers["connections"] <= CONNECTED + 1 + (kind == "churn") * ROUNDS
    if kind != "churn":  # a proven peer within its limits, which may ask as much as others
        assert weather.cpu_share <= 1 - KEPT_MIN


async def test_three_thousand_open_streams_cost_others_nothing(nursery: trio.Nursery) -> None:
    """Method: 47 identities hold as many streams as one may, 3,008 in all."""
    async with victim() as (child, address), AsyncExitStack() as attackers:
        honest = Honest(address)
        nursery.start_soon(honest.run)
        await observe(honest, child, INTERVAL_S)
        before = [await observe(honest, child, INTERVAL_S) for _ in range(3)]
        for number in range(-(-3000 // config.INBOUND_STREAMS_MAX)):
            peer = await attackers.enter_async_context(attacker(address, f"holder {number}"))
            for _ in range(config.INBOUND_STREAMS_MAX):
                await peer.open(HOLD, bytes(100))
            await peer.settle()
            assert not peer.is_over
        during = [await observe(honest, child, INTERVAL_S) for _ in range(3)]
        assert (await child.ask("count"))["streams"] >= 3000
        await attackers.aclose()
        after = [await observe(honest, child, INTERVAL_S) for _ in range(3)]
        nursery.cancel_scope.cancel()
    calm = statistics.median(item.answers_per_s for item in before + after)
    if is_steady(before + after):
        assert statistics.median(item.answers_per_s for item in during) >= KEPT_MIN * calm
