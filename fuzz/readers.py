"""How each decoder is fed bytes, where that takes more than one line.

Most take bytes alone; where a signature or a handshake would stop every input at the door, the
bytes go inside sound ones. What has a state is fed the same bytes in several cuts.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from swarmpy.errors import (
    ModelRefused,
    RemoteProtocolError,
)
from swarmpy.identity import (
    Identity,
    parse_peer_id,
    peer_id_bytes,
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
    pipeline,
    protobuf,
    revocation,
    summary,
    swim,
    tensor,
    wire,
    yamux,
)
from swarmpy.public_keys import check_multihash, decode_public_key, verify
from swarmpy.shards import gguf, refusals, safetensors
from swarmpy.shards.gguf_cut import cut_layers, layer_count
from swarmpy.shards.llama import llama_config
from swarmpy.shards.special_tokens import end_ids
from swarmpy.shards.tokenizer_files import tokenizer_config, tokenizer_json

NOW_S = 1_700_000_000.0
"""The clock of every decoder that has one."""

NETWORK, ANN, BOB = Identity(b"n" * 32), Identity(b"a" * 32), Identity(b"b" * 32)

UNREAD_BYTES_MAX = 256
"""Unread bytes of a Yamux session that is to run into its bound."""

FILE = Path("model.gguf")


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut bytes as a connection would: into pieces of `size`."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def sealed(signer: Identity, domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """A sound envelope around anything."""
    return envelope.seal(signer, domain=domain, payload_type=payload_type, payload=payload)


# One function a decoder that needs more than one line --------------------------------------


def read_varints(data: bytes) -> None:
    offset = 0
    while (found := wire.decode_varint(data, offset)) is not None:
        assert wire.encode_varint(found[0]) == data[offset : found[1]]
        offset = found[1]


def read_protobuf(data: bytes) -> None:
    fields = protobuf.decode(data)
    for number in fields:
        for read in (protobuf.bytes_field, protobuf.bytes_fields):
            if all(isinstance(value, bytes) for value in fields[number]):
                read(fields, number)
    for number in range(1, 9):
        protobuf.text_field(fields, number)
    protobuf.int_field(fields, 9)


def read_peer_id(data: bytes) -> None:
    peer = parse_peer_id(data.decode("utf-8", "replace"))
    assert parse_peer_id(peer) == peer
    public_key_of(peer)


def read_peer_id_bytes(data: bytes) -> None:
    check_multihash(data)
    assert peer_id_bytes(peer_id_from_bytes(data)) == data


def read_public_key(data: bytes) -> None:
    """A key of any kind, and a signature it never made."""
    key = decode_public_key(data)
    assert decode_public_key(key.encoded) == key
    verify(key, b"s" * 64, b"message")


def read_peer_record(data: bytes) -> None:
    record = sealed(ANN, "libp2p-peer-record", b"\x03\x01", data)
    identify.open_peer_record(record, peer=ANN.peer_id)


def read_multiaddr(data: bytes) -> None:
    """What is read from bytes is written as text that means the same bytes."""
    text = multiaddr.from_bytes(data)
    assert multiaddr.to_bytes(text) == data


def read_multiaddr_text(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    multiaddr.components(text)
    multiaddr.split_peer(text)
    assert multiaddr.from_bytes(multiaddr.to_bytes(text))
    multiaddr.parse_tcp(text)


def read_endpoint(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    ip, port = endpoint.ip_endpoint(text)
    assert multiaddr.parse_tcp(text)[1] == port
    endpoint.subnet_of(ip)
    endpoint.advertised([text], count_max=8)


def read_dialer(data: bytes) -> None:
    """Any cut of the listener's bytes must come to the same end."""
    ends = []
    for size in (len(data) or 1, data[0] % 16 + 1 if data else 1):
        dialer = multistream.Dialer(["/a/1", "/b/1"])
        ends.append((_fed(dialer.receive, data, size), dialer.selected, dialer.rest))
        dialer.start()
    assert ends[0][:2] == ends[1][:2]


def read_selector(data: bytes) -> None:
    """Any cut of the dialer's bytes must come to the same end."""
    ends = []
    for size in (len(data) or 1, data[0] % 16 + 1 if data else 1):
        selector = multistream.Selector(lambda name: name == "/a/1")
        ends.append((_fed(selector.receive, data, size), selector.selected))
    assert ends[0] == ends[1]


def _fed(receive: Callable[[bytes], object], data: bytes, size: int) -> bool:
    """Feed pieces; return whether all were taken."""
    try:
        for piece in pieces(data, size):
            receive(piece)
    except RemoteProtocolError:
        return False
    return True


_STATIC = noise.StaticKey.create(ANN, b"s" * 32)


