"""Writes the part of the corpus that is known beforehand: `python -m fuzz.seeds`.

Valid inputs of every decoder, from the published vectors and from the message types themselves, and
hostile ones. Run it after a change of the wire; it only ever adds files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fuzz.decoders import DECODERS
from fuzz.examples import example, structs_of
from fuzz.readers import ANN, BOB, NETWORK, handshake, sealed
from swarmpy.identity import PUBLIC_KEY_PROTOBUF_PREFIX, peer_id_bytes
from swarmpy.proto import (
    identify,
    mdns,
    membership,
    multiaddr,
    multistream,
    noise,
    protobuf,
    wire,
)

ROOT = Path(__file__).parent
CORPUS = ROOT / "corpus"
EVERY = "every"
"""The folder of inputs for all targets."""

VECTORS = ROOT.parent / "protocols" / "vectors"

ADDRESSES = (
    "/ip4/192.168.1.20/tcp/41234",
    "/ip6/2001:db8::7/tcp/41234",
    "/dns4/example.org/tcp/443",
    f"/ip4/192.0.2.1/tcp/4001/p2p/{ANN.peer_id}",
)

HOSTILE = (
    b"",
    b"\x00",
    b"\xff" * 9,
    b"\x80" * 10,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 1500,
    b"\x81\xa1a" * 700,
    b"[" * 1500,
    b'{"a":' * 500,
)
"""Lengths beyond what comes, and nesting beyond what recursion bears."""


def vectors(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text("utf-8"))


def messages() -> Iterator[tuple[str, bytes]]:
    """Each message type at its least and with everything in it."""
    for name, decoder in DECODERS.items():
        for kind in decoder.kinds:
            for struct_type in structs_of(kind):
                for is_full in (False, True):
                    data = msgspec.msgpack.encode(example(struct_type, is_full=is_full))
                    if name == "pipeline_step":
                        data = wire.encode_varint(len(data)) + data
                    yield name, data


def published() -> Iterator[tuple[str, bytes]]:
    """What the vectors hold."""
    for case in vectors("pipeline")["messages"]:
        for name in ("first", "description", "command", "report", "token"):
            types = [kind.__name__ for kind in structs_of(DECODERS[f"pipeline_{name}"].kinds[0])]
            if case["type"] in types:
                yield f"pipeline_{name}", bytes.fromhex(case["bytes"])
    for case in vectors("pipeline")["steps"]:
        yield "pipeline_step", bytes.fromhex(case["frame"])
    for case in vectors("multiaddr")["valid"]:
        yield "multiaddr", bytes.fromhex(case["bytes"])
        yield "multiaddr_text", case["text"].encode()
        yield "endpoint", case["text"].encode()
    for case in vectors("yamux")["valid"]:
        for choice in (0, 3, 128 + 5, 32 + 64 + 7):
            yield "yamux", bytes([choice]) + bytes.fromhex(case["bytes"])
    for case in vectors("invite")["codes"]:
        yield "invite_code", case["code"].encode()
        yield "envelope", bytes.fromhex(case["envelope"])
        yield "invite", payload_of(bytes.fromhex(case["envelope"]))
    records = vectors("membership")["revocations"]
    for case in (*records, *vectors("membership")["invalid_revocations"]):
        yield "envelope", bytes.fromhex(case["bytes"])
    for case in records:
        yield "revocation", payload_of(bytes.fromhex(case["bytes"]))
    for name, target in (("announce", "announcement"), ("swim", "statement")):
        for case in vectors(name)["valid"]:
            yield target, payload_of(bytes.fromhex(case["bytes"]))
    for name in ("announce", "invite", "membership"):
        target = name if name == "announce" else f"{name}_message"
        for case in (*vectors(name)["messages"], *vectors(name)["invalid_messages"]):
            yield target, bytes.fromhex(case["bytes"])
    for case in vectors("identify")["invalid"]:
        yield "identify", bytes.fromhex(case["bytes"])
    for case in vectors("mdns")["invalid"]:
        yield "mdns", bytes.fromhex(case["txt"])
    for case in vectors("membership")["memberships"]:
        payloads = [payload_of(bytes.fromhex(record)) for record in case["proof"]]
        yield "membership_record", payloads[0]
        yield "membership_proof", msgspec.msgpack.encode(payloads)
    for case in vectors("identity")["valid"]:
        yield "public_key", bytes.fromhex(case["public_key"])
        for text in (case["peer_id"], *case["cids"]):
            yield "peer_id", text.encode()
    for case in vectors("noise")["libp2p"]:
        yield "noise_first", bytes.fromhex(case["messages"][0])


def payload_of(envelope: bytes) -> bytes:
    return protobuf.bytes_field(protobuf.decode(envelope), 3)


def made() -> Iterator[tuple[str, bytes]]:
    """What has no vectors."""
    static = noise.StaticKey.create(BOB, b"x" * 32)
    payload = noise.Payload(static.identity_key, static.signature, ("/yamux/1.0.0", "/mplex/6.7.0"))
    for name in ("noise_payload", "noise_proof", "protobuf"):
        yield name, noise.encode_payload(payload)
    initiator, responder = handshake(is_initiator=True), handshake(is_initiator=False)
    yield "noise_first", (first := initiator.start())
    yield "noise_second", responder.receive(first) or b""
    out = bytearray(34)
    noise.Sealer(b"k" * 32).seal_into(b"plaintext 16 byt", memoryview(out), 0)
    yield "noise_frames", bytes(out[2:])
    record = identify.seal_peer_record(ANN, ADDRESSES[:2], seq=7)
    info = identify.IdentifyInfo(
        agent="swarmpy/0.1.0",
        protocols=("/ipfs/ping/1.0.0", "/swarmpy/membership/1"),
        addresses=ADDRESSES[:2],
        observed_address=ADDRESSES[1],
    )
    for signed in (b"", record):
        data = identify.encode(info, public_key=ANN.public_key, signed_record=signed)
        yield "identify", data
        yield "protobuf", data
    yield "peer_record", payload_of(record)
    yield "envelope", sealed(ANN, "fuzz", b"f", b"payload")
    yield "mdns", mdns.encode_txt(ANN.peer_id, ADDRESSES[:2])
    yield "mdns", b"\x07a=other" + mdns.encode_txt(ANN.peer_id, ADDRESSES[:1])
    yield "ping", b"p" * 32
    yield "peer_id", ANN.peer_id.encode()
    yield "peer_id_bytes", peer_id_bytes(ANN.peer_id)
    yield "peer_id_bytes", b"\x00\x24" + PUBLIC_KEY_PROTOBUF_PREFIX + b"\x01" + bytes(31)
    yield "network_id", membership.own_network_id(NETWORK).encode()
    yield "varint", b"\x00\x7f\x80\x01\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    line, header = multistream.encode_line, multistream.encode_line(multistream.HEADER)
    yield "multistream_dialer", header + line("/a/1") + b"rest"
    yield "multistream_dialer", header + line("na") + line("/b/1")
    yield "multistream_selector", header + line("ls") + line("/x") + line("/a/1") + b"rest"
    yield "multistream_selector", header + line("/x") * 33
    for address in ADDRESSES:
        yield "multiaddr", multiaddr.to_bytes(address)
        yield "multiaddr_text", address.encode()
        yield "endpoint", address.encode()


def tensors() -> Iterator[tuple[str, bytes]]:
    """A spec and its tensors, alone and behind a message of the engine's pipe."""
    spec = msgspec.msgpack.encode([["float32", [3, 2]], ["bfloat16", [1]]])
    yield "tensor", bytes([len(spec)]) + spec + struct.pack("<6fH", *range(6), 0x7F80)
    step = example(structs_of(DECODERS["engine_request"].kinds[0])[0], is_full=False)
    head = msgspec.msgpack.encode(step)
    exported = {"type": "exported", "id": 1, "names": ["k"], "tensors": [["float32", [2]]]}
    told = msgspec.msgpack.encode(exported)
    frame = struct.pack("<II", len(told), 8) + told + struct.pack("<2f", 1, 2)
    yield "engine_frames", struct.pack("<II", len(head), 0) + head + frame
    yield "engine_frames", struct.pack("<II", len(told), 70_000) + told + bytes(200)


