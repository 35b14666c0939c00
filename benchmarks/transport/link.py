"""A long line between two network namespaces: what goes in at one end comes out later at the other.

Args: two namespaces, seconds of delay each way. It makes a TUN device named "line" in each of them,
prints one JSON line when packets pass, and holds every IP packet for the delay, losing none. The
rate is the kernel's business: a token bucket (`tc ... tbf`) on each device, so that a sender's own
TCP meets the queue, as at the uplink of its machine. Linux, as root.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
DEVICE = "line"
PACKET_BYTES_MAX = 65536
PACKETS_AT_ONCE = 64


def make_device(namespace: str) -> int:
    """Make a TUN device in a namespace and return its other end: reads are packets sent there."""
    name = f"tun{os.getpid()}"
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    command = ["ip", "link", "set", name, "netns", namespace, "name", DEVICE]
    subprocess.run(command, check=True)
    return device


def read_packets(device: int) -> list[bytes]:
    packets: list[bytes] = []
    try:
        while len(packets) < PACKETS_AT_ONCE:
            packets.append(os.read(device, PACKET_BYTES_MAX))
    except BlockingIOError:
        pass
    return packets


def deliver(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:
        if error.errno != errno.EIO:  # the other end is not up yet
            raise


def forward(devices: tuple[int, int], delay_s: float) -> None:
    """Pass packets on until standard input ends."""
    stdin = sys.stdin.fileno()
    on_the_way = {device: deque[tuple[float, bytes]]() for device in devices}
    other = dict(zip(devices, reversed(devices), strict=True))
    while True:
        dues = [queue[0][0] for queue in on_the_way.values() if queue]
        wait_s = max(0.0, min(dues) - time.monotonic()) if dues else None
        readable, _, _ = select.select([*devices, stdin], [], [], wait_s)
        if stdin in readable and not os.read(stdin, 1):
            return
        now_s = time.monotonic()
        for device in devices:
            if device in readable:
                due_s = now_s + delay_s
                on_the_way[device].extend((due_s, packet) for packet in read_packets(device))
            queue = on_the_way[device]
            while queue and queue[0][0] <= now_s:
                deliver(other[device], queue.popleft()[1])


def main(first: str, second: str, delay_s: float) -> None:
    devices = (make_device(first), make_device(second))
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # a line does not wait for a CPU
    print(json.dumps({"address": "", "version": ""}), flush=True)
    forward(devices, delay_s)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
