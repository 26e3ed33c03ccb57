"""A change as it stands in a feed: Debezium's envelope, so that its consumers understand it.

    key    {"id": 1}
    value  {"before": …, "after": …, "source": {…}, "op": "c|u|d|r|t", "ts_ms": …}

and after a delete a second record with the same key and no value, the tombstone, so that a
compacted feed forgets the row. Beside that stands `types`, what the values of some columns are
(see `values`), and `last` with the last change of a transaction; Debezium's consumers pass over
them.

The key is the row's primary key, so all changes of one row stand in one partition, in order.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cdc.events import (
    ChangeEvent,
    ChangeSource,
    Delete,
    Insert,
    Position,
    Truncate,
    Update,
)
from aegis_cluster.cdc.values import decode_row, encode_row
from aegis_cluster.errors import CorruptRecord
from aegis_cluster.message import from_ms
from aegis_cluster.wire.payload import PAYLOAD_HEADER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.client.producer import Row
    from aegis_cluster.message import ReceivedMessage

VERSION: Final = "1"
SNAPSHOT_OP: Final = "r"
_PLAIN: Final = frozenset({bool, int, float, str, type(None)})
_IS_JSON: Final[list[tuple[str, bytes | None]]] = [(PAYLOAD_HEADER, b"j")]
_NOTHING: Final[list[tuple[str, bytes | None]]] = []
_VALUE_JSON: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode
_KEY_JSON: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class RowChange:
    """One change as a source reports it.

    op: Debezium's letter. position: above that of every change before it. key: None for a table as
    a whole; empty for a row of a table without one. ts_ms: of the commit, or of the read. is_last:
    of its transaction, or of the piece of a snapshot that was read at once.
    """

    source: ChangeSource
    op: str
    position: tuple[int, int]
    ts_ms: int
    key: Mapping[str, Any] | None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    transaction_id: str | None = None
    is_last: bool = False

    @property
    def record_key(self) -> bytes | None:
        """Chooses the partition."""
        return encode_row_key(self.key) if self.key else None

    @property
    def is_everywhere(self) -> bool:
        """It is about a table as a whole, so every partition gets it."""
        return self.key is None

    def record_value(self, feed: str, now_ms: int) -> bytes:
        """The envelope. now_ms: when the connector has it."""
        return _value_of(self, feed, now_ms)

    def as_last(self) -> RowChange:
        """The same, with nothing more of its transaction behind it."""
        return replace(self, is_last=True)


class EncodedChange:
    """A change whose envelope its source has written already, without values in between."""

    __slots__ = ("is_everywhere", "op", "position", "record_key", "source", "ts_ms", "value")

    def __init__(
        self,
        source: ChangeSource,
        op: str,
        position: tuple[int, int],
        ts_ms: int,
        record_key: bytes | None,
        value: bytes,
        is_everywhere: bool = False,
    ) -> None:
        self.source = source
        self.op = op
        self.position = position
        self.ts_ms = ts_ms
        self.record_key = record_key
        self.value = value
        self.is_everywhere = is_everywhere

    def record_value(self, _feed: str, _now_ms: int) -> bytes:
        """The envelope, as it was written."""
        return self.value

    @property
    def is_last(self) -> bool:
        """Of its transaction."""
        return self.value.endswith(LAST + b"}")

    def mark_last(self) -> None:
        """Nothing more of its transaction follows."""
        if not self.is_last:
            self.value = self.value[:-1] + LAST + b"}"

    def as_last(self) -> EncodedChange:
        """The same, with nothing more of its transaction behind it."""
        self.mark_last()
        return self


Change = RowChange | EncodedChange
LAST: Final = b',"last":true'
"""At the end of an envelope."""


def encode_row_key(key: Mapping[str, Any]) -> bytes:
    """Two rows are one in a feed if these are equal."""
    text = _KEY_JSON.encode({name: _key_value(value) for name, value in key.items()})
    return text.encode("utf-8", "backslashreplace")


def rows_of(change: Change, feed: str, now_ms: int, key: bytes | None) -> tuple[Row, ...]:
    """The records of one change. now_ms: when the connector has it; key: its `record_key`."""
    row: Row = (change.ts_ms, key, change.record_value(feed, now_ms), _IS_JSON)
    if change.op == "d" and key is not None:
        return row, (change.ts_ms, key, None, _NOTHING)
    return (row,)


def _value_of(change: RowChange, feed: str, now_ms: int) -> bytes:
    """JSON. Most rows hold nothing but what JSON has a form for, so that is tried first."""
    rows = [row for row in (change.before, change.after) if row is not None]
    if all(_PLAIN.issuperset(map(type, row.values())) for row in rows):
        try:
            return _VALUE_JSON(_envelope(change, feed, now_ms, encoded=False)).encode()
        except ValueError:
            pass  # an infinity, or text that is no UTF-8
    return _VALUE_JSON(_envelope(change, feed, now_ms, encoded=True)).encode()


def _envelope(change: RowChange, feed: str, now_ms: int, *, encoded: bool) -> dict[str, Any]:
    """encoded: values have to be made such that JSON has a form for them, and told of."""
    where = change.source
    types: dict[str, dict[str, str]] = {}
    envelope: dict[str, Any] = {
        "before": _half("before", change.before, types) if encoded else change.before,
        "after": _half("after", change.after, types) if encoded else change.after,
        "source": {
            "version": VERSION,
            "connector": where.connector,
            "name": feed,
            "ts_ms": change.ts_ms,
            "snapshot": "true" if change.op == SNAPSHOT_OP else "false",
            "db": where.database,
            "schema": where.schema,
            "table": where.table,
            "lsn": change.position[0],
            "sequence": change.position[1],
            "txId": change.transaction_id,
        },
        "op": change.op,
        "ts_ms": now_ms,
    }
    if change.key and change.key.keys() - (change.after or change.before or {}).keys():
        envelope["key"] = _half("key", change.key, types)
    if types:
        envelope["types"] = types
    if change.is_last:
        envelope["last"] = True
    return envelope


def _half(
    name: str, row: Mapping[str, Any] | None, types: dict[str, dict[str, str]]
) -> dict[str, Any] | None:
    if row is None:
        return None
    found: dict[str, str] = {}
    encoded = encode_row(row, found)
    if found:
        types[name] = found
    return encoded


def _key_value(value: Any) -> Any:
    """Text and bytes that look alike stay two keys."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


