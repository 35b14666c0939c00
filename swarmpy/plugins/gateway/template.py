"""A model's chat template: compiled once, rendered with a deadline.

The rules of what it may do are in `sandbox.py`. Rendering belongs in a worker thread; a tracer of
that thread looks at each line the template executes and ends it once its deadline has passed, so no
thread goes on behind our back. Page: docs/http-api.md, "Templates".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swarmpy.errors import ModelRefused
from swarmpy.plugins.gateway.errors import refuse
from swarmpy.plugins.gateway.sandbox import (
    VALUE_SIZE_MAX,
    Budget,
    BudgetExceeded,
    RefusedByTemplate,
    TemplateEnvironment,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

TEMPLATE_CHARS_MAX = 256 * 1024
"""Longest template source; the longest published ones have about 30 thousand characters."""

RENDER_S_MAX = 5.0
"""Deadline of making one prompt. Real templates take some 30 microseconds a message."""


class Deadline:
    """Whether the time of a piece of work is over; told from outside, read in the worker thread."""

    def __init__(self) -> None:
        self.has_passed = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the Python code that this thread runs once the deadline has passed."""
        previous = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(previous)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if self.has_passed:
            raise BudgetExceeded(f"it runs for more than {RENDER_S_MAX:g} seconds")
        return self._trace


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self, source: str, *, strftime: Callable[[str], str], deadline: Deadline | None = None
    ) -> None:
        """Compile a template.

        Args:
            source: The template as the model's files have it.
            strftime: Formats the present time, for templates that tell the model the date.
            deadline: Ends the compilation.

        Raises:
            ModelRefused: It is too long, no template, or uses what is not allowed.
        """
        if len(source) > TEMPLATE_CHARS_MAX:
            raise ModelRefused(
                f"chat template of {len(source)} characters exceeds {TEMPLATE_CHARS_MAX}"
            )
        self._environment = TemplateEnvironment(strftime)
        with self._bounded(deadline or Deadline()):
            try:
                self._template = self._environment.from_string(source)
            except Exception as error:  # the border to a foreign program: any error is its own
                raise ModelRefused(f"chat template: {_shown(error)}") from error

    def render(self, variables: Mapping[str, object], deadline: Deadline | None = None) -> str:
        """Return the template's text for these variables.

        Raises:
            RequestRefused: The template refuses the messages, or fails on them.
            ModelRefused: It wants more time or memory than a template gets.
        """
        with self._bounded(deadline or Deadline()):
            try:
                return self._run(variables)
            except RefusedByTemplate as error:
                raise refuse(
                    400,
                    "messages_refused",
                    f"the model's chat template refuses these messages: {error!s:.300}",
                    param="messages",
                ) from error
            except Exception as error:  # the border to a foreign program: any error is its own
                raise refuse(
                    400,
                    "template_failed",
                    f"the model's chat template fails on these messages: {_shown(error)}",
                    param="messages",
                ) from error

    def _run(self, variables: Mapping[str, object]) -> str:
        context = self._template.new_context(dict(variables))
        pieces: list[str] = []
        size = 0
        for piece in self._template.root_render_func(context):
            size += len(piece)
            if size > VALUE_SIZE_MAX:
                raise BudgetExceeded(f"it makes more than {VALUE_SIZE_MAX} characters")
            pieces.append(piece)
        return "".join(pieces)

    @contextmanager
    def _bounded(self, deadline: Deadline) -> Iterator[None]:
        try:
            with self._environment.spending(Budget()), deadline.watched():
                yield
        except (BudgetExceeded, MemoryError) as error:
            raise ModelRefused(f"chat template: {_shown(error)}") from error


def _shown(error: BaseException) -> str:
    """A template's error as one bounded line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
