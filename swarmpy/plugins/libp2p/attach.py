"""What a py-libp2p host must be before a node may share it, and what is read off it once."""

from __future__ import annotations

from collections.abc import Sequence

from libp2p.abc import IHost
from libp2p.crypto.keys import KeyType
from libp2p.network.swarm import Swarm

from swarmpy.errors import ConfigError
from swarmpy.identity import Identity

NOISE = "/noise"

NOISE_ONLY = """\
from libp2p.security.noise.transport import Transport as NoiseTransport
noise = NoiseTransport(keys, noise_privkey=libp2p.crypto.x25519.create_new_key_pair().private_key)
host = libp2p.new_host(key_pair=keys, sec_opt={"/noise": noise})"""
"""The three lines that give an application a host which cannot be talked out of encryption."""


def require_noise_only(host: IHost) -> None:
    """Refuse a host that would speak anything but Noise to whoever asks for it.

    py-libp2p offers plaintext by default, on which an impostor needs the victim's public key alone.

    Raises:
        ConfigError: It offers something else; the advice is the three lines to change.
    """
    offered: Sequence[str] = [
        str(item) for item in swarm_of(host).upgrader.security_multistream.transports
    ]
    others = [item for item in offered if item != NOISE]
    if not others and offered:
        return
    found = f"offers {', '.join(others)}" if others else "offers no Noise"
    raise ConfigError(
        f"the py-libp2p host {found}; a node shares only one with {NOISE} alone",
        fix=f"Make the host with:\n{NOISE_ONLY}",
    )


def identity_of(host: IHost) -> Identity:
    """Return the node's identity, which is the host's.

    Raises:
        ConfigError: The host's key is not an Ed25519 key.
    """
    key = host.get_private_key()
    if key.get_type() != KeyType.Ed25519:
        raise ConfigError(
            f"the py-libp2p host has a key of type {key.get_type().name}, expected Ed25519",
            fix="Make its keys with libp2p.crypto.ed25519.create_new_key_pair().",
        )
    return Identity(key.to_bytes())


def swarm_of(host: IHost) -> Swarm:
    """Return the swarm under a host.

    Raises:
        ConfigError: It is of another kind than py-libp2p's own.
    """
    swarm = host.get_network()
    if not isinstance(swarm, Swarm):
        raise ConfigError(f"the py-libp2p host has a network of type {type(swarm).__name__}")
    return swarm
