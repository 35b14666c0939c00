"""`swarmpy models quantize`: a model made of another, and what that cost and gained, measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click
import msgspec

from swarmpy.errors import DoesNotFit, ExtensionNotFound, ModelRefused
from swarmpy_cli.console import Step, Steps, print_table, show_bytes
from swarmpy_cli.context import Settings, json_option, print_json
from swarmpy_cli.models import from_here

if TYPE_CHECKING:
    from swarmpy.abc import Progress
    from swarmpy.plugins.llama.measure import Measured
    from swarmpy.plugins.llama.quantize import Quantized
    from swarmpy.shards.catalog import ModelEntry

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
"""Types in which a model is published before anything is quantised."""

PERPLEXITY_RATIO_WARNED = 1.1
"""Rise of the perplexity from which on the output warns: a tenth can be read in replies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model beside the one that it was made of."""

    original: Measured
    new: Measured
    threads: int
    unscored: str = ""
    """Why there is no perplexity."""

    @property
    def ratio(self) -> tuple[float, float]:
        """How many times the perplexity is what it was, and the standard error of that."""
        from swarmpy.plugins.llama.measure import perplexity_ratio

        return perplexity_ratio(self.original, self.new)


@click.command()
@click.argument("model")
@click.option("--to", "to", required=True, metavar="TYPE", help="q4_0, q8_0, q4_k_m and others.")
@click.option("--force", "is_forced", is_flag=True, help="Make it again where it is here already.")
@click.option(
    "--measure/--no-measure",
    "is_measured",
    default=True,
    help="Compare both in perplexity and speed (default), or not.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 512),
    default=1,
    show_default=True,
    help="Threads to measure with.",
)
@json_option
@click.pass_obj
def quantize(
    settings: Settings,
    /,
    model: str,
    to: str,
    is_forced: bool,
    is_measured: bool,
    threads: int,
    is_json: bool,
) -> None:
    """Make a new model of MODEL, a GGUF on this machine, with its weights stored as TYPE.

    The original stays as it is. On CPUs q4_0 is the fastest of the small types.
    """
    from swarmpy.plugins.llama.file_types import file_type
    from swarmpy_cli.run import run_async

    file_type(to)  # A name that means nothing is refused before anything is done.
    steps = Steps(is_json=is_json)
    work = partial(_make, settings, from_here(model), to, is_forced=is_forced, steps=steps)
    original, made = run_async(work)
    comparison = None
    if is_measured:
        with steps.step(f"measuring {original.name} and {made.entry.name}") as step:
            report = partial(_report, step)
            comparison = run_async(
                partial(_compare, settings, original, made.entry, threads, report)
            )
    if is_json:
        print_json(_document(original, made, comparison))
    else:
        show(original, made, comparison)


def _report(step: Step, progress: Progress) -> None:
    step.progress(progress.step, progress.done, progress.total, progress.unit)


async def _make(
    settings: Settings, model: str, to: str, *, is_forced: bool, steps: Steps
) -> tuple[ModelEntry, Quantized]:
    """Find the original and make the other; a path is listed first, as by `pull`."""
    import trio

    from swarmpy.plugins.llama.quantize import quantize_model
    from swarmpy.shards.catalog import Catalog

    catalog = Catalog(settings.cache_folder)
    with steps.step(f"{model} as {to.upper()}") as step:
        report = partial(_report, step)
        if model.startswith("/"):
            original = await catalog.pull(model, report)
        else:
            original = await trio.to_thread.run_sync(catalog.find, model)
        made = await quantize_model(catalog, original, to, is_forced=is_forced, progress=report)
    return original, made


async def _compare(
    settings: Settings,
    original: ModelEntry,
    new: ModelEntry,
    threads: int,
    progress: Callable[[Progress], None],
) -> Comparison:
    """Measure both."""
    import trio

    from swarmpy.plugins.llama.measure import measure, prose_tokens

    text, unscored = None, ""
    try:
        text = await trio.to_thread.run_sync(prose_tokens, original.path)
    except (ModelRefused, ExtensionNotFound) as error:
        unscored = str(error)
    try:
        before, after = await measure(
            (original.path, new.path),
            text,
            cache_folder=settings.cache_folder,
            threads=threads,
            progress=progress,
        )
    except DoesNotFit as error:
        raise DoesNotFit(
            f"{new.name} is here, but was not measured: {error}",
            fix="Both models must fit in memory to be compared; --no-measure does without.",
        ) from error
    return Comparison(original=before, new=after, threads=threads, unscored=unscored)


def _document(
    original: ModelEntry, made: Quantized, comparison: Comparison | None
) -> dict[str, object]:
    """The whole answer as a JSON object; what was not measured is null."""
    from swarmpy.node_status import model_status

    shown: dict[str, object] = {
        "model": msgspec.to_builtins(model_status(made.entry)),
        "original": msgspec.to_builtins(model_status(original)),
        "is_new": made.is_new,
        "is_requantized": _is_requantized(original),
        "measured": None,
    }
    if comparison is not None:
        ratio, error = comparison.ratio
        shown["measured"] = {
            "original": _numbers(comparison.original),
            "new": _numbers(comparison.new),
            "perplexity_ratio": _number(ratio),
            "perplexity_ratio_error": _number(error),
            "prefill_gain": comparison.new.prefill_tok_s / comparison.original.prefill_tok_s,
            "decode_gain": comparison.new.decode_tok_s / comparison.original.decode_tok_s,
            "scored_tokens": comparison.new.losses.size,
            "threads": comparison.threads,
            "unscored": comparison.unscored,
        }
    return shown


def _numbers(measured: Measured) -> dict[str, float | None]:
    return {
        "perplexity": _number(measured.perplexity),
        "perplexity_error": _number(measured.perplexity_error),
        "prefill_tok_s": measured.prefill_tok_s,
        "decode_tok_s": measured.decode_tok_s,
    }


def _number(value: float) -> float | None:
    """A number for JSON, which has none that is not finite."""
    return value if math.isfinite(value) else None


def _is_requantized(original: ModelEntry) -> bool:
    """Whether the original's weights had lost something already."""
    return original.quantization not in UNQUANTIZED


