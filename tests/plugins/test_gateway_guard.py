"""Who may ask the local API: every check of the guard, over real connections."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from scripted_node import ScriptedNode, make_node, served

from swarmpy.plugins.gateway import GatewayAddress, guard
from swarmpy.plugins.gateway.keys import proof, read_key

JSON = {"content-type": "application/json"}


@pytest.fixture
async def node(tmp_path: Path) -> ScriptedNode:
    return make_node(tmp_path)


@pytest.fixture
async def address(node: ScriptedNode) -> AsyncIterator[GatewayAddress]:
    async with served(node) as address:
        yield address


@asynccontextmanager
async def client(address: GatewayAddress, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=address.base_url, headers=headers) as http:
        yield http


async def status_and_code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def exchange(address: GatewayAddress, request: bytes, *, end: bytes = b"\r\n\r\n") -> bytes:
    """Send raw bytes and return the answer's head."""
    host, port = address.base_url.removeprefix("http://").split(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        await stream.send_all(request)
        answer = b""
        with trio.fail_after(15):
            while end not in answer:
                part = await stream.receive_some(65536)
                if not part:
                    break
                answer += part
        return answer


# Keys -----------------------------------------------------------------------------


async def test_health_needs_no_key(address: GatewayAddress) -> None:
    async with client(address) as http:
        assert (await http.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/v1/models", "/health/ready", "/admin/status", "/", "/docs"])
async def test_every_other_path_needs_a_key(address: GatewayAddress, path: str) -> None:
    async with client(address) as http:
        response = await http.get(path)
    assert await status_and_code(response) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "value", ["Bearer wrong", "Bearer", "Basic KEY", "KEY", "Bearer KEYx", "Bearer \xff"]
)
async def test_a_wrong_key_is_a_401(address: GatewayAddress, value: str) -> None:
    value = value.replace("KEY", read_key(address.api_key_path))
    async with client(address) as http:
        response = await http.get("/v1/models", headers={"authorization": value.encode("latin-1")})
    assert await status_and_code(response) == (401, "invalid_api_key")


async def test_a_key_in_the_url_is_no_key(address: GatewayAddress) -> None:
    async with client(address) as http:
        response = await http.get(f"/v1/models?api_key={read_key(address.api_key_path)}")
    assert response.status_code == 401


async def test_two_authorization_headers_are_no_key(address: GatewayAddress) -> None:
    key = f"Bearer {read_key(address.api_key_path)}"
    headers = [("authorization", key), ("authorization", key)]
    async with client(address) as http:
        assert (await http.get("/v1/models", headers=headers)).status_code == 401


async def test_the_api_key_opens_v1_and_ready_but_not_admin(address: GatewayAddress) -> None:
    async with client(address, read_key(address.api_key_path)) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/health/ready")).status_code == 200
        refused = await http.get("/admin/status")
    assert await status_and_code(refused) == (403, "admin_key_required")


async def test_the_admin_key_opens_both(address: GatewayAddress) -> None:
    async with client(address, read_key(address.admin_key_path)) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/admin/status")).json()["name"] == "attic"


async def test_the_unix_socket_needs_no_key(address: GatewayAddress) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(address.admin_socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as http:
        assert (await http.get("/admin/status")).json()["name"] == "attic"
        assert (await http.get("/v1/models")).status_code == 200


async def test_the_server_proves_that_it_knows_the_admin_key(address: GatewayAddress) -> None:
    nonce = bytes(range(32))
    async with client(address) as http:
        answer = await http.post("/proof", json={"nonce": nonce.hex()})
    port = httpx.URL(address.base_url).port
    assert port is not None
    assert answer.json() == {"proof": proof(read_key(address.admin_key_path), nonce, port=port)}


@pytest.mark.parametrize("nonce", ["", "00" * 15, "00" * 65, "zz" * 16, 5])
async def test_a_proof_of_no_proper_nonce_is_a_400(address: GatewayAddress, nonce: Any) -> None:
    async with client(address) as http:
        answer = await http.post("/proof", json={"nonce": nonce})
    assert answer.status_code == 400


# Host, Origin, WebSocket ------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example:PORT", "127.0.0.1", "localhost:1", "127.0.0.1.evil.example:PORT", ""]
)
async def test_a_foreign_host_is_refused_even_for_health(
    address: GatewayAddress, host: str
) -> None:
    port = address.base_url.rpartition(":")[2]
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.get("/health", headers={"host": host.replace("PORT", port)})
    assert await status_and_code(response) == (403, "host_not_allowed")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
async def test_loopbacks_names_are_served(address: GatewayAddress, name: str) -> None:
    port = address.base_url.rpartition(":")[2]
    async with client(address) as http:
        response = await http.get("/health", headers={"host": f"{name}:{port}"})
    assert response.status_code == 200


async def test_a_configured_host_is_served(tmp_path: Path) -> None:
    node = make_node(tmp_path, allowed_hosts=("attic.lan", "proxy.lan:443"))
    async with served(node) as address, client(address) as http:
        port = address.base_url.rpartition(":")[2]
        for host in (f"attic.lan:{port}", "proxy.lan:443"):
            assert (await http.get("/health", headers={"host": host})).status_code == 200
        assert (await http.get("/health", headers={"host": "proxy.lan"})).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1"])
async def test_a_foreign_origin_is_refused(address: GatewayAddress, origin: str) -> None:
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.get("/v1/models", headers={"origin": origin})
    assert await status_and_code(response) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


async def test_our_own_origin_is_served(address: GatewayAddress) -> None:
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.get("/v1/models", headers={"origin": address.base_url})
    assert response.status_code == 200


async def test_a_foreign_origin_is_refused_on_the_unix_socket(address: GatewayAddress) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(address.admin_socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as http:
        response = await http.get("/admin/status", headers={"origin": "http://node"})
    assert response.status_code == 403


async def test_no_websocket_is_accepted(address: GatewayAddress) -> None:
    key = read_key(address.admin_key_path)
    host = address.base_url.removeprefix("http://")
    answer = await exchange(
        address,
        f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 403")


# Bodies -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_of_another_type_is_refused(address: GatewayAddress, kind: str) -> None:
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.post(
            "/v1/chat/completions", content=b"{}", headers={"content-type": kind}
        )
    assert await status_and_code(response) == (415, "unsupported_media_type")


async def test_a_charset_after_the_type_is_accepted(address: GatewayAddress) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.post(
            "/v1/chat/completions",
            content=body,
            headers={"content-type": "application/json; charset=utf-8"},
        )
    assert response.status_code == 200


async def test_a_packed_body_is_refused(address: GatewayAddress) -> None:
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.post(
            "/v1/chat/completions", content=b"", headers={**JSON, "content-encoding": "gzip"}
        )
    assert await status_and_code(response) == (415, "unsupported_encoding")


@pytest.mark.parametrize("key", ["api", ""])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_beyond_its_bound_is_refused_and_the_sender_reads_it(
    address: GatewayAddress, key: str, is_chunked: bool
) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(48):
            yield b" " * 65536

    body = parts() if is_chunked else b" " * 48 * 65536
    async with client(address, key and read_key(address.api_key_path)) as http:
        response = await http.post("/v1/chat/completions", content=body, headers=JSON)
    assert await status_and_code(response) == (
        (413, "body_too_large") if key else (401, "invalid_api_key")
    )


async def test_a_body_that_does_not_come_is_a_408(
    address: GatewayAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.1)
    key, host = read_key(address.api_key_path), address.base_url.removeprefix("http://")
    answer = await exchange(
        address,
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: 100\r\n\r\n{".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 408")


async def test_a_refused_request_with_an_endless_body_ends_its_connection(
    address: GatewayAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than the server queues must not leave the connection waiting for ever."""
    monkeypatch.setattr(guard, "DRAIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(guard, "DRAIN_BYTES_MAX", 1000)
    host = address.base_url.removeprefix("http://")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    ).encode()
    body = 50 * (b"64\r\n" + b" " * 100 + b"\r\n")
    answer = await exchange(address, head + body, end=b"never")
    assert answer.startswith(b"HTTP/1.1 401")


async def test_beyond_the_bound_of_requests_the_answer_is_429(
    address: GatewayAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "REQUESTS_MAX", 0)
    async with client(address, read_key(address.api_key_path)) as http:
        response = await http.get("/v1/models")
    assert await status_and_code(response) == (429, "overloaded")
    assert response.headers["retry-after"] == "1"
