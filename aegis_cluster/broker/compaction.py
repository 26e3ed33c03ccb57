"""Keeps compacted topics down to the latest of each key, event stores to what their streams show.

The idea: each replica compacts its own closed segments, one pass at a time in the whole shard, and
elsewhere (`transport.compact_later`: a child process where there is one). A pass is worth it when
half of what is closed was not compacted yet, when something has waited for long, or when tombstones
have had their time. What comes back is put in place segment by segment, oldest first, each durable
before the next.

The rules it protects: nothing is touched that is not committed here and covered by a checkpoint.
A tombstone goes only where this replica leads and every member is known to hold it: one that lacked
it, and still had an older value, would bring that back. That is looked at again before each file is
put in place, for members may come at any time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.scavenging import Closed, hides_events, is_worth_a_pass
from aegis_cluster.errors import CorruptRecord, OffsetOutOfRange
from aegis_cluster.ids import NO_INDEX, LogIndex, RecordOffset
from aegis_cluster.limits import COMPACTION_KEYS_MAX, INDEX_INTERVAL_BYTES
from aegis_cluster.storage.compaction import segments_of
from aegis_cluster.storage.compaction_job import CompactionJob, CompactionResult, Rewritten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.segment import Segment
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.descriptions import TopicSettings

EVERY_MS: Final = 2_000
AGAIN_MS: Final = 60_000
"""After a pass that gave up."""
WAITED_MS: Final = 60 * 60_000
"""What is closed is compacted after so long, however little it is."""
SEGMENT_BYTES: Final = 8 * 1024 * 1024
"""Of a compacted topic: only closed segments are compacted, so they are small."""
SEGMENT_MS: Final = 60 * 60_000

log = logging.getLogger(__name__)


def compact_here(store: ShardStore, job: CompactionJob) -> CompactionResult | None:
    """One pass in this thread; None where the files were not as the job says (any more)."""
    try:
        return store.compact(job)
    except (CorruptRecord, OffsetOutOfRange) as error:
        # Whether that is damage is for those to say who read with the log at hand (`scrub`).
        log.warning("Compaction of group %s gave up: %s", job.group, error)
        return None


@dataclass(slots=True)
class _State:
    """What this process knows of one partition's compaction."""

    installs: int
    """As the store counts them; another log begins anew."""
    clean_to: RecordOffset = RecordOffset(0)  # noqa: RUF009 - a NewType call is a constant
    hidden_events: int = 0
    """Of an event store: as many were hidden at the last pass."""
    since_ms: int = 0
    """When this process began to look, on the shard's clock."""
    oldest_tombstone_ms: int | None = None
    """Append time of the oldest one that stayed at the last pass."""
    at_ms: int | None = None
    """When the last pass ended, on the shard's clock."""
    not_before_ms: int = 0
    passes: int = 0
    saved_bytes: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Pass:
    """One pass under way."""

    partition: Partition
    state: _State
    job: CompactionJob
    segments: dict[LogIndex, Segment]
    hidden_events: int


