"""`swarmpy chat`: one question, or a conversation, through the running node's own HTTP endpoint."""

from __future__ import annotations

import sys

import click
import msgspec

from swarmpy_cli.client import NodeClient, NodeError, connect
from swarmpy_cli.console import print_error, print_reply, without_controls
from swarmpy_cli.context import Settings, json_option, print_json
from swarmpy_cli.models import served_choice
from swarmpy_cli.replies import Question, Reply, stream_reply

TEMPERATURE = 0.3
"""Small models, which is what runs where nothing else fits, ramble at the API's default of 1."""


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", help="Model to ask (default: the one the swarm serves).")
@click.option("--system", help="System message, put before the conversation.")
@click.option(
    "--temperature",
    type=float,
    default=TEMPERATURE,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this probability.")
@click.option("--seed", type=int, help="Repeat a sampled reply.")
@click.option("--max-tokens", type=int, help="Longest reply, in tokens.")
@json_option
@click.pass_obj
def chat(
    settings: Settings,
    /,
    prompt: str | None,
    model: str | None,
    system: str | None,
    is_json: bool,
    **sampling: float | int | None,
) -> None:
    """Ask a question, or talk.

    Without a PROMPT each line is a turn of one conversation. Ctrl-C
    during a reply ends that reply; at the prompt it ends the conversation.
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_prompt()
    if prompt is None and is_json:
        raise click.UsageError("--json needs a PROMPT")
    if prompt == "":
        raise click.UsageError("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system else []
    with connect(settings.folder) as node:
        question = Question(
            model=model or _chosen_model(node),
            sampling={name: value for name, value in sampling.items() if value is not None},
        )
        if prompt is None:
            _converse(node, question, messages)
            return
        messages.append({"role": "user", "content": prompt})
        reply = Reply()
        try:
            for piece in stream_reply(node, question.body(messages), reply, _show_note):
                if not is_json:
                    print_reply(piece)
        finally:
            if reply.text and not is_json:
                click.echo()  # An error stands on a line of its own.
        if is_json:
            print_json(
                {
                    "model": question.model,
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "usage": msgspec.to_builtins(reply.usage),
                }
            )
        else:
            _show_cut(reply, question)


def _read_prompt() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the prompt is no text: {error}") from error


def _chosen_model(node: NodeClient) -> str:
    choice = served_choice(node)
    click.echo(click.style(f"{choice.model}: {choice.why}", dim=True), err=True)
    return choice.model


def _converse(node: NodeClient, question: Question, messages: list[dict[str, str]]) -> None:
    """Talk until the end of input; a cut or failed turn is not remembered."""
    try:
        import readline  # noqa: F401  (gives input() a history and keys)
    except ImportError:
        pass
    while (line := _next_line()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        reply = Reply()
        try:
            for piece in stream_reply(node, question.body(messages), reply, _show_note):
                print_reply(piece)
            click.echo()
            _show_cut(reply, question)
            messages.append({"role": "assistant", "content": reply.text})
        except KeyboardInterrupt:
            click.echo("\n(cancelled)", err=True)
            messages.pop()
        except NodeError as error:
            click.echo(err=True)
            print_error(error)
            messages.pop()


def _next_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _show_cut(reply: Reply, question: Question) -> None:
    if reply.finish_reason == "length":
        is_asked = "max_tokens" in question.sampling
        _show_note("cut at --max-tokens" if is_asked else "cut: the context is full")


def _show_note(text: str) -> None:
    click.echo(click.style(f"({without_controls(text)})", dim=True), err=True)
