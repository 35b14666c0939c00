"""What a model is called, for people: "Qwen3-8B-4bit" is "Qwen 3 8B (4-bit)"."""

from __future__ import annotations

import re

_FORMAT = re.compile(
    r"[-_. ](?:gguf|mlx|awq|gptq|dwq|exl2"
    r"|i?q\d+(?:[-_.](?:[0-9a-z]{1,3}))*|mxfp4|nvfp4|int[48]|fp?8|b?fp?16|fp?32|\d+-?bits?)$",
    re.IGNORECASE,
)
"""What names end with to say how weights are stored; the files themselves say it better."""

_SIZE = re.compile(r"^(?:\d+x)?\d+(?:\.\d+)?[bmk]$", re.IGNORECASE)
"""Parameters: "8b", "1.7B", "8x7b"."""

_VERSIONED = re.compile(r"^([A-Za-z]{3,})(\d+(?:\.\d+)*)$")
"""A family's name with its version: "qwen3", "Phi3.5"."""

_SPELLINGS = {"gpt": "GPT", "oss": "OSS", "moe": "MoE", "glm": "GLM", "olmo": "OLMo", "vl": "VL"}
"""Names whose first letter is not the only large one."""


def display_title(title: str, quantization: str) -> str:
    """Return a model's title as people write it, with how its weights are stored.

    A title with spaces or brackets was written by somebody, and is left alone.

    Args:
        title: A repository's, file's or folder's name.
        quantization: As the files say it: "4-bit", "Q4_K_M", "BF16"; "" where they do not.
    """
    if re.search(r"[\s()\[\]]", title):
        return title
    bare = title
    while (shorter := _FORMAT.sub("", bare)) != bare:
        bare = shorter
    words = " ".join(_word(part) for part in re.split(r"[-_]+", bare) if part) or title
    return f"{words} ({quantization})" if quantization else words


def _word(part: str) -> str:
    if part.lower() in _SPELLINGS:
        return _SPELLINGS[part.lower()]
    if _SIZE.match(part):
        return part[:-1].lower() + part[-1].upper()
    if versioned := _VERSIONED.match(part):
        return f"{_word(versioned[1])} {versioned[2]}"
    return part.capitalize() if part.isalpha() and part.islower() else part
