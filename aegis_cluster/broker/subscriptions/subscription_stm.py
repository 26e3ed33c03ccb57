"""The fold of one partition of `__subscriptions`: the committed table.

What the coordinator has appended ahead of the commit is in its own copies (`Live`); they end with
its leadership. Markers of transactions are not appended by it, so it hears of them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.broker.subscriptions.commands import decode_command
from aegis_cluster.broker.subscriptions.subscription_table import SubscriptionTable
from aegis_cluster.errors import CorruptRecord
from aegis_cluster.ids import ProducerId
from aegis_cluster.wire.batch import decode_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster.broker.subscriptions.commands import Key
    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.markers import Marker

    BurialEnded = Callable[[Key, ProducerId, int, bool], None]


class SubscriptionFold:
    """Applies the commands of each committed frame."""

    def __init__(self) -> None:
        self.table = SubscriptionTable()
        self.on_burial_ended: BurialEnded | None = None
        """The coordinator here, if any, hears: whose, by which producer and epoch, committed."""

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None:
        for record in decode_batch(payload):
            if record.value is None:
                raise CorruptRecord(f"A subscription command at index {header.index} is empty.")
            self.table.apply(decode_command(record.value), header.time_ms)

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """Messages are settled whose dead letters were written in it, or go on waiting for that."""
        producer, epoch = ProducerId(marker.producer_id), marker.producer_epoch - 1
        key = self.table.end_transaction(producer, epoch, committed=marker.committed)
        if key is not None and self.on_burial_ended is not None:
            self.on_burial_ended(key, producer, epoch, marker.committed)

    def leadership_lost(self) -> None:
        """Nothing here runs ahead of the commit."""

    def slices(self) -> Iterator[list[Any]]:
        return self.table.slices()

    def loader(self) -> SubscriptionLoader:
        return SubscriptionLoader(self)

    def load_body(self, body: list[Any]) -> None:
        raise CorruptRecord("Snapshots of subscriptions were in slices from the first version on.")


class SubscriptionLoader:
    """A table that takes the place of a fold's once it is complete."""

    def __init__(self, fold: SubscriptionFold) -> None:
        self._fold = fold
        self._table = SubscriptionTable()

    def add(self, piece: list[Any]) -> None:
        self._table.add(piece)

    def finish(self) -> None:
        self._fold.table = self._table
