"""Print every multicast DNS packet that passes an interface, one line of hex each.

    lan_capture.py INTERFACE

The first line is empty: from then on nothing is missed.
"""

from __future__ import annotations

import socket
import sys

ETHERTYPE_IP = 0x0800
UDP = 17
PORT = 5353
ETHERNET_BYTES = 14


def main(interface: str) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ETHERTYPE_IP)) as link:
        link.bind((interface, 0))
        print(flush=True)
        while True:
            payload = mdns_payload(link.recv(65536)[ETHERNET_BYTES:])
            if payload:
                print(payload.hex(), flush=True)


def mdns_payload(packet: bytes) -> bytes:
    """Return what an IPv4 packet carries for port 5353, b"" if it is none for it."""
    header_bytes = (packet[0] & 15) * 4
    datagram = packet[header_bytes:]
    is_mdns = packet[9] == UDP and int.from_bytes(datagram[2:4], "big") == PORT
    return datagram[8:] if is_mdns else b""


if __name__ == "__main__":
    main(sys.argv[1])
