"""A node on a py-libp2p host that an application owns: `Node.open(..., host=LibP2PHost(host))`.

The application keeps its host, its protocols and its connections; the node shares them. Written
for one version of py-libp2p, which the extra `libp2p` pins: what that version lacks is made up for
on its connections from outside, and that reaches into them. Why: docs/decisions/0015.
"""

from __future__ import annotations

from importlib.util import find_spec

from swarmpy.errors import ExtensionNotFound

if find_spec("libp2p") is None:
    raise ExtensionNotFound(
        "py-libp2p is not installed", fix="Install swarmpy with the extra 'libp2p'."
    )

from swarmpy.plugins.libp2p.host import LibP2PHost

__all__ = ["LibP2PHost"]
