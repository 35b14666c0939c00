"""Models' titles, as people write them."""

from __future__ import annotations

import pytest

from swarmpy.shards.titles import display_title


@pytest.mark.parametrize(
    ("title", "quantization", "shown"),
    [
        ("Qwen3-8B-4bit", "4-bit", "Qwen 3 8B (4-bit)"),
        ("Qwen3-8B-MLX-4bit", "4-bit", "Qwen 3 8B (4-bit)"),
        ("qwen2.5-0.5b-instruct-q4_k_m", "Q4_K_M", "Qwen 2.5 0.5B Instruct (Q4_K_M)"),
        ("Llama-3.2-1B-Instruct-Q4_K_M", "Q4_K_M", "Llama 3.2 1B Instruct (Q4_K_M)"),
        ("Mixtral-8x7B-Instruct-v0.1-GGUF", "Q5_0", "Mixtral 8x7B Instruct v0.1 (Q5_0)"),
        ("gpt-oss-20b-mxfp4", "MXFP4", "GPT OSS 20B (MXFP4)"),
        ("gemma-2-2b-it-IQ3_XXS", "IQ3_XXS", "Gemma 2 2B It (IQ3_XXS)"),
        ("Qwen3-30B-A3B-bf16", "BF16", "Qwen 3 30B A3B (BF16)"),
        ("glm4", "", "GLM 4"),
        ("My own model", "F16", "My own model"),
        ("SmolLM2 135M Instruct (Q4_1)", "Q4_1", "SmolLM2 135M Instruct (Q4_1)"),
        ("q4", "Q4_0", "q4 (Q4_0)"),
        ("--", "", "--"),
    ],
)
def test_a_title_is_written_as_people_write_it(title: str, quantization: str, shown: str) -> None:
    assert display_title(title, quantization) == shown


def test_a_title_that_was_shown_once_is_not_changed_again() -> None:
    once = display_title("Qwen3-8B-4bit", "4-bit")

    assert display_title(once, "8-bit") == once
