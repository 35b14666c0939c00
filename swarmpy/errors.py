"""Every error swarmpy raises: one tree, and the blame is in the type.

An error's docstring is the text its user reads; the message adds what was expected and what came.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Something in swarmpy failed."""

    @property
    def fix(self) -> str:
        """What the user can do about it; the class's own advice unless the raiser said better."""
        return self._fix or self.advice

    advice = "Run the command again with --log-level debug to see what led here."

    def __init__(self, message: str = "", *, fix: str = "") -> None:
        super().__init__(message or (self.__doc__ or "").strip().split("\n")[0])
        self._fix = fix


class ConfigError(SwarmError):
    """A setting is unknown, malformed or contradicts another."""

    advice = "Correct the named setting in config.toml, the environment or the flag."


class ExtensionNotFound(SwarmError):
    """No installed package provides the extension that was asked for."""

    advice = "Install swarmpy with the extra 'all'."


# Network --------------------------------------------------------------------


class NetworkError(SwarmError):
    """The network did not carry what was asked of it."""

    advice = "Check that the peer is running and that its address can be reached from here."


class DialFailed(NetworkError):
    """No address of the peer could be connected to."""


class ConnectionLost(NetworkError):
    """The connection to the peer broke before the exchange was finished."""


class StreamReset(NetworkError):
    """The peer, or this node, gave up one stream; the connection lives on."""


class PeerTimeout(NetworkError):
    """The peer did not answer in time."""


# Protocol -------------------------------------------------------------------


class ProtocolError(SwarmError):
    """A protocol rule was broken."""

    advice = "Check that both peers run a compatible swarmpy version."


class LocalProtocolError(ProtocolError):
    """This node broke a protocol rule: a bug of swarmpy or of the calling program."""

    advice = "Please report this with the log."


class RemoteProtocolError(ProtocolError):
    """The peer broke a protocol rule; it costs the stream first, then the connection.

    Attributes:
        peer: The peer's id as text, or "" before it is known.
        penalty: How much the breach costs, 1 (a stream) to 10 (the connection at once).
    """

    def __init__(self, message: str = "", *, peer: str = "", penalty: int = 1) -> None:
        super().__init__(message)
        self.peer = peer
        self.penalty = penalty


class HandshakeFailed(RemoteProtocolError):
    """The peer could not prove who it is, or speaks no protocol of ours."""


class FrameTooLarge(RemoteProtocolError):
    """The peer sent a frame beyond its bound."""


class BadSignature(RemoteProtocolError):
    """A signature does not fit the key and the bytes it came with."""


class BadMessage(RemoteProtocolError):
    """The bytes are not a valid message of this protocol."""


# Credits --------------------------------------------------------------------


class CreditError(SwarmError):
    """A tab between two peers cannot move as asked."""


class CreditExceeded(CreditError):
    """The debit would pass the credit limit; nothing was moved."""


class StaleReceipt(CreditError):
    """The receipt was issued too long ago, or in the future."""


class ReceiptConflict(CreditError):
    """Two receipts of one pair carry the same sequence number."""


# Pipeline -------------------------------------------------------------------


class PipelineError(SwarmError):
    """A model could not be run over the swarm."""

    advice = "Run `swarmpy peers` to see who is connected and what each can hold."


class NoPipeline(PipelineError):
    """No set of peers can hold the model; the message says what is missing and who was asked."""

    advice = "Invite another machine, raise engine.memory_bytes_max, or choose a smaller model."


class OfferRejected(PipelineError):
    """A peer refused the layers it was offered."""


class StageBusy(PipelineError):
    """A peer's memory is promised to a pipeline that another peer is assembling."""

    advice = "Wait until the other request has its pipeline; it may serve this one too."


class StageLost(PipelineError):
    """A stage of the pipeline went away during the reply."""

    advice = "Send the request again; the remaining peers are planned anew."


class StageEvicted(StageLost):
    """A stage had no session, and made room for another model."""

    advice = "Send the request again, or give models more memory (engine.memory_bytes_max)."


class EngineLost(PipelineError):
    """The engine's child process is gone; every slot of the shard is lost with it."""

    advice = "Send the request again; the shard is loaded anew."


class RowError(PipelineError):
    """One row of a step could not be computed; the others were not touched."""


class ContextExceeded(PipelineError):
    """The prompt and the reply do not fit in the model's context."""

    advice = "Shorten the prompt, lower max_tokens, or raise engine.context."


class SamplingError(PipelineError):
    """A sampling parameter is outside its range."""

    advice = "Correct the named parameter."


# Membership -----------------------------------------------------------------


class MembershipError(SwarmError):
    """The network's members-only rule was not met."""


class NotAMember(MembershipError):
    """The peer is not a member of any network this node belongs to."""

    advice = "Ask a member for an invite (`swarmpy invite`) and run `swarmpy join CODE`."


class MembershipRevoked(NotAMember):
    """A membership was ended by the network's founder, or by whoever let the member in."""

    advice = (
        "Ask whoever ended it. The machine can join again with a new identity: an empty data folder"
        " and a new code."
    )


class StaleRecord(MembershipError):
    """A signed record is over, or not yet valid, by this machine's clock."""

    advice = "Check both machines' clocks."


class ClockSkew(StaleRecord):
    """Two machines' clocks differ by more than signed times allow for: one of them is wrong."""


class InviteMalformed(MembershipError):
    """The invite code is incomplete or was changed."""

    advice = "Copy the whole code again, from swarm:// to its end."


class InviteExpired(MembershipError):
    """The invite code's time is over."""

    advice = "Ask its issuer for a new one (`swarmpy invite`) and check both clocks."


class InviteUsed(MembershipError):
    """The invite code was already used by somebody else, or was revoked."""

    advice = "Ask its issuer for a new one: each code admits one machine."


class InviteForeign(MembershipError):
    """The invite was not issued by the peer it is shown to."""

    advice = "Redeem the code at the node that issued it, or ask that node for a new one."


# Models ---------------------------------------------------------------------


class ModelError(SwarmError):
    """A model cannot be used."""


class ModelNotFound(ModelError):
    """No model of this name is known here."""

    advice = "Run `swarmpy models list`; fetch one with `swarmpy models pull MODEL`."


class ModelRefused(ModelError):
    """The model's files ask for something a model must not do, or contradict themselves."""

    advice = "A model is data: use one without custom code whose files are intact."


class DownloadFailed(ModelError):
    """The model's files could not be fetched or did not verify."""

    advice = "Check the network and the free disk space, then run the same command again."


class DoesNotFit(ModelError):
    """The shard needs more memory than its budget; the message lists the terms."""

    advice = "Take fewer layers, fewer slots or a shorter context, or raise the memory budget."
