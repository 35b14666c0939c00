"""What `swarmpy chat` prints around a reply, with a node that only the test plays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from swarmpy_cli.client import NodeClient, NodeError
from swarmpy_cli.replies import Reply
from tests.cli.processes import Swarmpy

Stream = Callable[[NodeClient, object, Reply, Callable[[str], None]], Iterator[str]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stream], None]:
    """Sets how the node that `swarmpy chat` talks to answers."""
    monkeypatch.setattr("swarmpy_cli.chat.connect", contextlib.nullcontext)
    return lambda stream: monkeypatch.setattr("swarmpy_cli.chat.stream_reply", stream)


def test_an_error_in_mid_reply_stands_on_a_line_of_its_own(
    swarmpy: Swarmpy, answer: Callable[[Stream], None]
) -> None:
    def break_off(
        node: NodeClient, body: object, reply: Reply, waiting: Callable[[str], None]
    ) -> Iterator[str]:
        reply.text = "half a"
        yield "half a"
        raise NodeError("the peer went away\x1b[2J", code="stage_lost")

    answer(break_off)
    ran = swarmpy("chat", "hello", "--model", "m")

    assert (ran.code, ran.output) == (1, "half a\n")
    assert ran.errors == "error: the peer went away[2J\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--max-tokens", "1"], "cut at --max-tokens"), ([], "cut: the context is full")],
)
def test_a_reply_that_was_cut_says_by_what(
    swarmpy: Swarmpy, answer: Callable[[Stream], None], words: list[str], why: str
) -> None:
    def cut(
        node: NodeClient, body: object, reply: Reply, waiting: Callable[[str], None]
    ) -> Iterator[str]:
        reply.text, reply.finish_reason = "one", "length"
        yield "one"

    answer(cut)
    ran = swarmpy("chat", "hello", "--model", "m", *words)

    assert (ran.output, ran.errors) == ("one\n", f"({why})\n")
