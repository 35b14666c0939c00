"""The published vectors: each valid case means what it says, each invalid one is refused.

Cases that belong to one module's own test (Noise's conversations, Yamux's events, sampling) are
read there; here is what any second decoder is held to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmpy.errors import (
    InviteMalformed,
    MembershipError,
    ModelRefused,
    RemoteProtocolError,
    StaleRecord,
)
from swarmpy.identity import Identity, PeerId, parse_peer_id
from swarmpy.pipeline.finite import is_finite
from swarmpy.proto import (
    announce,
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
    revocation,
    swim,
    tensor,
    wire,
    yamux,
)
from swarmpy.public_keys import decode_public_key
from swarmpy.shards import refusals, safetensors

FOLDER = Path(__file__).parents[2] / "protocols" / "vectors"
FILES = {path.stem: json.loads(path.read_text("utf-8")) for path in FOLDER.glob("*.json")}

UNIONS: dict[str, Any] = {
    "announce": announce.Message,
    "First": pipeline.First,
    "Command": pipeline.Command,
    "Report": pipeline.Report,
    "TokenFrame": pipeline.TokenFrame,
    "invite": invite.InviteMessage,
    "membership": membership.MembershipMessage,
}


def cases(file: str, *parts: str) -> Any:
    """Parametrize a test over cases of a file, named by what they are."""
    found = [case for part in parts for case in FILES[file][part]]
    assert found
    names = [str(case.get("what", case.get("why", case.get("type", "")))) for case in found]
    return pytest.mark.parametrize("case", found, ids=names)


def hexes(text: str) -> bytes:
    return bytes.fromhex(text)


# libp2p's ---------------------------------------------------------------------------------


@cases("ping", "valid")
def test_a_ping_that_comes_back_is_one(case: dict[str, str]) -> None:
    ping.check_pong(hexes(case["sent"]), hexes(case["received"]))


@cases("ping", "invalid")
def test_a_ping_that_comes_back_otherwise_is_none(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        ping.check_pong(hexes(case["sent"]), hexes(case["received"]))


@cases("envelope", "valid")
def test_an_envelope_opens_and_is_sealed_again_to_the_same_bytes(case: dict[str, str]) -> None:
    file = FILES["envelope"]
    signer = Identity(hexes(file["seeds"]["ann"]))
    purpose = {"domain": file["domain"], "payload_type": hexes(file["type"])}

    opened = envelope.open_envelope(hexes(case["bytes"]), **purpose)

    assert (opened.signer, opened.payload.hex()) == (case["signer"], case["payload"])
    assert envelope.seal(signer, payload=opened.payload, **purpose).hex() == case["bytes"]


@cases("envelope", "invalid")
def test_an_envelope_that_is_none_is_refused(case: dict[str, str]) -> None:
    file = FILES["envelope"]
    with pytest.raises(RemoteProtocolError):
        envelope.open_envelope(
            hexes(case["bytes"]), domain=file["domain"], payload_type=hexes(file["type"])
        )


@cases("identify", "valid")
def test_an_identify_message_says_what_the_vector_says(case: dict[str, Any]) -> None:
    info = identify.decode(hexes(case["bytes"]), peer=PeerId(FILES["identify"]["peer"]))

    said = {name: getattr(info, name) for name in case if name not in ("what", "bytes")}
    assert json.loads(json.dumps(said)) == {name: case[name] for name in said}


@cases("identify", "invalid")
def test_an_identify_message_that_is_none_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        identify.decode(hexes(case["bytes"]), peer=PeerId(FILES["identify"]["peer"]))


@cases("identity", "invalid_public_keys")
def test_a_public_key_that_is_none_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_public_key(hexes(case["public_key"]))


@cases("identity", "invalid_peer_ids")
def test_a_peer_id_that_is_none_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_peer_id(case["peer_id"])


@cases("multiaddr", "invalid")
def test_bytes_that_are_no_address_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        multiaddr.from_bytes(hexes(case["bytes"]))


@pytest.mark.parametrize("text", FILES["multiaddr"]["invalid_text"])
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        multiaddr.components(text)


def dialer() -> multistream.Dialer:
    return multistream.Dialer(FILES["multistream"]["proposes"])


def listener() -> multistream.Selector:
    return multistream.Selector(lambda name: name in FILES["multistream"]["serves"])


def fed(receive: Callable[[bytes], bytes], data: bytes, size: int) -> bytes:
    """Feed pieces of `size` and return what was answered."""
    return b"".join(receive(data[start : start + size]) for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
@cases("multistream", "dialer")
def test_a_dialer_says_what_the_vector_says(case: dict[str, Any], size: int) -> None:
    side = dialer()

    sent = side.start() + fed(side.receive, hexes(case["received"]), size)

    assert (sent.hex(), side.selected, side.rest.hex()) == (
        case["sent"],
        case["selected"],
        case["rest"],
    )


@pytest.mark.parametrize("size", [1, 7, 1000])
@cases("multistream", "listener")
def test_a_listener_says_what_the_vector_says(case: dict[str, Any], size: int) -> None:
    side = listener()

    sent = fed(side.receive, hexes(case["received"]), size)

    assert (sent.hex(), side.selected, side.rest.hex()) == (
        case["sent"],
        case["selected"],
        case["rest"],
    )


@cases("multistream", "invalid_dialer")
def test_a_dialer_refuses_what_the_vector_names(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        dialer().receive(hexes(case["received"]))


@cases("multistream", "invalid_listener")
def test_a_listener_refuses_what_the_vector_names(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        listener().receive(hexes(case["received"]))


def handshake(role: str) -> noise.Handshake:
    static = noise.StaticKey.create(Identity(b"\x01" * 32), b"s" * 32)
    return noise.Handshake(is_initiator=role == "initiator", static=static, ephemeral=b"e" * 32)


@cases("noise", "invalid")
def test_a_handshake_message_that_is_none_fails(case: dict[str, str]) -> None:
    side = handshake(case["role"])
    if case["role"] == "initiator":
        side.start()
    with pytest.raises(RemoteProtocolError):
        side.receive(hexes(case["message"]))


@cases("noise", "invalid_payloads")
def test_a_handshake_payload_that_proves_nothing_fails(case: dict[str, str]) -> None:
    stranger = noise.XX(is_initiator=True, static=b"x" * 32, ephemeral=b"y" * 32)
    responder = handshake("responder")
    stranger.read(responder.receive(stranger.write(b"")) or b"")
    with pytest.raises(RemoteProtocolError):
        responder.receive(stranger.write(hexes(case["payload"])))


@cases("yamux", "invalid")
def test_frames_that_break_a_rule_close_the_session(case: dict[str, str]) -> None:
    session = yamux.Yamux(
        is_initiator=False,
        inbound_streams_max=4,
        unread_bytes_max=1 << 24,
        resets_per_second_max=3,
    )
    with pytest.raises(RemoteProtocolError):
        session.receive(hexes(case["bytes"]))


@cases("mdns", "valid")
def test_a_txt_record_says_what_the_vector_says(case: dict[str, Any]) -> None:
    found = mdns.decode_txt(hexes(case["txt"]))

    assert (found or (None, ())) == (case["peer"], tuple(case["addresses"]))


@cases("mdns", "invalid")
def test_a_txt_record_that_is_none_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        mdns.decode_txt(hexes(case["txt"]))


# Messages of ours ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["announce", "invite", "membership"])
def test_messages_mean_what_the_vectors_say(name: str) -> None:
    for case in FILES[name]["messages"]:
        message = wire.decode(hexes(case["bytes"]), UNIONS[name])

        assert message == msgspec.convert(case["fields"], UNIONS[name])
        assert wire.decode(wire.encode(message), UNIONS[name]) == message


@pytest.mark.parametrize("name", ["announce", "invite", "membership"])
def test_messages_that_are_none_are_refused(name: str) -> None:
    for case in FILES[name]["invalid_messages"]:
        with pytest.raises(RemoteProtocolError):
            print(name, case["what"], wire.decode(hexes(case["bytes"]), UNIONS[name]))


@cases("pipeline", "invalid_messages")
def test_pipeline_messages_that_are_none_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode(hexes(case["bytes"]), UNIONS[case["type"]])


@cases("pipeline", "invalid_steps")
def test_step_frames_that_are_none_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        pipeline.decode_step(hexes(case["frame"]))


def engine_reader(direction: str) -> Callable[[memoryview], object]:
    return engine.decode_request if direction == "request" else engine.decode_reply


@cases("engine", "messages")
def test_engine_messages_mean_what_the_vectors_say(case: dict[str, Any]) -> None:
    message = engine_reader(case["direction"])(memoryview(hexes(case["bytes"])))

    kind = getattr(engine, case["type"])
    assert message == msgspec.convert(case["fields"], kind, strict=False)
    assert json.loads(msgspec.json.encode(message)) == case["fields"]


@cases("engine", "invalid_messages")
def test_engine_messages_that_are_none_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        engine_reader(case["direction"])(memoryview(hexes(case["bytes"])))


def engine_frames(data: bytes) -> list[engine.Frame]:
    """Read frames as they come over the pipe, and cut their tensors."""
    reader, found = engine.FrameReader(), []
    while data:
        wanted = reader.wanted[: len(data)]
        wanted[:] = data[: len(wanted)]
        found += reader.received(len(wanted))
        data = data[len(wanted) :]
    return found


def read_engine_frames(data: bytes) -> None:
    """Read frames with their messages and tensors, as the node does."""
    for head, payload in engine_frames(data):
        tensor.split(getattr(engine.decode_reply(head), "tensors", ()), payload)


@cases("engine", "frames")
def test_an_engines_frame_is_its_message_and_tensors(case: dict[str, Any]) -> None:
    ((head, payload),) = engine_frames(hexes(case["bytes"]))

    message = engine.decode_reply(head)
    tensors = tensor.split(getattr(message, "tensors", ()), payload)
    assert head.hex() == case["message"]
    assert [bytes(tensor.data).hex() for tensor in tensors] == case["tensors"]


@cases("engine", "invalid_frames")
def test_an_engines_frame_that_is_none_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(RemoteProtocolError):
        read_engine_frames(hexes(case["bytes"]))


# Signed records -----------------------------------------------------------------------------

OPENERS: dict[str, Callable[..., Any]] = {
    "announce": announce.open_announcement,
    "membership": revocation.open_revocation,
    "swim": swim.open_statement,
}


def opened(file: str, case: dict[str, Any]) -> Any:
    return OPENERS[file](hexes(case["bytes"]), wall_s=case["wall_s"])


@cases("announce", "valid")
def test_an_announcement_says_what_the_vector_says(case: dict[str, Any]) -> None:
    signed = opened("announce", case)

    assert (signed.peer, signed.network_id) == (case["peer"], case["network_id"])
    assert signed.announcement == msgspec.convert(case["fields"], announce.Announcement)


@cases("swim", "valid")
def test_a_statement_says_what_the_vector_says(case: dict[str, Any]) -> None:
    signed = opened("swim", case)

    said = (signed.network_id, signed.signer, signed.peer, signed.seq)
    assert said == (case["network_id"], case["signer"], case["accused"], case["seq"])


@cases("membership", "revocations")
def test_a_revocation_says_what_the_vector_says(case: dict[str, Any]) -> None:
    signed = opened("membership", case)

    member = Identity(hexes(FILES["membership"]["seeds"][case["member"]])).peer_id
    said = (signed.network_id, signed.signer, signed.peer)
    assert said == (case["network_id"], case["signer"], member)


def records(part: str) -> Any:
    """Parametrize over the cases of all three kinds of record."""
    found = [
        (file, case)
        for file, name in (
            ("announce", part),
            ("swim", part),
            ("membership", f"{part}_revocations"),
        )
        for case in FILES[file][name]
    ]
    names = [f"{file}: {case['what']}" for file, case in found]
    return pytest.mark.parametrize(("file", "case"), found, ids=names)


@records("invalid")
def test_a_record_that_is_none_is_a_breach(file: str, case: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        opened(file, case)


@records("stale")
def test_a_record_of_another_time_is_stale_and_no_breach(file: str, case: dict[str, Any]) -> None:
    with pytest.raises(StaleRecord):
        opened(file, case)


# Tensors, codes, chains, files --------------------------------------------------------------


def check_tensors(case: dict[str, Any]) -> None:
    """Check what came as a stage does."""
    declared = msgspec.convert(case["declared"], tensor.WireSpec)
    agreed = msgspec.convert(case["agreed"], tensor.WireSpec)
    hidden = tensor.split(declared, memoryview(hexes(case["bytes"])))
    tensor.check_hidden(hidden, agreed, count=case["count"])
    if not all(map(is_finite, hidden)):
        raise RemoteProtocolError("not finite")


@cases("tensor", "valid")
def test_tensors_that_fit_are_taken(case: dict[str, Any]) -> None:
    check_tensors(case)


@cases("tensor", "invalid")
def test_tensors_that_do_not_fit_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        check_tensors(case)


@pytest.mark.parametrize("code", FILES["invite"]["equal"])
def test_a_code_means_the_same_however_it_was_pasted(code: str) -> None:
    expected = FILES["invite"]["codes"][0]["envelope"]
    assert invite.decode_invite(code).envelope.hex() == expected


@cases("invite", "later")
def test_a_later_revisions_code_is_read(case: dict[str, str]) -> None:
    assert invite.decode_invite(case["code"]).invite.version == 1


@cases("invite", "invalid")
def test_a_code_that_is_none_is_malformed(case: dict[str, str]) -> None:
    with pytest.raises(InviteMalformed):
        invite.decode_invite(case["code"])


def proof_of(case: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(map(hexes, case["proof"]))


@cases("membership", "memberships")
def test_a_proof_rests_on_whom_the_vector_says(case: dict[str, Any]) -> None:
    found = membership.verify_membership(proof_of(case), wall_s=case["wall_s"])
    assert [item.hex() for item in found.line] == case["line"]


@cases("membership", "reaches")
def test_a_revocation_reaches_what_the_vector_says(case: dict[str, Any]) -> None:
    signed = revocation.opened_again(hexes(case["revocation"]))
    shown = membership.open_membership(proof_of(case))
    assert revocation.voids(signed, shown) == case["is_void"]


@cases("membership", "refused")
def test_a_proof_that_does_not_verify_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises((RemoteProtocolError, MembershipError)):
        membership.verify_membership(proof_of(case), wall_s=case["wall_s"])


@cases("membership", "later")
def test_a_later_revisions_proof_is_read(case: dict[str, Any]) -> None:
    found = membership.verify_membership(proof_of(case), wall_s=case["wall_s"])
    assert found.network_id == case["network_id"]


@cases("manifest", "invalid_safetensors")
def test_a_safetensors_header_that_lies_is_refused(case: dict[str, Any]) -> None:
    header = case["header"].encode()
    with pytest.raises(ModelRefused):
        safetensors.parse_header(
            header, path=Path("m"), file_bytes=8 + len(header) + case["tensor_bytes"]
        )


@cases("manifest", "invalid_configurations")
def test_a_configuration_that_asks_for_too_much_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ModelRefused):
        refusals.check_config(case["config"])
