"""Rows as PostgreSQL sends them, made into what a feed holds, without a Python value in between.

The idea: a value comes as its type's text, and stands in the feed as JSON. For most types that is
the same text, or the text in quotes, so a column's *writer* makes one of the other and a row is a
few joins of bytes. What a writer cannot do (an array, an infinity) it leaves: then the row goes the
slow way, by `postgres_types` and `envelope`, whose form is the same byte for byte.
"""

from __future__ import annotations

import base64
import json
import time
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cdc.envelope import (
    VERSION,
    EncodedChange,
    RowChange,
    encode_row_key,
)
from aegis_cluster.cdc.pgoutput import TOASTED, Toasted
from aegis_cluster.cdc.values import UNCHANGED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.cdc.events import ChangeSource

Writer = "Callable[[bytes], bytes | None]"
Position = tuple[int, int]


def _text(value: bytes) -> bytes:
    written: str = encode_basestring(value.decode())
    return written.encode()


def _as_is(value: bytes) -> bytes:
    return value


def _quoted(value: bytes) -> bytes:
    return b'"' + value + b'"'


def _boolean(value: bytes) -> bytes:
    return b"true" if value == b"t" else b"false"


def _float(value: bytes) -> bytes | None:
    if b"." in value or b"e" in value:
        return value
    return value + b".0" if value.lstrip(b"-").isdigit() else None


def _bytes(value: bytes) -> bytes | None:
    if not value.startswith(b"\\x"):
        return None
    return b'"' + base64.b64encode(bytes.fromhex(value[2:].decode())) + b'"'


def _date(value: bytes) -> bytes | None:
    return b'"' + value + b'"' if len(value) == 10 and value[4] == 45 else None


def _timestamp(value: bytes) -> bytes | None:
    if not 19 <= len(value) <= 26 or value[4] != 45 or value.endswith(b"C"):
        return None
    return b'"' + value[:10] + b"T" + _microseconds(value[11:]) + b'"'


def _timestamptz(value: bytes) -> bytes | None:
    if not 22 <= len(value) <= 29 or value[4] != 45 or not value.endswith(b"+00"):
        return None
    return b'"' + value[:10] + b"T" + _microseconds(value[11:-3]) + b'+00:00"'


def _microseconds(value: bytes) -> bytes:
    """As `isoformat` has them: none, or six digits."""
    return value if len(value) == 8 else value.ljust(15, b"0")


_WRITERS: Final[dict[int, tuple[Callable[[bytes], bytes | None], str | None]]] = {
    # By type: the writer, and the tag that leads back (see `values`).
    16: (_boolean, None),
    17: (_bytes, "bytes"),
    20: (_as_is, None),
    21: (_as_is, None),
    23: (_as_is, None),
    26: (_as_is, None),
    114: (_text, "json"),
    700: (_float, None),
    701: (_float, None),
    1082: (_date, "date"),
    1114: (_timestamp, "timestamp"),
    1184: (_timestamptz, "timestamptz"),
    2950: (_quoted, "uuid"),
    3802: (_text, "json"),
    **dict.fromkeys((18, 19, 25, 1042, 1043), (_text, None)),
}
_KEY_TYPES: Final = frozenset({16, 20, 21, 23, 26, 2950, 18, 19, 25, 1042, 1043})
"""Those that a key holds in the same form as a row does."""


def _number(value: bytes) -> bytes | None:
    """`Decimal` writes very small ones otherwise, and text has to be the same by either way."""
    return None if value.startswith((b"0.000000", b"-0.000000")) else b'"' + value + b'"'


