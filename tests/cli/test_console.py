"""What people see."""

from __future__ import annotations

import io

import click
import pytest

from swarmpy_cli.console import Step, print_reply, print_table, show_bytes, show_seconds
from swarmpy_cli.network import parse_duration, short_peer
from swarmpy_cli.status import show_layers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (538e6, "538 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0851, "85 ms"), (3.21, "3.2 s"), (300, "5 min"), (86400, "24 h"), (7500, "2 h 5 min")],
)
def test_times_are_shown_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_layers_are_shown_with_both_ends() -> None:
    assert show_layers(10, 20) == "10-19"
    assert show_layers(4, 5) == "4"


def test_a_step_away_from_a_terminal_is_one_line_for_each_thing_it_does() -> None:
    stream = io.StringIO()
    step = Step("model", stream)
    for done in (10, 20, 30):
        step.progress("downloading", done, 30, "bytes")
    step.progress("checking")
    step.finish(is_done=True)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["  … model: downloading", "  … model: checking"]
    assert lines[2].startswith("✓ model  ")
    assert len(lines) == 3


def test_a_table_away_from_a_terminal_is_not_cut() -> None:
    stream = io.StringIO()
    print_table(("name", "address"), [("ann", "/ip4/192.0.2.1/tcp/4001" * 4)], stream=stream)
    assert "/ip4/192.0.2.1/tcp/4001" * 4 in stream.getvalue()


def test_a_cell_is_text_and_no_markup() -> None:
    stream = io.StringIO()
    print_table(("name",), [("[red]ann",)], stream=stream)
    assert "[red]ann" in stream.getvalue()


def test_a_cell_cannot_command_the_terminal() -> None:
    """A peer chooses the name of its engine, and this node that of its files."""
    stream = io.StringIO()
    print_table(("engine",), [("\x1b[2Jecho\x1b]0;title\x07\x9b1m",)], stream=stream)
    assert stream.getvalue().split("\n")[1].strip() == "[2Jecho]0;title1m"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("1d", 86400), ("1.5h", 5400)]
)
def test_a_time_span_is_read_with_its_unit(text: str, seconds: float) -> None:
    command = click.Command("invite")
    assert parse_duration(click.Context(command), click.Option(["--ttl"]), text) == seconds


def test_a_peer_is_shortened_to_the_end_where_two_differ() -> None:
    assert short_peer("12D3KooWAbCdEfGhIjKl") == "…EfGhIjKl"


@pytest.mark.parametrize(
    ("is_terminal", "shown"),
    [(True, "a]52;c;eA==b\n\tc2J"), (False, "a\x1b]52;c;eA==\x07b\n\tc\x9b2J")],
)
def test_a_reply_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, shown: str
) -> None:
    """A peer that computes the last layers chooses every character; a pipe gets them unchanged."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", stream)

    print_reply("a\x1b]52;c;eA==\x07b\n\tc\x9b2J")

    assert stream.getvalue() == shown
