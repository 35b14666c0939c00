"""What people see: steps with a check mark and a time, progress, and tables.

On a terminal a running step is drawn with rich; elsewhere each step is one line. rich is imported
only where something is drawn with it, never for --json.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

from swarmpy.errors import SwarmError

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBars
    from rich.progress import TaskID

PIPE_WIDTH = 240
"""Columns of a table that is not drawn on a terminal, so that a program reads uncut cells."""


class NotConfirmed(SwarmError):
    """What cannot be taken back has to be confirmed, and nobody could be asked."""

    advice = "Run the command in a terminal, or add --yes."


def show_bytes(count: float) -> str:
    """Return a size as people read it: "217 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def show_seconds(seconds: float) -> str:
    """Return a duration as people read it: "85 ms", "3.2 s", "2 h 5 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def show_progress(done: int, total: int, unit: str) -> str:
    """Return how far something is: "41.0 of 93.5 MB", "3 of 30 layers"."""
    if unit == "bytes":
        return f"{show_bytes(done)} of {show_bytes(total)}" if total else show_bytes(done)
    return f"{done} of {total} {unit}" if total else f"{done} {unit}"


_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def without_controls(text: str) -> str:
    """Return a text that others chose without what a terminal takes for commands.

    A model, or whoever computes its last layers, chooses every character of a reply, and a peer
    those of its errors.
    """
    return text.translate(_CONTROLS)


def print_reply(text: str) -> None:
    """Print a piece of a reply: as it is, but for what a terminal would take for commands."""
    click.echo(without_controls(text) if sys.stdout.isatty() else text, nl=False)


def print_error(error: SwarmError) -> None:
    """Print what went wrong and what to do about it on standard error."""
    click.echo(click.style("error: ", fg="red") + without_controls(str(error)), err=True)
    if error.fix:
        click.echo(click.style("  fix: ", fg="cyan") + without_controls(error.fix), err=True)


def silence(stream: TextIO) -> None:
    """Let what is written to a stream go nowhere, once the reader of its pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_line(text: str, stream: TextIO) -> None:
    """Print one line; where nobody reads any more, what runs goes on without being heard."""
    try:
        click.echo(text, file=stream)
    except BrokenPipeError:
        silence(stream)


class Step:
    """One thing that is being done: drawn while it runs, one line once it is over."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title = title
        self._stream = stream
        self._started = time.perf_counter()
        self._last_line = ""
        self._bars: ProgressBars | None = None
        self._task: TaskID | None = None
        if stream.isatty():
            self._draw()

    def progress(self, text: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Show that the step is at `text`, `done` of `total` (0: not known)."""
        text = without_controls(text)
        shown = f"{text} {show_progress(done, total, unit)}" if done or total else text
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task,
                description=f"{self.title}: {shown}" if shown else self.title,
                completed=done if total else 0,
                total=total or None,
            )
        elif text and text != self._last_line:
            self._last_line = text
            print_line(f"  … {self.title}: {text}", self._stream)

    def finish(self, *, is_done: bool) -> None:
        """Replace the drawing by the line that stays."""
        if self._bars is not None:
            self._bars.stop()
        mark = click.style("✓", fg="green") if is_done else click.style("✗", fg="red")
        spent = show_seconds(time.perf_counter() - self._started)
        print_line(f"{mark} {self.title}  {click.style(spent, dim=True)}", self._stream)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            console=Console(file=self._stream, highlight=False),
            transient=True,
        )
        self._bars.start()
        self._task = self._bars.add_task(self.title, total=None)


class Steps:
    """Prints what happens, a line per step; on standard error where standard output is for JSON."""

    def __init__(self, *, is_json: bool = False) -> None:
        self.stream = sys.stderr if is_json else sys.stdout

    def line(self, text: str = "") -> None:
        """Print one line."""
        print_line(text, self.stream)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Do one step: a check mark and its time if the block ends, a cross if it raises."""
        step = Step(title, self.stream)
        try:
            yield step
        except BaseException:
            step.finish(is_done=False)
            raise
        step.finish(is_done=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None
) -> None:
    """Print rows under their column names; on a terminal a cell that is too long is folded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = stream or sys.stdout
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(without_controls(cell)) for cell in row))
    width = None if stream.isatty() else PIPE_WIDTH
    Console(file=stream, width=width, highlight=False).print(table)
