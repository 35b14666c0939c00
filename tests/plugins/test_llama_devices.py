"""How many layers GPUs hold; without one here, the arithmetic, and that a CPU build sees none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarmpy.abc import Inspection
from swarmpy.errors import ConfigError, ExtensionNotFound
from swarmpy.pipeline.fit import fit
from swarmpy.plugins.llama.devices import (
    GPU_LAYERS_MAX,
    GPU_LAYERS_VARIABLE,
    GPU_SHARE,
    Gpu,
    find_gpus,
    fitting_gpu_layers,
    wanted_gpu_layers,
)
from swarmpy.plugins.llama.library import find_library, open_library
from swarmpy.testing.engine import EchoModel, inspection_of

SLOTS, CONTEXT = 2, 1024
MODEL = inspection_of(EchoModel(layers=8, kv_bytes_per_token=1000))


def gpu(size: int) -> Gpu:
    """A GPU of which this much is counted on."""
    return Gpu("gpu", round(size / GPU_SHARE) + 1)


def need(model: Inspection, layers: int) -> int:
    """What the last layers of the model take on one GPU, its head included."""
    terms = fit(model, model.layer_count - 1, model.layer_count, slots=SLOTS, context=CONTEXT)
    layer = model.layer_weight_bytes[0] + terms.slots
    return layers * layer + model.head_weight_bytes + terms.activations + terms.logits


def held(*gpus: Gpu, model: Inspection = MODEL, start: int = 0, end: int = 8) -> int:
    return fitting_gpu_layers(model, start, end, slots=SLOTS, context=CONTEXT, gpus=gpus)


def test_without_a_gpu_everything_stays_on_the_cpu() -> None:
    assert held() == 0


def test_a_large_gpu_holds_all_layers_and_the_head() -> None:
    assert held(gpu(need(MODEL, 8))) == 9


@pytest.mark.parametrize("layers", [1, 5, 7])
def test_a_small_gpu_holds_the_head_and_as_many_of_the_last_layers_as_fit(layers: int) -> None:
    assert held(gpu(need(MODEL, layers))) == layers + 1
    assert held(gpu(need(MODEL, layers + 1) - 10)) == layers + 1


def test_a_gpu_that_holds_no_layer_beside_the_head_holds_nothing() -> None:
    assert held(gpu(need(MODEL, 1) - 10)) == 0


def test_a_shard_without_the_head_needs_no_room_for_it() -> None:
    size = need(MODEL, 4) - MODEL.head_weight_bytes

    assert held(gpu(size), start=0, end=4) == 5
    assert held(gpu(size), start=4, end=8) < 5


def test_more_slots_leave_room_for_fewer_layers() -> None:
    room = [gpu(need(MODEL, 8))]

    assert fitting_gpu_layers(MODEL, 0, 8, slots=64, context=CONTEXT, gpus=room) < 9


def test_of_two_gpus_the_room_of_a_layer_is_not_counted_on() -> None:
    half = need(MODEL, 8) // 2

    assert held(gpu(half), gpu(half)) < held(gpu(2 * half)) == 9


def test_layers_of_different_sizes_are_counted_from_the_end() -> None:
    sizes = (*MODEL.layer_weight_bytes[:7], MODEL.layer_weight_bytes[7] * 3)
    model = replace(MODEL, layer_weight_bytes=sizes)

    assert held(gpu(need(MODEL, 4)), model=model) == 1 + 2


@pytest.mark.parametrize(
    ("text", "layers"), [("", None), ("0", 0), ("12", 12), ("9999999", GPU_LAYERS_MAX)]
)
def test_the_settings_may_name_a_number_of_layers(text: str, layers: int | None) -> None:
    assert wanted_gpu_layers({GPU_LAYERS_VARIABLE: text}) == layers


@pytest.mark.parametrize("text", ["-1", "all", "1.5", "99999999", "٣"])
def test_a_wrong_number_of_layers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=GPU_LAYERS_VARIABLE):
        wanted_gpu_layers({GPU_LAYERS_VARIABLE: text})


def test_a_build_for_cpus_sees_no_gpu() -> None:
    try:
        library = open_library(find_library())
    except ExtensionNotFound as missing:
        pytest.skip(f"no llama.cpp library: {missing}")

    assert find_gpus(library) == []
