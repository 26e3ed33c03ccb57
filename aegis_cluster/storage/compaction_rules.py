"""What a pass of compaction asks of those who decide which records stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aegis_cluster.ids import RecordOffset
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import BatchHeader, Bytes
    from aegis_cluster.wire.records import Record


@dataclass(slots=True)
class Outcomes:
    """Which records belong to aborted transactions, and where undecided ones begin."""

    aborted: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By producer: first offset and the marker's own, of each transaction that was aborted."""
    open_from: int | None = None

    def is_aborted(self, batch: BatchHeader) -> bool:
        """Readers of what is committed never see this batch."""
        if not batch.is_transactional:
            return False
        spans = self.aborted.get(batch.producer_id, ())
        return any(first <= batch.base_offset < marker for first, marker in spans)


class Rule(Protocol):
    """Of one pass."""

    @property
    def end(self) -> RecordOffset:
        """Records from here on are left alone."""

    @property
    def keys(self) -> int:
        """How many different keys were seen."""

    @property
    def oldest_tombstone_ms(self) -> int | None:
        """When the oldest null value that stays for now was appended."""

    def kept(
        self, header: FrameHeader, batch: BatchHeader, records: list[Record], annotation: Bytes
    ) -> list[Record]:
        """Those of a batch that stay, in their order."""

    def cannot_read(self) -> None:
        """A batch stays as it is, because it does not decode or cannot be written anew."""
