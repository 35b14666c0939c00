"""The depths from which llama.cpp concludes which model it has are those that cuts keep clear of.

Method: a tiny model of each architecture, made deeper by layers of zeros; its logits change with
the depth where the cuts say that they do, and nowhere else.
"""

from __future__ import annotations

import os

import pytest
from gguf_architectures import MODELS

from swarmpy.errors import ExtensionNotFound
from swarmpy.plugins.llama.architectures import ARCHITECTURES
from swarmpy.plugins.llama.library import find_library

try:
    find_library()
except ExtensionNotFound as missing:
    pytest.skip(f"no llama.cpp library: {missing}", allow_module_level=True)

from gguf_depths import differing_depths

DEPTHS = (16, 24, 26, 27, 28, 30, 32, 34, 36, 40, 42, 46, 47, 48, 60, 61, 62, 63, 64, 80, 126)
"""Of published models, and of those all that count. Every depth to 100 was tried once."""

STATED = {"minicpm": "minicpm+scales"}
"""Models that say what would follow from their depth, as their parts do."""


QUICK = ("command-r", "deepseek2", "gemma3", "mistral4")
"""Run each time. All take minutes: `make test ARGS=tests/plugins/test_llama_depths.py` with
SWARMPY_ALL_DEPTHS=1, for another version of the library."""


@pytest.mark.parametrize(
    "architecture", sorted(ARCHITECTURES if os.environ.get("SWARMPY_ALL_DEPTHS") else QUICK)
)
def test_logits_change_with_the_depth_where_cuts_keep_clear_of_it(architecture: str) -> None:
    name = STATED.get(architecture, architecture)
    assert name in MODELS

    assert differing_depths([name], DEPTHS) == {name: ""}
