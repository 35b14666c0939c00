"""The simulator bites: each classic bug, planted by patching one function, is caught by some seed.

The same seeds pass without it, so that it is the bug that was caught.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from swarm_stories import (
    announce_all_the_time,
    ask_throughout_and_heal,
    knock_as_a_stranger,
    plan,
    push_to_a_slow_reader,
    race_for_an_invite,
)

from swarmpy.abc import Row
from swarmpy.discovery.gossip import Gossip
from swarmpy.errors import SwarmError
from swarmpy.net.stream import NativeStream
from swarmpy.pipeline.engine_shards import InlineShard
from swarmpy.proto.announce import SignedAnnouncement
from swarmpy.testing import Simulation
from swarmpy.testing.faults import NO_FAULTS
from swarmpy.testing.runner import Plan, run_test
from swarmpy.trust.gate import MembershipGate
from swarmpy.trust.invites import InviteBook

STUCK = "within .* s: |no step"
"""What is lost on its way shows as waiting: a liveness bound, or a product's own time limit."""

SEEDS_MAX = 200
"""A bug that 200 seeds do not show would not be found by running them."""

CLEAN_SEEDS = 5

Story = Callable[[Simulation], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


def lose_a_wake_up(patch: pytest.MonkeyPatch) -> None:
    """Every 100th time a reader is not woken by what came for it."""
    wake, calls = NativeStream._wake_reader, [0]

    def forget_now_and_then(self: NativeStream) -> None:
        if self._reader is not None:
            calls[0] += 1
            if calls[0] % 100 == 0:
                self._reader = None
        wake(self)

    patch.setattr(NativeStream, "_wake_reader", forget_now_and_then)


def drop_a_frame(patch: pytest.MonkeyPatch) -> None:
    """Every 200th data frame is lost between connection and stream."""
    feed, calls = NativeStream.feed, [0]

    def drop_now_and_then(self: NativeStream, data: bytes) -> None:
        calls[0] += 1
        if calls[0] % 200:
            feed(self, data)

    patch.setattr(NativeStream, "feed", drop_now_and_then)


def double_a_step(patch: pytest.MonkeyPatch) -> None:
    """Every 50th step is computed twice, with the same result."""
    step, calls = InlineShard.step, [0]

    async def step_twice(self: InlineShard, rows: Sequence[Row]) -> Any:
        calls[0] += 1
        if calls[0] % 50 == 0:
            await step(self, rows)
        return await step(self, rows)

    patch.setattr(InlineShard, "step", step_twice)


def forget_that_an_invite_was_used(patch: pytest.MonkeyPatch) -> None:
    redeem = InviteBook.redeem

    def redeem_again(self: InviteBook, *args: Any, **options: Any) -> bytes:
        self._database.execute("DELETE FROM redemptions")
        return redeem(self, *args, **options)

    patch.setattr(InviteBook, "redeem", redeem_again)


def grant_window_before_reading(patch: pytest.MonkeyPatch) -> None:
    """The receiver opens the window when bytes come, not when they are read."""
    feed, pop = NativeStream.feed, NativeStream._pop

    def feed_and_grant(self: NativeStream, data: bytes) -> None:
        feed(self, data)
        self.connection.consumed(self.stream_id, len(data))

    def pop_without_granting(self: NativeStream, bytes_max: int | None) -> bytes:
        granted, self.connection.consumed = self.connection.consumed, _nothing  # type: ignore[method-assign]
        try:
            return pop(self, bytes_max)
        finally:
            self.connection.consumed = granted  # type: ignore[method-assign]

    patch.setattr(NativeStream, "feed", feed_and_grant)
    patch.setattr(NativeStream, "_pop", pop_without_granting)


def leave_the_gate_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MembershipGate, "allow_stream", lambda *_: True)


def keep_what_is_stale(patch: pytest.MonkeyPatch) -> None:
    """The last announcement to arrive stays, whether or not it is the newest."""
    take = Gossip._take_announcement

    def take_the_latest(self: Gossip, signed: SignedAnnouncement, *args: Any, **named: Any) -> bool:
        former = self._table.get(signed.key)
        if isinstance(former, SignedAnnouncement) and signed.version < former.version:
            self._table.remove(former)
        return take(self, signed, *args, **named)

    patch.setattr(Gossip, "_take_announcement", take_the_latest)


def _nothing(*_: object, **__: object) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A bug, and the story in which it shows."""

    bug: Patch
    story: Story
    plan: Plan
    sign: str
    """What the failure says: caught for another reason is not caught."""


BUGS = [
    Planted(bug=lose_a_wake_up, story=ask_throughout_and_heal, plan=plan(3), sign=STUCK),
    Planted(bug=drop_a_frame, story=ask_throughout_and_heal, plan=plan(3), sign=STUCK),
    Planted(
        bug=double_a_step,
        story=ask_throughout_and_heal,
        plan=plan(3),
        sign="^steps: computed twice",
    ),
    Planted(
        bug=forget_that_an_invite_was_used,
        story=race_for_an_invite,
        plan=plan(4, is_joined=False, engine=""),
        sign="^invite: an invite for 1 admitted",
    ),
    Planted(
        bug=grant_window_before_reading,
        story=push_to_a_slow_reader,
        plan=plan(2, engine=""),
        sign="^bounds: .* unread bytes",
    ),
    Planted(
        bug=leave_the_gate_open,
        story=knock_as_a_stranger,
        plan=plan(2, is_joined=False, engine=""),
        sign="^gate: .* served",
    ),
    Planted(
        bug=keep_what_is_stale,
        story=announce_all_the_time,
        plan=plan(
            5,
            engine="",
            faults=replace(NO_FAULTS, latency_s=0.5, jitter_s=1.0, loss=0.2, stalls_per_minute=30),
        ),
        sign="^records: .* went back",
    ),
]


def is_caught(planted: Planted, seed: int) -> bool:
    """Whether a seed fails, and by the sign of the bug."""
    try:
        run_test(planted.plan, planted.story, seed=seed)
    except (AssertionError, SwarmError) as error:
        # Broken invariants and liveness are AssertionErrors; a reply that breaks off is not.
        return re.search(planted.sign, f"{error}") is not None
    return False


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug.__name__)
def test_a_planted_bug_is_caught(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the simulator bites. Method: clean seeds pass; with the bug one of 200 fails."""
    for seed in range(CLEAN_SEEDS):
        run_test(planted.plan, planted.story, seed=seed)
    planted.bug(monkeypatch)
    assert any(is_caught(planted, seed) for seed in range(SEEDS_MAX))
