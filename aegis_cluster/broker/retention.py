"""What a topic no longer has to keep: decided by the leader as a frame, carried out by everybody.

The idea: only whole segments go, the oldest first, and never the one that grows. The leader says
where the log starts from now on in a LOG_START frame; once that is committed, every replica drops
the segments below it, in its own time. A segment is too old when the frame after it was *appended*
before the limit, so a record dated 2099 or 1970 changes nothing.

The rules it protects: *earliest* never moves back, whoever leads; nothing goes that is not
committed and durable here, or that the folded state on disk does not cover (A13, C14).
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import Corruption, Refused
from aegis_cluster.storage.segment import HEADER_BYTES
from aegis_cluster.wire.frame import FRAME_HEADER_BYTES, decode_header

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId, LogIndex, RecordOffset
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.wire.descriptions import TopicSettings

EVERY_MS: Final = 1_000


class Retention:
    """One per shard; a look at each partition now and then, and hardly ever a read."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms
        self._first_times: dict[GroupId, tuple[LogIndex, int]] = {}
        """Of one segment per group: its first index, and when that was appended."""

    def tick(self) -> None:
        shard = self._shard
        if shard.now_ms < self._due_ms:
            return
        self._due_ms = shard.now_ms + EVERY_MS
        for group, partition in shard.manager.partitions.items():
            if partition.replica.damaged or len(partition.log.segments) < 2:
                continue
            found = shard.table.partition_of(group)
            try:
                if found is not None and partition.serving:
                    self._decide(partition, found[0].settings)
                self._carry_out(partition)
            except Corruption as error:
                partition.damage_met(error)

    # ---- the leader decides

    def _decide(self, partition: Partition, settings: TopicSettings) -> None:
        if settings.retention_ms is None and settings.retention_bytes is None:
            return
        start = self._wanted_start(partition, settings)
        decided = [offset for _, offset in partition.log.log_starts]
        if start > max([partition.log_start_offset, *decided]):
            with suppress(Refused):  # another time
                partition.set_log_start(start)

    def _wanted_start(self, partition: Partition, settings: TopicSettings) -> RecordOffset:
        """Offset of the first segment that has to stay."""
        segments = partition.log.segments
        kept_bytes = sum(segment.end for segment in segments)
        for segment, following in itertools.pairwise(segments):
            kept_bytes -= segment.end
            if following.base_index > partition.applied or not (
                self._is_too_much(kept_bytes, settings)
                or self._is_too_old(partition, following, settings)
            ):
                return segment.header.before.offset
        return segments[-1].header.before.offset

    def _is_too_much(self, bytes_without: int, settings: TopicSettings) -> bool:
        """Even without the segment, as much as is wanted would be kept."""
        return settings.retention_bytes is not None and bytes_without >= settings.retention_bytes

    def _is_too_old(
        self, partition: Partition, following: Segment, settings: TopicSettings
    ) -> bool:
        if settings.retention_ms is None or following.end <= HEADER_BYTES:
            return False
        return self._first_time(partition, following) < partition.now() - settings.retention_ms

    def _first_time(self, partition: Partition, segment: Segment) -> int:
        known = self._first_times.get(partition.group)
        if known is not None and known[0] == segment.base_index:
            return known[1]
        time_ms = decode_header(segment.file.pread(FRAME_HEADER_BYTES, HEADER_BYTES)).time_ms
        self._first_times[partition.group] = (segment.base_index, time_ms)
        return time_ms

    # ---- everybody carries out

    def _carry_out(self, partition: Partition) -> None:
        """Drop the segments below the decided start."""
        log, start = partition.log, partition.log_start_offset
        if log.segments[1].header.before.offset > start:
            return
        partition.drop_before(log.index_of_offset(start))
