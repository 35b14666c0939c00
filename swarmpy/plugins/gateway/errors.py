"""What an HTTP client gets for each error: the one table of statuses and codes.

The body is OpenAI's, `{"error": {"message", "type", "param", "code"}}`, and `fix` where there is
advice. Page: docs/http-api.md, "Errors".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarmpy import errors

INVALID = "invalid_request_error"
"""OpenAI's type for all that the client can correct."""

SERVER = "server_error"
"""OpenAI's type for all that it cannot."""

RETRY_AFTER_S = 2
"""Told to clients of a node that stops: by then it has stopped, and another may be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error as it goes to the client."""

    status: int
    code: str
    message: str
    type: str = INVALID
    param: str | None = None
    fix: str = ""
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, object]:
        """The JSON object: a response's whole body, or the last event of a broken stream."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.fix:
            error["fix"] = self.fix
        return {"error": error}


class RequestRefused(Exception):
    """A request cannot be served as it is; carries what the client is told.

    Raised inside the gateway only, which answers with it: no caller of swarmpy ever sees one.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refuse(
    status: int, code: str, message: str, *, param: str | None = None, fix: str = ""
) -> RequestRefused:
    """Return the exception for a request that the client can correct."""
    return RequestRefused(Refusal(status=status, code=code, message=message, param=param, fix=fix))


SHUTTING_DOWN = Refusal(
    status=503,
    code="shutting_down",
    message="this node is stopping and takes no new requests",
    type=SERVER,
    fix="Send the request again once the node is back, or to another node.",
    headers={"retry-after": str(RETRY_AFTER_S)},
)

OVERLOADED = Refusal(
    status=429,
    code="overloaded",
    message="this node has as many requests under way as it takes",
    type="rate_limit_error",
    fix="Send the request again when others have ended.",
    headers={"retry-after": "1"},
)

INTERNAL = Refusal(
    status=500,
    code="internal_error",
    message="the node failed to handle this request",
    type=SERVER,
    fix="Please report this with the node's log.",
)

_NOT_AGAIN = {"x-should-retry": "false"}
"""Tells the OpenAI clients not to repeat what has to be changed by a person first."""

_TABLE: tuple[tuple[type[errors.SwarmError], int, str, str, Mapping[str, str] | None], ...] = (
    (errors.SamplingError, 400, "invalid_value", INVALID, None),
    (errors.ContextExceeded, 400, "context_length_exceeded", INVALID, None),
    (errors.NoPipeline, 503, "no_pipeline", SERVER, _NOT_AGAIN),
    (errors.OfferRejected, 503, "offer_rejected", SERVER, None),
    (errors.StageLost, 502, "stage_lost", SERVER, None),
    (errors.EngineLost, 502, "engine_lost", SERVER, None),
    (errors.PipelineError, 502, "pipeline_error", SERVER, None),
    (errors.ModelNotFound, 404, "model_not_found", INVALID, None),
    (errors.ModelRefused, 422, "model_refused", INVALID, None),
    (errors.DoesNotFit, 503, "does_not_fit", SERVER, _NOT_AGAIN),
    (errors.DownloadFailed, 502, "download_failed", SERVER, _NOT_AGAIN),
    (errors.ModelError, 400, "model_error", INVALID, None),
    (errors.InviteMalformed, 400, "invite_malformed", INVALID, None),
    (errors.InviteForeign, 400, "invite_foreign", INVALID, None),
    (errors.InviteUsed, 409, "invite_used", INVALID, None),
    (errors.InviteExpired, 410, "invite_expired", INVALID, None),
    (errors.MembershipRevoked, 403, "membership_revoked", INVALID, None),
    (errors.NotAMember, 403, "not_a_member", INVALID, None),
    (errors.MembershipError, 400, "membership_error", INVALID, None),
    (errors.PeerTimeout, 502, "peer_timeout", SERVER, None),
    (errors.NetworkError, 502, "network_error", SERVER, None),
    (errors.ProtocolError, 502, "protocol_error", SERVER, None),
    (errors.ExtensionNotFound, 503, "extension_not_found", SERVER, _NOT_AGAIN),
    (errors.ConfigError, 400, "config_error", INVALID, None),
    (errors.SwarmError, 500, "swarm_error", SERVER, None),
)
"""Class, status, code, type, headers. The first row that fits counts, so subclasses come first."""


def refusal_of(error: errors.SwarmError) -> Refusal:
    """Return what a client is told of an error of swarmpy's."""
    for kind, status, code, type_, headers in _TABLE:
        if isinstance(error, kind):
            return Refusal(
                status=status,
                code=code,
                message=str(error),
                type=type_,
                param=_param_of(error),
                fix=error.fix,
                headers=headers,
            )
    raise AssertionError("the table's last row fits every SwarmError")


def _param_of(error: errors.SwarmError) -> str | None:
    """The field of the request that an error is about."""
    match error:
        case errors.SamplingError():
            return str(error).partition(" ")[0]  # its message begins with the parameter's name
        case errors.ModelNotFound():
            return "model"
        case errors.ContextExceeded():
            return "messages"
    return None
