"""The Hugging Face Hub as this package needs it: what a repository holds, and ranges of its bytes.

The only place that knows `huggingface_hub` and the HTTP library it brings; their errors end here.
Listing is `huggingface_hub`'s work; bytes are fetched by range requests of our own, always of one
commit, whose files cannot change.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import trio

from swarmpy.errors import DownloadFailed, ExtensionNotFound, ModelNotFound
from swarmpy.proto.wire import printable
from swarmpy.shards.partial import SourceFile

if TYPE_CHECKING:
    import httpx2

READ_TIMEOUT_S = 60.0
"""Longest silence of the Hub in the middle of an answer, or before it."""

CONNECT_TIMEOUT_S = 20.0

FILES_LISTED_MAX = 100_000
"""Files of one repository."""

RESUME = "Check the network; what came so far is kept, and the same command goes on from there."


class HubUnreachable(DownloadFailed):
    """The Hub did not answer, or the connection broke; nothing is known to be wrong there."""

    advice = RESUME


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One commit of a repository: its files at the top level, by name."""

    repository: str
    """As the Hub spells it."""
    commit: str
    files: dict[str, SourceFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where the Hub is, and as whom it is asked."""

    endpoint: str
    token: str | None

    @property
    def host(self) -> str:
        """The endpoint's host, for messages."""
        return urlsplit(self.endpoint).netloc


def access(*, endpoint: str = "", token: str | None = None) -> Access:
    """Return how the Hub is reached: as given, else as huggingface_hub's settings say.

    Those are HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH and what `hf auth login` has stored. Blocks.

    Raises:
        ExtensionNotFound: huggingface_hub is not installed.
        DownloadFailed: The endpoint is no address of the web.
    """
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        raise ExtensionNotFound(
            "models of the Hugging Face Hub need huggingface_hub, which is not installed",
            fix="Install it: pip install 'swarmpy[hub]'",
        ) from error
    place = (endpoint or os.environ.get("HF_ENDPOINT", "") or constants.ENDPOINT).rstrip("/")
    if urlsplit(place).scheme not in ("http", "https"):
        raise DownloadFailed(
            f"HF_ENDPOINT is {place!r:.80}, expected https://…", fix="Correct HF_ENDPOINT."
        )
    with _hub_errors("", "", urlsplit(place).netloc):
        return Access(endpoint=place, token=get_token() if token is None else token)


def list_files(repository: str, revision: str, access: Access) -> Listing:
    """Ask the Hub what a revision of a model repository holds. Blocks.

    Raises:
        ModelNotFound: No such repository or revision, or one this user may not see.
        HubUnreachable: The Hub did not answer.
        DownloadFailed: It refused, or its answer makes no sense.
    """
    from huggingface_hub import HfApi

    try:
        with _hub_errors(repository, revision, access.host):
            info = HfApi(endpoint=access.endpoint, token=access.token or False).model_info(
                repository, revision=revision, files_metadata=True, timeout=READ_TIMEOUT_S
            )
        listed = [
            (item.rfilename, item.size, item.lfs.sha256 if item.lfs else "", item.blob_id)
            for item in info.siblings or ()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadFailed(
            f"the Hub at {access.host} describes {repository} in a way that makes no sense: "
            f"{printable(repr(error)[:200])}"
        ) from error
    if len(listed) > FILES_LISTED_MAX:
        raise DownloadFailed(f"{repository} has {len(listed)} files, at most {FILES_LISTED_MAX}")
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
        raise DownloadFailed(f"the Hub names {info.sha!r:.80} as the commit of {repository}")
    files = {
        name: _source_file(name, size, sha256, "" if sha256 else blob or "")
        for name, size, sha256, blob in listed
        if "/" not in name
    }
    return Listing(repository=info.id or repository, commit=info.sha or "", files=files)


class HubConnection:
    """Fetches bytes of one commit over connections that are kept between requests."""

    def __init__(self, client: httpx2.AsyncClient, listing: Listing, access: Access) -> None:
        """Args: client: Open as long as this is used; see `connect`."""
        self._client = client
        self._listing = listing
        self._access = access

    async def fetch(
        self, file: SourceFile, start: int, end: int, sink: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Fetch bytes `[start, end)` of a file; `sink` gets them in order, in pieces.

        Raises:
            HubUnreachable: No answer, or the connection broke; what `sink` got is right so far.
            DownloadFailed: The Hub refuses, or answers with other bytes than were asked for.
        """
        place, commit = self._listing.repository, self._listing.commit
        url = f"{self._access.endpoint}/{place}/resolve/{commit}/{quote(file.name)}"
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if self._access.token:
            headers["Authorization"] = f"Bearer {self._access.token}"
        count, failure = 0, None
        # The library's iterators close their connection only where a read is what ends them. So a
        # piece is kept whatever comes, and an error of keeping it ends the next read.
        with _hub_errors(place, "", self._access.host), trio.CancelScope() as reading:
            async with self._client.stream("GET", url, headers=headers) as response:
                self._check(response, file, start, end)
                async for piece in response.aiter_raw():
                    count += len(piece)
                    try:
                        if count > end - start:
                            raise DownloadFailed(
                                f"the Hub sent more than bytes {start}-{end - 1} of {file.name}"
                            )
                        if failure is None:
                            with trio.CancelScope(shield=True):
                                await sink(piece)
                    except DownloadFailed as error:
                        failure = failure or error
                        reading.cancel()
        if failure is not None:
            raise failure
        if count < end - start:
            raise HubUnreachable(f"the Hub's answer ended {end - start - count} bytes early")

    def _check(self, response: httpx2.Response, file: SourceFile, start: int, end: int) -> None:
        """Refuse an answer that is not the range, of the file, that was asked for."""
        name, status = f"{file.name} of {self._listing.repository}", response.status_code
        if self._access.endpoint.startswith("https:") and response.url.scheme != "https":
            raise DownloadFailed(f"the Hub leads to {response.url.host} without encryption")
        if status in (401, 403) and not response.history:
            raise _denied(name, self._listing.repository, self._access)
        if _is_busy(status):
            raise _busy(self._access.host, status)
        if status == 404:
            raise DownloadFailed(f"the Hub lists {name}, but does not have it")
        if status == 200 and (start, end) == (0, file.size):
            came = f"bytes 0-{int(response.headers.get('content-length', end)) - 1}/{file.size}"
        elif status == 206:
            came = response.headers.get("content-range", "")
        else:
            raise DownloadFailed(
                f"the Hub answered {status} to bytes {start}-{end - 1} of {name}, expected 206",
                fix=RESUME,
            )
        if came != f"bytes {start}-{end - 1}/{file.size}":
            raise DownloadFailed(
                f"asked for bytes {start}-{end - 1} of the {file.size} of {name}, "
                f"the Hub sent {printable(came[:80])!r}"
            )
        tags = {item.headers.get("x-linked-etag", "") for item in (*response.history, response)}
        tags = {tag.removeprefix("W/").strip('"') for tag in tags}
        hashes = {tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)}  # Mirrors have others.
        if file.sha256 and hashes - {file.sha256}:
            raise DownloadFailed(f"{name} has ETag {min(hashes)}, listed was {file.sha256}")


@asynccontextmanager
async def connect(listing: Listing, access: Access) -> AsyncIterator[HubConnection]:
    """Open a client for one commit's bytes; it is huggingface_hub's own, with its settings."""
    import httpx2
    from huggingface_hub import get_async_session

    async with get_async_session() as client:
        client.follow_redirects = True  # A token is never sent on to another host.
        client.timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        yield HubConnection(client, listing, access)


@contextmanager
def _hub_errors(repository: str, revision: str, host: str) -> Iterator[None]:
    """The border: what huggingface_hub and its HTTP library raise becomes our own."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(repository, host) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the Hub at {host} has no model {repository}, or does not show it to you",
            fix="Check the name; for a private model set HF_TOKEN or run `hf auth login`. "
            "A folder of this machine begins with ./ or /.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{repository} has no revision {revision!r}",
            fix=f"Leave it out, or see https://{host}/{repository}/tree/main",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachable(
            "HF_HUB_OFFLINE is set, so that the Hub is not asked", fix="Unset HF_HUB_OFFLINE."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise _denied_listing(repository, host, status) from error
        if _is_busy(status):
            raise _busy(host, status) from error
        raise DownloadFailed(
            f"the Hub at {host} answered {status} about {repository}", fix=RESUME
        ) from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        words = printable(str(error)[:200]) or type(error).__name__
        raise HubUnreachable(f"the connection to the Hub at {host} failed: {words}") from error


def _is_busy(status: int) -> bool:
    return status == 429 or status >= 500


def _busy(host: str, status: int) -> HubUnreachable:
    return HubUnreachable(
        f"the Hub at {host} is busy or out of order: it answered {status}",
        fix="Run the same command again in some minutes; it goes on where it stopped.",
    )


def _denied_listing(repository: str, host: str, status: int) -> DownloadFailed:
    return DownloadFailed(
        f"the Hub at {host} refused ({status}) to list {repository}",
        fix="Set HF_TOKEN to a token that may read it, or run `hf auth login`.",
    )


def _denied(name: str, repository: str, access: Access) -> DownloadFailed:
    """Return the error of a file that is listed and not given: a gated model, or no token."""
    if access.token is None:
        return DownloadFailed(
            f"the Hub gives {name} only to users it knows",
            fix=f"Accept its terms at {access.endpoint}/{repository}, then set HF_TOKEN or run "
            "`hf auth login`.",
        )
    return _gated(repository, access.host)


def _gated(repository: str, host: str) -> DownloadFailed:
    return DownloadFailed(
        f"{repository} is given only to who has accepted its terms, and this token has not",
        fix=f"Accept them at https://{host}/{repository}, or set HF_TOKEN to another user's token.",
    )


def _source_file(name: str, size: int | None, sha256: str, git_id: str) -> SourceFile:
    """A file as listed. A malformed hash is the Hub's mistake and makes the file unusable."""
    if size is None or not 0 <= size <= 1 << 53:
        raise DownloadFailed(f"the Hub lists {name!r:.80} with a size of {size!r:.40}")
    if not re.fullmatch("([0-9a-f]{64})?", sha256) or not re.fullmatch("([0-9a-f]{40})?", git_id):
        raise DownloadFailed(f"the Hub lists {name!r:.80} with a malformed hash")
    return SourceFile(name=name, size=size, sha256=sha256, git_id=git_id)
