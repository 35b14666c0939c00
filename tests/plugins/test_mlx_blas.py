"""OpenBLAS under MLX: in use and right where it can be had, and given up without harm elsewhere."""

from __future__ import annotations

import platform
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from swarmpy.plugins.mlx import blas

on_linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="OpenBLAS is bound on Linux only",
)


@on_linux
def test_mlx_computes_with_openblas() -> None:
    bound = blas.bind_openblas()

    assert bound.name.startswith("openblas 0.")
    assert bound.gflops > 10  # The reference BLAS of the wheel has about 4.


@on_linux
def test_the_machines_load_does_not_choose_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a busy core made OpenBLAS look slow, and the slow library was taken.

    Method: how many threads it has while it is timed, and afterwards.
    """
    library, timed = blas._library(), []
    library.scipy_openblas_set_num_threads(2)

    def measure() -> float:
        timed.append(library.scipy_openblas_get_num_threads())
        return 10.0 ** len(timed)

    monkeypatch.setattr(blas, "_bound", None)
    monkeypatch.setattr(blas, "_measure_gflops", measure)

    assert blas.bind_openblas().name.startswith("openblas ")
    assert timed[-1] == 1
    assert library.scipy_openblas_get_num_threads() == 2


@on_linux
def test_the_table_of_functions_is_left_as_protected_as_it_was() -> None:
    before = blas._find_slot().protection

    blas.bind_openblas()

    assert blas._find_slot().protection == before


def test_a_product_is_right_whatever_computes_it() -> None:
    blas.bind_openblas()
    left = np.random.default_rng(1).normal(size=(65, 33)).astype(np.float32)
    right = np.random.default_rng(2).normal(size=(33, 17)).astype(np.float32)

    product = np.array(mx.array(left) @ mx.array(right))

    np.testing.assert_allclose(product, left @ right, atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        b"#!/bin/sh\n" + bytes(100),
        b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 3, 62) + b"\xff" * 100,
        b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 2, 62) + bytes(100),
    ],
)
def test_a_library_that_is_none_is_given_up(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "libmlx.so"
    path.write_bytes(content)

    with pytest.raises(blas.BlasUnavailable):
        blas._slot_offset(path)
