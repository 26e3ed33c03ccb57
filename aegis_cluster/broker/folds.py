"""The state that a partition folds over its committed frames, whatever its kind.

A fold is applied on every replica in index order; the leader alone may look ahead of what is
committed (see `producer_stm`). Everything it keeps can be written to a snapshot and read back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.broker.producer_stm import ProducerTable
from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import RecordOffset

if TYPE_CHECKING:
    from aegis_cluster.broker.metadata_stm import MetadataFold
    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader

SNAPSHOT_VERSION: Final = 1


class Fold(Protocol):
    """What a kind of partition adds to its producer table."""

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None: ...

    def leadership_lost(self) -> None: ...

    def to_body(self) -> Any: ...

    def load_body(self, body: Any) -> None: ...


class PartitionState:
    """Everything folded over one partition: its producers, and its kind's own fold, if any."""

    def __init__(self, fold: MetadataFold | None = None) -> None:
        self.producers = ProducerTable()
        self.fold: Fold | None = fold

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None:
        """Fold one committed DATA frame."""
        self.producers.apply(
            batch,
            index=header.index,
            offset=RecordOffset(batch.base_offset),
            time_ms=header.time_ms,
        )
        if self.fold is not None:
            self.fold.apply(header, batch, payload)

    def leadership_lost(self) -> None:
        """Drop what was decided ahead of the commit."""
        self.producers.drop_overlay()
        if self.fold is not None:
            self.fold.leadership_lost()

    def to_body(self) -> list[Any]:
        fold = None if self.fold is None else self.fold.to_body()
        return [SNAPSHOT_VERSION, self.producers.to_body(), fold]

    def load_body(self, body: list[Any]) -> None:
        version, producers, fold = body
        if version > SNAPSHOT_VERSION:
            raise CorruptLog(
                f"A snapshot has version {version}; this program reads up to {SNAPSHOT_VERSION}."
                " Run a newer aegis-cluster."
            )
        self.producers.load_body(producers)
        if self.fold is not None:
            self.fold.load_body(fold)
