"""Tiles: what exact mode promises of one linear."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from swarmpy.plugins.mlx.blas import bind_openblas
from swarmpy.plugins.mlx.exact import Tiles


@pytest.fixture
def linear() -> nn.Linear:
    bind_openblas()
    mx.random.seed(3)
    return nn.Linear(576, 192, bias=True)


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 15])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(linear: nn.Linear, rows: int) -> None:
    tiles = Tiles()
    tiles.install(linear)
    tiles.is_on = True
    x = mx.random.normal((rows, 1, 576))
    alone = [numbers(linear(x[index : index + 1])) for index in range(rows)]

    together = numbers(linear(x))

    assert together.tobytes() == np.concatenate(alone).tobytes()


def test_tiles_change_nothing_but_the_last_bits(linear: nn.Linear) -> None:
    x = mx.random.normal((1, 5, 576))
    plain = numbers(linear(x))
    tiles = Tiles()
    tiles.install(linear)
    switched_off = numbers(linear(x))
    tiles.is_on = True

    assert switched_off.tobytes() == plain.tobytes()
    np.testing.assert_allclose(numbers(linear(x)), plain, atol=1e-5)


def test_a_tied_embedding_is_tiled_as_a_head_only() -> None:
    embedding = nn.Embedding(50, 64)
    tiles = Tiles()
    tiles.install(embedding)
    tiles.is_on = True

    assert embedding(mx.array([[1, 2]])).shape == (1, 2, 64)
    assert embedding.as_linear(mx.zeros((1, 2, 64))).shape == (1, 2, 50)