class TableRows:
    """Writes the rows of one table, as it is at one time.

    columns: with the number of their type. key: the columns that tell rows apart. told: those that
    are told of an old row where only its identity is.
    """

    def __init__(
        self,
        feed: str,
        source: ChangeSource,
        columns: Sequence[tuple[str, int]],
        key: Sequence[str],
        told: frozenset[str],
        reader: Callable[[int], Callable[[str], Any]],
    ) -> None:
        self.feed = feed
        self.source = source
        self.names = tuple(name for name, _ in columns)
        self.key = tuple(key)
        self._told = tuple(place for place, name in enumerate(self.names) if name in told)
        self._readers = tuple(reader(oid) for _, oid in columns)
        known = [
            _WRITERS.get(oid)
            or ((_number, "decimal") if oid == 1700 else self._by_reader(reader(oid)))
            for _, oid in columns
        ]
        self._writers = tuple(writer for writer, _ in known)
        self._heads = _heads(self.names)
        self._told_heads = _heads([self.names[place] for place in self._told])
        tags = {n: tag for n, (_, tag) in zip(self.names, known, strict=True) if tag is not None}
        self._tags = tags
        places = {name: place for place, name in enumerate(self.names)}
        self._key_places = tuple(places[name] for name in self.key)
        self._key_heads = _heads(self.key)
        types = dict(columns)
        self._is_key_plain = all(types[name] in _KEY_TYPES for name in self.key)
        self._ends: dict[tuple[str, ...], bytes] = {
            halves: self._end(halves)
            for halves in ((), ("after",), ("before",), ("before", "after"))
        }
        self._source_head = (
            b',"source":'
            + json.dumps(
                {
                    "version": VERSION,
                    "connector": source.connector,
                    "name": feed,
                    "db": source.database,
                    "schema": source.schema,
                    "table": source.table,
                },
                ensure_ascii=False,
                separators=(",", ":"),
            ).encode()[:-1]
        )

    @staticmethod
    def _by_reader(
        read: Callable[[str], Any],
    ) -> tuple[Callable[[bytes], bytes | None], str | None]:
        """Types that stay text are written as that; of all others none is."""
        return (_text, None) if read is str else (lambda _: None, None)

    def _end(self, halves: Sequence[str]) -> bytes:
        if not self._tags or not halves:
            return b"}"
        types = json.dumps(
            dict.fromkeys(halves, self._tags), ensure_ascii=False, separators=(",", ":")
        )
        return b',"types":' + types.encode() + b"}"

    # ---- one row

    def row(self, values: Sequence[bytes | Toasted | None]) -> bytes | None:
        """JSON; None where a value needs the slow way."""
        parts = []
        for head, write, value in zip(self._heads, self._writers, values, strict=True):
            if value is None:
                parts.append(head + b"null")
                continue
            written = None if value is TOASTED else write(value)  # type: ignore[arg-type]
            if written is None:
                return None
            parts.append(head + written)
        return b"".join(parts) + b"}" if parts else b"{}"

    def told_row(self, values: Sequence[bytes | Toasted | None]) -> bytes | None:
        """JSON of what is told of an old row by its identity; None as in `row`."""
        parts = []
        for head, place in zip(self._told_heads, self._told, strict=True):
            value = values[place]
            written = b"null"
            if value is not None:
                found = None if value is TOASTED else self._writers[place](value)  # type: ignore[arg-type]
                if found is None:
                    return None
                written = found
            parts.append(head + written)
        return b"".join(parts) + b"}" if parts else b"{}"

    def values(self, values: Sequence[bytes | Toasted | None]) -> dict[str, Any]:
        """By column, as Python has them."""
        return {
            name: UNCHANGED if raw is TOASTED else None if raw is None else read(raw.decode())  # type: ignore[union-attr]
            for name, read, raw in zip(self.names, self._readers, values, strict=True)
        }

    def record_key(self, values: Sequence[bytes | Toasted | None]) -> bytes | None:
        """Of the record; None in a table without a key."""
        if not self.key:
            return None
        raw = [values[place] for place in self._key_places]
        if self._is_key_plain and None not in raw and TOASTED not in raw:
            parts = [
                head + (self._writers[place](value) or b"")  # type: ignore[arg-type]
                for head, place, value in zip(self._key_heads, self._key_places, raw, strict=True)
            ]
            return b"".join(parts) + b"}"
        row = self.values(values)
        return encode_row_key({name: row[name] for name in self.key})

    def told(self, values: Sequence[bytes | Toasted | None]) -> dict[str, Any]:
        """What is told of an old row by its identity."""
        row = self.values(values)
        return {self.names[place]: row[self.names[place]] for place in self._told}

    # ---- one change

    def change(
        self,
        op: str,
        position: Position,
        moment: Moment,
        before: Sequence[bytes | Toasted | None] | None,
        after: Sequence[bytes | Toasted | None] | None,
        *,
        key_only: bool = False,
        key: bytes | None = None,
    ) -> EncodedChange:
        """key_only: of `before` only the identity is told. key: where it is known already."""
        if key is None:
            key = self.record_key(after if after is not None else before or ())
        old, new = b"null", b"null"
        halves: tuple[str, ...] = ()
        slow = False
        if before is not None:
            written = self.told_row(before) if key_only else self.row(before)
            slow, old, halves = written is None, written or b"", ("before",)
        if after is not None and not slow:
            written = self.row(after)
            slow, new, halves = written is None, written or b"", (*halves, "after")
        if slow:
            return self._slowly(op, position, moment, before, after, key_only=key_only, key=key)
        value = b"".join(
            (
                b'{"before":', old, b',"after":', new, self._source_head, moment.source,
                b'"sequence":%d},"op":"%b","ts_ms":%d' % (position[1], op.encode(), moment.now_ms),
                self._ends[halves],
            )
        )  # fmt: skip
        return EncodedChange(self.source, op, position, moment.ts_ms, key, value)

    def _slowly(
        self,
        op: str,
        position: Position,
        moment: Moment,
        before: Sequence[bytes | Toasted | None] | None,
        after: Sequence[bytes | Toasted | None] | None,
        *,
        key_only: bool,
        key: bytes | None,
    ) -> EncodedChange:
        old = None
        if before is not None:
            old = self.told(before) if key_only else self.values(before)
        new = None if after is None else self.values(after)
        row = new if new is not None else old or {}
        change = RowChange(
            self.source,
            op,
            position,
            moment.ts_ms,
            {name: row[name] for name in self.key},
            old,
            new,
            moment.transaction_id,
        )
        value = change.record_value(self.feed, moment.now_ms)
        return EncodedChange(self.source, op, position, moment.ts_ms, key, value)

    def truncate(self, position: Position, moment: Moment) -> EncodedChange:
        """All rows are gone."""
        change = RowChange(
            self.source, "t", position, moment.ts_ms, None, transaction_id=moment.transaction_id
        )
        value = change.record_value(self.feed, moment.now_ms)
        return EncodedChange(self.source, "t", position, moment.ts_ms, None, value, True)


