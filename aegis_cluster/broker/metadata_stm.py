"""The fold of `__cluster/0`: the committed metadata table, and the controller's view ahead of it.

`table` is what is committed, the same on every node. `ahead` is `table` plus the commands that
this replica, as the controller, has appended and not committed yet; decisions are made on it, so
requests need not wait for each other. It is thrown away with leadership.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.cluster.metadata import Command, decode_command
from aegis_cluster.cluster.metadata_table import MetadataTable, TableLoader
from aegis_cluster.errors import CorruptRecord, invariant
from aegis_cluster.wire.batch import decode_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import LogIndex
    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.markers import Marker


class MetadataFold:
    """Applies each command of a committed frame to the table."""

    def __init__(self) -> None:
        self.table = MetadataTable()
        self._ahead: MetadataTable | None = None

    @property
    def ahead(self) -> MetadataTable:
        """The table as it will be once everything under way has committed."""
        if self._ahead is None:
            self._ahead = self.table.copy()
        return self._ahead

    def appended(self, index: LogIndex, command: Command) -> None:
        """Note a command that the controller has just put into its log."""
        self.ahead.apply(index, command)

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None:
        apply_commands(self.table, header.index, payload)
        if self._ahead is not None and self._ahead.index < header.index:
            self._ahead = None

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """No transaction has a part in the cluster's metadata."""

    def leadership_lost(self) -> None:
        self._ahead = None

    def slices(self) -> Iterator[list[Any]]:
        return self.table.slices()

    def loader(self) -> MetadataLoader:
        return MetadataLoader(self)

    def load_body(self, body: list[Any]) -> None:
        """What snapshots without slices hold (version 1)."""
        self.replace(MetadataTable.from_body(body))

    def replace(self, table: MetadataTable) -> None:
        self.table = table
        self._ahead = None


class MetadataLoader(TableLoader):
    """A table that takes the place of a fold's once it is complete."""

    def __init__(self, fold: MetadataFold) -> None:
        super().__init__()
        self._fold = fold

    def finish(self) -> None:
        self._fold.replace(self.table)


def apply_commands(table: MetadataTable, index: LogIndex, payload: memoryview) -> None:
    """Fold one batch of `__cluster/0`, which holds one command."""
    records = decode_batch(payload)
    invariant(len(records) == 1, "a metadata frame holds one command", index=index)
    value = records[0].value
    if value is None:
        raise CorruptRecord(f"The metadata command at index {index} is empty.", index=index)
    table.apply(index, decode_command(value))
