"""What a subscriber gets: one change of one row, or of a whole table.

match change:
    case Insert(new_row=row): ...
    case Update(old_row=old, new_row=new): ...
    case Delete(old_row=old): ...
    case Truncate(): ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime


class Operation(Enum):
    """What happened; the values are Debezium's letters. A row of a snapshot is an INSERT."""

    INSERT = "c"
    UPDATE = "u"
    DELETE = "d"
    TRUNCATE = "t"


class ChangeSource(NamedTuple):
    """Where a change comes from. schema: empty where the database has none (SQLite)."""

    database: str
    schema: str
    table: str
    connector: str = ""
    """`"sqlite"` or `"postgresql"`."""

    @property
    def full_name(self) -> str:
        """As a subscription may name the table: `users`, or `public.users`."""
        return f"{self.schema}.{self.table}" if self.schema else self.table


class Position(NamedTuple):
    """Where in its source a change stands; later changes have higher ones.

    lsn: PostgreSQL: the commit's LSN; SQLite: the number of the change. sequence: within it.
    """

    lsn: int
    sequence: int


class _Acknowledging(Protocol):
    async def ack(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ChangeEvent:
    """One change. Rows are by column name, values as the database's own.

    key: of the row, by column; None for a table as a whole, or a row without one.
    timestamp: when it was committed or, in a snapshot, read. transaction_id: the source's own;
    None where it has none. is_snapshot: the row was there before, and was read, not changed.
    """

    operation: ClassVar[Operation]

    source: ChangeSource
    position: Position
    timestamp: datetime
    key: Mapping[str, Any] | None = None
    transaction_id: str | None = None
    is_snapshot: bool = False
    is_last: bool = False
    """Of its transaction, or of the rows that a snapshot read together."""
    partition: int = 0
    """Of the feed; and where in it the change stands."""
    offset: int = 0
    message: _Acknowledging | None = field(default=None, repr=False, compare=False)

    async def ack(self) -> None:
        """The change is handled: a subscription by name does not hand it out again."""
        if self.message is not None:
            await self.message.ack()


@dataclass(frozen=True, kw_only=True)
class Insert(ChangeEvent):
    """A new row, or one that a snapshot has found."""

    operation: ClassVar[Operation] = Operation.INSERT
    new_row: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Update(ChangeEvent):
    """A changed row. old_row: None where the source does not tell it, or it was not asked for."""

    operation: ClassVar[Operation] = Operation.UPDATE
    new_row: Mapping[str, Any]
    old_row: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Delete(ChangeEvent):
    """A row that is gone. old_row: what the source tells of it; at least the key."""

    operation: ClassVar[Operation] = Operation.DELETE
    old_row: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Truncate(ChangeEvent):
    """All rows of the table are gone. In a feed with several partitions it stands in each."""

    operation: ClassVar[Operation] = Operation.TRUNCATE
