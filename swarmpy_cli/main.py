"""The `swarmpy` command: its global options, and what becomes of an error.

Every SwarmError is one line that says what went wrong and one that says what to do, and exit code
1; a usage error is exit code 2; with --json either is one object on standard output.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from swarmpy.config import LOG_LEVELS
from swarmpy.errors import SwarmError
from swarmpy_cli import chat, demo, join, models, network, quantize, run, status
from swarmpy_cli.client import NodeError
from swarmpy_cli.console import print_error, silence
from swarmpy_cli.context import Settings, default_cache_folder, default_folder, print_json

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""What shells expect of a command ended by Ctrl-C: 128 + SIGINT."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=False,
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of this node's keys and settings (default: $SWARMPY_HOME or the platform's).",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of model files (default: $SWARMPY_CACHE or the platform's).",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    help="Log lines to write on standard error (default: warning).",
)
@click.version_option(package_name="swarmpy", message="%(package)s %(version)s")
@click.pass_context
def cli(
    context: click.Context, data_dir: Path | None, cache_dir: Path | None, log_level: str | None
) -> None:
    """Pool machines to run a language model that none of them could run alone.

    \b
    Two machines at home:
      swarmpy run              on the first; it prints an invite
      swarmpy join CODE        on the second
      swarmpy chat             on either
    """
    context.obj = Settings(
        folder=(data_dir or default_folder()).absolute(),
        cache_folder=(cache_dir or default_cache_folder()).absolute(),
        log_level=log_level or "",
    )


for _command in (
    run.run,
    demo.demo,
    chat.chat,
    network.invite,
    join.join,
    network.peers,
    network.revoke,
    models.models,
    status.status,
    status.version,
):
    cli.add_command(_command)
models.models.add_command(quantize.quantize)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_json = "--json" in words
    try:
        result = cli.main(words, prog_name="swarmpy", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SwarmError as error:
        _print_error(error, is_json=is_json)
        return EXIT_FAILED
    except click.ClickException as error:
        if is_json:
            print_json({"error": _described("usage_error", error.format_message(), "")})
        else:
            error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)
        return EXIT_FAILED


def _print_error(error: SwarmError, *, is_json: bool) -> None:
    if is_json:
        code = error.code if isinstance(error, NodeError) else error_code(type(error).__name__)
        print_json({"error": _described(code, str(error), error.fix)})
    else:
        print_error(error)


def error_code(class_name: str) -> str:
    """Return an error class as the HTTP API writes it: InviteUsed is invite_used."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name).lower()


def _described(code: str, message: str, fix: str) -> dict[str, str]:
    return {"code": code, "message": message, "fix": fix}
