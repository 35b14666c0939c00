"""What a node tells about itself: the plain records that the CLI, the admin API and programs read.

Frozen and JSON-able (`msgspec.to_builtins`). Field names are the JSON's; units are last.
"""

from __future__ import annotations

import msgspec


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a pipeline: who holds layers [start, end) of its model."""

    peer: str
    name: str
    start: int
    end: int
    weight_bytes: int
    """Resident bytes of weights as computed in."""
    planned_weight_bytes: int
    rss_bytes: int
    """Resident memory of the engine's process after loading; 0 where it has none of its own."""
    engine: str
    exactness: str
    sees_prompt: bool
    """Whether it is sent token ids of the prompt."""
    path: str = "direct"
    """How the coordinator reaches it: local, direct or relayed."""
    fetch_bytes: int = 0
    """Of the model's files, that the stage had to fetch before it loaded."""


class PipelineView(msgspec.Struct, frozen=True, kw_only=True):
    """A ready pipeline, seen from its coordinator."""

    id: str
    model_id: str
    model: str
    layer_count: int
    context: int
    stages: tuple[StageView, ...]
    predicted_tok_s: float
    sessions: int = 0


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A peer this node knows."""

    peer: str
    name: str
    state: str
    """member (connected), known (a member to connect to when it is needed), visible (not joined),
    revoked (visible, and let go from a network of this node), connecting, lost or self."""
    addresses: tuple[str, ...]
    source: str
    """How it was found: cache, mdns, invite, announce or inbound."""
    path: str
    """direct, relayed, or "" without a connection."""
    rtt_ms: float | None
    networks: tuple[str, ...]
    engine: str
    memory_bytes_max: int
    memory_bytes_free: int
    models: tuple[str, ...]
    shards: tuple[str, ...]
    """Layers it holds now, "MODEL 10-19"."""
    agent: str


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A model that this machine has, or that a connected member announces."""

    model_id: str
    name: str
    display_name: str
    size_bytes: int
    layer_count: int
    is_local: bool
    is_ready: bool
    """Whether a pipeline for it is loaded here."""
    peers: tuple[str, ...]
    """Names of members that announce it."""
    path: str = ""
    license: str = ""
    source: str = ""
    architecture: str = ""
    quantization: str = ""
    context_max: int = 0
    parameter_count: int = 0
    layers: tuple[tuple[int, int], ...] | None = None
    """Ranges [start, end) of layers whose files are here; None: all of them are, or it is not."""
    held_bytes: int = 0
    """Of the files, where only some layers are here."""
    engine: str = ""
    """The engine that runs it here; "" before that is known."""
    engine_why: str = ""
    memory_bytes: dict[int, int] = {}
    """By tokens of context: what the whole model takes with one session, by the fit check."""
    derived_from: str = ""
    """Id of the model this one was quantised from; empty for an original."""


class NetworkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A network this node is a member of."""

    id: str
    name: str
    words: str
    is_founder: bool
    can_invite: bool
    members_connected: int
    expires_wall_s: float
    """End of this node's membership record (Unix seconds)."""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The node itself."""

    peer: str
    name: str
    version: str
    addresses: tuple[str, ...]
    networks: tuple[NetworkStatus, ...]
    engine: str
    memory_bytes_max: int
    memory_bytes_free: int
    peers_connected: int
    pipelines: tuple[PipelineView, ...]
    shards: tuple[str, ...]
    uptime_s: float
    is_stopping: bool
    revoked: tuple[str, ...] = ()
    """Names of the networks that this node was a member of until somebody revoked it."""


class InviteCreated(msgspec.Struct, frozen=True, kw_only=True):
    """A new invite. The code is a secret: anyone who holds it can join."""

    code: str
    id: str
    """Under which it is listed and revoked; says nothing of the code."""
    words: str
    network: str
    expires_wall_s: float
    uses: int


class InviteShown(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody must see before they join."""

    network: str
    network_id: str
    issuer: str
    issuer_peer: str
    words: str
    """The same four words stand on the issuer's screen."""
    scope: str
    """Sentences: what this node will do for the members, and what it may ask of them."""
    expires_wall_s: float


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """The network that was joined."""

    network: str
    network_id: str
    issuer: str
    words: str
    was_member: bool
    """Whether the node was in the network already; then the code is not used up."""
    seconds: float


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """A member that was let go."""

    peer: str
    name: str
    networks: tuple[str, ...]
    """Names of the networks that it, and whoever it invited, belongs to no more."""
    falling: tuple[str, ...] = ()
    """Names of the members in view that are out with it."""
    neighbours_told: int = 0
    """Connected members that pass it on; with none nobody else knows yet."""
