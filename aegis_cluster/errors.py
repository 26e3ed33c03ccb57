"""One tree of errors: each says what happened, to what, and what to do.

The idea: a caller must always know what happened to the data, so the first branch of the tree is
not about causes but about knowledge. `Refused`: it certainly did not happen. `OutcomeUnknown`: it
may have. `Corruption`: stored bytes fail their check. `PeerViolation` and `Misuse`: the other
side, or the caller, broke the contract. `InvariantBroken` is none of these: our own model is
wrong, and the process ends.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AegisError(Exception):
    """Root of every error that this library raises on purpose.

    `details` carries the numbers behind the sentence (`have=`, `want=`); `retriable` tells
    whether the same call can help later.
    """

    retriable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(kind: type[AegisError], message: str, details: dict[str, Any]) -> AegisError:
    return kind(message, **details)


class Refused(AegisError):
    """It certainly did not happen."""


class TopicNotFound(Refused):
    """No topic of that name exists."""


class TopicExists(Refused):
    """A topic of that name exists already."""


class GroupNotFound(Refused):
    """No consumer group of that name exists."""


class MessageTooLarge(Refused):
    """A message, batch or request is over its limit."""


class NotEnoughReplicas(Refused):
    """Too few nodes are up, or registered, for what was asked."""

    retriable = True


class NotLeader(Refused):
    """This replica does not lead the partition; `details["leader"]` may name who does."""

    retriable = True


class OutOfOrderSequence(Refused):
    """A producer's batch does not follow its last one (KIP-98)."""


class ProducerFenced(Refused):
    """A newer epoch of this producer exists (KIP-98)."""


class TransactionAborted(Refused):
    """The transaction was aborted, so nothing of it happened; the producer may begin another."""


class NoOpenTransaction(Refused):
    """There is no open transaction that this could be done to."""


class UnknownProducer(Refused):
    """Nothing is known any more of this producer here: a repeat cannot be told from a new batch."""


class MemberFenced(Refused):
    """The group has moved on to a newer epoch of this member."""


class MemberInUse(Refused):
    """A living process is in the group under this member's name."""


class GroupNotEmpty(Refused):
    """The group has members, and only those may move its positions."""


class SubscriptionNotFound(Refused):
    """The topic has no persistent subscription of that name."""


class SubscriptionInUse(Refused):
    """The subscription has consumers, and which may hold messages, so it does not begin anew."""


class LockLost(Refused):
    """The message is no longer this consumer's to settle: its lock ran out, or it was settled."""


class WrongExpectedVersion(Refused):
    """The stream is not at the version that the append was conditional on.

    `stream`, `expected` (a number or an `ExpectedVersion`) and `actual` (-1: no such stream).
    """

    @property
    def stream(self) -> str:
        return str(self.details.get("stream", ""))

    @property
    def expected(self) -> int:
        return int(self.details.get("expected", -1))

    @property
    def actual(self) -> int:
        return int(self.details.get("actual", -1))


class StreamHeld(Refused):
    """A transaction has appended to the stream, or made sure of its version, and has not ended."""

    retriable = True


class StreamDeleted(Refused):
    """The stream of events was deleted for ever: nothing is appended to it any more."""


class FeedFenced(Refused):
    """Another connector has taken the change feed over: what an older one sends is refused."""


class StalePosition(Refused):
    """A change feed has this position of its source already."""


class SourceError(Refused):
    """A database cannot be captured as it is; another try would not help until that is mended."""


class SourceUnavailable(Refused):
    """A database that is captured does not answer; its connector tries again."""

    retriable = True


class LeaseHeld(Refused):
    """Another holder has the lease now; `details` tell which, and for how long at least."""

    retriable = True


class LeaseLost(Refused):
    """The lease has ended, or another holder has it: stop, and acquire it anew."""


class OffsetOutOfRange(Refused):
    """The offset lies below the log start or beyond the log end."""


class Throttled(Refused):
    """A limit on requests or bytes in flight is reached."""

    retriable = True


class DiskFull(Refused):
    """The node's disk is full; it resumes by itself when there is room."""

    retriable = True


class Unauthorized(Refused):
    """The other side does not accept who we are."""


class ConfigError(Refused):
    """A setting has an unknown name or a value that is not allowed."""


class RequestTimeout(Refused):
    """The deadline passed before anything was sent."""

    retriable = True


class InvalidBatch(Refused):
    """A record batch breaks the format, or claims what a client may not claim."""


class InvalidTopic(Refused):
    """A topic's name or settings are not allowed."""


class UnsupportedPayload(Refused):
    """A key or payload could not come back equal, so it is not sent."""


class KeyRequired(Refused):
    """A message for a compacted topic has no key, so nothing could ever replace it."""


class UnsupportedVersion(Refused):
    """The other side speaks no version of the protocol that we speak."""


class WrongCluster(Refused):
    """The other side belongs to another cluster."""


class NotReady(Refused):
    """The node or partition is starting, stopping or between leaders."""

    retriable = True


class Unavailable(Refused):
    """No node could be reached in time; nothing was sent."""

    retriable = True


class OutcomeUnknown(AegisError):
    """Sent, and no answer came by the deadline: it may have happened."""


class PartlyPublished(OutcomeUnknown):
    """A part of a `publish_many` went through.

    `receipts` is what was acknowledged; `failed` and `unknown` are positions in the input.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.receipts: list[Any] = details.get("receipts", [])
        self.failed: list[int] = details.get("failed", [])
        self.unknown: list[int] = details.get("unknown", [])


class Corruption(AegisError):
    """Stored bytes fail their check."""


class CorruptRecord(Corruption):
    """A record, batch or frame fails its check."""


class CorruptLog(Corruption):
    """A file of the log, or its place in the directory, fails its check."""


class StorageFailed(AegisError):
    """The disk refused a write or a sync; the shard stops using its files, without a retry."""


class PeerViolation(AegisError):
    """The other side broke the protocol: the link is dropped and counted."""


class Misuse(AegisError):
    """The caller broke the contract of a function or class."""


class InvariantBroken(BaseException):
    """Our model is wrong. Caught nowhere: stopping is recoverable, a wrong log is not."""

    def __init__(self, message: str, **details: Any) -> None:
        shown = ", ".join(f"{name}={value!r}" for name, value in details.items())
        super().__init__(f"{message} ({shown})" if shown else message)
        self.details = details


def invariant(condition: bool, message: str, /, **details: Any) -> None:
    """End the process when our own model is wrong; always on, also under `python -O`."""
    if not condition:
        raise InvariantBroken(message, **details)
