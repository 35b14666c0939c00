# ruff: noqa: RUF001 - texts of many scripts
"""Texts that tokenizers fall over, vocabularies trained on them, and GGUF files of those."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from gguf_architectures import Value
from gguf_models import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

NASTY = (
    "",
    " ",
    "  ",
    "   leading, trailing and   inner spaces   ",
    "\t",
    "\n",
    "\n\n\n",
    "\r\n\r\n x\r\n",
    "a\n \n  \n\tb\n",
    " \n \n",
    "tabs\tand \t mixed\t\t\nlines\r\n\n\nend",
    "\u00a0no-break\u00a0 space\u3000ideographic\u3000\u3000 \u2003em\u2028line\u0085next",
    "\x00\x01\x1b[0m\x7f control",
    "1 12 123 1234 12345 123456 1234567 12345678901234567890",
    "3.14159 1,000,000 0x1F 1e-9 2026-11-20T14:59:35Z v1.2.3 50% $9.99 €5 #7",
    "١٢٣٤٥٦ ½ ² Ⅻ ①②③ 千二百 0１２３",
    "can't won't I'll they've HE'S we'RE 'tis o'clock 'd 'LL it''s l'été",
    "'rest 'terms 'selfish 'dare 'vente 'llama it'serious we'Reset I'Monday",
    "don’t it’s rock ‘n’ roll",
    "camelCase PascalCase snake_case SCREAMING_CASE iPhone15Pro XMLHttpRequest eBay",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment\n",
    'if (a&&b || !c) { x += 1; y[0] = "s\\n"; } // ok\n\n\n/* --- */',
    "<html><body class='x'>&amp; &lt;</body></html>",
    "https://example.org/path?q=1&r=%20#frag user@example.org C:\\dir\\file.txt",
    "Hello, World!!! ... ?!? -- --- “quotes” (brackets) [x] {y} `code` ~ ^ | \\ @ =+<>",
    "... word...word ,comma ,,, . ; :) :-( /path /* \n/ \n//",
    "naïve café œuvre straße Müller's Żółć ñandú",
    "ÅÄÖ ÉCOLE Été ÀÉÎ ΑΒΓ Привет МИР",
    "e\u0301 vs \u00e9, A\u030aB x\u0323\u0307y \u0301alone",
    "हिन्दी में लिखा हुआ पाठ বাংলা ไทยภาษา தமிழ்",
    "مرحبا بالعالم، كيف؟ שלום עולם ־ नमस्ते।",
    "日本語のテキスト、カタカナ。ひらがな々〇 中文文本：测试“引用”！ 한국어 텍스트 ㄱㄴ ㄅㄆ",
    "中文English混合123数字、标点。",
    "𠀀𠀁 豈 〆 ｆｕｌｌ ｗｉｄｔｈ ﾊﾝｶｸ",
    "🦙🔥👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 🇩🇪 ☺️ ✨x✨",
    "∑∫√≠≤ → ⇒ ± × ÷ µ ° © ® ™ § ¶",
    "\u200bzero\u200dwidth\u200c \ufeffbom \u00adsoft \u202eoverride",
    "𝕬𝖇 ǅ ǆ ªº ʰ ˈ ﬁ ﬀ ß ẞ ı İ",
    "\ue000private \ufffd replaced \U000f0000 \U0010fffd \u0378unassigned",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=" * 40 + "\n" + "-" * 17 + " " * 33 + "end" + "\n" * 9,
    " a b  c   d    e     f" + " " * 64 + "g" + "\t" * 8,
    "<|begin|>user\nhi<|stop|>\n<|begin|>assistant\n",
    "text<|stop|>text <|stop|> text<|stop|>",
    "Quokka numbat Quokkas",
    "<|tool|>x<|tool|> y",
    "<|begin|> \n\t x<s>  y</s>  z<|endoftext|>\n  <unk>  w",
    "<|unfinished <|end <0x41> <0x0A> <s> </s> <unk> ▁ ▁▁x",
)
"""Whitespace, digits, contractions, case, scripts, marks, emoji, control and special tokens."""

_LETTERS = (
    "aZ bY cX dW 0 1 23 456 7890 é É ß ж Ж λ ñ 中 文 の カ 한 글 ا ه א ह ि ् \u0301 \u200b \u200d"
)
_ENDINGS = "' 's 'S 't 're 'VE 'll 'D ’s the and ing tion return self. http:// </ 🦙 👍🏽 € ° ½ ²"
_SYMBOLS = '. , ; : ! ? ( ) [ ] { } < > / \\ | @ # $ % ^ & * - _ + = ~ ` " 。 、 ， ！ “ ” …'
_SPACES = " ", " ", " ", " ", "  ", "   ", "\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000"
_PARTS = (*_LETTERS.split(" "), *_ENDINGS.split(" "), *_SYMBOLS.split(" "), *_SPACES)


def random_texts(count: int, *, seed: int) -> list[str]:
    """Texts of 1 to 30 parts, the same ones for a seed."""
    generator = random.Random(seed)
    return ["".join(generator.choices(_PARTS, k=generator.randint(1, 30))) for _ in range(count)]


PROSE = (
    "A ring of peers runs a model together: each holds some of its layers, and what one has "
    "computed goes straight to the next.\nNobody waits for a coordinator, and nobody needs to "
    "hold it all. In 2024 that took 3 machines; by 2026 they'd do with 12 old laptops.\n\n"
    "    for peer in peers:\n        peer.step(rows)  # 1,024 tokens\n"
)

SPACE = "\u2581"

UNMERGED = ("Quokka", "\u0120numbat")
"""Words of the byte-level vocabulary that no merge comes to."""

SPECIAL = ("<|begin|>", "<|stop|>", "<|tool|>")
"""Control, control and user-defined; first in each vocabulary."""


@cache
def training_texts() -> tuple[str, ...]:
    # No merges are to come to "</s>", which would be a token that ends replies.
    nasty = [text for text in NASTY if "s>" not in text]
    return (*[PROSE] * 3, *nasty * 3, *random_texts(600, seed=1))


@cache
def byte_level_metadata() -> dict[str, Value]:
    """A byte-level BPE vocabulary whose merges cross words, so that every cut of text shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        max_token_length=64,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].__getitem__), *UNMERGED]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@cache
