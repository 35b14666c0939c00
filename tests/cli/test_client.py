"""How the commands reach a node, and what they make of its answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest

from swarmpy.errors import NetworkError
from swarmpy.plugins.gateway.keys import key_path
from swarmpy.status import NodeStatus
from swarmpy.store import write_file
from swarmpy_cli.client import (
    NODE_FILE,
    NodeError,
    NodeFile,
    NoNodeRunning,
    connect,
    connect_endpoint,
)
from swarmpy_cli.replies import Reply, stream_reply
from tests.cli.processes import ECHO, NODE_OPTIONS, started

KEY = "sk-swarmpy-admin-" + "0" * 64


@contextlib.contextmanager
def answering(body: bytes, *, status: int = 200, keys: list[str] | None = None) -> Iterator[str]:
    """A server on this machine that is no node: it answers everything with `body`.

    Args:
        keys: Where the keys go that it is sent.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if keys is not None and "authorization" in self.headers:
                keys.append(self.headers["authorization"])
            self.rfile.read(int(self.headers["content-length"] or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def reply_to(body: bytes) -> Reply:
    """Read a streamed reply that consists of `body`."""
    reply = Reply()
    with answering(body) as url, connect_endpoint(url, "key") as client:
        for _ in stream_reply(client, {}, reply, lambda text: None):
            pass
    return reply


def event(content: str) -> bytes:
    data = msgspec.json.encode({"choices": [{"delta": {"content": content}}]})
    return b"data: " + data + b"\n\n"


def test_a_node_without_a_socket_is_reached_over_tcp_once_it_proved_its_key(
    tmp_path: Path,
) -> None:
    """A Unix socket's path is bounded; a data folder's is not."""
    home = tmp_path / ("deep" * 30)
    with started(home, "run", "--no-model", "--engine", ECHO, *NODE_OPTIONS, "--json") as node:
        pid = node.ready()["pid"]
        assert not (home / "admin.sock").exists()
        with connect(home) as client:
            assert client.get("/admin/status", NodeStatus).engine == ECHO
        assert pid == node.popen.pid


def test_no_key_is_sent_to_a_server_that_cannot_prove_it(tmp_path: Path) -> None:
    write_file(key_path(tmp_path, "admin"), KEY.encode())
    keys: list[str] = []
    with answering(b'{"proof": "00"}', keys=keys) as url:
        left = NodeFile(pid=1, base_url=url, started_wall_s=0.0)
        (tmp_path / NODE_FILE).write_bytes(msgspec.json.encode(left))
        with pytest.raises(NetworkError, match="is not the node of"), connect(tmp_path):
            pass
    assert keys == []


def test_a_node_file_that_a_crash_left_is_no_running_node(tmp_path: Path) -> None:
    write_file(key_path(tmp_path, "admin"), KEY.encode())
    left = NodeFile(pid=1, base_url="http://127.0.0.1:1", started_wall_s=0.0)
    (tmp_path / NODE_FILE).write_bytes(msgspec.json.encode(left))
    with pytest.raises(NoNodeRunning), connect(tmp_path):
        pass


def test_a_refusal_keeps_the_nodes_code_and_fix() -> None:
    body = b'{"error": {"message": "used", "type": "x", "code": "invite_used", "fix": "ask"}}'
    refused = pytest.raises(NodeError, match="used")
    with (
        answering(body, status=409) as url,
        connect_endpoint(url, "k") as client,
        refused as caught,
    ):
        client.post("/admin/join", {}, dict[str, str])
    assert (caught.value.code, caught.value.fix) == ("invite_used", "ask")


def test_an_answer_that_is_no_json_is_a_clear_error() -> None:
    refused = pytest.raises(NetworkError, match="none of a swarmpy node's")
    with answering(b"<html>") as url, connect_endpoint(url, "key") as client, refused:
        client.get("/admin/status", NodeStatus)


def test_progress_is_passed_on_until_the_result() -> None:
    body = b'{"step": "downloading", "done": 1, "total": 2, "unit": "bytes"}\n{"result": 7}\n'
    shown: list[tuple[str, int, int, str]] = []
    with answering(body) as url, connect_endpoint(url, "key") as client:
        result = client.post_with_progress("/", {}, int, lambda *told: shown.append(told))
    assert result == 7
    assert shown == [("downloading", 1, 2, "bytes")]


@pytest.mark.parametrize("body", [b"", b'{"step": "downloading"}\n'])
def test_progress_without_a_result_is_an_error(body: bytes) -> None:
    refused = pytest.raises(NetworkError, match="half-way")
    with answering(body) as url, connect_endpoint(url, "key") as client, refused:
        client.post_with_progress("/", {}, int, lambda *told: None)


def test_a_reply_may_hold_every_kind_of_line_end() -> None:
    text = "one\u2028two\x85three\x1cfour\rfive\nsix"
    assert reply_to(event(text) + b"data: [DONE]\n\n").text == text


def test_comments_say_what_the_reply_waits_for() -> None:
    told: list[str] = []
    body = b": loading layers 10-19 41 %\n\n" + event("yes") + b"data: [DONE]\n\n"
    with answering(body) as url, connect_endpoint(url, "key") as client:
        assert list(stream_reply(client, {}, Reply(), told.append)) == ["yes"]
    assert told == ["loading layers 10-19 41 %"]


def test_an_error_event_ends_the_reply_with_its_message() -> None:
    with pytest.raises(NodeError, match="stage 2 is gone"):
        reply_to(event("one") + b'data: {"error": {"message": "stage 2 is gone"}}\n\n')


def test_a_reply_without_its_last_event_is_an_error() -> None:
    with pytest.raises(NodeError, match="without its last event"):
        reply_to(event("one"))


def test_a_reply_about_errors_is_no_error() -> None:
    assert reply_to(event('{"error": 1}') + b"data: [DONE]\n\n").text == '{"error": 1}'


def test_bytes_that_are_no_text_are_an_error_before_anything_is_sent() -> None:
    with (
        connect_endpoint("http://127.0.0.1:9/v1", KEY) as client,
        pytest.raises(NodeError, match="bytes that are no text"),
    ):
        client.post("/v1/chat/completions", {"prompt": "\udcff"}, dict[str, str])
