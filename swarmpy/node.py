"""The node: composition root and public API.

Everything a node is made of is made here and wired together by plain callables; no service knows
another. `Node.open` gives a running node, `generate` a reply, `join` and `create_invite` a network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from swarmpy import node_members, node_offers, node_status
from swarmpy.abc import Address, DiscoverySource, Host, Progress
from swarmpy.config import INVITE_TTL_S, Config
from swarmpy.discovery.cache import PeerCache
from swarmpy.discovery.mdns import MdnsSource
from swarmpy.discovery.service import Discovery
from swarmpy.environment import Environment, available_memory_bytes
from swarmpy.errors import (
    ConfigError,
    EngineLost,
    ModelNotFound,
    NoPipeline,
    StageEvicted,
    StageLost,
    SwarmError,
)
from swarmpy.identity import Identity, PeerId
from swarmpy.net.host import NativeHost
from swarmpy.net.tcp import TcpNetwork
from swarmpy.node_status import AGENT
from swarmpy.pipeline.assembler import Assembler
from swarmpy.pipeline.coordinator import Pipeline
from swarmpy.pipeline.engines import Engines
from swarmpy.pipeline.session import Generation, generate
from swarmpy.pipeline.stage import StageService
from swarmpy.proto.pipeline import Sampling
from swarmpy.shards.catalog import Catalog
from swarmpy.status import (
    InviteCreated,
    InviteShown,
    Joined,
    ModelStatus,
    NodeStatus,
    PeerStatus,
    PipelineView,
    Revoked,
)
from swarmpy.store import read_json, write_file
from swarmpy.trust.membership import Membership

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.75
"""Part of the available memory a node offers where no budget is set: the rest stays its owner's."""

STARTS_MAX = 8
"""Tries to begin a reply while its model makes room for others; a stage that is lost costs one."""

PRELOAD_PAUSE_S = 1.0
PRELOAD_PAUSE_S_MAX = 60.0
"""Between two tries to assemble a preloaded model's pipeline: doubled while it fails."""

PORTS_FILE = "ports.json"
"""Ports of the last run: a restarted node is found at once where it was."""


def ignore_progress(_: Progress) -> None:
    """Take progress that nobody watches."""


