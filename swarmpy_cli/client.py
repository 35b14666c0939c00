"""Talks to the node that runs in a data folder, over its local HTTP API.

Over the Unix socket in the folder, which only this user can open; where there is none, over
loopback TCP, and then the server proves that it knows the admin key before a key is sent to it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from swarmpy.errors import ExtensionNotFound, NetworkError, SwarmError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
"""A node on this machine accepts within milliseconds unless the machine swaps."""

CALL_TIMEOUT_S = 60.0
"""Longest answer that is not a stream: a join dials several addresses in turn."""

NODE_FILE = "node.json"
SOCKET_FILE = "admin.sock"

SOCKET_URL = "http://localhost"
"""Base of the addresses asked for over the Unix socket, which needs no host."""

ProgressShown = Callable[[str, int, int, str], None]
"""Takes the step's name, how much is done, of how much, and the unit."""


class NoNodeRunning(NetworkError):
    """No node answers in the data folder."""

    advice = "Start one with `swarmpy run`, and give it a moment."


class NodeError(SwarmError):
    """The node refused a request; message, code and fix are its own."""

    advice = ""

    def __init__(self, message: str, *, code: str, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.code = code


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a running node leaves in its data folder for the commands that talk to it."""

    pid: int
    base_url: str
    """Of the HTTP endpoint, without /v1; empty where none is served."""
    started_wall_s: float


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as the node's HTTP API tells it."""

    message: str
    type: str = ""
    code: str | None = None
    fix: str = ""


class NodeClient:
    """Calls one running node. Made by `connect`."""

    def __init__(self, http: httpx.Client, place: object, headers: Mapping[str, str]) -> None:
        """Args: place: The data folder or address, for messages."""
        self._http = http
        self._place = place
        self._headers = dict(headers)

    def get(self, path: str, kind: type[T]) -> T:
        """Return the answer to a GET as `kind`.

        Raises:
            NodeError: The node refused.
            NetworkError: No node answers, or it stopped answering.
        """
        return self._call("GET", path, None, kind)

    def post(self, path: str, body: object, kind: type[T]) -> T:
        """Return the answer to a POST of `body` as `kind`; raises as `get` does."""
        return self._call("POST", path, body, kind)

    def prove(self, admin_key: str) -> None:
        """Let the server prove that it knows the admin key.

        Raises:
            NetworkError: It does not: something else listens at the node's address.
        """
        from swarmpy.environment import system_random
        from swarmpy.plugins.gateway.keys import NONCE_BYTES_MIN, proof

        nonce = system_random().randbytes(NONCE_BYTES_MIN)
        answer = self.post("/proof", {"nonce": nonce.hex()}, dict[str, str])
        expected = proof(admin_key, nonce, port=self._http.base_url.port or 0)
        if not hmac.compare_digest(answer.get("proof", ""), expected):
            raise NetworkError(
                f"what answers at {self._http.base_url} is not the node of {self._place}",
                fix="Stop what took its port, or start the node again with `swarmpy run`.",
            )

    def post_with_progress(
        self, path: str, body: object, kind: type[T], progress: ProgressShown
    ) -> T:
        """POST, show each line of progress, and return the last line's result; raises as `get`."""
        with self._stream(path, body) as response:
            for line in _lines(response):
                event = _parse(line, dict[str, object]) if line else {}
                if "error" in event:
                    raise _node_error(event)
                if "result" in event:
                    return msgspec.convert(event["result"], kind)
                if "step" in event:
                    shown = msgspec.convert(event, _ProgressLine)
                    progress(shown.step, shown.done, shown.total, shown.unit)
        raise NetworkError(f"the node at {self._place} ended the answer to {path} half-way")

    def stream_events(self, path: str, body: object) -> Generator[bytes | str, None, None]:
        """POST and yield server-sent events: data as bytes, comments as text; raises as `get`.

        Closing the iterator closes the connection, and so ends the request at the node.
        """
        with self._stream(path, body) as response:
            for line in _lines(response):
                if line.startswith(b":"):
                    yield line[1:].strip().decode("utf-8", "replace")
                elif line.startswith(b"data:"):
                    yield line[5:].strip()

    def _call(self, method: str, path: str, body: object, kind: type[T]) -> T:
        with self._errors_mapped():
            response = self._http.request(method, path, json=body, headers=self._headers)
        if response.status_code >= 400:
            raise _node_error(response.content)
        return _parse(response.content, kind)

    @contextmanager
    def _stream(self, path: str, body: object) -> Iterator[httpx.Response]:
        import httpx

        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None)
        with (
            self._errors_mapped(),
            self._http.stream(
                "POST", path, json=body, headers=self._headers, timeout=timeout
            ) as response,
        ):
            if response.status_code >= 400:
                raise _node_error(response.read())
            yield response

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NoNodeRunning(f"no node is running in {self._place}") from error
        except UnicodeEncodeError as error:
            raise NodeError(
                "the command line or the input holds bytes that are no text",
                code="invalid_value",
                fix="Write it in UTF-8.",
            ) from error
        except httpx.HTTPError as error:
            raise NetworkError(
                f"the node at {self._place} stopped answering ({type(error).__name__})",
                fix="See its output; start it again with `swarmpy run`.",
            ) from error


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield the lines of a response as they come.

    httpx would also end a line at every other Unicode line end, which JSON text may hold.
    """
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


class _ProgressLine(msgspec.Struct, frozen=True):
    step: str
    done: int = 0
    total: int = 0
    unit: str = ""


@contextmanager
def connect(folder: Path) -> Iterator[NodeClient]:
    """Connect to the node that runs in a data folder.

    Raises:
        NoNodeRunning: None does.
        NetworkError: Something else answers at its address.
        ExtensionNotFound: httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise ExtensionNotFound(
            "this command talks to the node over HTTP, which needs httpx",
            fix="Install swarmpy with the extra 'gateway'.",
        ) from error
    timeout = httpx.Timeout(CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    address = read_node_file(folder)
    if address is None:
        raise NoNodeRunning(f"no node is running in {folder}")
    socket = folder / SOCKET_FILE
    with _client(folder, socket, address.base_url, timeout) as http:
        yield http


@contextmanager
def connect_endpoint(base_url: str, api_key: str) -> Iterator[NodeClient]:
    """Connect to a node's HTTP endpoint as any program would, with its base URL and key."""
    import httpx

    timeout = httpx.Timeout(CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    root = base_url.removesuffix("/").removesuffix("/v1")
    with httpx.Client(base_url=root, timeout=timeout, trust_env=False) as http:
        yield NodeClient(http, root, {"authorization": f"Bearer {api_key}"})


@contextmanager
def _client(
    folder: Path, socket: Path, base_url: str, timeout: httpx.Timeout
) -> Iterator[NodeClient]:
    import httpx

    if socket.exists():
        # Who can open the socket is this user, and needs no key.
        transport = httpx.HTTPTransport(uds=str(socket))
        with httpx.Client(transport=transport, base_url=SOCKET_URL, timeout=timeout) as http:
            yield NodeClient(http, folder, {})
        return
    from swarmpy.plugins.gateway.keys import key_path, read_key

    key = read_key(key_path(folder, "admin"))
    # A proxy of the environment must never see what is meant for this machine.
    with httpx.Client(base_url=base_url, timeout=timeout, trust_env=False) as http:
        client = NodeClient(http, folder, {})
        client.prove(key)
        yield NodeClient(http, folder, {"authorization": f"Bearer {key}"})


def read_node_file(folder: Path) -> NodeFile | None:
    """Return what the node that runs in `folder` left there, None where none does."""
    try:
        return msgspec.json.decode((folder / NODE_FILE).read_bytes(), type=NodeFile)
    except (OSError, msgspec.DecodeError):
        return None


def raise_event_error(event: bytes) -> None:
    """Raise the error that a server-sent event holds, if it holds one.

    Raises:
        NodeError: It does.
    """
    if b'"error"' in event and "error" in _parse(event, dict[str, object]):
        raise _node_error(event)


def _parse(data: bytes | str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise NetworkError(
            f"the answer is none of a swarmpy node's: {error}",
            fix="Check that the node runs the same swarmpy version as this command.",
        ) from error


def _node_error(answer: object) -> NodeError:
    """Return the error for an answer that holds {"error": {...}}."""
    if isinstance(answer, bytes):
        try:
            answer = msgspec.json.decode(answer)
        except msgspec.DecodeError:
            answer = {}
    try:
        body = msgspec.convert(answer, dict[str, ErrorBody])["error"]
    except (KeyError, msgspec.ValidationError):
        return NodeError("the node refused the request and gave no reason", code="unknown")
    return NodeError(body.message, code=body.code or body.type, fix=body.fix)
