"""A node whose replies are scripts, for tests of the gateway: real files and tokens, no engine."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from swarmpy.abc import Progress, WallSeconds
from swarmpy.config import Config, GatewayConfig
from swarmpy.environment import Environment
from swarmpy.errors import ModelNotFound
from swarmpy.pipeline.session import Report, Token
from swarmpy.plugins import gateway
from swarmpy.plugins.gateway import GatewayAddress
from swarmpy.proto.pipeline import Sampling
from swarmpy.shards.catalog import ModelEntry
from swarmpy.status import (
    InviteCreated,
    InviteShown,
    Joined,
    ModelStatus,
    NodeStatus,
    PeerStatus,
    PipelineView,
    StageView,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, and three special ones with the ids 0 to 2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return tokenizer


def write_model(folder: Path, *, template: str = CHATML) -> Path:
    """Write the files of a model that concern text."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def entry_of(path: Path, name: str = "tiny") -> ModelEntry:
    return ModelEntry(
        model_id=(name.encode().hex() * 64)[:64],
        name=name,
        display_name=name.title(),
        path=path,
        format="safetensors",
        size_bytes=1000,
        license="apache-2.0",
        source="folder",
        architecture="llama",
        layer_count=30,
        parameter_count=1,
        context_max=2048,
        quantization="",
    )


VIEW = PipelineView(
    id="p1",
    model_id=entry_of(Path("/none")).model_id,
    model="tiny",
    layer_count=30,
    context=2048,
    stages=(
        StageView(
            peer="12D3KooA",
            name="attic",
            start=0,
            end=30,
            weight_bytes=10,
            planned_weight_bytes=10,
            rss_bytes=20,
            engine="echo",
            exactness="echo",
            sees_prompt=True,
        ),
    ),
    predicted_tok_s=100.0,
)


class Pause:
    """A place in a script: tells that it is reached, and waits to be resumed."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.resume = trio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.resume.wait()


@dataclass
class ScriptedGeneration:
    """Yields the script's token ids; an exception in it is raised, a pause waited out."""

    script: Sequence[Any]
    finish_reason: str | None = None
    closed: trio.Event = field(default_factory=trio.Event)
    count: int = 0
    is_cut: bool = False
    pipeline: PipelineView = VIEW

    def __post_init__(self) -> None:
        self._left = list(self.script)

    def __aiter__(self) -> ScriptedGeneration:
        return self

    async def __anext__(self) -> Token:
        await trio.lowlevel.checkpoint()
        while self._left:
            item = self._left.pop(0)
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Pause):
                await item.wait()
            elif isinstance(item, Token):
                return item
            else:
                self.count += 1
                return Token(item, self.count - 1)
        if not self.is_cut:
            self.finish_reason = self.finish_reason or "stop"
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed.set()
        await trio.lowlevel.checkpoint_if_cancelled()

    @property
    def report(self) -> Report:
        return Report(
            prompt_tokens=1,
            reply_tokens=self.count,
            ttft_s=0.1,
            tok_s=10.0,
            loop_ms_p50=1.0,
            engine_ms_p50=0.5,
            hop_overhead_ms_p50=0.25,
            hops=0,
            predicted_tok_s=100.0,
            sees_prompt=("attic",),
        )


@dataclass
class ScriptedCatalog:
    entries: list[ModelEntry]

    def list(self) -> Sequence[ModelEntry]:
        return self.entries

    def find(self, name_or_id: str) -> ModelEntry:
        for entry in self.entries:
            if name_or_id in (entry.name, entry.model_id):
                return entry
        raise ModelNotFound(f"no model {name_or_id!r} is here")


@dataclass
class Call:
    """One call of `generate`."""

    model: str
    token_ids: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: Sequence[int]


