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

import gc
import importlib
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from aegis_cluster.errors import CorruptRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


_MAKE_RECORD: Final[Callable[[Any], Record]] = partial(tuple.__new__, Record)


class RecordColumns:
    """Records of one batch, column by column.

    Bytes and numbers, that is: Python's garbage collector does not look at those. Records are
    objects that it walks again and again while they wait for their reader, which took two thirds
    of the time of reading.
    """

    __slots__ = ("_headers", "annotation", "base_offset", "keys", "offsets", "timestamps", "values")

    def __init__(
        self,
        offsets: list[int],
        timestamps: list[int],
        keys: list[bytes | None],
        values: list[bytes | None],
        headers: list[Headers] | None,
    ) -> None:
        """timestamps: milliseconds since 1970; headers: None where no record has one."""
        self.offsets = offsets
        self.timestamps = timestamps
        self.keys = keys
        self.values = values
        self._headers = headers
        self.annotation: bytes = b""
        """What stood beside the batch in its frame; whoever reads frames notes it here."""
        self.base_offset = 0
        """Noted with the annotation: where the batch begins, whether that record is still there."""

    @classmethod
    def of(cls, records: Sequence[Any], *, timestamp: str = "timestamp_ms") -> RecordColumns:
        """records: objects with the attributes of `Record`; timestamp: how that one is called."""
        times = list(map(attrgetter(timestamp), records))
        if None in times:
            times = [NO_TIMESTAMP if time_ms is None else time_ms for time_ms in times]
        headers = list(map(attrgetter("headers"), records))
        return cls(
            list(map(attrgetter("offset"), records)),
            times,
            list(map(attrgetter("key"), records)),
            list(map(attrgetter("value"), records)),
            headers if any(headers) else None,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def after(self, count: int) -> RecordColumns:
        """Without the first `count`."""
        rest = RecordColumns(
            self.offsets[count:],
            self.timestamps[count:],
            self.keys[count:],
            self.values[count:],
            None if self._headers is None else self._headers[count:],
        )
        rest.annotation, rest.base_offset = self.annotation, self.base_offset
        return rest

    @property
    def first_offset(self) -> int:
        return self.offsets[0]

    @property
    def last_offset(self) -> int:
        return self.offsets[-1]

    @property
    def has_headers(self) -> bool:
        """Whether any record has one."""
        return self._headers is not None

    @property
    def headers(self) -> list[Headers]:
        return [[] for _ in self.offsets] if self._headers is None else self._headers

    def records(self) -> list[Record]:
        """Row by row."""
        rows = zip(self.offsets, self.timestamps, self.keys, self.values, self.headers, strict=True)
        return list(map(_MAKE_RECORD, rows))


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
        """Columns made without one line of Python per record."""
        try:
            with _collector_paused():
                return RecordColumns.of(list(self._batch(batch)), timestamp="timestamp")
        except self._failures as cause:
            raise CorruptRecord("a record does not decode", cause=str(cause)) from cause


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For the moment in which the objects of one batch are made, looked through and dropped: they
    would only set the garbage collector off, many times a batch, and are gone when it runs next.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
