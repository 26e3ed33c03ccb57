"""Makes the snapshots of one shard's replicas, a slice a turn, and never two at a time.

The idea: the state is captured at one moment, which is cheap (a shallow copy; what moves on
meanwhile does so on copies), encoded in slices over the turns that follow, written aside by the
helper thread, put in its place, and synced. The loop is held up by one slice at most.

The rule it protects: nobody is told of a snapshot before it is durable, so a log is only ever cut
to one that is there after a power loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import Corruption
from aegis_cluster.storage.snapshot import encode_slice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.broker.partition import Partition, ReadLater
    from aegis_cluster.ids import GroupId, LogIndex
    from aegis_cluster.storage.rounds import SnapshotTicket
    from aegis_cluster.storage.store import ShardStore

AGAIN_MS: Final = 5_000
"""After one that found no room."""


@dataclass(slots=True)
class _Making:
    """A snapshot between its capture and its end."""

    partition: Partition
    index: LogIndex
    ticket: SnapshotTicket
    slices: Iterator[bytes]
    blocks: list[bytes] = field(default_factory=list)
    is_written: bool = False
    """All slices are with the helper thread."""


class SnapshotMaker:
    """One per shard: `want` asks for a snapshot, `turn` moves the present one on."""

    def __init__(self, store: ShardStore, read_later: ReadLater) -> None:
        self._store = store
        self._read_later = read_later
        self._wanted: dict[GroupId, Partition] = {}
        self._making: _Making | None = None
        self._not_before_ms = 0

    def want(self, partition: Partition) -> None:
        """Have a snapshot of this replica made; it is told with `snapshot_saved`."""
        making = self._making
        if making is None or making.partition is not partition:
            self._wanted[partition.group] = partition

    def turn(self, now_ms: int) -> None:
        """One slice of work."""
        if self._making is not None:
            if not self._making.is_written:
                self._encode(self._making, now_ms)
        elif self._wanted and now_ms >= self._not_before_ms:
            self._begin(self._wanted.pop(next(iter(self._wanted))))

    def _begin(self, partition: Partition) -> None:
        """Capture, unless this is no moment for it; whoever wants it asks again."""
        if not partition.may_snapshot:
            return
        package, slices = partition.capture()
        body = package.body(rebuilding=False).to_values()
        try:
            ticket = self._store.begin_snapshot(partition.group, partition.applied, body)
        except Corruption as error:
            partition.damage_met(error)
            return
        self._making = _Making(partition, partition.applied, ticket, slices)

    def _encode(self, making: _Making, now_ms: int) -> None:
        data = next(making.slices, None)
        if data is not None:
            number = len(making.blocks)
            making.blocks.append(encode_slice(making.partition.group, number, data))
            return
        making.is_written = True
        store, ticket, blocks = self._store, making.ticket, making.blocks
        self._read_later(
            lambda: store.write_snapshot(ticket, blocks),
            lambda has_room: self._written(making, now_ms, has_room=has_room),
        )

    def _written(self, making: _Making, now_ms: int, *, has_room: bool) -> None:
        store, ticket = self._store, making.ticket
        if not has_room:
            self._not_before_ms = now_ms + AGAIN_MS
        if not has_room or not store.put_snapshot(ticket):
            self._making = None
            return
        self._read_later(lambda: store.sync_snapshot(ticket), lambda _: self._saved(making))

    def _saved(self, making: _Making) -> None:
        self._making = None
        size_bytes = sum(map(len, making.blocks))
        making.partition.snapshot_saved(making.index, size_bytes)
