"""What a topic no longer has to keep: decided by the leader as a frame, carried out by everybody.

The idea: only whole segments go, the oldest first. The leader says where the log starts from now on
in a LOG_START frame; once that is committed, every replica drops the segments below it, in its own
time. A segment is too old when the frame after it was *appended* before the limit, so a record
dated 2099 or 1970 changes nothing. So that a partition that is hardly written to drops its old
records too, a segment spans only a part of the limit in time, and where even the newest frame is
too old, the log starts at its end: the LOG_START frame itself then begins the next segment. Logs of
the cluster's own are cut to their snapshots in the same way.

The rules it protects: *earliest* never moves back, whoever leads; nothing goes that is not
committed and durable here, or that the folded state on disk does not cover (A13, C14).
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker import compaction, scavenging
from aegis_cluster.errors import Corruption, Refused
from aegis_cluster.ids import RecordOffset
from aegis_cluster.storage.segment import HEADER_BYTES
from aegis_cluster.wire.frame import decode_header

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId, LogIndex
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.wire.descriptions import TopicSettings

EVERY_MS: Final = 1_000
ROLLS_PER_RETENTION: Final = 4
"""A segment spans at most this part of the time that records are kept."""


class Retention:
    """One per shard; a look at each partition now and then, and hardly ever a read."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms
        self._newest: dict[GroupId, tuple[LogIndex, int]] = {}
        """Of some groups: the newest frame's index, and when it was appended."""

    def tick(self) -> None:
        shard = self._shard
        if shard.now_ms < self._due_ms:
            return
        self._due_ms = shard.now_ms + EVERY_MS
        for partition in shard.manager.partitions.values():
            if partition.replica.damaged or partition.log.resetting:
                continue
            try:
                self._look_at(partition)
            except Corruption as error:
                partition.damage_met(error)

    def prepare(self, partition: Partition) -> None:
        """A replica was opened: how its segments are cut is to be known from its first frame on."""
        found = self._shard.table.partition_of(partition.group)
        if found is not None and not partition.is_internal:
            _set_rolls(partition, found[0].settings)

    def _look_at(self, partition: Partition) -> None:
        found = self._shard.table.partition_of(partition.group)
        if partition.is_internal:
            if partition.serving:
                self._cut_to_snapshot(partition)
        elif found is not None:
            settings = found[0].settings
            _set_rolls(partition, settings)
            if partition.serving and settings.deletes:
                self._decide(partition, settings)
        if len(partition.log.segments) > 1:
            self._carry_out(partition)

    # ---- the leader decides

    def _decide(self, partition: Partition, settings: TopicSettings) -> None:
        if settings.retention_ms is None and settings.retention_bytes is None:
            return
        self._set_start(partition, self._wanted_start(partition, settings))

    def _cut_to_snapshot(self, partition: Partition) -> None:
        """A folded log stays short: what its snapshot covers is not needed any more."""
        self._set_start(partition, partition.snapshot_offset)

    def _set_start(self, partition: Partition, start: RecordOffset) -> None:
        decided = [offset for _, offset in partition.log.log_starts]
        if start > max([partition.log_start_offset, *decided]):
            with suppress(Refused):  # another time
                partition.set_log_start(start)

    def _wanted_start(self, partition: Partition, settings: TopicSettings) -> RecordOffset:
        """Offset of the first segment that has to stay; the end's, where none has to."""
        segments = partition.log.segments
        kept_bytes = sum(segment.end for segment in segments)
        for segment, following in itertools.pairwise(segments):
            kept_bytes -= segment.end
            if following.base_index > partition.applied or not (
                self._is_too_much(kept_bytes, settings)
                or self._is_too_old(partition, following, settings)
            ):
                return segment.header.before.offset
        if self._is_all_too_old(partition, settings):
            return partition.high_watermark
        return segments[-1].header.before.offset if segments else RecordOffset(0)

    def _is_too_much(self, bytes_without: int, settings: TopicSettings) -> bool:
        """Even without the segment, as much as is wanted would be kept."""
        return settings.retention_bytes is not None and bytes_without >= settings.retention_bytes

    def _is_too_old(
        self, partition: Partition, following: Segment, settings: TopicSettings
    ) -> bool:
        if settings.retention_ms is None or following.end <= HEADER_BYTES:
            return False
        return following.first_append_ms() < partition.now() - settings.retention_ms

    def _is_all_too_old(self, partition: Partition, settings: TopicSettings) -> bool:
        """The segment that grows holds records, all committed, the newest of them too old."""
        log = partition.log
        if (
            settings.retention_ms is None
            or not log.segments
            or partition.high_watermark <= log.segments[-1].header.before.offset
            or not partition.applied == log.last_index == log.written.index
        ):
            return False
        limit = partition.now() - settings.retention_ms
        return log.segments[-1].first_append_ms() < limit and self._newest_ms(partition) < limit

    def _newest_ms(self, partition: Partition) -> int:
        """When the log's last frame was appended."""
        last = partition.log.last_index
        known = self._newest.get(partition.group)
        if known is None or known[0] != last:
            time_ms = decode_header(partition.log.read(last, last, 1).data).time_ms
            known = self._newest[partition.group] = (last, time_ms)
        return known[1]

    # ---- everybody carries out

    def _carry_out(self, partition: Partition) -> None:
        """Drop the segments below the decided start."""
        start = partition.log_start_offset
        below = [s for s in partition.log.segments if s.header.before.offset <= start]
        if len(below) > 1:
            partition.drop_before(below[-1].base_index)


def _set_rolls(partition: Partition, settings: TopicSettings) -> None:
    """Only closed segments are dropped, compacted or scavenged."""
    log = partition.log
    if settings.compacts:
        log.roll_bytes, log.roll_ms = compaction.SEGMENT_BYTES, compaction.SEGMENT_MS
        return
    log.roll_bytes = log.roll_ms = None
    if settings.holds_events:
        log.roll_bytes, log.roll_ms = scavenging.SEGMENT_BYTES, scavenging.SEGMENT_MS
    if settings.retention_ms is not None:
        roll_ms = max(settings.retention_ms // ROLLS_PER_RETENTION, EVERY_MS)
        log.roll_ms = min(roll_ms, log.roll_ms or roll_ms)
