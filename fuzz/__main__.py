"""Runs the fuzz targets: `python -m fuzz [--runs N] [--target NAME]`; see fuzz/README.md.

Each target is a process of its own, since libFuzzer ends its process: this one starts them, one
after the other, and reports. New inputs are kept in build/fuzz/, crashes beside the corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
CORPUS, CRASHES = ROOT / "corpus", ROOT / "crashes"
WORK = ROOT.parent / "build" / "fuzz"

RUNS = 1_000_000
SECONDS_MAX = 10
"""An input that takes longer counts as a hang; the slowest decoder needs 0.5 ms."""

MEMORY_MB_MAX = 1024
"""Beyond this the process counts as out of memory; the largest decoder needs 512 MiB."""

INSTRUMENTED = ["swarmpy.proto", "swarmpy.identity", "swarmpy.shards", "swarmpy.pipeline.finite"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs a target (1,000,000)")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given, more = parser.parse_known_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: skipped: atheris is not installed (no wheel for this Python and machine)")
        return 0
    if given.only:
        fuzz(given.only, given.runs, more)
    from fuzz.decoders import DECODERS

    if unknown := set(given.target or ()) - set(DECODERS):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(DECODERS)}")
    failed = [name for name in given.target or DECODERS if not run(name, given.runs, more)]
    if failed:
        print(f"fuzz: {', '.join(failed)} failed; see {CRASHES}")
    return 1 if failed else 0


def run(name: str, runs: int, more: list[str]) -> bool:
    """Fuzz one target in a process of its own; print what came of it."""
    command = [sys.executable, "-m", "fuzz", "--only", name, "--runs", str(runs), *more]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    for folder in (CRASHES / name, CRASHES):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    lines = (done.stdout + done.stderr).splitlines()
    if done.returncode:
        told = [line for line in lines if not line.startswith(("INFO", "WARNING", "#"))]
        print(f"{name}: FAILED", *told[-40:], sep="\n  ", flush=True)
        return False
    last = [line for line in lines if "DONE" in line or line.startswith("Done")]
    print(f"{name}: {' '.join(' '.join(last).split())}", flush=True)
    return True


def fuzz(name: str, runs: int, more: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz.decoders import DECODERS, holds
    from fuzz.mutation import mutator

    decoder = DECODERS[name]
    found, crashes = WORK / name, CRASHES / name
    for folder in (found, crashes, CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-runs={runs}",
        f"-max_len={decoder.bytes_max}",
        f"-timeout={SECONDS_MAX}",
        f"-rss_limit_mb={MEMORY_MB_MAX}",
        f"-artifact_prefix={crashes}/",
        *more,
        str(found),
        *(str(folder) for folder in (CORPUS / "every", CORPUS / name, crashes)),
    ]
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    atheris.Setup(
        [sys.argv[0], *arguments],
        lambda data: holds(decoder, data),
        # Looked up late: atheris puts the working one in its place only now.
        custom_mutator=mutator(seeds, lambda data, most: atheris.Mutate(data, most)),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