def change_from(message: ReceivedMessage) -> ChangeEvent | None:
    """The change that a record of a feed holds; None for a tombstone. Raises `CorruptRecord`."""
    if message.payload is None:
        return None
    key = message.key.encode() if isinstance(message.key, str) else message.key
    try:
        change = event_from(message.payload, key)
        return replace(change, partition=message.partition, offset=message.offset, message=message)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptRecord(
            f"The record at offset {message.offset} of {message.topic} is no change: {error!r}.",
            offset=message.offset,
        ) from error


def event_from(envelope: Mapping[str, Any], key: bytes | None) -> ChangeEvent:
    """The change that an envelope tells of. key: of its record. Raises what a malformed one makes
    Python raise."""
    source, types, op = envelope["source"], envelope.get("types") or {}, envelope["op"]
    rows = {
        half: None if envelope[half] is None else decode_row(envelope[half], types.get(half) or {})
        for half in ("before", "after")
    }
    common: dict[str, Any] = {
        "source": ChangeSource(
            source["db"], source.get("schema") or "", source["table"], source["connector"]
        ),
        "position": Position(source["lsn"], source["sequence"]),
        "timestamp": from_ms(source["ts_ms"]),
        "key": _key_from(key, envelope, rows, types),
        "transaction_id": source.get("txId"),
        "is_snapshot": op == SNAPSHOT_OP,
        "is_last": bool(envelope.get("last")),
    }
    match op:
        case "c" | "r":
            return Insert(new_row=rows["after"] or {}, **common)
        case "u":
            return Update(new_row=rows["after"] or {}, old_row=rows["before"], **common)
        case "d":
            return Delete(old_row=rows["before"], **common)
        case "t":
            return Truncate(**common)
    raise ValueError(f"no operation is called {op!r}")


def _key_from(
    key: bytes | None,
    envelope: Mapping[str, Any],
    rows: Mapping[str, Any],
    types: Mapping[str, Any],
) -> dict[str, Any] | None:
    if key is None:
        return None
    if "key" in envelope:
        return decode_row(envelope["key"], types.get("key") or {})
    row = rows["after"] or rows["before"] or {}
    return {name: row[name] for name in json.loads(key) if name in row}