class Moment:
    """What the changes of one transaction, or of one piece of a snapshot, have in common."""

    __slots__ = ("now_ms", "source", "transaction_id", "ts_ms")

    def __init__(self, lsn: int, ts_ms: int, transaction_id: str | None) -> None:
        self.ts_ms = ts_ms
        self.transaction_id = transaction_id
        self.now_ms = time.time_ns() // 1_000_000
        xid = b"null" if transaction_id is None else b'"' + transaction_id.encode() + b'"'
        snapshot = b"true" if transaction_id is None else b"false"
        self.source = b',"snapshot":"%b","ts_ms":%d,"lsn":%d,"txId":%b,' % (
            snapshot, ts_ms, lsn, xid,
        )  # fmt: skip


def _heads(names: Sequence[str]) -> tuple[bytes, ...]:
    """What stands before each value of an object."""
    return tuple(
        (b"," if place else b"{") + _text(name.encode()) + b":" for place, name in enumerate(names)
    )


def copied(line: bytes) -> list[bytes | None]:
    """The values of a line of COPY's text format."""
    values = line.split(b"\t")
    if b"\\" not in line:
        return values  # type: ignore[return-value] # a list of bytes is one
    return [None if value == b"\\N" else _unescaped(value) for value in values]


def _unescaped(value: bytes) -> bytes:
    if b"\\" not in value:
        return value
    pieces = value.split(b"\\\\")
    for letter, meant in _ESCAPES:
        pieces = [piece.replace(letter, meant) for piece in pieces]
    return b"\\".join(pieces)


_ESCAPES: Final = (
    (b"\\b", b"\b"), (b"\\f", b"\f"), (b"\\n", b"\n"), (b"\\r", b"\r"), (b"\\t", b"\t"),
    (b"\\v", b"\v"),
)  # fmt: skip
