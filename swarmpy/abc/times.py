"""The two kinds of seconds, which must not be mistaken for each other."""

from __future__ import annotations

from typing import NewType

NowSeconds = NewType("NowSeconds", float)
"""Monotonic seconds (`trio.current_time`): deadlines, leases, round trips. Never on the wire."""

WallSeconds = NewType("WallSeconds", float)
"""Unix seconds: signatures and expiry. Never used for waiting."""
