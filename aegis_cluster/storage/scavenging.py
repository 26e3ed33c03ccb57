"""Scavenging: what the streams of an event store do not show any more goes from its log.

The idea: a frame's annotation says of which stream and version each of its records is, and stays
whatever becomes of them; so the tables that are folded over the log, event ids included, are the
same after a restart, and versions and offsets never change.

The rules it protects: only events that are hidden by what is committed go, and those of aborted
transactions; what was decided about streams, and snapshots of aggregates, stay (`$$` streams); a
frame whose annotation does not say of each record whose it is stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.wire.event_frames import decode_annotation

if TYPE_CHECKING:
    from aegis_cluster.ids import RecordOffset
    from aegis_cluster.storage.compaction_job import Hidden
    from aegis_cluster.storage.compaction_rules import Outcomes
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import BatchHeader, Bytes
    from aegis_cluster.wire.records import Record


class Scavenging:
    """The rule of one pass; see the module's first lines."""

    keys = 0
    oldest_tombstone_ms: int | None = None

    def __init__(self, hidden: Hidden, decided: Outcomes, end: RecordOffset) -> None:
        self.end = end
        self._hidden = hidden
        self._decided = decided

    def cannot_read(self) -> None:
        """That batch stays; others do not depend on it."""

    def kept(
        self, header: FrameHeader, batch: BatchHeader, records: list[Record], annotation: Bytes
    ) -> list[Record]:
        if self._decided.is_aborted(batch):
            return []
        hidden = self._hidden_offsets(header, batch, annotation)
        return [one for one in records if one.offset not in hidden] if hidden else records

    def _hidden_offsets(
        self, header: FrameHeader, batch: BatchHeader, annotation: Bytes
    ) -> set[int]:
        try:
            placed = decode_annotation(annotation)
        except CorruptRecord:
            return set()
        if sum(one.count for one in placed) != batch.last_offset_delta + 1:
            return set()
        below, before_ms = self._hidden.below, self._hidden.before_ms
        found: set[int] = set()
        offset = batch.base_offset
        for one in placed:
            count = one.count
            if header.time_ms < before_ms.get(one.stream, 0):
                found.update(range(offset, offset + count))
            else:
                gone = min(count, max(0, below.get(one.stream, 0) - one.first))
                found.update(range(offset, offset + gone))
            offset += count
        return found
