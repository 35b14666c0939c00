"""A Hugging Face Hub on 127.0.0.1: listings, files by range, redirects, and every way to fail."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Asked:
    """One request as it came."""

    path: str
    range: str
    authorization: str


@dataclass
class FakeHub:
    """What the server holds and how it misbehaves; changed by tests while it runs."""

    files: dict[str, bytes]
    repository: str = "ann/tiny"
    commit: str = COMMIT
    lfs: frozenset[str] = frozenset()
    token: str = ""
    """Needed for everything where it is set."""
    is_gated: bool = False
    """Whether files are refused to everybody, as before terms are accepted."""
    is_offline: bool = False
    """Whether connections are closed without an answer."""
    status: int = 0
    """What everything is answered with; 0: as it should be."""
    elsewhere: str = ""
    """Another server's address that files are redirected to."""
    etag: str = ""
    """Sent with a redirect instead of the file's hash."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file: after how many bytes the next answers break off."""
    wrong: dict[str, bytes] = field(default_factory=dict)
    """By file: what is sent instead of what is listed."""
    ignores_ranges: bool = False
    shifted_by: int = 0
    """How far the range that comes is from the one asked for."""
    stalls_after: int = -1
    """Answers stop after so many bytes until `released`; -1: they do not."""
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by file."""
    url: str = ""

    def ranges_of(self, name: str) -> list[tuple[int, int]]:
        """The ranges `[start, end)` asked for of a file, in order."""
        found = []
        for item in self.asked:
            if item.path.endswith(f"/{name}"):
                start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", item.range).groups()  # type: ignore[union-attr]
                found.append((int(start), int(end) + 1))
        return found

    def forget(self) -> None:
        """Forget what was asked and sent so far."""
        self.asked.clear()
        self.sent.clear()

    def listing(self) -> Mapping[str, object]:
        siblings = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            item: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git}
            if name in self.lfs:
                digest = hashlib.sha256(data).hexdigest()
                item["blobId"] = "b" * 40
                item["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        return {"id": self.repository, "sha": self.commit, "siblings": siblings}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return cast("Server", self.server).hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization", "")
        hub.asked.append(Asked(path, self.headers.get("Range", ""), authorization))
        if hub.is_offline:
            self.close_connection = True
        elif hub.status:
            self.answer(hub.status, {})
        elif hub.token and authorization != f"Bearer {hub.token}":
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/"):
            self.list_files(path.removeprefix("/api/models/"))
        elif hub.is_gated:
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif hub.elsewhere:
            etag = hub.etag or hashlib.sha256(hub.files[path.rpartition("/")[2]]).hexdigest()
            linked = {"X-Linked-Etag": f'"{etag}"'}
            self.answer(302, {"Location": f"{hub.elsewhere}{path}"} | linked)
        else:
            self.send_file(path)

    def list_files(self, place: str) -> None:
        repository, _, revision = place.partition("/revision/")
        if repository.lower() != self.hub.repository.lower():
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "", self.hub.commit):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(200, {"Content-Type": "application/json"}, self.hub.listing())

    def send_file(self, path: str) -> None:
        hub, name = self.hub, path.rpartition("/")[2]
        if path != f"/{hub.repository}/resolve/{hub.commit}/{name}" or name not in hub.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        data = hub.wrong.get(name, hub.files[name])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        if hub.ignores_ranges:
            start, end = 0, len(data)
        start, end = start + hub.shifted_by, end + hub.shifted_by
        self.send_response(200 if hub.ignores_ranges else 206)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.send_body(name, data[start:end])

    def send_body(self, name: str, body: bytes) -> None:
        hub = self.hub
        cuts = hub.cuts.get(name)
        if cuts:
            body = body[: cuts.pop(0)]
            self.close_connection = True
        first = body if hub.stalls_after < 0 else body[: hub.stalls_after]
        self.wfile.write(first)
        hub.sent[name] += len(first)
        if len(first) < len(body):
            hub.stalled.set()
            hub.released.wait(timeout=60)
            self.wfile.write(body[len(first) :])

    def answer(self, status: int, headers: Mapping[str, str], body: object = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a connection that the other side gave up."""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub at its `url` while the block runs."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