def scored_metadata() -> dict[str, Value]:
    """A SentencePiece vocabulary: merges as scores, rare characters as bytes."""
    merges, letters = _spaced_merges()
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    pieces = {piece: -float(rank) for rank, piece in enumerate([*made, *letters])}
    return _spaced_metadata("llama", pieces)


@cache
def phi_metadata() -> dict[str, Value]:
    """The same of a model whose special tokens take the spaces after them, most of them."""
    metadata = dict(scored_metadata())
    more = {"tokens": ["<s>", "</s>", "<|endoftext|>"], "scores": [0.0] * 3, "token_type": [3] * 3}
    for key, values in more.items():
        old = metadata[f"tokenizer.ggml.{key}"]
        assert isinstance(old, list)
        metadata[f"tokenizer.ggml.{key}"] = [*old, *values]
    return {**metadata, "general.name": "Phi-3 mini"}


@cache
def unigram_metadata() -> dict[str, Value]:
    """The same with the scores of a unigram model, which say nothing about the order of merges."""
    tokenizer = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=1500, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", SPACE) for text in training_texts()], trainer)
    pieces = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    return _spaced_metadata("llama", {SPACE: -3.0, **pieces})


@cache
def spaced_metadata() -> dict[str, Value]:
    """Gemma 4's kind: merges over characters, spaces among them; runs of newlines not merged."""
    learnt, letters = _spaced_merges()
    merges = [pair for pair in learnt if "".join(pair).strip("\n")]
    runs = ["\n" * size for size in range(1, 32)]
    pieces = dict.fromkeys([*letters, *runs, *("".join(pair) for pair in merges)], 0.0)
    metadata = _spaced_metadata("gemma4", pieces)
    del metadata["tokenizer.ggml.scores"]
    return {**metadata, "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}


@cache
def _spaced_merges() -> tuple[list[list[str]], list[str]]:
    """Merges learnt on text with marks for spaces, and the characters kept."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, limit_alphabet=150, max_token_length=64, show_progress=False
    )
    texts = [text.replace(" ", SPACE) for text in training_texts()]
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return bpe["merges"], sorted(text for text in bpe["vocab"] if len(text) == 1)


def _spaced_metadata(model: str, pieces: Mapping[str, float]) -> dict[str, Value]:
    named = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    # To llama.cpp a token ends before its first NUL.
    learnt = [piece for piece in pieces if piece not in named and "\0" not in piece]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": [*named, *learnt],
        "tokenizer.ggml.scores": [0.0] * len(named) + [float(pieces[piece]) for piece in learnt],
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(learnt),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_vocabulary(path: Path, metadata: Mapping[str, Value]) -> Path:
    """Write a GGUF without tensors."""
    base: dict[str, Value] = {"general.architecture": "llama", "llama.context_length": 512}
    write_gguf(path, {**base, **metadata}, {})
    return path
