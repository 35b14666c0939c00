"""What a stage checks of an offer, and a coordinator of a description, before they believe it.

Spec: protocols/pipeline.md, sections 2 and 9.
"""

from __future__ import annotations

from typing import Any

import msgspec

from swarmpy.abc import Inspection, StateKind
from swarmpy.config import PREFILL_CHUNK
from swarmpy.errors import OfferRejected, RemoteProtocolError
from swarmpy.identity import PeerId
from swarmpy.proto.membership import check_printable
from swarmpy.proto.pipeline import Described, Offer


def check_offer(offer: Offer, inspection: Inspection, *, me: PeerId) -> tuple[int, int]:
    """Check an offer against what this node's engine knows of the model.

    Returns:
        The range of layers offered.

    Raises:
        OfferRejected: It contradicts itself, or the engine: cuts, wire specs, slots, context.
    """
    cuts, ring = offer.cuts, offer.ring
    if len(cuts) != len(ring) + 1 or len(set(ring)) != len(ring):
        raise OfferRejected(f"{len(ring)} peers and {len(cuts)} cuts make no ring")
    if offer.stage >= len(ring) or ring[offer.stage] != me:
        raise OfferRejected(f"stage {offer.stage} of the ring is not this node")
    if cuts[0] != 0 or cuts[-1] != inspection.layer_count or list(cuts) != sorted(set(cuts)):
        raise OfferRejected(f"cuts {cuts} do not cover {inspection.layer_count} layers in order")
    forbidden = set(cuts[1:-1]) - set(inspection.cuts)
    if forbidden:
        raise OfferRejected(f"the model cannot be cut before layers {sorted(forbidden)}")
    if offer.slots > inspection.slots_max:
        raise OfferRejected(f"{offer.slots} slots, this model has {inspection.slots_max} at most")
    if not PREFILL_CHUNK <= offer.context <= max(PREFILL_CHUNK, inspection.context_max):
        raise OfferRejected(f"context {offer.context}, this model has {inspection.context_max}")
    start, end = cuts[offer.stage], cuts[offer.stage + 1]
    received = tuple(inspection.wire_specs[start]) if start else ()
    sent = tuple(inspection.wire_specs[end]) if end < inspection.layer_count else ()
    if (tuple(offer.received), tuple(offer.sent)) != (received, sent):
        raise OfferRejected(
            f"the tensors between layers differ: offered {offer.received} and {offer.sent}, "
            f"this engine ({inspection.engine}) has {received} and {sent}"
        )
    return start, end


def described(inspection: Inspection) -> Described:
    """An inspection as a message."""
    fields: dict[str, Any] = {
        name: getattr(inspection, name) for name in Described.__struct_fields__
    }
    fields["state_kind"] = inspection.state_kind.value
    fields["wire_specs"] = dict(inspection.wire_specs)
    return Described(**fields)


def inspection_of(message: Described) -> Inspection:
    """A message as an inspection.

    Raises:
        RemoteProtocolError: The numbers contradict each other.
    """
    count = message.layer_count
    for text in (message.engine, message.build_id, message.architecture):
        check_printable(text, "description")
    if not message.engine or message.slots_max < 1 or message.context_max < PREFILL_CHUNK:
        raise RemoteProtocolError(
            f"a description with {message.slots_max} slots of {message.context_max} tokens"
        )
    per_layer = (message.layer_weight_bytes, message.kv_bytes_per_token, message.state_bytes)
    if any(len(values) != count for values in per_layer):
        raise RemoteProtocolError(f"a description of {count} layers with other counts in it")
    if any(not 0 < cut < count or cut not in message.wire_specs for cut in message.cuts):
        raise RemoteProtocolError("a description with cuts outside the model or without a spec")
    fields = msgspec.structs.asdict(message)
    fields["state_kind"] = StateKind(message.state_kind)
    return Inspection(**fields)
