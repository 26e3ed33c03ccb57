"""PostgreSQL's `pgoutput` messages, protocol versions 1 and 2: bytes in, tuples out.

The idea: what a logical replication slot sends is a dozen small binary messages (PostgreSQL's
manual, "Logical Replication Message Formats"). Values stay the bytes of their text here;
`postgres_rows` makes them what a feed holds. In version 2 a large transaction is *streamed*: it
comes in pieces before its end is known, between `StreamStart` and `StreamStop`, and each message in
there says which transaction or subtransaction it is of; `unstreamed` gives it the form that it has
outside.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import PeerViolation

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCH_MS: Final = 946_684_800_000
"""2000-01-01, from which PostgreSQL counts, in milliseconds since 1970."""
_SHORT: Final = struct.Struct(">H").unpack_from
_INT: Final = struct.Struct(">I").unpack_from


class Toasted:
    """Stands for a value that did not change and was not sent; there is one, `TOASTED`."""


TOASTED: Final = Toasted()
Values = list["bytes | Toasted | None"]


class Begin(NamedTuple):
    """lsn: of the commit that this transaction ends with."""

    lsn: int
    time_ms: int
    xid: int


class Commit(NamedTuple):
    """end_lsn: behind the commit; where the log goes on."""

    end_lsn: int


class Column(NamedTuple):
    name: str
    type_oid: int
    is_key: bool
    """Of the replica identity; with FULL, all are."""


class Relation(NamedTuple):
    """A table as it is from here on. identity: `d`efault, `n`othing, `f`ull or `i`ndex."""

    oid: int
    schema: str
    table: str
    identity: str
    columns: tuple[Column, ...]


class RowInsert(NamedTuple):
    relation: int
    new: Values


class RowUpdate(NamedTuple):
    """key_only: of the old row only the identity's columns are told."""

    relation: int
    old: Values | None
    key_only: bool
    new: Values


class RowDelete(NamedTuple):
    relation: int
    old: Values
    key_only: bool


class TableTruncate(NamedTuple):
    relations: tuple[int, ...]


class LogicalMessage(NamedTuple):
    """What somebody wrote into the server's log by `pg_logical_emit_message`."""

    prefix: str
    content: bytes


class StreamStart(NamedTuple):
    """What follows, up to `StreamStop`, is of this transaction, which may still be undone."""

    xid: int


class StreamStop(NamedTuple):
    """The end of such a piece."""


class StreamCommit(NamedTuple):
    """A streamed transaction has committed. lsn, end_lsn, time_ms: as of `Begin` and `Commit`."""

    xid: int
    lsn: int
    end_lsn: int
    time_ms: int


class StreamAbort(NamedTuple):
    """A streamed transaction is undone; where `subxid` differs, only that part of it."""

    xid: int
    subxid: int


Decoded = (
    Begin | Commit | Relation | RowInsert | RowUpdate | RowDelete | TableTruncate | LogicalMessage
    | StreamStart | StreamStop | StreamCommit | StreamAbort
)  # fmt: skip


def decode(data: bytes) -> Decoded | None:
    """One message; None for kinds that say nothing about rows. Raises `PeerViolation`."""
    kind = data[:1]
    decoder = _DECODERS.get(kind)
    if decoder is None:
        if kind in (b"O", b"Y"):  # origin, type
            return None
        raise PeerViolation(f"PostgreSQL sent a message of kind {kind!r}, which is not known.")
    try:
        return decoder(data)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise PeerViolation(f"PostgreSQL sent a malformed message of kind {kind!r}.") from error


def unstreamed(data: bytes) -> tuple[int, bytes]:
    """A message from within a streamed piece: the (sub)transaction that it is of, and the message
    as it would be outside. Raises `PeerViolation`."""
    if len(data) < 5:
        raise PeerViolation("PostgreSQL sent a piece of a transaction that does not say of which.")
    return int(_INT(data, 1)[0]), data[:1] + data[5:]


