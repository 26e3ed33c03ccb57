"""What users make and what they get: messages, receipts, and where to start reading."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol

from aegis_cluster import arguments
from aegis_cluster.arguments import is_unicode
from aegis_cluster.errors import Misuse
from aegis_cluster.wire.payload import decode_key, decode_payload, encode_key, encode_payload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.client.producer import Row
    from aegis_cluster.wire.records import Record, RecordColumns

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
RESERVED_HEADERS: Final = ("aegis", "aegis-key")
NO_HEADERS: Final[Mapping[str, str | bytes]] = MappingProxyType({})
"""Of every message without one."""


@dataclass(frozen=True, slots=True)
class Message:
    """What to publish.

    key: `str`, `bytes` or None; the same key always lands in the same partition.
    payload: `bytes`, `str`, a JSON-like value, or None (the tombstone); it comes out equal.
    headers: names to `str` or `bytes`; both come out as they went in where they are text.
    timestamp: aware `datetime`; default: now. Kept to the millisecond.
    """

    key: str | bytes | None = None
    payload: Any = None
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    timestamp: datetime | None = None


class ReceivedMessage(Message):
    """What arrives: the message, and where it stands.

    As good as a frozen dataclass, and three times as fast to make: plain private fields behind
    read-only properties, and a `datetime` only for those who look at it.
    """

    __slots__ = (
        "_headers", "_key", "_offset", "_partition", "_payload", "_source", "_time_ms", "_topic",
    )  # fmt: skip
    # What is public has no setter. Both, or all that `__init__` assigns goes through a lookup of
    # `__setattr__`, four times as slow: the two share one slot of the type.
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__

    def __init__(
        self,
        key: str | bytes | None = None,
        payload: Any = None,
        headers: Mapping[str, str | bytes] = NO_HEADERS,
        timestamp: datetime | None = None,
        topic: str = "",
        partition: int = 0,
        offset: int = 0,
        source: Redelivery | None = None,
        time_ms: int | None = None,
    ) -> None:
        """time_ms: milliseconds since 1970, in place of `timestamp`."""
        self._key = key
        self._payload = payload
        self._headers = headers
        self._time_ms = time_ms if timestamp is None else to_ms(timestamp)
        self._topic = topic
        self._partition = partition
        self._offset = offset
        self._source = source

    @property
    def key(self) -> str | bytes | None:
        """As it was published."""
        return self._key

    @property
    def payload(self) -> Any:
        """As it was published."""
        return self._payload

    @property
    def headers(self) -> Mapping[str, str | bytes]:
        """As they were published."""
        return self._headers

    @property
    def timestamp(self) -> datetime | None:
        """Aware, to the millisecond."""
        return None if self._time_ms is None else from_ms(self._time_ms)

    @property
    def topic(self) -> str:
        """Where it was read from."""
        return self._topic

    @property
    def partition(self) -> int:
        """Where it was read from."""
        return self._partition

    @property
    def offset(self) -> int:
        """Its number in its partition."""
        return self._offset

    @property
    def source(self) -> Redelivery | None:
        """Who handed it out, and can do so again."""
        return self._source

    def _values(self) -> tuple[Any, ...]:
        """All that counts when two are compared."""
        return (
            self._key, self._payload, self._headers, self._time_ms, self._topic, self._partition,
            self._offset,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReceivedMessage):
            return NotImplemented
        return self._values() == other._values()

    __hash__ = Message.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles come from nobody who could hand them out again."""
        where = (self._topic, self._partition, self._offset, None, self._time_ms)
        return ReceivedMessage, (self._key, self._payload, dict(self._headers), None, *where)

    def __repr__(self) -> str:
        return (
            f"ReceivedMessage(key={self._key!r}, payload={self._payload!r},"
            f" headers={self._headers!r}, timestamp={self.timestamp!r}, topic={self._topic!r},"
            f" partition={self._partition}, offset={self._offset})"
        )

    async def ack(self) -> None:
        """Mark the message handled: the group's position moves over handled neighbours, in the
        background and on close. Without a group there is no position to move."""
        if self.source is not None:
            self.source.handled(self)

    async def nack(self, delay: float | None = None) -> None:
        """Have the message handed out again, before any later one of its partition.

        delay: not before so many seconds; other partitions go on meanwhile. Does nothing once
        the subscriber is closed. Raises `Misuse` for a message that no subscriber handed out.
        """
        if delay is not None:
            arguments.seconds(delay, "delay")
        if self._source is None:
            raise Misuse("This message came from no subscriber, so none can hand it out again.")
        self._source.hand_out_again(self, delay)


class Redelivery(Protocol):
    """What a message knows of its subscriber."""

    def handled(self, message: ReceivedMessage, /) -> None:
        """Its handler is done with it."""

    def hand_out_again(self, message: ReceivedMessage, delay: float | None, /) -> None:
        """Put it in front of what its partition has not handed out yet."""


class Receipt(NamedTuple):
    """Where one published message stands; timestamp: when its leader appended it."""

    topic: str
    partition: int
    offset: int
    timestamp: datetime


@dataclass(frozen=True, slots=True)
class BatchReceipt:
    """Where messages stand that were published together: `count` of them from `base_offset` on.

    base_offset: -1 where nobody waited for it (`acks="none"`).
    """

    partition: int
    base_offset: int
    count: int


class _Kind(Enum):
    EARLIEST = "earliest"
    LATEST = "latest"
    AT = "at"
    AT_TIME = "at_time"


