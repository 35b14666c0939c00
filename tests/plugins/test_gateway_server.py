"""The gateway's listeners: where they are, who may open them, and how they end."""

from __future__ import annotations

import json
import logging
import socket
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection
from scripted_node import Pause, ids_of, make_node, served

from swarmpy.abc import Progress
from swarmpy.errors import ConfigError
from swarmpy.plugins import gateway
from swarmpy.plugins.gateway import GatewayAddress, server
from swarmpy.plugins.gateway.keys import read_key

BODY = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


def port_of(address: GatewayAddress) -> int:
    return int(address.base_url.rpartition(":")[2])


def client_of(address: GatewayAddress) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {read_key(address.admin_key_path)}"}
    return httpx.AsyncClient(base_url=address.base_url, headers=headers)


async def connect(address: GatewayAddress) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port_of(address))


# Where ----------------------------------------------------------------------------


async def test_two_nodes_take_two_ports_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with (
        served(make_node(tmp_path / "a")) as first,
        served(make_node(tmp_path / "b")) as other,
    ):
        assert port_of(first) != port_of(other)
        assert port_of(first) >= server.DEFAULT_PORT


async def test_a_taken_port_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"gateway\.listen"):
            await gateway.serve(make_node(tmp_path, listen=listen))  # type: ignore[arg-type]