def show(original: ModelEntry, made: Quantized, comparison: Comparison | None) -> None:
    """Print what was made, and what it cost and gained beside the original."""
    new = made.entry
    state = "made of" if made.is_new else "is here already, made of"
    click.echo(f"{new.name}: {new.display_name}, {state} {original.name}")
    if not made.is_new:
        click.echo("  --force makes it again")
    if _is_requantized(original):
        click.echo(
            f"  from {original.quantization}: quality is lost twice. Where the same model is at "
            "hand in F16 or BF16, start from that."
        )
    rows = [
        (
            "size",
            show_bytes(original.size_bytes),
            show_bytes(new.size_bytes),
            _percent(new.size_bytes / original.size_bytes),
        )
    ]
    if comparison is not None:
        rows += _measured_rows(comparison)
    print_table(("", original.quantization, new.quantization, ""), rows)
    if comparison is None:
        return
    if comparison.unscored:
        click.echo(f"Perplexity was not measured: {comparison.unscored}")
    else:
        click.echo(
            f"Perplexity over {comparison.new.losses.size} tokens of prose, lower is better; "
            f"speeds with {comparison.threads} thread{'s' if comparison.threads > 1 else ''}."
        )
    if comparison.ratio[0] > PERPLEXITY_RATIO_WARNED:
        click.echo(
            click.style("warning: ", fg="yellow")
            + f"the perplexity rises by {_percent(comparison.ratio[0])[1:]}: {new.name} is "
            "noticeably worse than the original. A type with more bits loses less."
        )


def _measured_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    original, new = comparison.original, comparison.new
    rows = []
    if not comparison.unscored:
        ratio, error = comparison.ratio
        rows.append(
            (
                "perplexity",
                f"{original.perplexity:.2f} ± {original.perplexity_error:.2f}",
                f"{new.perplexity:.2f} ± {new.perplexity_error:.2f}",
                f"x {ratio:.3f} ± {error:.3f}",
            )
        )
    for name, before, after in (
        ("prefill tok/s", original.prefill_tok_s, new.prefill_tok_s),
        ("decode tok/s", original.decode_tok_s, new.decode_tok_s),
    ):
        rows.append((name, f"{before:.0f}", f"{after:.0f}", f"x {after / before:.2f}"))
    return rows


def _percent(ratio: float) -> str:
    """A ratio as a change: "+12 %"."""
    return f"{(ratio - 1) * 100:+.0f} %"
