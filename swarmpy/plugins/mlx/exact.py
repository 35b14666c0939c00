"""Exact mode: a sequence's bits must not depend on what else is computed with it.

A BLAS chooses its kernel by the number of rows, and with it the order of additions; logits move by
up to 7e-5. So every linear of a decode step runs in tiles of exactly eight rows, filled up with
zeros: measured bit-equal for 1 to 15 ragged sequences. Prompts need no tiles: their chunks lie on a
fixed grid and run alone. Spec: protocols/engine.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

ROW_TILE = 8
"""Rows of a tile: the fewest for which all tested kernels of OpenBLAS treat every row alike."""


class Tiles:
    """Switches the tiles of one model's linears on for decode steps."""

    def __init__(self) -> None:
        self.is_on = False
        self._zeros: dict[tuple[int, int, mx.Dtype], mx.array] = {}

    def install(self, model: nn.Module) -> None:
        """Re-class the model's linears so that they obey this switch."""
        for _, module in model.named_modules():
            method = _ROW_WISE.get(type(module))
            if method is not None:
                module.__class__ = _tiled_class(type(module), method)
                module.__dict__["_tiles"] = self

    def run(self, linear: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Apply a row-wise `linear` to `x` (..., K), in tiles if they are on."""
        if not self.is_on:
            return linear(x)
        shape = x.shape
        rows = x.size // shape[-1]
        flat = x.reshape(rows, shape[-1])
        if rows % ROW_TILE:
            flat = mx.concatenate([flat, self._filling(-rows % ROW_TILE, shape[-1], x.dtype)])
        tiles = [linear(flat[at : at + ROW_TILE]) for at in range(0, rows, ROW_TILE)]
        y = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)
        return y[:rows].reshape(*shape[:-1], y.shape[-1])

    def _filling(self, rows: int, width: int, dtype: mx.Dtype) -> mx.array:
        """Return rows of zeros, always the same ones."""
        key = (rows, width, dtype)
        if key not in self._zeros:
            self._zeros[key] = mx.zeros((rows, width), dtype)
            mx.eval(self._zeros[key])
        return self._zeros[key]


_ROW_WISE: dict[type, str] = {
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}
"""Modules whose method treats each row by itself, but for the order of additions."""

_tiled_classes: dict[type, type] = {}


def _tiled_class(kind: type, method: str) -> type:
    """Return a subclass of `kind` whose row-wise `method` runs in tiles."""
    if kind in _tiled_classes:
        return _tiled_classes[kind]
    real = getattr(kind, method)

    def run_tiled(self: nn.Module, x: mx.array) -> mx.array:
        tiles: Tiles = self.__dict__["_tiles"]
        return tiles.run(lambda rows: real(self, rows), x)

    tiled = type(f"Tiled{kind.__name__}", (kind,), {method: run_tiled})
    _tiled_classes[kind] = tiled
    return tiled