@pytest.mark.parametrize("listen", ["nowhere", "1.2.3:80", "127.0.0.1:70000", "127.0.0.1:x", ":1"])
async def test_a_malformed_address_is_an_error(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.listen"):
        await gateway.serve(make_node(tmp_path, listen=listen))  # type: ignore[arg-type]


async def test_listening_beyond_loopback_needs_host_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        await gateway.serve(make_node(tmp_path, listen="0.0.0.0:0"))  # type: ignore[arg-type]


async def test_the_url_of_a_node_beyond_loopback_has_its_first_name(tmp_path: Path) -> None:
    node = make_node(tmp_path, listen="0.0.0.0:0", allowed_hosts=("attic.lan",))
    async with served(node) as address:
        assert address.base_url == f"http://attic.lan:{port_of(address)}"


async def test_the_socket_is_the_owners_and_goes_with_the_server(tmp_path: Path) -> None:
    (tmp_path / "admin.sock").write_text("left by a killed node")
    async with served(make_node(tmp_path)) as address:
        assert address.admin_socket == tmp_path / "admin.sock"
        mode = address.admin_socket.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert mode & 0o777 == 0o600
    assert not (tmp_path / "admin.sock").exists()


async def test_no_socket_is_made_in_a_folder_that_others_may_enter(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    await trio.Path(tmp_path).chmod(0o755)
    with pytest.raises(ConfigError) as caught:
        await gateway.serve(node)  # type: ignore[arg-type]
    assert caught.value.fix == f"chmod 700 {tmp_path}"


async def test_a_folder_with_too_long_a_path_has_no_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    async with served(make_node(folder)) as address:
        assert address.admin_socket is None


# Stopping -------------------------------------------------------------------------


async def test_a_stopping_node_finishes_its_replies_and_refuses_new_ones(tmp_path: Path) -> None:
    node, pause = make_node(tmp_path), Pause()
    node.script = [*ids_of("He"), pause, *ids_of("llo")]
    texts: list[str] = []

    async def ask(http: httpx.AsyncClient) -> None:
        texts.append((await http.post("/v1/chat/completions", json=BODY)).text)

    async with trio.open_nursery() as nursery:
        address = await nursery.start(gateway.serve, node)
        async with client_of(address) as http:
            nursery.start_soon(ask, http)
            await pause.reached.wait()
            assert (await http.post("/admin/stop", json={})).json() == {"status": "stopping"}
            refused = await http.post("/v1/chat/completions", json=BODY)
            status = await http.get("/admin/status")
            pause.resume.set()
            while not texts:
                await trio.testing.wait_all_tasks_blocked(0.01)
    # The nursery has ended without being cancelled: `serve` returned.

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["retry-after"] == "2"
    assert status.json()["is_stopping"] is True
    assert texts[0].endswith("data: [DONE]\n\n")


async def test_an_idle_server_stops_at_once_with_connections_open(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(gateway.serve, node)
        async with client_of(address) as http, await connect(address):
            await http.get("/health")
            node.request_stop()
            with trio.fail_after(2):
                while nursery.child_tasks:
                    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_client_that_does_not_read_cannot_keep_the_server(tmp_path: Path) -> None:
    """hypercorn sends under a shield; cancelling the server must end that, too."""
    node = make_node(tmp_path)
    node.script = [7] * 1_000_000
    with trio.fail_after(20):
        async with served(node) as address:
            stream = await connect(address)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await stream.send_all(chat_request(address))
            await stalled(node)
    await stream.aclose()
    assert node.generations[0].closed.is_set()


async def test_a_client_that_does_not_read_loses_its_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENT_STALL_S_MAX", 0.1)
    node = make_node(tmp_path)
    node.script = [7] * 1_000_000
    async with served(node) as address, await connect(address) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(chat_request(address))
        with trio.fail_after(20):
            await stalled(node)
            await node.generations[0].closed.wait()


def request_head(address: GatewayAddress, path: str, size: int) -> str:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port_of(address)}\r\n"
        f"authorization: Bearer {read_key(address.admin_key_path)}\r\n"
        f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    )


def chat_request(address: GatewayAddress) -> bytes:
    return request_head(address, "/v1/chat/completions", len(STREAM)).encode() + STREAM


async def stalled(node: Any) -> None:
    """Wait until the reply makes no more progress: the client's window is full."""
    count = -1
    while not node.generations or node.generations[0].count != count:
        count = node.generations[0].count if node.generations else -1
        await trio.testing.wait_all_tasks_blocked(0.05)


# Connections ------------------------------------------------------------------------

PLAIN = b'{"messages":[{"role":"user","content":"Hi"}]}'
STREAM = b'{"messages":[{"role":"user","content":"Hi"}],"stream":true}'
PULL = b'{"model":"tiny"}'


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", PLAIN, 200),
        ("/v1/chat/completions", STREAM, 200),
        ("/admin/models/pull", PULL, 200),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b" " * 3_000_000, 413),
        ("/nothing", b"{}", 404),
    ],
    ids=["plain", "stream", "task", "malformed", "too large", "not found"],
)
async def test_a_connection_is_closed_after_its_last_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: bytes,
    status: int,
    is_kept: bool,
) -> None:
    """At once where the client wants that, else after some silence; it must never be forgotten."""
    monkeypatch.setattr(server, "IDLE_TIMEOUT_S", 0.2)
    async with served(make_node(tmp_path)) as address, await connect(address) as stream:
        close = "" if is_kept else "connection: close\r\n"
        head = request_head(address, path, len(body)).replace("\r\n\r\n", f"\r\n{close}\r\n")
        await stream.send_all(head.encode() + body)
        answer = b""
        with trio.fail_after(10):
            while part := await stream.receive_some(65536):
                answer += part
    assert answer.startswith(f"HTTP/1.1 {status}".encode())


def http2_request(path: bytes) -> bytes:
    """The bytes of an HTTP/2 client that asks for a path."""
    settings = H2Configuration(client_side=True, validate_outbound_headers=False)
    connection = H2Connection(settings)
    connection.initiate_connection()
    connection.send_headers(
        1,
        [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "localhost")],
        end_stream=True,
    )
    return connection.data_to_send()


