"""How byte-level BPE vocabularies cut text into words before merging, by the name in a GGUF.

A merge never crosses a word's edge, so a wrong cut gives other tokens. Each name is held against
llama.cpp's own tokenizer (tests/shards/test_tokenizer_llama.py). Where llama.cpp is known to leave
the vocabulary's original pattern, for want of Unicode in its regular expressions, the original
stands here: it is what the model was trained with. Those places are named with the pattern.
Spec: protocols/manifest.md, section 4; the names are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Step = dict[str, object]
"""One pre-tokenizer, as tokenizer.json has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a vocabulary cuts text, and what else its name says."""

    steps: tuple[Step, ...]
    is_composed: bool = False
    """Text is brought to Unicode's composed form (NFC) first; llama.cpp leaves that out."""
    takes_whole_words: bool = False
    """A word that is a token itself is not merged from its parts."""
    begins_with_bos: bool = False
    """Unless the file says otherwise."""


def byte_level(*, use_regex: bool) -> Step:
    """Bytes to printable characters; `use_regex` cuts by GPT-2's pattern first."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }


def cut_at(pattern: str) -> Step:
    """What the pattern matches becomes a word, and so does what lies between."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _by(*patterns: str, **more: bool) -> Split:
    """Cut by one pattern after the other."""
    return Split(steps=(*map(cut_at, patterns), byte_level(use_regex=False)), **more)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _words(
    numbers: str,
    *,
    contractions: str = _CONTRACTIONS + "|",
    letters: str = r"\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    spaces: str = _SPACES,
) -> str:
    """The pattern that Llama 3's and most later vocabularies vary."""
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letters}|{numbers}|{symbols}|{_LINES}|{spaces}"


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(numbers: str, *, tail: str, symbols: str, but: str = "") -> str:
    """A pattern that cuts where a word's case changes: "camelCase".

    llama.cpp takes letters beyond ASCII for both cases and marks for no letters, or knows no case.
    """
    before = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    return (
        rf"{before}{upper}*{lower}+{tail}|{before}{upper}+{lower}*{tail}"
        rf"|{numbers}|{symbols}|{_LINES}|{_SPACES}"
    )


_SYMBOLS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = _cased(r"\p{N}{1,3}", tail=_CONTRACTIONS + "?", symbols=_SYMBOLS_OR_SLASH)

