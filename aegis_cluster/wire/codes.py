"""Errors as numbers on the wire, mapped once.

The idea: the hundreds follow the branches of the tree in `errors`, so a code that is newer than
this process still tells what matters most: whether it happened.
The rule it protects: a number, once given, keeps its meaning for ever.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aegis_cluster import errors, limits
from aegis_cluster.errors import AegisError, PeerViolation

if TYPE_CHECKING:
    from collections.abc import Sequence

MESSAGE_CHARS_MAX: Final = 2_000
DETAILS_MAX: Final = 32
DETAILS_BYTES_MAX: Final = 64 * limits.KIB
DETAIL_DEPTH_MAX: Final = 3
DETAIL_ITEMS_MAX: Final = 64


class Code(IntEnum):
    """0 is success; then one number for every class of the tree, gaps left in every branch."""

    OK = 0
    ERROR = 1

    REFUSED = 100
    TOPIC_NOT_FOUND = 101
    TOPIC_EXISTS = 102
    GROUP_NOT_FOUND = 103
    INVALID_TOPIC = 104
    CONFIG_ERROR = 105
    MESSAGE_TOO_LARGE = 120
    INVALID_BATCH = 121
    UNSUPPORTED_PAYLOAD = 122
    KEY_REQUIRED = 123
    OUT_OF_ORDER_SEQUENCE = 130
    PRODUCER_FENCED = 131
    UNKNOWN_PRODUCER = 132
    MEMBER_FENCED = 133
    WRONG_EXPECTED_VERSION = 134
    MEMBER_IN_USE = 135
    GROUP_NOT_EMPTY = 136
    FEED_FENCED = 137
    STALE_POSITION = 138
    STREAM_DELETED = 139
    OFFSET_OUT_OF_RANGE = 140
    STREAM_HELD = 141
    NOT_LEADER = 150
    NOT_ENOUGH_REPLICAS = 151
    NOT_READY = 152
    UNAVAILABLE = 153
    REQUEST_TIMEOUT = 154
    THROTTLED = 155
    DISK_FULL = 156
    TRANSACTION_ABORTED = 160
    NO_OPEN_TRANSACTION = 161
    UNAUTHORIZED = 170
    UNSUPPORTED_VERSION = 171
    WRONG_CLUSTER = 172
    LEASE_HELD = 180
    LEASE_LOST = 181
    SUBSCRIPTION_NOT_FOUND = 190
    LOCK_LOST = 191
    SUBSCRIPTION_IN_USE = 192
    SOURCE_ERROR = 195
    SOURCE_UNAVAILABLE = 196

    OUTCOME_UNKNOWN = 300
    PARTLY_PUBLISHED = 301

    CORRUPTION = 400
    CORRUPT_RECORD = 401
    CORRUPT_LOG = 402

    STORAGE_FAILED = 500

    PEER_VIOLATION = 600

    MISUSE = 700


ERROR_OF_CODE: Final[dict[int, type[AegisError]]] = {
    Code.ERROR: AegisError,
    Code.REFUSED: errors.Refused,
    Code.TOPIC_NOT_FOUND: errors.TopicNotFound,
    Code.TOPIC_EXISTS: errors.TopicExists,
    Code.GROUP_NOT_FOUND: errors.GroupNotFound,
    Code.INVALID_TOPIC: errors.InvalidTopic,
    Code.CONFIG_ERROR: errors.ConfigError,
    Code.MESSAGE_TOO_LARGE: errors.MessageTooLarge,
    Code.INVALID_BATCH: errors.InvalidBatch,
    Code.UNSUPPORTED_PAYLOAD: errors.UnsupportedPayload,
    Code.KEY_REQUIRED: errors.KeyRequired,
    Code.OUT_OF_ORDER_SEQUENCE: errors.OutOfOrderSequence,
    Code.PRODUCER_FENCED: errors.ProducerFenced,
    Code.UNKNOWN_PRODUCER: errors.UnknownProducer,
    Code.MEMBER_FENCED: errors.MemberFenced,
    Code.WRONG_EXPECTED_VERSION: errors.WrongExpectedVersion,
    Code.MEMBER_IN_USE: errors.MemberInUse,
    Code.GROUP_NOT_EMPTY: errors.GroupNotEmpty,
    Code.FEED_FENCED: errors.FeedFenced,
    Code.STALE_POSITION: errors.StalePosition,
    Code.STREAM_DELETED: errors.StreamDeleted,
    Code.STREAM_HELD: errors.StreamHeld,
    Code.OFFSET_OUT_OF_RANGE: errors.OffsetOutOfRange,
    Code.NOT_LEADER: errors.NotLeader,
    Code.NOT_ENOUGH_REPLICAS: errors.NotEnoughReplicas,
    Code.NOT_READY: errors.NotReady,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.REQUEST_TIMEOUT: errors.RequestTimeout,
    Code.THROTTLED: errors.Throttled,
    Code.DISK_FULL: errors.DiskFull,
    Code.TRANSACTION_ABORTED: errors.TransactionAborted,
    Code.NO_OPEN_TRANSACTION: errors.NoOpenTransaction,
    Code.UNAUTHORIZED: errors.Unauthorized,
    Code.UNSUPPORTED_VERSION: errors.UnsupportedVersion,
    Code.WRONG_CLUSTER: errors.WrongCluster,
    Code.LEASE_HELD: errors.LeaseHeld,
    Code.LEASE_LOST: errors.LeaseLost,
    Code.SUBSCRIPTION_NOT_FOUND: errors.SubscriptionNotFound,
    Code.LOCK_LOST: errors.LockLost,
    Code.SUBSCRIPTION_IN_USE: errors.SubscriptionInUse,
    Code.SOURCE_ERROR: errors.SourceError,
    Code.SOURCE_UNAVAILABLE: errors.SourceUnavailable,
    Code.OUTCOME_UNKNOWN: errors.OutcomeUnknown,
    Code.PARTLY_PUBLISHED: errors.PartlyPublished,
    Code.CORRUPTION: errors.Corruption,
    Code.CORRUPT_RECORD: errors.CorruptRecord,
    Code.CORRUPT_LOG: errors.CorruptLog,
    Code.STORAGE_FAILED: errors.StorageFailed,
    Code.PEER_VIOLATION: errors.PeerViolation,
    Code.MISUSE: errors.Misuse,
}

CODE_OF_ERROR: Final[dict[type[AegisError], Code]] = {
    kind: Code(code) for code, kind in ERROR_OF_CODE.items()
}

_BRANCHES: Final[tuple[tuple[range, type[AegisError]], ...]] = (
    (range(100, 300), errors.Refused),
    (range(300, 400), errors.OutcomeUnknown),
    (range(400, 500), errors.Corruption),
    (range(500, 600), errors.StorageFailed),
    (range(600, 700), errors.PeerViolation),
    (range(700, 800), errors.Misuse),
)


def code_of(error: AegisError) -> Code:
    """The code of the error's class, or of its nearest parent that has one."""
    for kind in type(error).__mro__:
        code = CODE_OF_ERROR.get(kind)
        if code is not None:
            return code
    return Code.ERROR


