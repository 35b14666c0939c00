"""Every decoder as a function of bytes: the contract is a message or the error it names, no more.

One table for `make fuzz` (arbitrary bytes, guided by coverage) and for the suite (the committed
corpus, all crashes ever found, Hypothesis).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz import readers
from fuzz.readers import ANN, message
from swarmpy.errors import (
    InviteMalformed,
    ModelRefused,
    NotAMember,
    RemoteProtocolError,
    StaleRecord,
)
from swarmpy.identity import (
    base58_decode,
    parse_peer_id,
    peer_id_from_bytes,
    public_key_of,
)
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto import (
    announce,
    endpoint,
    engine,
    envelope,
    identify,
    invite,
    mdns,
    membership,
    multiaddr,
    multistream,
    noise,
    ping,
    pipeline,
    protobuf,
    revocation,
    summary,
    swim,
    tensor,
    wire,
    yamux,
)
from swarmpy.public_keys import (
    check_multihash,
    check_multihash_form,
    decode_public_key,
    verify,
)

STATES_BYTES_MAX = 64 * 1024
"""Largest input: as large as the largest message; libFuzzer grows towards it slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One decoder under the contract.

    Attributes:
        run: Decodes; must return or raise one of `refusals`.
        covers: The functions and classes of `swarmpy` that it runs; the suite checks that no
            decoder of `swarmpy.proto` is missing.
        kinds: The message types it decodes; likewise.
        bytes_max: Largest input worth making.
    """

    run: Callable[[bytes], object]
    covers: tuple[Callable[..., Any], ...] = ()
    kinds: tuple[Any, ...] = ()
    refusals: tuple[type[Exception], ...] = (RemoteProtocolError,)
    bytes_max: int = 2048


def holds(decoder: Decoder, data: bytes) -> None:
    """Run a decoder on any bytes: its own refusals are fine, every other error gets out."""
    try:
        decoder.run(data)
    except decoder.refusals:
        pass


def of(*kinds: Any) -> Decoder:
    """The decoder of one message type or tagged union."""
    return Decoder(
        run=message(*kinds), covers=(wire.decode,), kinds=kinds, bytes_max=STATES_BYTES_MAX
    )


DECODERS: dict[str, Decoder] = {
    "announce": of(announce.Message),
    "announcement": Decoder(
        run=readers.read_announcement,
        covers=(announce.open_announcement,),
        kinds=(announce.Announcement,),
        refusals=(RemoteProtocolError, StaleRecord),
        bytes_max=4096,
    ),
    "config": Decoder(run=readers.read_config, refusals=(ModelRefused,), bytes_max=4096),
    "endpoint": Decoder(
        run=readers.read_endpoint,
        covers=(endpoint.ip_endpoint, endpoint.subnet_of, endpoint.advertised),
    ),
    "engine_frames": Decoder(
        run=readers.read_engine_frames,
        covers=(engine.FrameReader, engine.decode_request, engine.decode_reply),
    ),
    "engine_reply": of(engine.Reply),
    "engine_request": of(engine.Request),
    "envelope": Decoder(
        run=lambda data: envelope.open_envelope(data, domain="fuzz", payload_type=b"f"),
        covers=(envelope.open_envelope,),
    ),
    "gguf": Decoder(run=readers.read_gguf, refusals=(ModelRefused,), bytes_max=4096),
    "gguf_cut": Decoder(run=readers.read_gguf_cut, refusals=(ModelRefused,), bytes_max=4096),
    "gguf_model": Decoder(run=readers.read_gguf_model, refusals=(), bytes_max=8192),
    "identify": Decoder(
        run=lambda data: identify.decode(data, peer=ANN.peer_id), covers=(identify.decode,)
    ),
    "invite": Decoder(
        run=readers.read_invite, covers=(invite.open_invite,), kinds=(invite.Invite,)
    ),
    "invite_code": Decoder(
        run=lambda data: invite.decode_invite(data.decode("utf-8", "replace")),
        covers=(invite.decode_invite,),
        refusals=(InviteMalformed,),
    ),
    "invite_message": of(invite.InviteMessage),
    "mdns": Decoder(run=readers.read_txt, covers=(mdns.decode_txt,), bytes_max=4096),
    "membership_message": of(membership.MembershipMessage),
    "membership_proof": Decoder(
        run=readers.read_proof,
        covers=(membership.open_membership, membership.verify_membership),
        refusals=(RemoteProtocolError, NotAMember),
    ),
    "membership_record": Decoder(
        run=readers.read_record,
        covers=(membership.verify_membership, membership.network_name_of),
        kinds=(membership.MembershipRecord,),
        refusals=(RemoteProtocolError, NotAMember),
    ),
    "multiaddr": Decoder(run=readers.read_multiaddr, covers=(multiaddr.from_bytes,), bytes_max=600),
    "multiaddr_text": Decoder(
        run=readers.read_multiaddr_text,
        covers=(
            multiaddr.components,
            multiaddr.parse_tcp,
            multiaddr.split_peer,
            multiaddr.to_bytes,
        ),
        bytes_max=600,
    ),
    "multistream_dialer": Decoder(run=readers.read_dialer, covers=(multistream.Dialer,)),
    "multistream_selector": Decoder(run=readers.read_selector, covers=(multistream.Selector,)),
    "network_id": Decoder(
        run=readers.read_network_id, covers=(membership.key_hash_of,), bytes_max=64
    ),
    "noise_first": Decoder(
        run=readers.read_noise_first, covers=(noise.Handshake, noise.XX), bytes_max=512
    ),
    "noise_frames": Decoder(run=readers.read_noise_frames, covers=(noise.Opener,)),
    "noise_payload": Decoder(run=noise.decode_payload, covers=(noise.decode_payload,)),
    "noise_proof": Decoder(run=readers.read_noise_proof, covers=(noise.Handshake,), bytes_max=512),
    "noise_second": Decoder(
        run=readers.read_noise_second, covers=(noise.Handshake,), bytes_max=512
    ),
    "peer_id": Decoder(
        run=readers.read_peer_id,
        covers=(parse_peer_id, public_key_of, base58_decode),
        bytes_max=160,
    ),
    "peer_id_bytes": Decoder(
        run=readers.read_peer_id_bytes,
        covers=(peer_id_from_bytes, check_multihash, check_multihash_form),
        bytes_max=64,
    ),
    "peer_record": Decoder(run=readers.read_peer_record, covers=(identify.open_peer_record,)),
    "ping": Decoder(
        run=lambda data: ping.check_pong(b"p" * ping.PAYLOAD_BYTES, data), covers=(ping.check_pong,)
    ),
    "pipeline_command": of(pipeline.Command),
    "pipeline_description": of(pipeline.Description),
    "pipeline_first": of(pipeline.First),
    "pipeline_report": of(pipeline.Report),
    "pipeline_step": Decoder(
        run=readers.read_step,
        covers=(pipeline.decode_step,),
        kinds=(pipeline.Step,),
        bytes_max=STATES_BYTES_MAX,
    ),
    "pipeline_token": of(pipeline.TokenFrame),
    "protobuf": Decoder(
        run=readers.read_protobuf,
        covers=(
            protobuf.decode,
            protobuf.bytes_field,
            protobuf.bytes_fields,
            protobuf.int_field,
            protobuf.text_field,
        ),
    ),
    "public_key": Decoder(run=readers.read_public_key, covers=(decode_public_key, verify)),
    "revocation": Decoder(
        run=readers.read_revocation,
        covers=(revocation.open_revocation,),
        kinds=(revocation.RevocationRecord,),
        refusals=(RemoteProtocolError, StaleRecord, NotAMember),
        bytes_max=4096,
    ),
    "safetensors": Decoder(run=readers.read_safetensors, refusals=(ModelRefused,), bytes_max=4096),
    "statement": Decoder(
        run=readers.read_statement,
        covers=(swim.open_statement,),
        kinds=(swim.Statement,),
        refusals=(RemoteProtocolError, StaleRecord),
        bytes_max=512,
    ),
    "summary": Decoder(
        run=readers.read_summary,
        covers=(summary.unpack_entries, summary.unpack_keys, summary.check_prefix),
        bytes_max=256,
    ),
    "tensor": Decoder(
        run=readers.read_spec_and_tensors,
        covers=(tensor.split, tensor.check_hidden, tensor.bytes_of, is_finite),
        kinds=(tensor.WireSpec,),
    ),
    "varint": Decoder(run=readers.read_varints, covers=(wire.decode_varint,), bytes_max=64),
    "yamux": Decoder(run=readers.read_yamux, covers=(yamux.Yamux,)),
}
"""By target name: `make fuzz TARGET=<name>`."""
