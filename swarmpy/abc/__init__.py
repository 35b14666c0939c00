"""What may be implemented: the contracts between swarmpy and the world, and between its layers.

Networks give byte streams, hosts give authenticated streams to peers, engines compute rows, sources
find peers and models. Production, simulation and other people's extensions implement these; nothing
else in swarmpy is meant to be subclassed.
"""

from __future__ import annotations

from swarmpy.abc.discovery import DiscoverySource, Sighting
from swarmpy.abc.engine import (
    Engine,
    Format,
    Inspection,
    Output,
    Row,
    Shard,
    StateKind,
    Suitability,
    Want,
)
from swarmpy.abc.host import (
    Connection,
    ConnectionEvent,
    Gate,
    Host,
    Priority,
    ProtocolId,
    Stream,
    StreamHandler,
)
from swarmpy.abc.models import ModelLabel, ModelSource, Progress
from swarmpy.abc.network import Address, ByteStream, Listener, Network
from swarmpy.abc.times import NowSeconds, WallSeconds

__all__ = [
    "Address",
    "ByteStream",
    "Connection",
    "ConnectionEvent",
    "DiscoverySource",
    "Engine",
    "Format",
    "Gate",
    "Host",
    "Inspection",
    "Listener",
    "ModelLabel",
    "ModelSource",
    "Network",
    "NowSeconds",
    "Output",
    "Priority",
    "Progress",
    "ProtocolId",
    "Row",
    "Shard",
    "Sighting",
    "StateKind",
    "Stream",
    "StreamHandler",
    "Suitability",
    "WallSeconds",
    "Want",
]
