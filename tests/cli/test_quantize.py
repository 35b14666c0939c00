"""`swarmpy models quantize`, as a user types it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import trio
from gguf_models import Tensor, metadata_of, write_gguf, write_models

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.library import find_library
from swarmpy.plugins.llama.measure import Measured
from swarmpy.plugins.llama.quantize import Quantized
from swarmpy.shards.catalog import ModelEntry
from swarmpy.shards.gguf import GgmlType
from swarmpy_cli.quantize import Comparison, show
from swarmpy_cli.run import run_async
from tests.cli.processes import Swarmpy, started

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), ("llama",))["llama"]


def entry(name: str, quantization: str, *, size_bytes: int = 1000) -> ModelEntry:
    return ModelEntry(
        model_id=name.ljust(64, "0"),
        name=name,
        display_name=name.title(),
        path=Path(name),
        format="gguf",
        size_bytes=size_bytes,
        license="",
        source="",
        architecture="llama",
        layer_count=6,
        parameter_count=0,
        context_max=256,
        quantization=quantization,
    )


def comparison(*, rise: float) -> Comparison:
    """Of losses that all are `rise` (nats) higher in the new model, at twice the speed."""
    losses = np.array([2.0, 3.0, 4.0])
    original = Measured(losses=losses, prefill_tok_s=100.0, decode_tok_s=10.0)
    new = Measured(losses=losses + rise, prefill_tok_s=200.0, decode_tok_s=20.0)
    return Comparison(original=original, new=new, threads=1)


def test_a_new_model_is_listed_and_says_what_it_is_made_of(swarmpy: Swarmpy, tiny: Path) -> None:
    pulled = swarmpy("models", "pull", str(tiny), "--json").document

    made = swarmpy("models", "quantize", "llama", "--to", "q4_0", "--no-measure", "--json").document

    assert made["original"] == pulled
    assert (made["is_new"], made["is_requantized"], made["measured"]) == (True, False, None)
    listed = swarmpy("models", "list", "--json").document["models"]
    assert [item["model_id"] for item in listed] == [
        item["model_id"] for item in (pulled, made["model"])
    ]
    shown = swarmpy("models", "show", "llama-q4_0", "--json").document
    assert shown["model_id"] == made["model"]["model_id"]
    assert (shown["derived_from"], shown["quantization"]) == (pulled["model_id"], "Q4_0")


def test_a_path_will_do_and_speeds_are_shown_where_no_text_can_be_scored(
    swarmpy: Swarmpy, tiny: Path
) -> None:
    """The tiny model has no vocabulary."""
    ran = swarmpy("models", "quantize", str(tiny), "--to", "q8_0")

    assert ran.code == 0, ran.errors
    lines = ran.output.splitlines()
    assert "llama-q8_0: Llama (Q8_0), made of llama" in lines
    assert [line.split()[0] for line in lines if line.startswith(("size", "p", "d"))] == [
        "size",
        "prefill",
        "decode",
    ]
    assert "Perplexity was not measured: llama.gguf: tokenizer 'none'" in ran.output


def test_numbers_are_measured_for_programs_too(swarmpy: Swarmpy, tiny: Path) -> None:
    document = swarmpy("models", "quantize", str(tiny), "--to", "q8_0", "--json").document

    measured = document["measured"]
    assert isinstance(measured, dict)
    assert measured["original"]["perplexity"] is None
    gain = measured["new"]["decode_tok_s"] / measured["original"]["decode_tok_s"]
    assert measured["decode_gain"] == pytest.approx(gain)
    assert (measured["threads"], measured["scored_tokens"]) == (1, 0)


def test_what_is_there_is_not_made_again(swarmpy: Swarmpy, tiny: Path) -> None:
    words = ("models", "quantize", str(tiny), "--to", "q4_0", "--no-measure")
    swarmpy(*words)

    again = swarmpy(*words)

    assert again.code == 0
    assert "llama-q4_0: Llama (Q4_0), is here already, made of llama" in again.output
    assert "--force makes it again" in again.output
    assert "is here already" not in swarmpy(*words, "--force").output


def test_an_unknown_type_is_refused_with_a_list(swarmpy: Swarmpy, tiny: Path) -> None:
    ran = swarmpy("models", "quantize", str(tiny), "--to", "q7")

    assert ran.code == 1
    assert "no model can be quantised to 'q7'" in ran.errors
    assert "Use one of q4_0, q4_1, q4_k_s" in ran.errors
    assert swarmpy("models", "list", "--json").document["models"] == []


def test_a_model_that_is_not_here_is_not_fetched(swarmpy: Swarmpy) -> None:
    ran = swarmpy("models", "quantize", "smollm2-135m-instruct", "--to", "q4_0")

    assert ran.code == 1
    assert "swarmpy models pull smollm2-135m-instruct" in ran.errors


def test_cost_and_gain_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    made = Quantized(entry=entry("b", "Q4_0", size_bytes=900), is_new=True)

    show(entry("a", "Q4_1"), made, comparison(rise=0.05))

    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Q4_1 Q4_0" in shown
    assert "size 1.0 kB 900 B -10 %" in shown
    assert "perplexity 20.09 ± 11.60 21.12 ± 12.19 x 1.051 ± 0.000" in shown
    assert "prefill tok/s 100 200 x 2.00" in shown
    assert "decode tok/s 10 20 x 2.00" in shown
    assert any("from Q4_1: quality is lost twice" in line for line in shown)
    assert not any("warning" in line for line in shown)


def test_a_clear_loss_of_quality_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    made = Quantized(entry=entry("b", "Q4_0"), is_new=True)

    show(entry("a", "F16"), made, comparison(rise=0.2))

    shown = capsys.readouterr().out
    assert "warning: the perplexity rises by 22 %: b is noticeably worse" in shown
    assert "lost twice" not in shown


@pytest.mark.skipif(sys.platform == "win32", reason="engine children need POSIX")
def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    """Method: weights that take seconds, and Ctrl-C as soon as the work is seen to have begun."""
    model = tmp_path / "large.gguf"
    raw = np.tile(np.random.default_rng(1).standard_normal(1 << 20, np.float32), 16).tobytes()
    names = [f"blk.{layer}.ffn_up.weight" for layer in range(4)]
    tensor = Tensor(GgmlType.F32, (4096, 4096), raw)
    write_gguf(
        model, {**metadata_of("llama"), "llama.block_count": 4}, dict.fromkeys(names, tensor)
    )
    words = ("models", "quantize", str(model), "--to", "q5_k_m", "--no-measure")

    with started(tmp_path / "home", *words) as process:
        output = process.popen.stdout
        assert output is not None
        for line in output:
            if b"quantising" in line:
                break
        code, _ = process.signal_and_wait(signal.SIGINT)

    assert code == 130
    cache = tmp_path / "cache"
    assert [path for part in ("downloads", "models") for path in (cache / part).glob("*")] == []


def test_ctrl_c_is_itself_where_tasks_made_a_group_of_it() -> None:
    """As during the measurement; else it would end in a traceback."""

    async def interrupted() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_async(interrupted)