def error_to_reply(error: AegisError) -> tuple[Code, list[Any]]:
    """Code and fields [message, details] of a reply that carries this error."""
    details = _plain(dict(list(error.details.items())[:DETAILS_MAX]), DETAIL_DEPTH_MAX)
    if len(msgpack.packb(details)) > DETAILS_BYTES_MAX:
        details = {"left_out": "details too large to send"}
    return code_of(error), [_text(error.message), details]


def error_from_reply(code: int, fields: Sequence[Any]) -> AegisError:
    """The error that a reply carries, as an object to raise.

    A code that this process does not know becomes the root of its branch; outside every branch
    nothing is known about the outcome, so that is what it says.
    """
    if not isinstance(code, int) or isinstance(code, bool):
        raise PeerViolation("An answer's code is a number; this one is none.", have=repr(code)[:80])
    message, details = _message_and_details(fields)
    kind = ERROR_OF_CODE.get(code)
    if kind is None:
        details["code"] = code
        kind = _branch_of(code)
    return kind(message, **details)


def _branch_of(code: int) -> type[AegisError]:
    for numbers, kind in _BRANCHES:
        if code in numbers:
            return kind
    return errors.OutcomeUnknown


def _message_and_details(fields: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    if len(fields) < 2 or type(fields[0]) is not str or type(fields[1]) is not dict:
        raise PeerViolation("A refusal carries a sentence and a map of details; this one does not.")
    details = {name: value for name, value in fields[1].items() if type(name) is str}
    details.pop("message", None)  # the name of the error's own argument
    details.pop("self", None)
    return fields[0], details


def _plain(value: Any, depth: int) -> Any:
    """`value` as msgpack can carry it; what it cannot is shown as text, never left out."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return value[:MESSAGE_CHARS_MAX]
    if depth and isinstance(value, dict):
        pairs = list(value.items())[:DETAIL_ITEMS_MAX]
        return {_text(str(name)): _plain(item, depth - 1) for name, item in pairs}
    if depth and isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value[:DETAIL_ITEMS_MAX]]
    return _text(repr(value))


def _text(value: str) -> str:
    """Bounded, and free of lone surrogates, which UTF-8 cannot carry."""
    return value[:MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode("utf-8")