def handshake(*, is_initiator: bool) -> noise.Handshake:
    """One side of a handshake from fixed keys."""
    key = b"i" * 32 if is_initiator else b"r" * 32
    return noise.Handshake(
        is_initiator=is_initiator, static=_STATIC, ephemeral=key, muxers=["/yamux/1.0.0"]
    )


def twin(side: noise.Handshake) -> noise.Handshake:
    """The same side at the same point: what came before costs six key agreements."""
    made = copy.copy(side)
    for name, value in vars(side).items():
        if isinstance(value, noise.XX):
            setattr(made, name, copy.copy(value))
    return made


RESPONDER, INITIATOR = handshake(is_initiator=False), handshake(is_initiator=True)
STRANGER = noise.XX(is_initiator=True, static=b"x" * 32, ephemeral=b"y" * 32)
ANSWERED = twin(RESPONDER)
STRANGER.read(ANSWERED.receive(STRANGER.write(b"")) or b"")
INITIATOR.start()


def read_noise_first(data: bytes) -> None:
    """Message 1, from whoever dials."""
    twin(RESPONDER).receive(data)


def read_noise_second(data: bytes) -> None:
    """Message 2: nothing decrypts but what follows from message 1."""
    twin(INITIATOR).receive(data)


def read_noise_proof(data: bytes) -> None:
    """What a peer says inside a message 3 that decrypts: keys, signature, extensions."""
    twin(ANSWERED).receive(copy.copy(STRANGER).write(data))


def read_noise_frames(data: bytes) -> None:
    """Frames behind a handshake: each is right or ends the direction."""
    opener = noise.Opener(b"k" * 32)
    for frame in pieces(data, data[0] + 1 if data else 1):
        opener.open(frame)


def read_yamux(data: bytes) -> None:
    """A session; the first byte says which end it is, in which pieces bytes come, who reads them.

    Unless somebody reads, or unread bytes are over their bound, any cut of the same bytes must give
    every stream the same bytes and the same end.
    """
    choice, stream = (data[0] if data else 0), data[1:]
    reads = bool(choice & 128)
    outcomes = []
    for size in (len(stream) or 1, choice % 32 + 1):
        session = yamux.Yamux(
            is_initiator=bool(choice & 32),
            inbound_streams_max=4,
            unread_bytes_max=UNREAD_BYTES_MAX if reads else len(data) + 1,
            resets_per_second_max=8,
        )
        if choice & 64:
            session.data_header(session.open(), 1)
        outcomes.append(_fed_session(session, stream, size, reads=reads))
    if not reads:
        assert outcomes[0] == outcomes[1]


def _fed_session(
    session: yamux.Yamux, data: bytes, size: int, *, reads: bool
) -> tuple[dict[int, bytes], bool]:
    """Feed pieces; return each stream's bytes, and whether all were taken."""
    received: dict[int, bytes] = {}
    for piece in pieces(data, size):
        try:
            events = session.receive(piece)
        except RemoteProtocolError:
            return {}, False
        for event in events:
            if not isinstance(event, yamux.DataReceived):
                continue
            received[event.stream_id] = received.get(event.stream_id, b"") + event.data
            if reads and event.stream_id % 4 == 1:
                session.consumed(event.stream_id, len(event.data))
                session.close_write(event.stream_id)
        assert 0 <= session.unread_bytes <= (UNREAD_BYTES_MAX if reads else len(data))
        assert len(session.outbox) <= 2 * len(data)
    return received, True


def read_spec_and_tensors(data: bytes) -> None:
    """A wire spec, then the bytes of its tensors."""
    size = data[0] if data else 0
    specs = wire.decode(data[1 : size + 1], tensor.WireSpec)
    hidden = tensor.split(specs, memoryview(data)[size + 1 :])
    for item in hidden:
        is_finite(item)
    tensor.check_hidden(hidden, specs[:2], count=3)


def read_step(data: bytes) -> None:
    step, hidden = pipeline.decode_step(data)
    assert pipeline.encode_step(step, hidden)
    for item in hidden:
        is_finite(item)


def read_engine_frames(data: bytes) -> None:
    """The pipe of an engine's child, as the node and as the child read it."""
    reader = engine.FrameReader()
    for piece in pieces(data, data[0] % 64 + 1 if data else 1):
        while piece:
            wanted = reader.wanted[: len(piece)]
            wanted[:] = piece[: len(wanted)]
            piece = piece[len(wanted) :]
            for head, payload in reader.received(len(wanted)):
                _read_engine_frame(head, payload)


def _read_engine_frame(head: memoryview, payload: memoryview) -> None:
    for read in (engine.decode_request, engine.decode_reply):
        try:
            message: Any = read(head)
        except RemoteProtocolError:
            continue
        tensor.split(getattr(message, "tensors", ()), payload)