def _values(data: bytes, at: int) -> tuple[Values, int]:
    """A row's values, and where they end. The line that everything waits for: no object for each
    field, no call for each value."""
    (count,) = _SHORT(data, at)
    at += 2
    found: Values = []
    for _ in range(count):
        kind = data[at]
        if kind == 116:  # text
            end = at + 5 + _INT(data, at + 1)[0]
            found.append(data[at + 5 : end])
            at = end
        else:
            found.append(_absent(kind))
            at += 1
    if at > len(data):
        raise ValueError("a value ends beyond its message")
    return found, at


def _absent(kind: int) -> Toasted | None:
    if kind == 110:  # null
        return None
    if kind == 117:  # unchanged
        return TOASTED
    raise ValueError("unknown kind of value")


def _insert(data: bytes) -> RowInsert:
    _expect(data[5] == 78)  # N
    return RowInsert(_INT(data, 1)[0], _values(data, 6)[0])


def _update(data: bytes) -> RowUpdate:
    letter, at, old = data[5], 6, None
    if letter in b"KO":
        old, at = _values(data, 6)
        _expect(data[at] == 78)
        at += 1
    else:
        _expect(letter == 78)
    return RowUpdate(_INT(data, 1)[0], old, letter == 75, _values(data, at)[0])


def _delete(data: bytes) -> RowDelete:
    _expect(data[5] in b"KO")
    return RowDelete(_INT(data, 1)[0], _values(data, 6)[0], data[5] == 75)


def _expect(is_so: bool) -> None:
    if not is_so:
        raise ValueError("a row is missing")


class _Reader:
    """Takes fields off the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 1

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def text(self) -> str:
        end = self._data.index(b"\0", self._at)
        found = self._data[self._at : end].decode()
        self._at = end + 1
        return found

    def rest(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise ValueError("a content ends beyond its message")
        return found


def _time_ms(microseconds: int) -> int:
    return EPOCH_MS + microseconds // 1000


def _begin(data: bytes) -> Begin:
    reader = _Reader(data)
    lsn, time = reader.number(">Q"), reader.number(">q")
    return Begin(lsn, _time_ms(time), reader.number(">I"))


def _commit(data: bytes) -> Commit:
    reader = _Reader(data)
    reader.number(">B")
    reader.number(">Q")
    return Commit(reader.number(">Q"))


def _relation(data: bytes) -> Relation:
    reader = _Reader(data)
    oid, schema, table = reader.number(">I"), reader.text(), reader.text()
    identity = chr(reader.number(">B"))
    columns = []
    for _ in range(reader.number(">H")):
        is_key, name = bool(reader.number(">B") & 1), reader.text()
        columns.append(Column(name, reader.number(">I"), is_key))
        reader.number(">i")
    return Relation(oid, schema or "pg_catalog", table, identity, tuple(columns))


def _truncate(data: bytes) -> TableTruncate:
    reader = _Reader(data)
    count = reader.number(">I")
    reader.number(">B")
    return TableTruncate(tuple(reader.number(">I") for _ in range(count)))


def _message(data: bytes) -> LogicalMessage:
    reader = _Reader(data)
    reader.number(">B")
    reader.number(">Q")
    prefix = reader.text()
    return LogicalMessage(prefix, reader.rest(reader.number(">I")))


def _stream_commit(data: bytes) -> StreamCommit:
    reader = _Reader(data)
    xid = reader.number(">I")
    reader.number(">B")
    lsn, end_lsn = reader.number(">Q"), reader.number(">Q")
    return StreamCommit(xid, lsn, end_lsn, _time_ms(reader.number(">q")))


def _stream_abort(data: bytes) -> StreamAbort:
    reader = _Reader(data)
    return StreamAbort(reader.number(">I"), reader.number(">I"))


_DECODERS: Final[dict[bytes, Callable[[bytes], Decoded]]] = {
    b"B": _begin,
    b"C": _commit,
    b"R": _relation,
    b"I": _insert,
    b"U": _update,
    b"D": _delete,
    b"T": _truncate,
    b"M": _message,
    b"S": lambda data: StreamStart(_INT(data, 1)[0]),
    b"E": lambda _: StreamStop(),
    b"c": _stream_commit,
    b"A": _stream_abort,
}
