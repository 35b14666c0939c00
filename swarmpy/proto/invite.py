"""Invites: the `swarm://` code, the four words that name a network, and what redeeming says.

A code is a signed envelope in base32. Every check that needs only the code and a clock is here; the
token inside is worth something at its issuer alone.
Sans-IO: `swarmpy/trust/invites.py` remembers who redeemed what.
Spec: protocols/invite.md (revision 2).
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from swarmpy.errors import BadMessage, InviteMalformed, RemoteProtocolError
from swarmpy.identity import Identity, PeerId
from swarmpy.proto import multiaddr
from swarmpy.proto.endpoint import ip_endpoint
from swarmpy.proto.envelope import open_envelope, seal
from swarmpy.proto.membership import (
    KeyHash,
    Name,
    NetworkId,
    Proof,
    WallSecondsInt,
    check_printable,
    check_version,
    key_hash_of,
    network_id_of,
)
from swarmpy.proto.wire import decode, encode

PROTOCOL = "/swarmpy/invite/1"

DOMAIN = "swarmpy-invite"
PAYLOAD_TYPE = b"i"
VERSION = 1
SCHEME = "swarm://"

CODE_CHARACTERS_MAX = 2048
"""Longest text tried as a code; eight IPv6 addresses and three long names stay below 1,500."""

INVITE_BYTES_MAX = 1024
"""Largest signed invite."""

INVITE_ADDRESSES_MAX = 8
INVITE_ADDRESS_BYTES_MAX = 64
"""Longest binary address in an invite: an IPv6 literal and a port take 20."""

INVITE_USES_MAX = 100
"""Most machines one code can admit: a code for more is a public one."""

TOKEN_BYTES = 16
"""128 random bits: a token cannot be guessed, only stolen."""


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """What an issuer signs. The issuer's PeerId is the envelope's signer and not repeated."""

    version: int
    network: KeyHash
    network_name: Name
    issuer_name: Name
    addresses: Annotated[
        tuple[Annotated[bytes, Meta(max_length=INVITE_ADDRESS_BYTES_MAX)], ...],
        Meta(max_length=INVITE_ADDRESSES_MAX),
    ]
    """Binary multiaddrs of the issuer, IP literals only."""
    token: Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    expires_wall_s: WallSecondsInt
    can_invite: bool
    uses: Annotated[int, Meta(ge=1, le=INVITE_USES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedInvite:
    """A verified invite and the bytes that were signed."""

    invite: Invite
    issuer: PeerId
    network_id: NetworkId
    addresses: tuple[str, ...]
    envelope: bytes


# The conversation ---------------------------------------------------------------


class Redeem(msgspec.Struct, frozen=True, tag="redeem"):
    """The joiner shows its invite to the issuer."""

    invite: Annotated[bytes, Meta(max_length=INVITE_BYTES_MAX)]


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The joiner's membership; the same bytes however often the same joiner asks."""

    proof: Proof