_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_SYMBOL_AND_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_MARKED_WORDS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = (
    rf"{_ASCII_SYMBOL_AND_WORD}|{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
"""As DeepSeek's first vocabularies list them."""

_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_NO_COMMAS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

# Numbers of more than 96 digits are cut in another way than the original's: its patterns look from
# each digit to the last one, so that a million digits from a user would take hours.
_THREES_FROM_THE_END = r"\d{1,3}(?=(?:\d{3}){0,31}\b)"
_EDGES_OF_THREES = r"(?=(\d{3}){1,32}(?!\d))"
_RUNS_OF_LINES = r"[^\n]+|[\n]+"

_GPT2_SPLIT = _by(_GPT2)
_SINGLE_DIGITS = _by(r"\p{N}", _GPT2)
_LLAMA3_SPLIT = _by(_LLAMA3, takes_whole_words=True, begins_with_bos=True)
_QWEN2_SPLIT = _by(_QWEN2)
_DEEPSEEK3_SPLIT = _by(r"\p{N}{1,3}", _CJK, _DEEPSEEK3)
_GPT4O_SPLIT = _by(_GPT4O)
_BLOOM_SPLIT = _by(_NO_COMMAS)

SPLITS: Mapping[str, Split] = {
    "default": _by(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    # GPT-2's.
    **dict.fromkeys(("gpt2", "gpt-2", "phi-2", "a.x-4.0", "exaone4", "gigachat"), _GPT2_SPLIT),
    **dict.fromkeys(("granite-docling", "jais", "mellum", "mpt", "olmo", "trillion"), _GPT2_SPLIT),
    # The same after single digits.
    **dict.fromkeys(("codeshell", "command-r", "exaone", "mellum2", "minerva-7b"), _SINGLE_DIGITS),
    **dict.fromkeys(("refact", "smollm", "starcoder"), _SINGLE_DIGITS),
    "chameleon": _by(
        r"<sentinel:[0-9]+>",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
        begins_with_bos=True,
    ),
    "falcon": _by(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    # Llama 3's: digits in threes.
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), _LLAMA3_SPLIT),
    **dict.fromkeys(("lfm2", "midm-2.0", "pixtral"), _LLAMA3_SPLIT),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "smaug-bpe"), _by(_LLAMA3)),
    **dict.fromkeys(("glm4", "glm5"), _by(_LLAMA3, takes_whole_words=True)),
    "jais-2": _by(
        _words(
            r"\p{N}{1,3}",
            spaces=r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)"
            r"|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "minicpm5": _by(r"\p{N}{1,3}", _words(r"\p{N}+"), takes_whole_words=True),
    # Qwen 2's: single digits.
    "qwen2": _by(_QWEN2, is_composed=True),
    "qwen35": _by(
        _words(r"\p{N}", letters=r"[\p{L}\p{M}]+", symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
        is_composed=True,
    ),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "deepseek-r1-qwen", "grok-2"), _QWEN2_SPLIT),
    **dict.fromkeys(("hunyuan", "kormo", "llada-moe", "megrez"), _QWEN2_SPLIT),
    **dict.fromkeys(("solar-open", "stablelm2"), _QWEN2_SPLIT),
    "exaone-moe": _by(
        _words(
            r"\p{N}",
            letters=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
        )
    ),
    "k2-horizon": _by(_words(r"\p{N}{1,3}", letters="(?:\\p{L}|\\p{M}|\u200c|\u200d)+")),
    "laguna": _by(_RUNS_OF_LINES, _QWEN2),
    "seed-coder": _by(_words(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+")),
    "ufakzeka": _by(_words(r"\p{N}", contractions="")),
    # GPT-4o's: also where case changes.
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie"), _GPT4O_SPLIT),
    "tekken": _by(
        _cased(r"\p{N}", tail="", symbols=_SYMBOLS_OR_SLASH),
        takes_whole_words=True,
        begins_with_bos=True,
    ),
    # llama.cpp also cuts numbers that letters follow, takes the spaces before a number to it, and
    # knows no case here.
    **dict.fromkeys(("cohere2moe", "tiny_aya"), _by(_THREES_FROM_THE_END, _GPT4O)),
    "kimi-k2": _by(
        r"[\p{Han}]+|"
        + _cased(
            r"\p{N}{1,3}",
            tail=_CONTRACTIONS + "?",
            symbols=r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            but=r"&&[^\p{Han}]",
        )
    ),
    "youtu": _by(
        "[\uac00-\ud7a3\u3131-\u318e]+|[\u3105-\u312f]+|"
        "[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
        + _CJK,
        _cased(r"\p{N}", tail=_CONTRACTIONS + "?", symbols=_SYMBOLS_OR_SLASH),
        takes_whole_words=True,
    ),
    # DeepSeek's.
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _DEEPSEEK3_SPLIT),
    # llama.cpp takes no ideographic space for one of these characters.
    "deepseek-llm": _by(
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"(?<!\s)\s+$",
        _EAST_ASIAN,
        r"\p{N}+",
    ),
    "deepseek-coder": _by(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}"),
    # llama.cpp counts ASCII's digits only.
    "superbpe": _by(r"\p{N}+", _EDGES_OF_THREES),
    "spark2_5": _by(
        r"\p{N}{1,3}",
        _CJK,
        rf"{_ASCII_SYMBOL_AND_WORD}|{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
        r"\p{N}",
    ),
    # Text without certain marks of punctuation.
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), _BLOOM_SPLIT),
    "viking": _by(_NO_COMMAS, r"\p{N}"),
}
"""By `tokenizer.ggml.pre`; a name that is not here is refused."""
