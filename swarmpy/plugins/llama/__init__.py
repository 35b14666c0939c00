"""The llama engine: GGUF models by layer range on a stock llama.cpp library, at its speed.

Importing this package costs nothing, and its class only a look for the library: that is opened by
the child process that computes, never by the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmpy.plugins.llama.engine import LlamaEngine

__all__ = ["LlamaEngine"]


def __getattr__(name: str) -> object:
    if name != "LlamaEngine":
        raise AttributeError(name)
    from swarmpy.plugins.llama.library import find_library

    find_library()  # A node without it must learn so now, and can take another engine.
    from swarmpy.plugins.llama.engine import LlamaEngine

    return LlamaEngine