RefusalReason = Literal["malformed", "expired", "used", "foreign", "busy", "unable", "revoked"]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why there is no membership, and what time it is at the issuer."""

    reason: RefusalReason
    wall_s: WallSecondsInt


InviteMessage = Redeem | Accepted | Refused


# The code -------------------------------------------------------------------------


def encode_invite(
    issuer: Identity,
    *,
    network_id: NetworkId,
    network_name: str,
    issuer_name: str,
    addresses: tuple[str, ...],
    token: bytes,
    expires_wall_s: int,
    can_invite: bool,
    uses: int,
) -> str:
    """Sign an invite and return its code."""
    invite = Invite(
        version=VERSION,
        network=key_hash_of(network_id),
        network_name=network_name,
        issuer_name=issuer_name,
        addresses=tuple(multiaddr.to_bytes(address) for address in addresses),
        token=token,
        expires_wall_s=expires_wall_s,
        can_invite=can_invite,
        uses=uses,
    )
    sealed = seal(issuer, domain=DOMAIN, payload_type=PAYLOAD_TYPE, payload=encode(invite))
    return SCHEME + base64.b32encode(sealed).decode().rstrip("=").lower()


def decode_invite(code: str) -> SignedInvite:
    """Read a code as a person pasted it: spaces, line breaks and capitals do not matter.

    Raises:
        InviteMalformed: The code is incomplete, was changed, or is none.
    """
    if len(code) > CODE_CHARACTERS_MAX:
        raise InviteMalformed(f"a code of {len(code)} characters exceeds {CODE_CHARACTERS_MAX}")
    text = "".join(code.split()).lower()
    if not text.startswith(SCHEME):
        raise InviteMalformed(f"an invite code starts with {SCHEME}")
    body = text.removeprefix(SCHEME)
    try:
        sealed = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except (binascii.Error, ValueError) as error:
        raise InviteMalformed(
            "the code holds characters that no code has, or is cut off"
        ) from error
    if base64.b32encode(sealed).decode().rstrip("=").lower() != body:
        raise InviteMalformed("the code's last character was changed")
    try:
        return open_invite(sealed)
    except RemoteProtocolError as error:
        raise InviteMalformed(f"the code is incomplete or was changed: {error}") from error


def open_invite(sealed: bytes) -> SignedInvite:
    """Verify a signed invite as it travels in `Redeem`.

    Raises:
        BadMessage: Not an invite, or one whose addresses are no IP literals.
        BadSignature: It was changed.
    """
    if len(sealed) > INVITE_BYTES_MAX:
        raise BadMessage(f"invite of {len(sealed)} bytes exceeds {INVITE_BYTES_MAX}")
    envelope = open_envelope(sealed, domain=DOMAIN, payload_type=PAYLOAD_TYPE)
    invite = decode(envelope.payload, Invite)
    check_version(invite.version, "invite")
    check_printable(invite.network_name, "network name")
    check_printable(invite.issuer_name, "issuer's name")
    return SignedInvite(
        invite=invite,
        issuer=envelope.signer,
        network_id=network_id_of(invite.network),
        addresses=tuple(_ip_address(address) for address in invite.addresses),
        envelope=envelope.signed,
    )


def _ip_address(data: bytes) -> str:
    address = multiaddr.from_bytes(data)
    ip_endpoint(address)
    return address


# The four words ---------------------------------------------------------------------

_ONSETS = "bdfghjklmnprstvz"
_VOWELS = "aeio"
_CODAS = ("l", "m", "n", "r", "s", "t", "x", "v")
_ENDINGS = ("a", "en", "ik", "o")

FIRST_SYLLABLES = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
"""64 open syllables of two letters, so that a word splits in one way only."""

LAST_SYLLABLES = tuple(coda + ending for coda in _CODAS for ending in _ENDINGS)
"""32 syllables; 64 x 32 = 2,048 words of 11 bits."""

WORDS = 4
WORD_BITS = 11

SCRYPT_N = 2**15
"""With r = 8: about 0.06 s and 32 MiB a try, so that 2^44 tries to make a network of the same words
cost far more than meeting the issuer, and a node that stops for one try is not missed."""


@functools.lru_cache(maxsize=64)
def words_of(network_id: NetworkId) -> tuple[str, ...]:
    """Return the four words (44 bits) by which two people check that they mean the same network.

    Takes about 0.06 s of CPU the first time.
    """
    digest = hashlib.scrypt(
        key_hash_of(network_id),
        salt=b"swarmpy-words",
        n=SCRYPT_N,
        r=8,
        p=1,
        maxmem=160 * SCRYPT_N * 8,
        dklen=6,
    )
    bits = int.from_bytes(digest, "big") >> (48 - WORDS * WORD_BITS)
    return tuple(
        word(bits >> WORD_BITS * (WORDS - 1 - position) & (1 << WORD_BITS) - 1)
        for position in range(WORDS)
    )


def word(index: int) -> str:
    """Return word number `index`, 0 to 2,047."""
    first, last = divmod(index, len(LAST_SYLLABLES))
    return FIRST_SYLLABLES[first] + LAST_SYLLABLES[last]
