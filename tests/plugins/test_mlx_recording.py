"""What a recording finds in toy models whose wiring is known."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from swarmpy.errors import ModelRefused
from swarmpy.plugins.mlx.recording import Layers, Recording, record
from swarmpy.proto.tensor import TensorSpec

WIDTH = 8
COUNT = 4


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def __call__(self, x: mx.array, cache: KVCache, extra: mx.array | None = None) -> mx.array:
        heads = x[:, None]
        keys, values = cache.update_and_fetch(heads, heads)
        y = mx.fast.scaled_dot_product_attention(heads, keys, values, scale=1.0)[:, 0]
        return x + self.linear(y if extra is None else y + extra)


class PairLayer(ToyLayer):
    """Also returns its keys, which nobody need look at."""

    def __call__(self, x: mx.array, cache: KVCache) -> tuple[mx.array, mx.array]:  # type: ignore[override]
        y = super().__call__(x, cache)
        return y, cache.keys


class Toy(nn.Module):
    """Embedding, four layers, head; subclasses wire the layers."""

    def __init__(self, layer: Callable[[], nn.Module] = ToyLayer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers = [layer() for _ in range(COUNT)]
        self.head = nn.Linear(WIDTH, 20, bias=False)

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in range(COUNT)]

    def __call__(self, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
        return self.head(self.run_layers(self.embedding(token_ids), token_ids, cache))

    def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
        for layer, own in zip(self.layers, cache, strict=True):
            x = layer(x, own)
        return x


def recorded(module: nn.Module) -> Recording:
    return record(module, Layers(module))


def test_a_plain_chain_can_be_cut_anywhere() -> None:
    recording = recorded(Toy())

    assert sorted(recording.carried) == [1, 2, 3]
    assert recording.wire_spec(2) == (TensorSpec("float32", (-1, WIDTH)),)
    assert [needs.token_ids for needs in recording.layer_needs] == [True, False, False, False]
    assert recording.needs(1, 2).parameters == {"layers.1.linear.weight"}
    assert recording.needs(3, 4).parameters == {"layers.3.linear.weight", "head.weight"}


def test_layers_that_use_one_cache_are_not_cut_apart() -> None:
    class SharedCache(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            for index, layer in enumerate(self.layers):
                x = layer(x, cache[1 if index == 2 else index])
            return x

    assert sorted(recorded(SharedCache()).carried) == [1, 3]


def test_a_layer_that_reads_an_older_output_is_not_cut_off_from_it() -> None:
    class Skip(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            first = x = self.layers[0](x, cache[0])
            x = self.layers[1](x, cache[1])
            x = self.layers[2](x, cache[2])
            return self.layers[3](x, cache[3], extra=first)

    assert sorted(recorded(Skip()).carried) == [1]


def test_a_layer_that_embeds_the_tokens_again_is_found() -> None:
    class EmbedsAgain(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            for index, layer in enumerate(self.layers):
                extra = self.embedding(token_ids) if index == 2 else None
                x = layer(x, cache[index], extra=extra)
            return x

    recording = recorded(EmbedsAgain())

    assert [needs.token_ids for needs in recording.layer_needs] == [True, False, True, False]
    assert "embedding.weight" in recording.needs(2, 3).parameters


def test_an_output_nobody_reads_does_not_cross() -> None:
    """The keys grow with the sequence: were they needed, there would be no cut at all."""

    class Pairs(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            for layer, own in zip(self.layers, cache, strict=True):
                x, _ = layer(x, own)
            return x

    recording = recorded(Pairs(PairLayer))

    assert sorted(recording.carried) == [1, 2, 3]
    assert len(recording.leaves[0]) == 2
    assert recording.wire_spec(1) == (TensorSpec("float32", (-1, WIDTH)),)


def test_a_model_that_keeps_a_state_itself_is_found() -> None:
    class Remembers(Toy):
        def __init__(self) -> None:
            super().__init__()
            self._last = mx.zeros((1,))

        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            self._last = x
            return super().run_layers(x, token_ids, cache)

    assert recorded(Remembers()).keeps_state_itself
    assert not recorded(Toy()).keeps_state_itself


def test_layers_called_out_of_order_are_refused() -> None:
    class Backward(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            for layer, own in zip(self.layers[::-1], cache, strict=True):
                x = layer(x, own)
            return x

    with pytest.raises(ModelRefused, match="out of order"):
        recorded(Backward())


def test_a_layer_used_twice_is_refused() -> None:
    toy = Toy()
    toy.layers = [toy.layers[0]] * COUNT

    with pytest.raises(ModelRefused, match="one layer in several places"):
        recorded(toy)


def test_a_model_that_leaves_a_layer_out_is_refused() -> None:
    class Lazy(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            return self.layers[0](x, cache[0])

    with pytest.raises(ModelRefused, match="1 calls of 4 layers"):
        recorded(Lazy())


def test_calls_of_one_compiled_function_are_told_apart() -> None:
    """MLX draws them with one number; taken for one operation, all layers would need all others."""
    gate = mx.compile(lambda x: nn.silu(x) * 2)

    class Compiled(Toy):
        def run_layers(self, x: mx.array, token_ids: mx.array, cache: list[KVCache]) -> mx.array:
            for layer, own in zip(self.layers, cache, strict=True):
                x = layer(gate(x), own)
            return x

    assert sorted(recorded(Compiled()).carried) == [1, 2, 3]