async def test_http2_is_guarded_as_http1_is(tmp_path: Path) -> None:
    async with served(make_node(tmp_path)) as address:
        key = {"authorization": f"Bearer {read_key(address.api_key_path)}"}
        async with httpx.AsyncClient(base_url=address.base_url, http1=False, http2=True) as http:
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/v1/models", headers={**key, "host": "x"})).status_code == 403
            reply = await http.post("/v1/chat/completions", json=BODY, headers=key)
    assert reply.http_version == "HTTP/2"
    assert reply.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x13/multistream/1.0.0\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 20_000,
        http2_request(b"/\xff"),
    ],
    ids=["another protocol", "two hosts", "bad path", "long header", "bad path in HTTP/2"],
)
async def test_garbage_costs_its_connection_only(tmp_path: Path, data: bytes) -> None:
    async with served(make_node(tmp_path)) as address:
        stream = await connect(address)
        async with stream:
            await stream.send_all(data)
            await stream.send_eof()
            with trio.fail_after(10):
                while await stream.receive_some(65536):
                    pass
        async with client_of(address) as http:
            assert (await http.get("/health")).status_code == 200


async def test_an_error_inside_the_http_library_costs_its_connection_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(make_node(tmp_path)) as address:

        async def broken(self: object) -> None:
            raise ValueError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(server.TCPServer, "run", broken)
            async with await connect(address) as stream:
                assert await stream.receive_some() == b""
        async with client_of(address) as http:
            assert (await http.get("/health")).status_code == 200
    assert any(record.levelno == logging.WARNING for record in caplog.records)


async def test_connections_beyond_the_bound_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    async with served(make_node(tmp_path)) as address, client_of(address) as http:
        await http.get("/health")
        async with await connect(address) as stream:
            assert await stream.receive_some() == b""
        assert (await http.get("/health")).status_code == 200


# Admin ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["peers", "models", "pipelines", "status"])
async def test_views_are_the_nodes_own_records(tmp_path: Path, path: str) -> None:
    async with served(make_node(tmp_path)) as address, client_of(address) as http:
        assert (await http.get(f"/admin/{path}")).status_code == 200


async def test_invites_are_made_shown_and_redeemed(tmp_path: Path) -> None:
    async with served(make_node(tmp_path)) as address, client_of(address) as http:
        made = await http.post("/admin/invites", json={"ttl_s": 60, "uses": 2})
        shown = await http.post("/admin/invites/inspect", json={"code": made.json()["code"]})
        joined = await http.post("/admin/join", json={"code": made.json()["code"]})
    assert (made.json()["uses"], made.json()["expires_wall_s"]) == (2, 60)
    assert shown.json()["issuer"] == "attic"
    assert joined.json()["network"] == "n"


async def test_a_long_task_tells_its_progress_and_then_its_result(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.start_script = [Progress(step="fetching", done=1, total=2), Pause()]
    pause = node.start_script[1]
    lines: list[dict[str, Any]] = []
    body = {"model": "tiny"}
    async with (
        served(node) as address,
        client_of(address) as http,
        http.stream("POST", "/admin/models/pull", json=body) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(json.loads(line))
            pause.resume.set()

    assert lines[0] == {"step": "fetching", "done": 1, "total": 2, "unit": "bytes"}
    assert lines[-1]["result"]["name"] == "tiny"


async def test_a_long_task_that_fails_ends_with_the_error(tmp_path: Path) -> None:
    async with served(make_node(tmp_path)) as address, client_of(address) as http:
        response = await http.post("/admin/prepare", json={"model": "nobody"})

    error = json.loads(response.text.splitlines()[-1])["error"]
    assert (error["code"], bool(error["fix"])) == ("model_not_found", True)


async def test_a_long_task_does_not_keep_a_stopping_node(tmp_path: Path) -> None:
    node, pause = make_node(tmp_path), Pause()
    node.start_script = [pause]
    answers: list[str] = []

    async def pull(http: httpx.AsyncClient) -> None:
        answers.append((await http.post("/admin/models/pull", json={"model": "tiny"})).text)

    async with trio.open_nursery() as nursery:
        address = await nursery.start(gateway.serve, node)
        async with client_of(address) as http, trio.open_nursery() as asking:
            asking.start_soon(pull, http)
            await pause.reached.wait()
            node.request_stop()

    assert json.loads(answers[0])["error"]["code"] == "shutting_down"
