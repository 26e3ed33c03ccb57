"""The fold of one partition of `__groups`: the committed table, and the coordinator's view ahead.

Only groups that something is under way for are copied; their copies go when all of it has
committed, or with leadership. Positions need no view ahead: a commit is checked against members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aegis_cluster.broker.groups.commands import (
    CommitOffsets,
    DropGroup,
    PendOffsets,
    decode_command,
)
from aegis_cluster.broker.groups.group_table import Group, GroupTable
from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import LogIndex, ProducerId
from aegis_cluster.wire.batch import decode_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aegis_cluster.broker.groups.commands import GroupCommand
    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.markers import Marker


class _Ahead(NamedTuple):
    group: Group
    index: LogIndex  # type: ignore[assignment] # hides tuple.index


class GroupFold:
    """Applies the commands of each committed frame."""

    def __init__(self) -> None:
        self.table = GroupTable()
        self._ahead: dict[str, _Ahead] = {}

    def group(self, name: str) -> Group:
        """The group as it will be once everything under way has committed; not to be changed."""
        ahead = self._ahead.get(name)
        if ahead is not None:
            return ahead.group
        return self.table.groups.get(name) or Group(name)

    def index_of(self, name: str) -> LogIndex:
        """An answer about the group may leave once this index is committed."""
        ahead = self._ahead.get(name)
        return LogIndex(0) if ahead is None else ahead.index

    def appended(self, index: LogIndex, name: str, commands: Iterable[GroupCommand]) -> None:
        """Note what the coordinator has just put into its log."""
        group = self.group(name).copy()
        for command in commands:
            match command:
                case CommitOffsets() | PendOffsets():
                    continue
                case DropGroup():
                    group = Group(name)
                case _:
                    group.apply(command)
        self._ahead[name] = _Ahead(group, index)

    # ---- Fold

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None:
        for record in decode_batch(payload):
            if record.value is None:
                raise CorruptRecord(f"A group command at index {header.index} is empty.")
            self.table.apply(decode_command(record.value), header.time_ms)
        done = [name for name, ahead in self._ahead.items() if ahead.index <= header.index]
        for name in done:
            del self._ahead[name]

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """Positions of a transaction become the group's, or are forgotten."""
        producer, epoch = ProducerId(marker.producer_id), marker.producer_epoch - 1
        self.table.end_transaction(producer, epoch, header.time_ms, committed=marker.committed)

    def leadership_lost(self) -> None:
        self._ahead.clear()

    def slices(self) -> Iterator[list[Any]]:
        return self.table.slices()

    def loader(self) -> GroupLoader:
        return GroupLoader(self)

    def load_body(self, body: list[Any]) -> None:
        raise CorruptRecord("Snapshots of groups were in slices from the first version on.")

    def replace(self, table: GroupTable) -> None:
        self.table = table
        self._ahead.clear()


class GroupLoader:
    """A table that takes the place of a fold's once it is complete."""

    def __init__(self, fold: GroupFold) -> None:
        self._fold = fold
        self._table = GroupTable()

    def add(self, piece: list[Any]) -> None:
        self._table.add(piece)

    def finish(self) -> None:
        self._fold.replace(self._table)
