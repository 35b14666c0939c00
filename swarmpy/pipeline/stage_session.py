"""What a stage keeps of one session: its slot, its lease, where it stands, and its last answers.

Spec: protocols/pipeline.md, sections "Sessions" and "Steps".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from swarmpy.config import STEPS_IN_FLIGHT_MAX
from swarmpy.pipeline.audience import Audience
from swarmpy.pipeline.links import OutEdge
from swarmpy.proto.pipeline import Sampling

REPLAY_BYTES_MAX = 1024 * 1024
"""Answers kept of one session for steps that come twice; the newest is always kept."""


@dataclass(eq=False, slots=True)
class StageSession:
    """One session at one stage."""

    id: bytes
    epoch: int
    audience: Audience
    slot: int
    cleared: trio.Event | None
    """Set once the slot's former state is forgotten; None if it is."""
    lease_s: float
    lease_until: float
    sampling: Sampling | None
    reply_position: int
    max_tokens: int
    stop_ids: frozenset[int]
    history: list[int] | None
    """Prompt ids and reply, where the repetition penalty needs them."""
    next_step: int = 0
    end: int = 0
    """Tokens in the slot."""
    bulk: OutEdge | None = None
    """Where this session's prompt chunks leave for the next stage."""
    _answers: deque[tuple[int, bytes, bool]] = field(default_factory=deque)
    _answers_bytes: int = 0

    def remember(self, step: int, frame: bytes, is_bulk: bool) -> None:
        """Keep what a step was answered with; the oldest answers go."""
        answers = self._answers
        answers.append((step, frame, is_bulk))
        self._answers_bytes += len(frame)
        while len(answers) > 1 and (
            self._answers_bytes > REPLAY_BYTES_MAX or len(answers) > STEPS_IN_FLIGHT_MAX
        ):
            self._answers_bytes -= len(answers.popleft()[1])

    def answer(self, step: int) -> tuple[bytes, bool] | None:
        """The frame a step was answered with, and whether it went over the bulk stream."""
        for number, frame, is_bulk in self._answers:
            if number == step:
                return frame, is_bulk
        return None
