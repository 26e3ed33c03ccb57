"""Rows that were there before the stream, read in chunks between the stream's transactions.

The idea (DBLog's, as Debezium has it): a chunk is read while the stream goes on, then a message is
written into the server's log, and where the stream meets that message the chunk takes its place.
What was committed in the meantime is in the stream before it; a row of the chunk that is older than
that is left out. So a snapshot needs no lock, no long transaction and no copy of a table in memory,
can be broken off after any chunk, and can be made of any table at any time.

Which of the two is older is not guessed by time: the chunk is read under one snapshot of
PostgreSQL's, which tells of every transaction whether it sees it. A chunk whose snapshot does not
see a transaction that the feed has already (it waits for a standby, say) is read again.

A table whose rows have no key cannot be read like that. It is read whole under one snapshot, at a
point of the stream; what follows there and was seen already is passed over.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster.errors import SourceError
from aegis_cluster.limits import FEED_MARK_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.cdc.postgres_rows import TableRows
    from aegis_cluster.cdc.source import PartitionPoint

ANNOUNCED: Final = "announced"
"""A slot of this name is ours; nothing was read yet."""
READING: Final = "reading"
"""The rows of all tables are being read, one table after the other, by name."""
DONE: Final = "done"
ASKED_MAX: Final = 50
"""Tables that wait for their snapshots; more would not fit the mark."""
_XID: Final = 1 << 32


class Seen(NamedTuple):
    """What a snapshot of PostgreSQL's sees (`pg_current_snapshot`)."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Seen:
        xmin, xmax, running = text.split(":")
        numbers = frozenset(int(one) for one in running.split(",") if one)
        return cls(int(xmin), int(xmax), numbers)

    def sees(self, xid: int) -> bool:
        """Of a transaction that has committed. xid: its 32 bits, of the last 2**31."""
        full = self.full(xid)
        return full < self.xmin or (full < self.xmax and full not in self.running)

    def full(self, xid: int) -> int:
        """All 64 bits: the number nearest to ours that ends like that."""
        near = self.xmax - self.xmax % _XID + xid
        if near > self.xmax + _XID // 2:
            return near - _XID
        return near + _XID if near < self.xmax - _XID // 2 else near

    def misses(self, given: Iterable[int]) -> bool:
        """Whether one of these, all committed, is not seen."""
        running = {one % _XID for one in self.running}
        return bool(running) and any(xid in running for xid in given)


class Window:
    """Stands between a chunk that was read and its place in the stream."""

    def __init__(self, oid: int, seen: Seen, *, keyless: bool) -> None:
        self.oid = oid
        self.is_void = False
        """The table was emptied after the chunk was read."""
        self.is_torn = False
        """A row that was changed in between was not told of whole, so the chunk has to be read
        again: what it has of the row is too old, and what the stream has is too little."""
        self._seen = seen
        self._keyless = keyless
        self._newer: set[bytes | None] = set()

    def passes(self, key: bytes | None, xid: int, *, is_whole: bool) -> bool:
        """Note a change; whether it is to be handed on."""
        if self._seen.sees(xid):
            return not self._keyless
        if not self._keyless:
            self._newer.add(key)
            self.is_torn = self.is_torn or not is_whole
        return True

    def is_truncated(self, xid: int) -> bool:
        """Note that; whether it is to be handed on."""
        if self._seen.sees(xid):
            return not self._keyless
        self.is_void = True
        self._newer.clear()
        return True

    def is_newer(self, key: bytes | None) -> bool:
        """The stream has a newer row of this key than the chunk."""
        return key in self._newer


@dataclass(slots=True)
class Asked:
    """A table that waits. step: see below; number: of the mark that has it in the feed, before
    which nothing is done about it."""

    schema: str
    table: str
    step: int = 1
    number: int = 0

    @property
    def name(self) -> tuple[str, str]:
        return self.schema, self.table


EMPTY: Final = 0
"""What the feed has of it is void: it is told so first."""
READ: Final = 1
FORGET: Final = 2
"""The table is gone: nothing but the first of these."""


@dataclass(slots=True)
class Progress:
    """How far snapshots are; travels in the feed's marks.

    server: its system identifier, so that another one is not taken for it. number: of the mark.
    reached: the last table that the first snapshot is done with. chunk: of the table that is being
    read, what was handed on last: schema, table, the key before it and its last one.
    """

    server: str
    stage: str = ANNOUNCED
    number: int = 0
    reached: tuple[str, str] | None = None
    asked: list[Asked] = field(default_factory=list)
    chunk: tuple[str, str, list[str] | None, list[str]] | None = None

    def mark(self) -> bytes:
        """The next one. Raises `SourceError` where it would not fit a frame."""
        self.number += 1
        asked = [[one.schema, one.table, one.step] for one in self.asked]
        values = [self.stage, self.server, self.number, self.reached, asked, self.chunk]
        data: bytes = msgpack.packb(values)
        if len(data) > FEED_MARK_BYTES_MAX and self.chunk is not None:
            values[-1] = None  # after a crash this table begins anew
            data = msgpack.packb(values)
        if len(data) > FEED_MARK_BYTES_MAX:
            raise SourceError("Too many tables wait for their snapshots; ask for fewer at once.")
        return data

    @classmethod
    def found(
        cls, points: Sequence[PartitionPoint], server: str
    ) -> tuple[Progress | None, frozenset[int]]:
        """As of the newest mark, and which partitions lack its chunk; None: the feed has none."""
        marks = {n: msgpack.unpackb(p.mark) for n, p in enumerate(points) if p.mark}
        if not marks:
            return None, frozenset()
        newest: list[Any] = max(marks.values(), key=lambda values: values[2])
        stage, of, number, reached, asked, chunk = newest
        if of != server:
            raise SourceError(
                f"The feed was filled from another server than this one ({of}, now {server})."
                " Give the source another name, so that it begins a feed of its own."
            )
        waiting = [Asked(schema, table, step) for schema, table, step in asked]
        progress = cls(
            server,
            stage,
            number,
            None if reached is None else (reached[0], reached[1]),
            waiting,
            None if chunk is None else (chunk[0], chunk[1], chunk[2], chunk[3]),
        )
        lacking = frozenset(n for n in range(len(points)) if marks.get(n) != newest)
        return progress, frozenset() if chunk is None else lacking


@dataclass(slots=True)
class Target:
    """A table that is being read.

    key: its columns with the names of their types, in the order of the key; empty where it has
    none. after: the key of the last row that was read. estimate: of rows, by the server's
    statistics; -1 where it has none.
    """

    oid: int
    schema: str
    table: str
    rows: TableRows
    key: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    estimate: int
    after: list[str] | None = None
    done: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> tuple[str, str]:
        return self.schema, self.table


@dataclass(slots=True)
class Chunk:
    """Rows that were read, and wait for their place; without a target: the place itself.

    token: what the stream will meet. before, end: the key before them, and their last one.
    """

    target: Target | None
    window: Window | None
    token: bytes
    lines: list[bytes] = field(default_factory=list)
    before: list[str] | None = None
    end: list[str] | None = None
    is_last: bool = True
    only: frozenset[int] | None = None
