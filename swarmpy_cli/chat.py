"""`swarmpy chat`: one question, or a conversation, through the running node's own HTTP endpoint."""

from __future__ import annotations

import sys

import click
import msgspec

from swarmpy_cli.client import NodeClient, NodeError, connect
from swarmpy_cli.context import Settings, json_option, print_json
from swarmpy_cli.models import served_choice
from swarmpy_cli.replies import Question, Reply, stream_reply


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", help="Model to ask (default: the one the swarm serves).")
@click.option("--system", help="System message, put before the conversation.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
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
        prompt = sys.stdin.read().strip()
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
        for piece in stream_reply(node, question.body(messages), reply, _show_waiting):
            if not is_json:
                click.echo(piece, nl=False)
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
            _end_reply(reply)


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
            for piece in stream_reply(node, question.body(messages), reply, _show_waiting):
                click.echo(piece, nl=False)
            _end_reply(reply)
            messages.append({"role": "assistant", "content": reply.text})
        except KeyboardInterrupt:
            click.echo("\n(cancelled)", err=True)
            messages.pop()
        except NodeError as error:
            click.echo(
                f"\nerror: {error}" + (f"\n  fix: {error.fix}" if error.fix else ""), err=True
            )
            messages.pop()


def _next_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _end_reply(reply: Reply) -> None:
    click.echo()
    if reply.finish_reason == "length":
        click.echo(click.style("(cut at --max-tokens)", dim=True), err=True)


def _show_waiting(text: str) -> None:
    click.echo(click.style(f"({text})", dim=True), err=True)
