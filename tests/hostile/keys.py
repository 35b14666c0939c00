"""Identity keys as a hostile peer may show them: of every kind libp2p names, sound or not."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hostile.garbage import mutated

from swarmpy.proto import protobuf

RSA, ED25519, SECP256K1, ECDSA = range(4)

SMALL_ORDER_X25519 = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]
"""The points of Curve25519 with which every shared secret is zero (RFC 7748, section 6.1)."""

SMALL_ORDER_ED25519 = [
    b"\x01" + bytes(31),
    bytes(32),
    bytes(31) + b"\x80",
    b"\xec" + b"\xff" * 30 + b"\x7f",
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85"),
]
"""The points of order 1, 2, 4 and 8: under them one signature can fit every message."""


def encoded(kind: int, data: bytes) -> bytes:
    """Return libp2p's protobuf PublicKey."""
    return protobuf.encode([(1, kind), (2, data)])


def _spki(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed448.Ed448PublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def sound_keys() -> list[bytes]:
    """Return keys that are what they say, some too weak or of a kind nobody uses."""
    curves = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1(), ec.BrainpoolP256R1())
    points = [ec.derive_private_key(7, curve).public_key() for curve in curves]
    compressed = points[3].public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    modulus = (1 << 2047) | 1
    return [
        *(encoded(ECDSA, _spki(point)) for point in points),
        encoded(SECP256K1, compressed),
        encoded(SECP256K1, points[3].public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)),
        encoded(RSA, _spki(points[0])),  # another kind than it says
        encoded(ECDSA, _spki(ed448.Ed448PrivateKey.from_private_bytes(b"\x01" * 57).public_key())),
        *(
            encoded(RSA, _spki(rsa.RSAPublicNumbers(exponent, number).public_key()))
            for exponent, number in (
                (3, modulus),
                (65537, modulus),
                (65537, (1 << 1023) | 1),
                (65537, (1 << 8191) | 1),
                (65537, (1 << 16383) | 1),
                ((1 << 2000) | 1, modulus),
            )
        ),
    ]


def identity_keys(generator: random.Random) -> Iterator[bytes]:
    """Yield identity keys: sound, of small order, cut, changed, of unknown kinds."""
    for key in sound_keys():
        yield key
        for _ in range(4):
            yield mutated(key, generator)
            yield key[: generator.randrange(len(key))]
    for point in SMALL_ORDER_ED25519:
        yield encoded(ED25519, point)
    for kind in (*range(6), 2**31, 2**63 - 1):
        for size in (0, 1, 31, 32, 33, 65, 300):
            yield encoded(kind, generator.randbytes(size))