class Compaction:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms + EVERY_MS
        self._states: dict[GroupId, _State] = {}
        self._busy = False
        self._count = 0

    def tick(self) -> None:
        """Begin a pass where one is due."""
        shard = self._shard
        if self._busy or shard.now_ms < self._due_ms:
            return
        self._due_ms = shard.now_ms + EVERY_MS
        for group in [one for one in self._states if one not in shard.manager.partitions]:
            del self._states[group]
        for partition in list(shard.manager.partitions.values()):
            settings = self._settings(partition)
            if settings is not None and self._begin(partition, settings):
                return

    def report(self, partition: Partition) -> dict[str, Any] | None:
        """For a status answer: what was done since this process started; None: nothing yet."""
        state = self._states.get(partition.group)
        if state is None or state.at_ms is None:
            return None
        return {
            "passes": state.passes,
            "last_s_ago": (self._shard.now_ms - state.at_ms) // 1_000,
            "saved_bytes": state.saved_bytes,
            "records_dropped": state.dropped,
            "compacted_to": state.clean_to,
        }

    def _settings(self, partition: Partition) -> TopicSettings | None:
        """Of a partition that may be compacted now."""
        log_ = partition.log
        if partition.is_internal or partition.replica.damaged or partition.damage is not None:
            return None
        if log_.resetting or log_.damage is not None or len(log_.segments) < 2:
            return None
        found = self._shard.table.partition_of(partition.group)
        if found is None:
            return None
        settings = found[0].settings
        return settings if settings.compacts or hides_events(partition.state.events) else None

    def _state(self, partition: Partition) -> _State:
        installs = self._shard.store.installs(partition.group)
        state = self._states.get(partition.group)
        if state is None or state.installs != installs:
            state = _State(installs, _clean_to(partition), since_ms=self._shard.now_ms)
            if state.clean_to:  # an earlier process has looked
                state.hidden_events = partition.state.events.hidden_events
            self._states[partition.group] = state
        return state

    def _begin(self, partition: Partition, settings: TopicSettings) -> bool:
        state = self._state(partition)
        if self._shard.now_ms < state.not_before_ms or not self._is_due(partition, state, settings):
            return False
        self._count += 1
        events = partition.state.events
        scavenges = not settings.compacts
        bound = NO_INDEX if scavenges else self._held_by_all(partition)
        job = CompactionJob(
            group=partition.group,
            directory=partition.log.directory,
            token=f"{self._shard.context.boot_id[:8]}-{self._count}",
            segments=segments_of(partition.log, partition.applied),
            committed=partition.applied,
            below=partition.last_stable_offset,
            clean_to=RecordOffset(0) if scavenges else state.clean_to,
            tombstones_before_ms=partition.now() - settings.tombstone_retention_ms
            if bound > NO_INDEX
            else None,
            tombstones_to=bound,
            keys_max=COMPACTION_KEYS_MAX,
            index_interval_bytes=INDEX_INTERVAL_BYTES,
            room_bytes=self._room(),
            hidden=events.hidden(partition.now()) if scavenges else None,
        )
        segments = {one.base_index: one for one in partition.log.segments}
        under_way = _Pass(partition, state, job, segments, events.hidden_events)
        self._busy = True
        self._shard.transport.compact_later(job, lambda result: self._built(under_way, result))
        return True

    def _is_due(self, partition: Partition, state: _State, settings: TopicSettings) -> bool:
        specs = [one for one in segments_of(partition.log, partition.applied) if one.closed]
        total = sum(one.end for one in specs)
        dirty = sum(one.end for one in specs if one.end_offset > state.clean_to)
        if self._room() <= 0:
            return False
        if not settings.compacts:
            closed = Closed(total, dirty, partition.log.end_offset - partition.log_start_offset)
            since_ms = state.since_ms if state.at_ms is None else state.at_ms
            waited_ms = self._shard.now_ms - since_ms
            return is_worth_a_pass(
                partition.state.events, closed, seen=state.hidden_events, waited_ms=waited_ms
            )
        if dirty and dirty * 2 >= total:
            return True
        if state.at_ms is None:
            return dirty > 0
        waited = self._shard.now_ms - state.at_ms
        if dirty > 0 and waited >= WAITED_MS:
            return True
        oldest_ms, kept_ms = state.oldest_tombstone_ms, settings.tombstone_retention_ms
        return (
            oldest_ms is not None
            and oldest_ms < partition.now() - kept_ms
            and waited >= max(kept_ms // 4, EVERY_MS)
            and self._held_by_all(partition) > NO_INDEX
        )

    def _room(self) -> int:
        """What may be written aside: it must not fill the disk."""
        store = self._shard.store
        return store.free_bytes - 2 * store.limits.reserve_bytes

    def _held_by_all(self, partition: Partition) -> LogIndex:
        """The last index that every member is known to hold; 0 where this replica does not lead."""
        if not partition.serving:
            return NO_INDEX
        replica = partition.replica
        held = [partition.log.durable_index]
        for member in replica.membership.members:
            if member != replica.me:
                progress = replica.progress.get(member)
                held.append(progress.matched if progress is not None else NO_INDEX)
        return min(held)

    # ---- what comes back

    def _built(self, under_way: _Pass, result: CompactionResult | None) -> None:
        state = under_way.state
        if result is None or not result.has_room:
            state.not_before_ms = self._shard.now_ms + AGAIN_MS
            self._busy = False
            return
        self._put(under_way, result, iter(result.rewritten))

    def _put(self, under_way: _Pass, result: CompactionResult, left: Iterator[Rewritten]) -> None:
        """Put the next segment in its place, and go on once that is durable."""
        store, job = self._shard.store, under_way.job
        found = next(left, None)
        if found is None:
            self._end(under_way, result)
            return
        old = under_way.segments[found.header.base_index]
        if not self._still_stands(under_way) or not store.put_compacted(job, old, found):
            # The log has moved on; the next pass begins with what is there.
            self._shard.transport.read_later(lambda: store.discard_compacted(job), self._idle)
            return
        under_way.state.saved_bytes += found.bytes_before - found.end
        under_way.state.dropped += found.records_dropped
        self._shard.transport.read_later(
            lambda: store.sync_compacted(job), lambda _: self._put(under_way, result, left)
        )

    def _idle(self, _: None) -> None:
        self._busy = False

    def _still_stands(self, under_way: _Pass) -> bool:
        partition, job = under_way.partition, under_way.job
        if self._shard.manager.partitions.get(partition.group) is not partition:
            return False
        if job.tombstones_before_ms is None:
            return True
        return self._held_by_all(partition) >= job.tombstones_to

    def _end(self, under_way: _Pass, result: CompactionResult) -> None:
        state = under_way.state
        state.clean_to = result.clean_to
        if under_way.job.hidden is not None:
            ends = [one.end_offset for one in under_way.job.segments if one.closed]
            if result.clean_to >= max(ends):
                state.hidden_events = under_way.hidden_events
            else:  # what is left is worth a pass again, by the same rule
                state.not_before_ms = self._shard.now_ms + AGAIN_MS
        state.oldest_tombstone_ms = result.oldest_tombstone_ms
        state.at_ms = self._shard.now_ms
        state.passes += 1
        self._busy = False
        self._due_ms = self._shard.now_ms  # another may have waited
        log.info(
            "Compacted %s up to offset %s: %s segments written anew, %s keys seen.",
            under_way.partition.name,
            result.clean_to,
            len(result.rewritten),
            result.keys,
        )


def _clean_to(partition: Partition) -> RecordOffset:
    """How far an earlier process has come: a pass goes from the oldest segment on, so what lies
    below the newest one that was written anew was compacted with it."""
    compacted = [s.header.before.offset for s in partition.log.segments if s.header.compactions]
    return max(compacted, default=RecordOffset(0))