def model_files() -> Iterator[tuple[str, bytes]]:
    """Headers of both formats, and a configuration."""
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [48, 50]},
    }
    yield "safetensors", struct.pack("<H", 50) + json.dumps(header).encode()
    twice = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}'
    yield "safetensors", struct.pack("<H", 4) + twice
    yield "config", b'{"model_type":"llama","num_hidden_layers":2,"quantization":{"bits":[4,8]}}'
    yield "config", b'{"vocab_size":' + b"[" * 900 + b"]" * 900 + b"}"
    yield "gguf", gguf()
    yield "gguf_cut", gguf_of_layers()
    yield "gguf_model", msgspec.msgpack.encode(metadata())
    yield "gguf_model", msgspec.msgpack.encode(scored_metadata())
    yield "gguf_model", msgspec.msgpack.encode(metadata() | {"tokenizer.ggml.model": "gemma4"})


def scored_metadata() -> dict[str, object]:
    """The same with SentencePiece's vocabulary, two templates, and end tokens of several kinds."""
    pieces = {"<unk>": 2, "<s>": 3, "<|im_end|>": 1, "<0x0A>": 6, "a": 1, "aa": 1, "aaa": 5, "x": 4}
    vocabulary = {
        "model": "llama",
        "tokens": list(pieces),
        "token_type": list(pieces.values()),
        "scores": [0.0, 0.0, 0.0, 0.0, -9.0, -1.0, -2.0, 0.0],
        "eos_token_id": 2,
        "eos_token_ids": [1, 2],
        "add_space_prefix": False,
        "add_eos_token": True,
    }
    return {
        **metadata(),
        "general.name": "Phi-3",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    }


