"""PostgreSQL's `pgoutput` messages, protocol version 1: bytes in, tuples out.

The idea: what a logical replication slot sends is a dozen small binary messages (PostgreSQL's
manual, "Logical Replication Message Formats"). Values stay text here; `postgres_types` makes them
values. In version 1 a transaction is sent once it has committed; the server keeps it until then.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import PeerViolation

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCH_MS: Final = 946_684_800_000
"""2000-01-01, from which PostgreSQL counts, in milliseconds since 1970."""


class Toasted:
    """Stands for a value that did not change and was not sent; there is one, `TOASTED`."""


TOASTED: Final = Toasted()
Tuple = list["str | Toasted | None"]


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
    new: Tuple


class RowUpdate(NamedTuple):
    """key_only: of the old row only the identity's columns are told."""

    relation: int
    old: Tuple | None
    key_only: bool
    new: Tuple


class RowDelete(NamedTuple):
    relation: int
    old: Tuple
    key_only: bool


class TableTruncate(NamedTuple):
    relations: tuple[int, ...]


Decoded = Begin | Commit | Relation | RowInsert | RowUpdate | RowDelete | TableTruncate


def decode(data: bytes) -> Decoded | None:
    """One message; None for kinds that say nothing about rows. Raises `PeerViolation`."""
    reader = _Reader(data)
    kind = reader.letter()
    decoder = _DECODERS.get(kind)
    if decoder is None:
        if kind in "OYM":  # origin, type, logical message
            return None
        raise PeerViolation(f"PostgreSQL sent a message of kind {kind!r}, which is not known.")
    try:
        return decoder(reader)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise PeerViolation(f"PostgreSQL sent a malformed message of kind {kind!r}.") from error


class _Reader:
    """Takes fields off the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def letter(self) -> str:
        return chr(self.number(">B"))

    def text(self) -> str:
        end = self._data.index(b"\0", self._at)
        found = self._data[self._at : end].decode()
        self._at = end + 1
        return found

    def values(self) -> Tuple:
        return [self._value() for _ in range(self.number(">H"))]

    def _value(self) -> str | Toasted | None:
        match self.letter():
            case "n":
                return None
            case "u":
                return TOASTED
            case "t":
                size = self.number(">i")
                raw = self._data[self._at : self._at + size]
                if size < 0 or len(raw) != size:
                    raise ValueError("a value ends beyond its message")
                self._at += size
                return raw.decode()
        raise ValueError("unknown kind of value")


def _time_ms(microseconds: int) -> int:
    return EPOCH_MS + microseconds // 1000


def _begin(reader: _Reader) -> Begin:
    lsn, time = reader.number(">Q"), reader.number(">q")
    return Begin(lsn, _time_ms(time), reader.number(">I"))


def _commit(reader: _Reader) -> Commit:
    reader.number(">B")
    reader.number(">Q")
    return Commit(reader.number(">Q"))


def _relation(reader: _Reader) -> Relation:
    oid, schema, table, identity = (
        reader.number(">I"), reader.text(), reader.text(), reader.letter(),
    )  # fmt: skip
    columns = []
    for _ in range(reader.number(">H")):
        is_key, name = bool(reader.number(">B") & 1), reader.text()
        columns.append(Column(name, reader.number(">I"), is_key))
        reader.number(">i")
    return Relation(oid, schema or "pg_catalog", table, identity, tuple(columns))


def _insert(reader: _Reader) -> RowInsert:
    relation = reader.number(">I")
    _expect(reader, "N")
    return RowInsert(relation, reader.values())


def _update(reader: _Reader) -> RowUpdate:
    relation, letter = reader.number(">I"), reader.letter()
    old, key_only = None, letter == "K"
    if letter in "KO":
        old = reader.values()
        letter = reader.letter()
    if letter != "N":
        raise ValueError("an update without a new row")
    return RowUpdate(relation, old, key_only, reader.values())


def _delete(reader: _Reader) -> RowDelete:
    relation, letter = reader.number(">I"), reader.letter()
    if letter not in "KO":
        raise ValueError("a delete without an old row")
    return RowDelete(relation, reader.values(), letter == "K")


def _truncate(reader: _Reader) -> TableTruncate:
    count = reader.number(">I")
    reader.number(">B")
    return TableTruncate(tuple(reader.number(">I") for _ in range(count)))


def _expect(reader: _Reader, letter: str) -> None:
    if reader.letter() != letter:
        raise ValueError("a row is missing")


_DECODERS: Final[dict[str, Callable[[_Reader], Decoded]]] = {
    "B": _begin,
    "C": _commit,
    "R": _relation,
    "I": _insert,
    "U": _update,
    "D": _delete,
    "T": _truncate,
}
