"""What a reader makes of a feed, and whether that is the database.

The idea: rows by key, replaced by what comes later; rows of tables without a key are counted. On
the way it looks for what must not be: one position twice in a partition, one row changed twice by
one transaction of a kind that changes it once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cdc.events import Delete, Insert, Truncate, Update
from aegis_cluster.cdc.values import UNCHANGED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.cdc.events import ChangeEvent

Rows = Counter[str]
"""How often each row is there, by its columns with the types of their values."""
PROBLEMS_MAX: Final = 20


def row_text(row: Mapping[str, Any]) -> str:
    """1, 1.0 and True are three values."""
    return repr(sorted((name, type(value).__name__, value) for name, value in row.items()))


def _whole(row: Mapping[str, Any], before: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what was not told, since it did not change."""
    if UNCHANGED not in row.values():
        return row
    return {
        name: before.get(name, value) if value is UNCHANGED else value
        for name, value in row.items()
    }


class Fold:
    """Takes changes one by one; partitions each in order.

    once: tables that a transaction changes in one row at most.
    """

    def __init__(self, once: frozenset[str] = frozenset()) -> None:
        self.problems: list[str] = []
        self.changes = 0
        self.snapshot_rows = 0
        self._once = once
        self._positions: dict[int, tuple[int, int]] = {}
        self._rows: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = defaultdict(dict)
        self._keyless: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        self._by: set[tuple[str, str]] = set()

    def add(self, change: ChangeEvent) -> None:
        """Note one change."""
        self.changes += 1
        self.snapshot_rows += change.is_snapshot
        position, partition = tuple(change.position), change.partition
        if position <= self._positions.get(partition, (-1, -1)):
            self._problem(f"position {position} of partition {partition} is not above the last")
        self._positions[partition] = (position[0], position[1])
        table = change.source.table
        if change.transaction_id is not None and table in self._once:
            if (change.transaction_id, table) in self._by:
                self._problem(f"transaction {change.transaction_id} changes {table} twice")
            self._by.add((change.transaction_id, table))
        self._apply((table, partition), change)

    def _apply(self, place: tuple[str, int], change: ChangeEvent) -> None:
        if isinstance(change, Truncate):
            self._rows[place].clear()
            self._keyless[place].clear()
            return
        if not change.key:
            self._count(place, change)
            return
        rows, key = self._rows[place], row_text(change.key)
        if isinstance(change, (Insert, Update)):
            rows[key] = _whole(change.new_row, rows.get(key, {}))
        else:
            rows.pop(key, None)  # before a snapshot has come to it, a row may go unseen

    def _count(self, place: tuple[str, int], change: ChangeEvent) -> None:
        counts = self._keyless[place]
        if isinstance(change, (Update, Delete)):
            old = row_text(change.old_row or {})
            counts[old] -= 1
            if not counts[old]:
                del counts[old]
        if isinstance(change, (Insert, Update)):
            counts[row_text(change.new_row)] += 1

    def tables(self) -> dict[str, Rows]:
        """What the feed says of each table now; those without a row are left out."""
        found: dict[str, Rows] = defaultdict(Counter)
        for (table, _), rows in self._rows.items():
            found[table].update(map(row_text, rows.values()))
        for (table, _), counts in self._keyless.items():
            found[table].update(counts)
        return {table: rows for table, rows in found.items() if rows}

    def _problem(self, what: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(what)


def difference(feed: Mapping[str, Rows], database: Mapping[str, Rows]) -> list[str]:
    """A sentence for each table that is not the same; none: they are equal."""
    said = []
    for table in sorted(feed.keys() | database.keys()):
        ours, theirs = feed.get(table, Counter()), database.get(table, Counter())
        if ours != theirs:
            more, fewer = ours - theirs, theirs - ours
            said.append(
                f"{table}: {more.total()} rows too many and {fewer.total()} missing; for"
                f" example {next(iter(more), '-')} and {next(iter(fewer), '-')}"
            )
    return said
