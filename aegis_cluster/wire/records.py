"""Records inside a batch: one interface, a compiled codec and our own twin.

The idea: a record costs Python time only in clients, and there a compiled codec is four times
faster than anything written in Python. `aiokafka.record` has one; it is pinned and held behind
`RecordCodec`, next to a twin of ours (`records_pure`) that passes the same tests, so that a
platform without wheels works and a change in aiokafka cannot reach past this module.

The rules it protects: reading never goes beyond the batch. The compiled decoder reads a variable-
length integer without looking for the end, so every batch is given zero bytes behind it
(`PADDING_BYTES`), in the same allocation, where such an integer ends. Whatever it raises on hostile
bytes becomes CorruptRecord.

aiokafka takes a tenth of a second to import, so it is imported on first use, and a process that
handles whole batches only never pays for it.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from aegis_cluster.errors import CorruptRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.wire.layout import BatchHeader

Headers: TypeAlias = list[tuple[str, bytes | None]]

PADDING_BYTES: Final = 64
"""More than the two 10-byte integers that the compiled decoder may read past the end."""

NO_TIMESTAMP: Final = -1
"""Kafka's way to say that a record has none; we never write it."""


class Record(NamedTuple):
    """One record as stored."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


_OFFSET: Final = attrgetter("offset")
_KEY: Final = attrgetter("key")
_VALUE: Final = attrgetter("value")
_HEADERS: Final = attrgetter("headers")


class RecordColumns:
    """Records of one batch, column by column; a column costs nothing until it is asked for."""

    __slots__ = ("_records", "_timestamp", "annotation")

    def __init__(self, records: Sequence[Any], *, timestamp: str = "timestamp_ms") -> None:
        """records: objects with the attributes of `Record`; timestamp: how that one is called."""
        self._records = records
        self._timestamp = timestamp
        self.annotation: bytes = b""
        """What stood beside the batch in its frame; whoever reads frames notes it here."""

    def __len__(self) -> int:
        return len(self._records)

    def after(self, count: int) -> RecordColumns:
        """Without the first `count`."""
        rest = RecordColumns(self._records[count:], timestamp=self._timestamp)
        rest.annotation = self.annotation
        return rest

    @property
    def offsets(self) -> list[int]:
        return list(map(_OFFSET, self._records))

    @property
    def first_offset(self) -> int:
        return int(self._records[0].offset)

    @property
    def last_offset(self) -> int:
        return int(self._records[-1].offset)

    @property
    def timestamps(self) -> list[int]:
        """Milliseconds since 1970."""
        found = list(map(attrgetter(self._timestamp), self._records))
        if None in found:
            return [NO_TIMESTAMP if time_ms is None else time_ms for time_ms in found]
        return found

    @property
    def keys(self) -> list[bytes | None]:
        return list(map(_KEY, self._records))

    @property
    def values(self) -> list[bytes | None]:
        return list(map(_VALUE, self._records))

    @property
    def headers(self) -> list[Headers]:
        return list(map(_HEADERS, self._records))

    @property
    def has_headers(self) -> bool:
        """Whether any record has one."""
        return any(map(_HEADERS, self._records))

    def records(self) -> list[Record]:
        """Row by row."""
        rows = map(_MAKE_RECORD, map(_fields(self._timestamp), self._records))
        found: list[Record] = list(rows)
        if self._timestamp != "timestamp_ms" and None in map(_TIMESTAMP, found):
            return [_with_timestamp(record) for record in found]
        return found


class RecordWriter(Protocol):
    """One batch under construction, not compressed."""

    def append(
        self,
        offset: int,
        timestamp: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        /,
    ) -> object:
        """Add a record; offsets are 0, 1, 2, … and timestamps are not negative."""

    def size(self) -> int:
        """Bytes so far, the batch header included."""

    def build(self) -> bytearray:
        """The batch, once; of its header only the timestamps are to be trusted."""


class RecordCodec(Protocol):
    """What a record codec can do."""

    @property
    def name(self) -> str:
        """For humans and tests."""

    def writer(self) -> RecordWriter:
        """A new, empty batch."""

    def read(self, header: BatchHeader, batch: memoryview) -> RecordColumns:
        """All records of a batch that is not compressed and has padding behind it in memory."""


class CompiledCodec:
    """aiokafka's compiled codec (0.14.0) behind our interface."""

    name = "aiokafka"

    def __init__(self) -> None:
        module: Any = importlib.import_module("aiokafka.record._crecords")
        failures: Any = importlib.import_module("aiokafka.errors")
        self._batch: Callable[[memoryview], Any] = module.DefaultRecordBatch
        self._builder: Callable[..., RecordWriter] = module.DefaultRecordBatchBuilder
        self._failures: tuple[type[Exception], ...] = (
            failures.CorruptRecordException,
            ValueError,  # a header name that is not UTF-8
            OverflowError,  # lengths near 2**63 pass its bounds check and end in the allocator
            MemoryError,
        )

    def writer(self) -> RecordWriter:
        """A builder with no codec and no limit of its own; batches are limited by our callers."""
        return self._builder(2, 0, 0, -1, -1, -1, 2**31 - 1)

    def read(self, header: BatchHeader, batch: memoryview) -> RecordColumns:
        """Records made without one line of Python per record."""
        try:
            return RecordColumns(list(self._batch(batch)), timestamp="timestamp")
        except self._failures as cause:
            raise CorruptRecord("a record does not decode", cause=str(cause)) from cause


@cache
def _fields(timestamp: str) -> attrgetter[Any]:
    return attrgetter("offset", timestamp, "key", "value", "headers")


_TIMESTAMP: Final = itemgetter(1)
_MAKE_RECORD: Final[Callable[[Any], Record]] = partial(tuple.__new__, Record)


def _with_timestamp(record: Record) -> Record:
    """aiokafka shows the timestamp -1 as None."""
    missing: Any = record.timestamp_ms
    return record._replace(timestamp_ms=NO_TIMESTAMP) if missing is None else record


@cache
def compiled_codec() -> RecordCodec | None:
    """The compiled codec, or None where aiokafka came without its compiled part."""
    try:
        return CompiledCodec()
    except ImportError:
        return None


@cache
def pure_codec() -> RecordCodec:
    """Our own twin."""
    from aegis_cluster.wire.records_pure import PureCodec

    return PureCodec()


@cache
def record_codec() -> RecordCodec:
    """The codec in use: compiled where there is one. Call it early to pay for the import early."""
    return compiled_codec() or pure_codec()
