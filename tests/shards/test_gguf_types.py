"""GGUF tensor types: what we know of each is what ggml's own table says, and no more.

The library is opened in a child process: an assertion in it would end the test run.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shard_files import gguf_bytes, llama_metadata, zeros

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.library import find_library
from swarmpy.shards.describe import FILE_TYPES, describe
from swarmpy.shards.gguf import BLOCKS, GgmlType

NUMBERS = range(43)
"""Those of the pinned library, `GGML_TYPE_COUNT`; it does not check them itself."""

FILE_TYPE_NUMBERS = range(64)


def read_tables() -> None:
    """Print name, elements and bytes of a block by type number, and the names of file types."""
    native = ctypes.CDLL(str(find_library()), mode=ctypes.RTLD_LOCAL)
    native.ggml_type_name.restype = native.llama_ftype_name.restype = ctypes.c_char_p
    native.ggml_blck_size.restype = ctypes.c_int64
    native.ggml_type_size.restype = ctypes.c_size_t
    types = [
        (
            native.ggml_type_name(number).decode(),
            native.ggml_blck_size(number),
            native.ggml_type_size(number),
        )
        for number in NUMBERS
    ]
    files = [native.llama_ftype_name(number).decode() for number in FILE_TYPE_NUMBERS]
    json.dump([types, files], sys.stdout)


@pytest.fixture(scope="module")
def tables() -> tuple[list[tuple[str, int, int]], list[str]]:
    try:
        find_library()
    except ExtensionNotFound as error:
        pytest.skip(str(error))
    code = "from test_gguf_types import read_tables; read_tables()"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    types, files = json.loads(answer.stdout)
    return [tuple(row) for row in types], files


def test_every_type_is_the_librarys(tables: tuple[list[tuple[str, int, int]], list[str]]) -> None:
    """Types that ggml has given up have no block there, and no name here."""
    theirs = {
        number: (name.upper(), items, size)
        for number, (name, items, size) in enumerate(tables[0])
        if items > 0
    }

    assert {int(kind): (kind.name, *BLOCKS[kind]) for kind in GgmlType} == theirs


def test_every_file_type_is_named_as_the_library_names_it(
    tables: tuple[list[tuple[str, int, int]], list[str]],
) -> None:
    """Its names are longer: "Q4_K - Medium", "IQ2_XS - 2.3125 bpw", "all F32"."""
    theirs = {
        number: re.sub(r"all | - [\d.]+ bpw.*", "", name)
        .replace(" - ", "_")
        .replace("Small", "S")
        .replace("Medium", "M")
        .replace("Large", "L")
        .replace("IQ3_S mix_3.66 bpw", "IQ3_M")
        .replace("IQ3_S mix", "IQ3_M")
        .replace("Q2_K_M", "Q2_K")
        .replace(" MoE", "_MOE")
        for number, name in enumerate(tables[1])
        if not name.startswith("unknown")
    }

    assert {number: name for number, (name, _) in FILE_TYPES.items()} == theirs


def quantization(path: Path, file_type: int | None, *kinds: GgmlType) -> str:
    """What a file of one row of each type is said to be."""
    stated = {} if file_type is None else {"general.file_type": file_type}
    tensors = {kind.name: zeros(kind, (1, 256)) for kind in kinds}
    path.write_bytes(gguf_bytes({**llama_metadata(), **stated}, tensors))
    return describe(path).quantization


@pytest.mark.parametrize(
    ("file_type", "kinds", "name"),
    [
        (15, [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.F32], "Q4_K_M"),
        (15, [GgmlType.Q4_K, GgmlType.Q8_0], "Q4_K_M"),
        (14, [GgmlType.Q4_K], "Q4_K_S"),
        (38, [GgmlType.MXFP4, GgmlType.Q8_0], "MXFP4_MOE"),
        (1, [GgmlType.F16], "F16"),
    ],
)
def test_a_file_is_called_what_it_says(
    tmp_path: Path, file_type: int, kinds: list[GgmlType], name: str
) -> None:
    assert quantization(tmp_path / "a.gguf", file_type, *kinds) == name


@pytest.mark.parametrize(
    ("file_type", "kinds", "name"),
    [
        (None, [GgmlType.Q4_K, GgmlType.Q6_K], "Q6_K"),
        (15, [GgmlType.Q5_K, GgmlType.Q6_K], "Q6_K"),
        (0, [GgmlType.Q8_0, GgmlType.F16], "F16"),
        (1, [GgmlType.F16, GgmlType.F32], "F32"),
        (999, [GgmlType.IQ4_XS], "IQ4_XS"),
        (-1, [GgmlType.TQ2_0], "TQ2_0"),
    ],
)
def test_a_file_whose_tensors_say_otherwise_is_called_by_its_widest_type(
    tmp_path: Path, file_type: int | None, kinds: list[GgmlType], name: str
) -> None:
    assert quantization(tmp_path / "a.gguf", file_type, *kinds) == name
