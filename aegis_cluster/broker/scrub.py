"""Reads what is stored again, slowly, to find damage while others can still mend it.

The idea: frames that nobody reads for months rot unseen, and when the last good copy goes it is too
late. So each shard proves its durable, committed frames over and over, one small read of the helper
thread at a time: CRC, batch, chain and index. What fails is damage that was met while reading: a
leader hands over, and the replica is rebuilt (`repair`).

The rule it protects: it never gets in the way; at most one read is under way, and only so much is
read in a second.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import Corruption, OffsetOutOfRange
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.limits import SCRUB_BYTES_PER_READ, SCRUB_EVERY_MS

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.storage.types import ReadResult

log = logging.getLogger(__name__)

REST_MS: Final = 60_000
"""Between two passes; a small log is not read all day."""


class Scrub:
    """One per shard; goes from group to group and from frame to frame, then begins anew."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms + SCRUB_EVERY_MS
        self._group: GroupId | None = None
        self._next = LogIndex(0)
        self._busy = False
        self._passes = 0
        self._found = 0
        self._checked_bytes = 0
        self._last_bytes = 0
        self._last_ms: int | None = None

    def tick(self) -> None:
        """One read, when it is time."""
        if self._busy or self._shard.now_ms < self._due_ms:
            return
        self._due_ms = self._shard.now_ms + SCRUB_EVERY_MS
        partition = self._partition()
        if partition is not None:
            self._read(partition)

    def report(self) -> dict[str, Any]:
        """For a status answer: how far the present pass is, and what the last one found."""
        return {
            "passes": self._passes,
            "checked_bytes": self._checked_bytes,
            "stored_bytes": sum(
                segment.end
                for partition in self._shard.manager.partitions.values()
                for segment in partition.log.segments
            ),
            "last_pass_bytes": self._last_bytes,
            "last_pass_ended_s_ago": (
                None if self._last_ms is None else (self._shard.now_ms - self._last_ms) // 1_000
            ),
            "damage_found": self._found,
        }

    def _partition(self) -> Partition | None:
        """Where to read next; None at the end of a pass."""
        partitions = self._shard.manager.partitions
        if self._group in partitions and self._next <= _last(partitions[self._group]):
            return partitions[self._group]
        later = [g for g in sorted(partitions) if self._group is None or g > self._group]
        for group in later:
            self._group, self._next = group, partitions[group].log.first_index
            if self._next <= _last(partitions[group]):
                return partitions[group]
        self._end_pass()
        return None

    def _end_pass(self) -> None:
        self._group = None
        self._due_ms = self._shard.now_ms + REST_MS
        if self._checked_bytes == 0:
            return  # there is nothing yet
        self._passes += 1
        self._last_bytes, self._checked_bytes = self._checked_bytes, 0
        self._last_ms = self._shard.now_ms

    def _read(self, partition: Partition) -> None:
        first = LogIndex(max(self._next, partition.log.first_index))
        last, frames = _last(partition), partition.log
        if first > last:
            return
        try:
            ticket = frames.plan_read(first, last, SCRUB_BYTES_PER_READ)
        except OffsetOutOfRange:
            self._next = LogIndex(last + 1)
            return
        self._busy = True

        def read() -> ReadResult | Corruption:
            try:
                return ticket.read()
            except Corruption as error:
                return error

        self._shard.transport.read_later(read, lambda result: self._done(partition, result))

    def _done(self, partition: Partition, result: ReadResult | Corruption) -> None:
        self._busy = False
        if not isinstance(result, Corruption):
            self._checked_bytes += len(result.data)
            self._next = LogIndex(result.last + 1)
            return
        self._next = LogIndex(_last(partition) + 1)  # the rest is rebuilt, or lost
        if self._is_still_there(partition):
            self._found += 1
            log.error("Reading the stored frames again found damage in %s.", partition.name)
            partition.damage_met(result)

    def _is_still_there(self, partition: Partition) -> bool:
        """Not removed or replaced while the read was under way."""
        return self._shard.manager.partitions.get(partition.group) is partition


def _last(partition: Partition) -> LogIndex:
    """Durable and committed here, and standing in a file; nothing of a replica that is damaged."""
    log_ = partition.log
    if partition.replica.damaged or partition.damage is not None or log_.resetting:
        return LogIndex(0)
    return LogIndex(min(log_.durable_index, partition.applied, log_.written.index))