class Node:
    """A running node. Made by `Node.open`; everything it started ends with the `async with` block.

    Attributes:
        host: Register an application's own protocols here (`host.set_handler`).
        membership: Networks, invites, members.
        discovery: Peers and their announcements.
        catalog: Models of this machine.
    """

    def __init__(self, config: Config, environment: Environment, host: Host | None = None) -> None:
        """Make the parts; `Node.open` runs them."""
        self.config = config
        self.environment = environment
        folder = environment.folder
        if host is not None:
            self.identity = host.identity
        else:
            self.identity = Identity.load_or_create(folder / "identity.key", environment.random)
        self.peer_id: PeerId = self.identity.peer_id
        if not config.node.name.isprintable():
            raise ConfigError("node.name holds characters that cannot be printed")
        self.name = config.node.name or self.peer_id[-8:]
        self.host: Host = host or NativeHost(
            self.identity,
            environment.network,
            random=environment.random,
            agent=AGENT,
            wall_time=environment.wall_time,
        )
        self.membership = Membership(
            identity=self.identity,
            name=self.name,
            folder=folder,
            environment=environment,
            host=self.host,
        )
        self.catalog = Catalog(environment.cache_folder)
        self.engines = Engines.find(config.engine, cache_folder=environment.cache_folder)
        memory_bytes = config.engine.memory_bytes_max or int(
            available_memory_bytes() * MEMORY_SHARE
        )
        self.stages = StageService(
            self.host,
            self.engines,
            memory_bytes_max=memory_bytes if self.engines else 0,
            find_model=self._model_path,
            obtain_files=self._obtain_files,
            check_files=self._check_files,
            connect=lambda peer: self.discovery.connect(peer),
            on_change=partial(node_offers.announce_holdings, self),
        )
        self.assembler = Assembler(
            self.stages,
            config=config.engine,
            capacities=partial(node_offers.capacities, self),
            random=environment.random,
            model_name=self.model_name,
            is_single=config.models.single,
        )
        self._cache = PeerCache(folder / "peers.db")
        self.discovery = Discovery(
            host=self.host,
            environment=environment,
            identity=self.identity,
            name=self.name,
            config=config.network,
            trust=node_members.trust_of(self.membership),
            sources=self._sources(),
            cache=self._cache,
        )
        self.speeds_before_bytes_s = node_offers.read_speeds(folder)
        self._started_s = 0.0
        self._stopping = trio.Event()
        self._replies: set[Generation] = set()
        self._idle = trio.Event()
        self._members_changed = trio.lowlevel.ParkingLot()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: Config, environment: Environment, *, host: Host | None = None
    ) -> AsyncIterator[Node]:
        """Open a node: listen, meet the members of its networks, serve.

        Args:
            host: How it reaches peers, and its identity; without one a `NativeHost` over
                `environment.network` with the identity in the node's folder.

        Raises:
            ConfigError: A setting cannot be followed (an address is taken, a folder not writable).
            ExtensionNotFound: The configured engine is not installed.
        """
        try:
            environment.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            node = cls(config, environment, host)
        except OSError as error:
            raise ConfigError(f"cannot use the folder {environment.folder}: {error}") from error
        caught: list[BaseException] = []
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await node._start(nursery)
                    yield node
                    await node.discovery.leave()
                except BaseException as error:
                    caught.append(error)
                    raise
                finally:
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The caller's own error comes back as it was, not as a group of one.
            if group.exceptions == tuple(caught):
                raise caught[0] from caught[0].__cause__
            raise
        finally:
            node_offers.keep_speeds(node)
            node.host.close()
            node.membership.close()
            node._cache.close()

    async def _start(self, nursery: trio.Nursery) -> None:
        self._started_s = trio.current_time()
        node_members.introduce(self.membership, self.discovery)
        self.membership.on_member(self._tell_members_changed)
        self.discovery.on_announcement(self._tell_members_changed)
        await nursery.start(self.host.run)
        await self._listen()
        await nursery.start(self.engines.run)
        await nursery.start(self.stages.run)
        await nursery.start(self.assembler.run)
        self.discovery.announce(
            agent=AGENT,
            boot_id=self.environment.random.randbytes(8).hex(),
            machine_id=_machine_id(self.environment),
            engine=self.engine_names[:64],
        )
        node_offers.announce_models(self)
        node_offers.announce_holdings(self)
        await nursery.start(self.membership.run)
        await nursery.start(self.discovery.run)
        self.stages.spawn(partial(node_offers.choose_engines, self))
        for model in self.config.models.preload[: 1 if self.config.models.single else None]:
            self.stages.spawn(partial(self._keep_loaded, model))

    async def _listen(self) -> None:
        """Listen where the settings say; port 0 is the port of the last run, while it is free."""
        path = self.environment.folder / PORTS_FILE
        ports = read_json(path)
        bound: dict[str, str] = {}
        for wanted in self.config.network.listen:
            bound[wanted] = await self._listen_at(wanted, ports.get(wanted))
        if bound != ports:
            write_file(path, json.dumps(bound).encode())

    async def _listen_at(self, wanted: str, before: object) -> str:
        if isinstance(before, str) and wanted.endswith("/tcp/0"):
            try:
                return await self.host.listen(Address(before))
            except ConfigError:
                logger.debug("port.taken", extra={"address": before})
        return await self.host.listen(Address(wanted))

    def _sources(self) -> list[DiscoverySource]:
        sources: list[DiscoverySource] = [self._cache]
        if self.config.network.mdns and self.environment.mdns:
            sources.append(MdnsSource(self.peer_id, lambda: self.host.addresses, self.environment))
        return sources

    # Replies ---------------------------------------------------------------------

    async def generate(
        self,
        model: str,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        on_progress: Callable[[Progress], None] = ignore_progress,
    ) -> Generation:
        """Start a reply and return it as an async iterator of tokens; close it in any case.

        Args:
            model: Name or id of a model that is known here.
            token_ids: The prompt.
            max_tokens: Most tokens of the reply.
            stop_ids: Tokens that end the reply and are not part of it.
            on_progress: Told what a reply that must wait is waiting for.

        Raises:
            ModelNotFound: No model of that name is known here.
            NoPipeline: The connected members cannot hold the model, or the node is stopping.
            SamplingError, ContextExceeded: The request asks for what is out of range.
        """
        start = partial(
            generate,
            token_ids=token_ids,
            spec=sampling,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            step_timeout_s=self.config.engine.step_timeout_s,
            on_progress=on_progress,
            on_close=self._reply_closed,
        )
        tries = STARTS_MAX
        while True:
            tries -= 1
            pipeline = await self._pipeline_for(model, on_progress)
            try:
                generation = await start(pipeline, session_id=self._new_id())
                break
            except (StageLost, EngineLost) as error:
                # The reply had not begun: nothing was sent that a new ring could contradict.
                if not tries or (tries < STARTS_MAX - 1 and not isinstance(error, StageEvicted)):
                    raise
        self._replies.add(generation)
        return generation

    def _new_id(self) -> bytes:
        return self.environment.random.randbytes(16)

    async def prepare(
        self, model: str, *, on_progress: Callable[[Progress], None] = ignore_progress
    ) -> PipelineView:
        """Assemble a model's pipeline (plan, offer, load) without a reply; raises as `generate`."""
        return (await self._pipeline_for(model, on_progress)).view()

    async def check_plan(self, model: str) -> None:
        """Check that a pipeline for a model is ready or could be planned now; nothing is loaded.

        Raises:
            ModelNotFound, NoPipeline: As `generate`.
        """
        await self.assembler.plan_for(self.catalog.find(model).model_id)

    async def _pipeline_for(self, model: str, on_progress: Callable[[Progress], None]) -> Pipeline:
        if self._stopping.is_set():
            raise NoPipeline("this node is stopping", fix="Ask another node, or start it again.")
        found = self.catalog.find(model)
        assemble = partial(self.assembler.pipeline_for, found.model_id, on_progress=on_progress)
        try:
            return await assemble()
        except NoPipeline:
            if not await node_members.wait_announced(self):
                raise
            return await assemble()

    async def _keep_loaded(self, model: str) -> None:
        """Assemble a model's pipeline, and again when it was lost or members come that help.

        One that made room for another model stays away until somebody asks for it: two that do not
        fit together would replace each other for ever.
        """
        pause_s = PRELOAD_PAUSE_S
        while not self._stopping.is_set():
            try:
                pipeline = await self._pipeline_for(model, ignore_progress)
            except SwarmError as error:
                logger.info("model.not_preloaded", extra={"model": model, "error": str(error)})
                with trio.move_on_after(PRELOAD_PAUSE_S_MAX):
                    await self.wait_members_changed()
            else:
                pause_s = PRELOAD_PAUSE_S
                await pipeline.wait_closed()
                if isinstance(pipeline.error, StageEvicted):
                    return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, PRELOAD_PAUSE_S_MAX)

    def _reply_closed(self, generation: Generation) -> None:
        self._replies.discard(generation)
        if self._stopping.is_set() and not self._replies:
            self._idle.set()

    def request_stop(self) -> None:
        """Admit no more requests; replies that are under way finish."""
        self._stopping.set()
        if not self._replies:
            self._idle.set()

    async def wait_stopping(self) -> None:
        """Wait until somebody has asked the node to stop."""
        await self._stopping.wait()

    async def wait_idle(self) -> None:
        """Wait until, after `request_stop`, the last reply is closed."""
        await self._idle.wait()

    # Membership ------------------------------------------------------------------

    async def create_invite(
        self, *, ttl_s: float = INVITE_TTL_S, uses: int = 1, can_invite: bool = True
    ) -> InviteCreated:
        """Make an invite into the network joined or made last; the first call makes a network.

        Raises:
            NotAMember: This node may not invite into its network.
            MembershipError: The life or number of uses is out of range, or this node listens
                nowhere.
        """
        self.found_network()
        return await self.membership.create_invite(ttl_s=ttl_s, uses=uses, can_invite=can_invite)

    def found_network(self) -> None:
        """Make this node's own network, unless it belongs to one already."""
        if not self.membership.networks():
            self.membership.create_network()

    async def inspect_invite(self, code: str) -> InviteShown:
        """Read what an invite says, without redeeming it.

        Raises:
            InviteMalformed, InviteExpired: As they say.
        """
        return await self.membership.inspect_invite(code)

    async def join(self, code: str) -> Joined:
        """Redeem an invite at its issuer; on return issuer and this node serve each other.

        Raises:
            MembershipError: The code is malformed, expired, used or another peer's.
            DialFailed: The issuer cannot be reached.
        """
        return await self.membership.redeem(code)

    def revoke(self, peer: str, *, network: str = "", is_rehearsal: bool = False) -> Revoked:
        """End a member's membership, and that of whoever it invited; it spreads by itself.

        Args:
            peer: Its PeerId, the end of it, or its name if no other member has the same.
            network: Of one network only, by name or id; empty: of all where this node may.
            is_rehearsal: Only return what it would come to.

        Raises:
            MembershipError: No such peer is known or may be revoked here, or several are called so.
        """
        return node_members.revoke(self, peer, network=network, is_rehearsal=is_rehearsal)

    async def wait_members(self, count: int) -> None:
        """Wait until `count` other members have said what they offer and can be reached.

        Up to eight are connected then; replies connect to the others when they need them.
        """
        await node_members.wait_members(self, count)

    async def wait_members_changed(self) -> None:
        """Wait until a member connects or says something new."""
        await self._members_changed.park()

    def _tell_members_changed(self, _: object) -> None:
        self._members_changed.unpark_all()

    # Models ----------------------------------------------------------------------

    async def pull(
        self,
        model: str,
        *,
        layers: tuple[int, int] | None = None,
        on_progress: Callable[[Progress], None] = ignore_progress,
    ) -> ModelStatus:
        """Fetch a model's files, or check those that are here, and offer it from now on.

        Args:
            layers: Only the headers and the files of layers [start, end), of a hub's model.

        Raises:
            ModelNotFound, DownloadFailed, ModelRefused: As they say.
        """
        if layers is None:
            entry = await self.catalog.pull(model, on_progress)
        else:
            start, end = layers
            entry = await self.catalog.pull_layers(
                model, start=start, end=end, progress=on_progress
            )
        node_offers.announce_models(self)
        self.stages.spawn(partial(node_offers.choose_engines, self))
        return node_status.model_status(entry)

    async def rename(self, model: str, name: str) -> ModelStatus:
        """Give a model of this machine another name, by which requests then know it.

        Raises:
            ModelNotFound, ModelRefused: As they say.
        """
        entry = await self.catalog.rename(model, name)
        node_offers.announce_models(self)
        return node_status.model_status(entry)

    def models(self) -> list[ModelStatus]:
        """Return the models that this machine has or that connected members announce, by name."""
        return node_status.model_statuses(self)

    def _model_path(self, model_id: str) -> Path | None:
        entry = self.catalog.by_id(model_id)
        return entry.path if entry else None

    async def _obtain_files(
        self, model_id: str, start: int, end: int, on_progress: Callable[[Progress], None]
    ) -> Path:
        """Check the files of layers before they are loaded; fetch what is not there or damaged."""
        entry = self.catalog.by_id(model_id)
        if entry is None:
            raise ModelNotFound(f"this node does not have model {model_id}")
        if node_offers.fetches(self, entry):
            entry = await self.catalog.obtain(entry, start=start, end=end, progress=on_progress)
            node_offers.announce_models(self)
        else:
            entry = await self.catalog.verify(entry, on_progress)
            entry.check_layers(start, end)
        return entry.path

    async def _check_files(self, model_id: str, start: int, end: int) -> int:
        """Return the bytes of layers that this node would fetch before it loads them.

        Raises:
            ModelNotFound: The model is not here, or these layers are not and may not be fetched.
        """
        entry = await trio.to_thread.run_sync(self.catalog.by_id, model_id)
        if entry is None:
            raise ModelNotFound(f"this node does not have model {model_id}")
        if not node_offers.fetches(self, entry):
            entry.check_layers(start, end)
            return 0
        missing = partial(self.catalog.missing_bytes, entry, start=start, end=end)
        return await trio.to_thread.run_sync(missing)

    # Status ----------------------------------------------------------------------

    def pipelines(self) -> list[PipelineView]:
        """Return the ready pipelines this node coordinates."""
        return self.assembler.pipelines()

    def peers(self) -> list[PeerStatus]:
        """Return every peer known, this node first, then in PeerId order."""
        return node_status.peer_statuses(self)

    def status(self) -> NodeStatus:
        """Return what the node is doing."""
        return node_status.status_of(self)

    def model_name(self, model_id: str) -> str:
        """Return a model's name, the beginning of its id where this machine does not know it."""
        entry = self.catalog.by_id(model_id)
        return entry.name if entry else model_id[:12]

    @property
    def uptime_s(self) -> float:
        """Seconds since the node was opened."""
        return trio.current_time() - self._started_s

    @property
    def is_stopping(self) -> bool:
        """Whether no more requests are admitted."""
        return self._stopping.is_set()

    @property
    def engine_names(self) -> str:
        """The engines' names as people read them, "" on a node that only routes."""
        return ", ".join(self.engines.names)


def local_environment(folder: Path, *, cache_folder: Path | None = None) -> Environment:
    """Return the real world for a node: TCP, this machine's clocks and randomness.

    Args:
        folder: The node's data folder.
        cache_folder: Of model files; None: the user's, as the command line uses it.
    """
    from platformdirs import user_cache_path

    cache = cache_folder or user_cache_path("swarmpy", appauthor=False)
    return Environment(network=TcpNetwork(), folder=folder, cache_folder=cache)


def _machine_id(environment: Environment) -> str:
    """Return a random id that this machine's nodes share: who shares it shares its cores."""
    path = environment.cache_folder / "run" / "machine"
    try:
        return path.read_text("ascii")[:32]
    except (OSError, UnicodeDecodeError):
        made = environment.random.randbytes(8).hex()
        write_file(path, made.encode())
        return made
