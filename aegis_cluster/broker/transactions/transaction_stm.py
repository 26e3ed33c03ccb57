"""The fold of one partition of `__transactions`: the committed table, and the view ahead of it.

Requests are decided on the view ahead. Markers are sent by the committed table alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aegis_cluster.broker.transactions.commands import decode_command
from aegis_cluster.broker.transactions.transaction_table import (
    Transaction,
    TransactionTable,
    moved,
)
from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import NO_INDEX, LogIndex
from aegis_cluster.wire.batch import decode_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aegis_cluster.broker.transactions.commands import TransactionCommand
    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.markers import Marker


class _Ahead(NamedTuple):
    transaction: Transaction | None
    index: LogIndex  # type: ignore[assignment] # hides tuple.index


class TransactionFold:
    """Applies the commands of each committed frame."""

    def __init__(self) -> None:
        self.table = TransactionTable()
        self._ahead: dict[str, _Ahead] = {}

    def get(self, name: str) -> Transaction | None:
        """As it will be once everything under way has committed."""
        ahead = self._ahead.get(name)
        return ahead.transaction if ahead is not None else self.table.transactions.get(name)

    def index_of(self, name: str) -> LogIndex:
        """An answer about the transactional id may leave once this index is committed."""
        ahead = self._ahead.get(name)
        return NO_INDEX if ahead is None else ahead.index

    def appended(
        self, index: LogIndex, name: str, commands: Iterable[TransactionCommand], time_ms: int
    ) -> None:
        """Note what the coordinator has just put into its log."""
        one = self.get(name)
        for command in commands:
            one = moved(one, command, time_ms)
        self._ahead[name] = _Ahead(one, index)

    # ---- Fold

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None:
        for record in decode_batch(payload):
            if record.value is None:
                raise CorruptRecord(f"A transaction command at index {header.index} is empty.")
            self.table.apply(decode_command(record.value), header.time_ms)
        done = [name for name, ahead in self._ahead.items() if ahead.index <= header.index]
        for name in done:
            del self._ahead[name]

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """Transactions are not part of transactions."""

    def leadership_lost(self) -> None:
        self._ahead.clear()

    def slices(self) -> Iterator[list[Any]]:
        return self.table.slices()

    def loader(self) -> TransactionLoader:
        return TransactionLoader(self)

    def load_body(self, body: list[Any]) -> None:
        raise CorruptRecord("Snapshots of transactions were in slices from the first version on.")

    def replace(self, table: TransactionTable) -> None:
        self.table = table
        self._ahead.clear()


class TransactionLoader:
    """A table that takes the place of a fold's once it is complete."""

    def __init__(self, fold: TransactionFold) -> None:
        self._fold = fold
        self._table = TransactionTable()

    def add(self, piece: list[Any]) -> None:
        self._table.add(piece)

    def finish(self) -> None:
        self._fold.replace(self._table)