def metadata() -> dict[str, object]:
    """Metadata of a small llama with a vocabulary of its own."""
    tokens = ["<s>", "</s>", *map(chr, range(33, 127)), "he", "hel"]
    numbers = {
        "embedding_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "block_count": 2,
        "feed_forward_length": 128,
        "context_length": 512,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
    }
    vocabulary = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["h e", "he l"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
    }
    return {
        "general.architecture": "llama",
        "tokenizer.chat_template": "{{ messages }}",
        **{f"llama.{key}": value for key, value in numbers.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    }


def gguf() -> bytes:
    """A GGUF of one tensor with a string, a number and an array as metadata."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    metadata = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    metadata += text("llama.block_count") + struct.pack("<II", 4, 2)
    metadata += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    metadata += text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5)
    tensor = text("output.weight") + struct.pack("<IQQIQ", 2, 4, 3, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 4) + metadata + tensor
    return head + bytes(-len(head) % 32) + bytes(48)


def gguf_of_layers() -> bytes:
    """A GGUF of two layers with a tied embedding, dense layers first, and windows."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"block_count": 2, "leading_dense_block_count": 1, "nextn_predict_layers": 0}
    metadata = text("general.architecture") + struct.pack("<I", 8) + text("gemma3")
    for key, value in numbers.items():
        metadata += text(f"gemma3.{key}") + struct.pack("<II", 4, value)
    metadata += text("gemma3.feed_forward_length") + struct.pack("<IIQ2I", 9, 4, 2, 8, 8)
    names = ("token_embd.weight", "blk.0.attn_norm.weight", "blk.1.attn_norm.weight")
    tensors = b"".join(
        text(name) + struct.pack("<IQQIQ", 2, 4, 2, 0, 32 * index)
        for index, name in enumerate(names)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, 5) + metadata + tensors
    return head + bytes(-len(head) % 32) + bytes(96)


def write(target: str, data: bytes) -> None:
    """Keep one input, under the hash of its bytes."""
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> None:
    for source in (messages, published, made, tensors, model_files):
        for target, data in source():
            write(target, data)
    for data in HOSTILE:
        write(EVERY, data)


if __name__ == "__main__":
    main()
