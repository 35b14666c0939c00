"""From messages to the token ids of a prompt, as the model's own files say.

The template is rendered twice: with the messages, and with an unguessable placeholder for each
message's text. If filling in the placeholders gives what the messages gave, it is known which
characters a user wrote, and none of them becomes a special token. A template that looks into the
text or changes it gets the text itself, with the special tokens spelled in it broken in two.
Page: docs/http-api.md, "Special tokens".
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from swarmpy.environment import Environment
from swarmpy.errors import ModelRefused
from swarmpy.identity import RandomBytes
from swarmpy.plugins.gateway.errors import RequestRefused
from swarmpy.plugins.gateway.template import (
    RENDER_S_MAX,
    TEMPLATE_CHARS_MAX,
    ChatTemplate,
    Deadline,
)
from swarmpy.plugins.gateway.text import TextCodec, Written
from swarmpy.proto.pipeline import STOP_IDS_MAX
from swarmpy.shards import gguf
from swarmpy.shards.catalog import ModelEntry
from swarmpy.shards.refusals import (
    CONFIG_BYTES_MAX,
    TOKENIZER_CONFIG_BYTES_MAX,
    read_bytes,
    read_json,
)
from swarmpy.shards.special_tokens import end_ids
from swarmpy.shards.tokenizer_files import tokenizer_config, tokenizer_json

T = TypeVar("T")

TOKENIZER_BYTES_MAX = 64 * 1024 * 1024
"""tokenizer.json; the largest published ones (262 k tokens) have 33 MB."""

LOAD_S_MAX = 60.0
"""Deadline of reading a model's tokenizer and template. The largest take about two seconds."""

THREADS_MAX = 2
"""Worker threads that render and encode at a time, those given up on included."""

FORMATS_MAX = 4
"""Models whose tokenizers stay in memory, at 20 to 200 MB each."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
"""What a template may ask for by name."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as the template is given it."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class ChatFiles:
    """What a model's files say about text: the source of a `ChatFormat`."""

    tokenizer_json: str
    template: str
    special_tokens: Mapping[str, str]
    stop_ids: frozenset[int]
    """Tokens that the files say end a reply."""