def read_record(data: bytes) -> None:
    """A membership record signed by the network's own key."""
    record = sealed(NETWORK, membership.DOMAIN, membership.PAYLOAD_TYPE, data)
    membership.network_name_of([record])
    membership.verify_membership([record], wall_s=NOW_S)


def read_proof(data: bytes) -> None:
    """A chain of payloads: the first signed by the network's key, the others by members."""
    try:
        payloads = msgspec.msgpack.decode(data, type=list[bytes])
    except (msgspec.MsgspecError, RecursionError):
        payloads = [data]
    signers = [NETWORK, ANN, BOB, ANN]
    proof = [
        sealed(signer, membership.DOMAIN, membership.PAYLOAD_TYPE, payload)
        for signer, payload in zip(signers, payloads, strict=False)
    ]
    membership.open_membership(proof)
    membership.verify_membership(proof, wall_s=NOW_S)


def read_network_id(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    hash_ = membership.key_hash_of(membership.NetworkId(text))
    assert membership.network_id_of(hash_) == text


def read_invite(data: bytes) -> None:
    invite.open_invite(sealed(ANN, invite.DOMAIN, invite.PAYLOAD_TYPE, data))


def read_announcement(data: bytes) -> None:
    record = sealed(ANN, announce.DOMAIN, announce.PAYLOAD_TYPE, data)
    announce.open_announcement(record, wall_s=NOW_S)


def read_revocation(data: bytes) -> None:
    """By the network's own key, and by a member that must show that it stands above."""
    for signer in (NETWORK, ANN):
        record = sealed(signer, revocation.DOMAIN, revocation.PAYLOAD_TYPE, data)
        revocation.open_revocation(record, wall_s=NOW_S)


def read_statement(data: bytes) -> None:
    record = sealed(ANN, swim.DOMAIN, swim.PAYLOAD_TYPE, data)
    swim.open_statement(record, wall_s=NOW_S)


def read_summary(data: bytes) -> None:
    """What a table's summary is compared by: entries, keys, prefixes."""
    for read in (summary.unpack_entries, summary.unpack_keys):
        try:
            list(read(data))
        except RemoteProtocolError:
            pass
    summary.check_prefix(data.decode("utf-8", "replace"))


def read_txt(data: bytes) -> None:
    found = mdns.decode_txt(data)
    if found is not None:
        assert mdns.decode_txt(mdns.encode_txt(*found)) == found


def read_config(data: bytes) -> None:
    """A model's configuration, as `refusals.read_json` reads it behind the file."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict):
        refusals.check_config(config)


def read_safetensors(data: bytes) -> None:
    """The first two bytes say how many bytes of tensors follow the header."""
    size = int.from_bytes(data[:2], "little")
    header = data[2:]
    safetensors.parse_header(header, path=FILE, file_bytes=8 + len(header) + size)


def read_gguf(data: bytes) -> None:
    gguf.parse_header(io.BytesIO(data), path=FILE, file_bytes=len(data))


def read_gguf_cut(data: bytes) -> None:
    """A header, and what of it a shard would be; its own header must be read again."""
    header = gguf.parse_header(io.BytesIO(data), path=FILE, file_bytes=len(data))
    for start, end in ((0, layer_count(header)), (0, 1), (1, 2)):
        cut = cut_layers(header, start, end)
        again = io.BytesIO(cut.header)
        assert gguf.parse_header(again, path=FILE, file_bytes=cut.size_bytes).tensors


def read_gguf_model(data: bytes) -> None:
    """What is made of a GGUF's metadata, given as a MessagePack map."""
    try:
        found = msgspec.msgpack.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    metadata = {key: _metadata_value(value) for key, value in found.items()}
    header = gguf.GgufHeader(path=FILE, version=3, alignment=32, metadata=metadata, tensors={})
    for convert in (llama_config, tokenizer_json, tokenizer_config, end_ids):
        try:
            convert(header)
        except ModelRefused:
            pass


def _metadata_value(value: Any) -> gguf.MetadataValue:
    """The same as a header's reader would give it: arrays of at most two levels, no other types."""
    if isinstance(value, list):
        return tuple(item if isinstance(item, (int, float, str)) else "" for item in value)
    return value if isinstance(value, (int, float, str)) else 0


def message(*kinds: Any) -> Callable[[bytes], object]:
    """A function that decodes one message of a type or tagged union."""

    def read(data: bytes) -> object:
        return [_read_message(data, kind) for kind in kinds]

    return read


def _read_message(data: bytes, kind: Any) -> object:
    """Decode; what comes back must survive being sent on."""
    found = wire.decode(data, kind)
    assert wire.decode(wire.encode(found), kind) == found
    return found
