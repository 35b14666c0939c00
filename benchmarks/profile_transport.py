"""Where a stack's CPU time goes under one load: perf by kind of work, py-spy by Python file.

    python benchmarks/profile_transport.py [--stack swarmpy] [--load bulk | rtt]

Linux, with `perf` and `py-spy` on the path, and the right to use them on processes of one's own.
perf samples CPU time only, so that waiting and other programs do not count.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trio
from transport.driver import LOOPBACK, STACKS, Pair, pair

SECONDS = 8
SAMPLES_A_SECOND = 999
LOADS: dict[str, dict[str, object]] = {
    "bulk": {"do": "bulk", "size": 256 << 20},
    "rtt": {"do": "rtt", "size": 16 * 1024, "count": 3000, "seconds_max": 1.0},
}

KINDS = (
    ("AEAD", r"_rust", r"(?i)chacha|poly1305"),
    ("cryptography's wrapper", r"_rust", r""),
    ("kernel", r"kernel", r""),
    ("Python", r"python|\.cpython", r""),
    ("allocating and copying", r"libc", r""),
)
"""Kind of work, by the object and the symbol that a sample fell into; the first that fits."""

NOT_PYTHON = re.compile(r"(?i)\b(epoll_wait|epoll_ctl|send|recv) \(|chacha|poly1305")
"""py-spy's innermost frames that are the kernel or the cipher: perf has those."""

PYTHON_FRAME = re.compile(r"(\S+) \((\S+\.py):\d+\)")


async def profile(stack: str, load: str) -> None:
    with tempfile.TemporaryDirectory(prefix="swarmpy-profile-") as name:
        folder = Path(name)
        async with pair(STACKS[stack](folder, LOOPBACK)) as both:
            await watched(both, load, folder)
        for end in ("dialing", "listening"):
            print(f"{stack}, {load}, {end}: {shares(by_kind(folder / f'{end}.data'))}")
            print(f"  of Python: {shares(by_file(folder / f'{end}.txt'))}")


async def watched(both: Pair, load: str, folder: Path) -> None:
    """Repeat the load while each profiler in turn watches both ends."""
    ends = {"dialing": both.dialing.process.pid, "listening": both.listening.process.pid}
    perf = ["perf", "record", "-q", "-F", str(SAMPLES_A_SECOND)]
    spy = ["py-spy", "record", "--native", "-f", "raw", "-r", "400", "-d", str(SECONDS)]
    for commands in (
        [
            [*perf, "-p", str(pid), "-o", str(folder / f"{end}.data"), "sleep", str(SECONDS)]
            for end, pid in ends.items()
        ],
        [[*spy, "-p", str(pid), "-o", str(folder / f"{end}.txt")] for end, pid in ends.items()],
    ):
        await repeat_during(both, load, commands)


async def repeat_during(both: Pair, load: str, commands: Sequence[Sequence[str]]) -> None:
    arguments = dict(LOADS[load])
    command = str(arguments.pop("do"))
    await both.dialing.do(command, **arguments)
    watching = [
        await trio.lowlevel.open_process(item, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for item in commands
    ]
    while any(process.poll() is None for process in watching):
        await both.dialing.do(command, **arguments)


def by_kind(samples: Path) -> Counter[str]:
    """CPU by kind of work."""
    report = ["perf", "report", "--stdio", "--no-children", "-F", "overhead,dso,sym", "-t", "\t"]
    done = subprocess.run([*report, "-i", str(samples)], capture_output=True, text=True, check=True)
    found: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if line.startswith("#") or len(cells) < 3:
            continue
        share, owner, symbol = cells[:3]
        kind = next(
            (
                kind
                for kind, of, named in KINDS
                if re.search(of, owner) and re.search(named, symbol)
            ),
            "other",
        )
        found[kind] += round(float(share.rstrip("%")) * 100)
    return found


def by_file(samples: Path) -> Counter[str]:
    """Samples whose time the interpreter spent, by the file of the innermost Python frame."""
    found: Counter[str] = Counter()
    for line in samples.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        python = [match for frame in frames if (match := PYTHON_FRAME.fullmatch(frame))]
        if python and not NOT_PYTHON.search(frames[-1]):
            found[python[-1][2].rpartition("site-packages/")[2]] += int(count)
    return found


def shares(found: Counter[str]) -> str:
    total = sum(found.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in found.most_common(9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stack", choices=("raw", "aead", "swarmpy", "py-libp2p"), default="swarmpy"
    )
    parser.add_argument("--load", choices=tuple(LOADS), default="bulk")
    arguments = parser.parse_args()
    trio.run(profile, arguments.stack, arguments.load)


if __name__ == "__main__":
    main()