class ChatFormat:
    """How one model reads a conversation and writes its reply. Its methods run in any thread."""

    def __init__(
        self,
        files: ChatFiles,
        *,
        random: RandomBytes,
        strftime: Callable[[str], str],
        deadline: Deadline | None = None,
    ) -> None:
        """Raises: ModelRefused: The tokenizer or the template is none."""
        self.codec = TextCodec(files.tokenizer_json, random)
        self._template = ChatTemplate(files.template, strftime=strftime, deadline=deadline)
        named = self.codec.special_ids.get(files.special_tokens.get("eos_token", ""))
        self.stop_ids: Sequence[int] = sorted(
            files.stop_ids | ({named} if named is not None else set())
        )[:STOP_IDS_MAX]
        """Tokens that end a reply and are no part of it."""
        self._special_tokens = files.special_tokens
        self._random = random

    def prompt_ids(
        self, messages: Sequence[Message], deadline: Deadline | None = None
    ) -> list[int]:
        """Return the prompt's token ids, up to where the assistant's reply begins.

        Raises:
            RequestRefused: The template refuses the messages, or a text cannot be kept apart.
            ModelRefused: The template wants more time or memory than it gets.
        """
        deadline = deadline or Deadline()
        texts = [message.text for message in messages]
        prompt = self._render(messages, texts, deadline)
        written = self._attributed(messages, prompt, deadline)
        if written is None:
            divided = [self.codec.divided(text) for text in texts]
            if divided != texts:
                prompt = self._render(messages, divided, deadline)
            written = [Written(prompt, by_template=True)]
        return self.codec.encode(written)

    def _attributed(
        self, messages: Sequence[Message], prompt: str, deadline: Deadline
    ) -> list[Written] | None:
        """Cut the prompt into what the template wrote and what users did; None if unclear."""
        nonce = self._random.randbytes(16).hex()
        # The letters show a template that changes case; the space outside, one that trims.
        cores = [message.text.strip() for message in messages]
        names = [f"Text{nonce}n{index}e" if core else "" for index, core in enumerate(cores)]
        holders = [
            message.text.replace(core, name, 1) if core else message.text
            for message, core, name in zip(messages, cores, names, strict=True)
        ]
        try:
            pieces = re.split(f"Text{nonce}n([0-9]+)e", self._render(messages, holders, deadline))
        except RequestRefused:  # it looks into the texts; the texts themselves it accepted
            return None
        written = [
            Written(cores[int(piece)] if index % 2 else piece, by_template=not index % 2)
            for index, piece in enumerate(pieces)
        ]
        return written if "".join(part.text for part in written) == prompt else None

    def _render(self, messages: Sequence[Message], texts: Sequence[str], deadline: Deadline) -> str:
        turns = [
            {"role": message.role, "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        variables = {"messages": turns, "add_generation_prompt": True, **self._special_tokens}
        return self._template.render(variables, deadline)


class ChatFormats:
    """The chat formats of the models in use, each read once."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._formats: OrderedDict[str, ChatFormat] = OrderedDict()
        self._loading = trio.Lock()
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    async def of(self, entry: ModelEntry) -> ChatFormat:
        """Return a model's chat format, reading its files the first time.

        Raises:
            ModelRefused: They have no usable tokenizer or template.
        """
        async with self._loading:
            found = self._formats.get(entry.model_id)
            if found is None:
                found = await self._in_thread(partial(self._load, entry.path), LOAD_S_MAX)
                self._formats[entry.model_id] = found
                if len(self._formats) > FORMATS_MAX:
                    self._formats.popitem(last=False)
            self._formats.move_to_end(entry.model_id)
            return found

    async def prompt_ids(self, chat_format: ChatFormat, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids, made in a worker thread; raises as the format does."""
        return await self._in_thread(
            lambda deadline: chat_format.prompt_ids(messages, deadline), RENDER_S_MAX
        )

    def _load(self, path: Path, deadline: Deadline) -> ChatFormat:
        return ChatFormat(
            read_chat_files(path),
            random=self._environment.random,
            strftime=self._strftime,
            deadline=deadline,
        )

    def _strftime(self, pattern: str) -> str:
        now = datetime.fromtimestamp(self._environment.wall_time(), UTC)
        return now.astimezone().strftime(pattern)

    async def _in_thread(self, work: Callable[[Deadline], T], seconds: float) -> T:
        """Run foreign code in a thread; when its time is over, or nobody waits any more, end it."""
        deadline = Deadline()
        try:
            with trio.fail_after(seconds):
                return await trio.to_thread.run_sync(
                    work, deadline, abandon_on_cancel=True, limiter=self._threads
                )
        except trio.TooSlowError as error:
            raise ModelRefused(
                f"the model's template and tokenizer took more than {seconds:g} seconds"
            ) from error
        finally:
            deadline.has_passed = True


def read_chat_files(path: Path) -> ChatFiles:
    """Read the tokenizer and the template of a model's folder or GGUF file.

    Raises:
        ModelRefused: A file is missing, too large or malformed, or there is no template.
    """
    return _read_folder(path) if path.is_dir() else _read_gguf(path)


def _read_folder(path: Path) -> ChatFiles:
    config = read_json(path / "tokenizer_config.json", bytes_max=TOKENIZER_CONFIG_BYTES_MAX)
    file = path / "chat_template.jinja"
    template = (
        _text(file, bytes_max=4 * TEMPLATE_CHARS_MAX)
        if file.exists()
        else _template_of(config, path.name)
    )
    ends = [
        read_json(path / name, bytes_max=CONFIG_BYTES_MAX).get("eos_token_id")
        for name in ("config.json", "generation_config.json")
        if (path / name).exists()
    ]
    return ChatFiles(
        tokenizer_json=_text(path / "tokenizer.json", bytes_max=TOKENIZER_BYTES_MAX),
        template=template,
        special_tokens=_special_tokens(config),
        stop_ids=frozenset(_token_ids(ends)),
    )


def _read_gguf(path: Path) -> ChatFiles:
    header = gguf.read_header(path)
    config = tokenizer_config(header)
    return ChatFiles(
        tokenizer_json=json.dumps(tokenizer_json(header)),
        template=_template_of(config, path.name),
        special_tokens=_special_tokens(config),
        stop_ids=end_ids(header),
    )


def _token_ids(values: Iterable[object]) -> Iterator[int]:
    """The token ids among values that are one, a list of them, or nothing."""
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and item >= 0:
                yield item


def _text(path: Path, *, bytes_max: int) -> str:
    try:
        return read_bytes(path, bytes_max=bytes_max).decode()
    except UnicodeDecodeError as error:
        raise ModelRefused(f"{path.name} is not UTF-8 text") from error


def _template_of(config: Mapping[str, object], name: str) -> str:
    """The template in a tokenizer configuration: a text, or the one of several named "default"."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            item.get("name"): item.get("template") for item in template if isinstance(item, dict)
        }
        template = named.get("default")
    if not isinstance(template, str) or not template:
        raise ModelRefused(
            f"{name} has no chat template",
            fix="Use a model made for chat: its files name a template.",
        )
    return template


def _special_tokens(config: Mapping[str, object]) -> Mapping[str, str]:
    """The special tokens a configuration names, as texts; older files have objects there."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