@dataclass(frozen=True, slots=True)
class Offset:
    """Where reading starts."""

    kind: _Kind
    number: int = 0
    """An offset, or milliseconds since 1970."""

    @classmethod
    def at(cls, number: int) -> Offset:
        """This very offset, in every partition."""
        return cls(_Kind.AT, arguments.whole(number, "offset", least=0))

    @classmethod
    def at_time(cls, time: datetime) -> Offset:
        """In every partition the first message of that time or later, in the order in which they
        are stored; the end where there is none. Raises `Misuse` for a time without a zone."""
        return cls(_Kind.AT_TIME, max(0, to_ms(time)))

    @property
    def time_ms(self) -> int | None:
        """What to ask leaders for; None where no time is meant."""
        return self.number if self.kind is _Kind.AT_TIME else None

    EARLIEST: ClassVar[Offset]
    """The first message that is kept."""
    LATEST: ClassVar[Offset]
    """Only what comes from now on."""

    def resolve(self, *, log_start: int, high_watermark: int, at_time: int | None = None) -> int:
        """The offset that this means in one partition, as it stands now.

        at_time: where the batch with the first message of `time_ms` begins.
        """
        match self.kind:
            case _Kind.EARLIEST:
                return log_start
            case _Kind.LATEST:
                return high_watermark
            case _Kind.AT:
                return self.number
            case _Kind.AT_TIME:
                return high_watermark if at_time is None else at_time


@dataclass(frozen=True, slots=True)
class PartitionOffsets:
    """log_start: first offset kept; high_watermark: first not committed; last_stable_offset: first
    that an open transaction holds back."""

    log_start: int
    high_watermark: int
    last_stable_offset: int


def to_row(message: Message, now_ms: int) -> Row:
    """A message as a record. Raises `UnsupportedPayload` for what could not come back equal, and
    `Misuse` for what is no message."""
    if not isinstance(message, Message):
        hint = "give a Message(payload=…); publish_many() takes bare payloads"
        arguments.instance(message, Message, "message", hint)
    key, key_headers = None, None
    if message.key is not None:
        key, key_headers = encode_key(message.key)
    value, headers = encode_payload(message.payload)
    if key_headers:
        headers += key_headers
    if message.headers:
        headers += _headers(message.headers)
    time_ms = now_ms if message.timestamp is None else to_ms(message.timestamp)
    return time_ms, key, value, headers


def _headers(headers: Mapping[str, str | bytes]) -> list[tuple[str, bytes | None]]:
    rows: list[tuple[str, bytes | None]] = []
    hint = "give a mapping of names to str or bytes"
    for name, content in arguments.instance(headers, Mapping, "headers", hint).items():
        if not isinstance(name, str) or name in RESERVED_HEADERS or not is_unicode(name):
            raise Misuse(f"{name!r} cannot be the name of a header.")
        if isinstance(content, str) and is_unicode(content):
            rows.append((name, content.encode()))
        elif isinstance(content, bytes):
            rows.append((name, content))
        else:
            raise Misuse(
                f"Header {name!r} is {content!r:.60}; use bytes, or str that can be written as"
                " UTF-8."
            )
    return rows


def from_record(
    topic: str, partition: int, record: Record, source: Redelivery | None = None
) -> ReceivedMessage:
    """A record as a message. Raises `CorruptRecord` when it does not decode."""
    offset, time_ms, key, value, headers = record
    if not headers:
        name = None if key is None else decode_key(key, headers)
        return ReceivedMessage(
            name, value, NO_HEADERS, None, topic, partition, offset, source, time_ms
        )
    return ReceivedMessage(
        decode_key(key, headers),
        decode_payload(value, headers),
        {n: _text(c) for n, c in headers if n not in RESERVED_HEADERS} or NO_HEADERS,
        None,
        topic,
        partition,
        offset,
        source,
        time_ms,
    )


def from_columns(
    topic: str, partition: int, columns: RecordColumns, source: Redelivery | None
) -> Iterator[ReceivedMessage]:
    """Records as messages, each made when it is asked for; a step raises `CorruptRecord` when its
    record does not decode."""
    if columns.has_headers:
        return map(partial(from_record, topic, partition, source=source), columns.records())
    return map(
        ReceivedMessage,
        [None if key is None else decode_key(key, ()) for key in columns.keys],
        columns.values,
        repeat(NO_HEADERS),
        repeat(None),
        repeat(topic),
        repeat(partition),
        columns.offsets,
        repeat(source),
        columns.timestamps,
    )


def _text(content: bytes | None) -> str | bytes:
    try:
        return (content or b"").decode()
    except UnicodeDecodeError:
        return content or b""


def to_ms(time: datetime) -> int:
    """Milliseconds since 1970. Raises `Misuse` for a naive time: it names no moment."""
    arguments.instance(time, datetime, "timestamp", "give an aware datetime, as datetime.now(UTC)")
    if time.tzinfo is None:
        raise Misuse("A timestamp needs a time zone; use datetime.now(UTC).")
    return (time - EPOCH) // timedelta(milliseconds=1)


def now_ms() -> int:
    """What a message without a timestamp gets: milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def from_ms(time_ms: int) -> datetime:
    return EPOCH + timedelta(milliseconds=time_ms)


Offset.EARLIEST = Offset(_Kind.EARLIEST)
Offset.LATEST = Offset(_Kind.LATEST)