@dataclass
class ScriptedNode:
    """What the gateway uses of `swarmpy.node.Node`, with replies set by the test."""

    environment: Environment
    config: Config
    catalog: ScriptedCatalog
    script: Sequence[Any] = ()
    """Of the next replies."""
    start_script: Sequence[Any] = ()
    """Progress to report, pauses and errors to raise before a reply begins."""
    ready: list[PipelineView] = field(default_factory=list)
    plan_error: Exception | None = None
    calls: list[Call] = field(default_factory=list)
    generations: list[ScriptedGeneration] = field(default_factory=list)
    stopping: trio.Event = field(default_factory=trio.Event)

    async def generate(
        self,
        model: str,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        on_progress: Callable[[Progress], None],
    ) -> ScriptedGeneration:
        self.calls.append(Call(model, list(token_ids), sampling, max_tokens, stop_ids))
        await self._play(on_progress)
        self.generations.append(ScriptedGeneration(self.script))
        return self.generations[-1]

    async def _play(self, on_progress: Callable[[Progress], None]) -> None:
        for item in self.start_script:
            if isinstance(item, Progress):
                on_progress(item)
            elif isinstance(item, Pause):
                await item.wait()
            else:
                raise item

    async def prepare(self, model: str, *, on_progress: Callable[[Progress], None]) -> PipelineView:
        self.catalog.find(model)
        await self._play(on_progress)
        return VIEW

    async def pull(
        self, model: str, *, layers: object, on_progress: Callable[[Progress], None]
    ) -> ModelStatus:
        await self._play(on_progress)
        return self.models()[0]

    async def check_plan(self, model: str) -> None:
        if self.plan_error is not None:
            raise self.plan_error

    def models(self) -> list[ModelStatus]:
        return [
            ModelStatus(
                model_id=entry.model_id,
                name=entry.name,
                display_name=entry.display_name,
                size_bytes=entry.size_bytes,
                layer_count=entry.layer_count,
                is_local=True,
                is_ready=False,
                peers=(),
            )
            for entry in self.catalog.entries
        ]

    def pipelines(self) -> list[PipelineView]:
        return self.ready

    def peers(self) -> list[PeerStatus]:
        return []

    def status(self) -> NodeStatus:
        return NodeStatus(
            peer="12D3KooA",
            name="attic",
            version="0",
            addresses=(),
            networks=(),
            engine="",
            memory_bytes_max=0,
            memory_bytes_free=0,
            peers_connected=0,
            pipelines=(),
            shards=(),
            uptime_s=1.0,
            is_stopping=self.stopping.is_set(),
        )

    async def create_invite(self, *, ttl_s: float, uses: int, can_invite: bool) -> InviteCreated:
        return InviteCreated(
            code="swarm://x", id="i", words="a b c d", network="n", expires_wall_s=ttl_s, uses=uses
        )

    async def inspect_invite(self, code: str) -> InviteShown:
        return InviteShown(
            network="n",
            network_id="i",
            issuer="attic",
            issuer_peer="12D3KooA",
            words="a b c d",
            scope="",
            expires_wall_s=0.0,
        )

    async def join(self, code: str) -> Joined:
        return Joined(
            network="n",
            network_id="i",
            issuer="attic",
            words="a b c d",
            was_member=False,
            seconds=0.1,
        )

    def request_stop(self) -> None:
        self.stopping.set()

    async def wait_stopping(self) -> None:
        await self.stopping.wait()


def make_node(folder: Path, **gateway_settings: Any) -> ScriptedNode:
    """Make a node with one model, "tiny", whose reply is "Hello"."""
    folder.chmod(0o700)
    environment = Environment(
        network=None,  # type: ignore[arg-type]
        folder=folder,
        cache_folder=folder,
        random=random.Random(7),
        wall_time=lambda: WallSeconds(1_700_000_000.0),
    )
    settings = replace(Config(), gateway=GatewayConfig(**gateway_settings))
    return ScriptedNode(
        environment,
        settings,
        ScriptedCatalog([entry_of(write_model(folder / "tiny"))]),
        script=ids_of("Hello"),
    )


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False).ids


@asynccontextmanager
async def served(node: Any) -> AsyncIterator[GatewayAddress]:
    """Serve a node's gateway while the block runs."""
    async with trio.open_nursery() as nursery:
        yield await nursery.start(gateway.serve, node)
        nursery.cancel_scope.cancel()
