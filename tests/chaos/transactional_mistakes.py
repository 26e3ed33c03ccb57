"""Mistakes about transactions, groups and compaction, to be planted one at a time.

As in `mistakes`: each patches methods for the time of one test, and the simulator must see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.broker import producer_stm
from aegis_cluster.broker.fetch import Fetches
from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.groups import coordinator as group_coordinator
from aegis_cluster.broker.partition import Partition
from aegis_cluster.broker.producer_stm import ProducerTable
from aegis_cluster.broker.transactions.markers import Errand
from aegis_cluster.broker.transactions.transaction_coordinator import TransactionCoordinator
from aegis_cluster.broker.transactions.transaction_table import Phase
from aegis_cluster.storage import compaction
from aegis_cluster.wire.frame import FrameKind, frame_payload, rewrite_frame
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.markers import Marker
from aegis_cluster.wire.rewrite import with_records

if TYPE_CHECKING:
    import pytest

    from aegis_cluster.ids import LogIndex


def offset_commits_are_not_fenced(patch: pytest.MonkeyPatch) -> None:
    """B2: a member that its group has lost moves the group all the same."""
    patch.setattr(group_coordinator, "check_commit", lambda *_: None)


def markers_leave_before_the_decision_is_durable(patch: pytest.MonkeyPatch) -> None:
    """B4: a coordinator that dies then has committed what its successor aborts."""
    right = TransactionCoordinator._after_commit

    def after_commit(self: TransactionCoordinator, index: LogIndex, name: str) -> None:
        one = self.fold.get(name)
        assert one is not None
        number, epoch = one.identity
        marker = Marker(number, epoch + 1, one.phase is Phase.COMMITTING, 1)
        self._sender.send([Errand(part, marker, lambda _: None) for part in one.participants])
        right(self, index, name)

    patch.setattr(TransactionCoordinator, "_after_commit", after_commit)


def fetches_that_waited_ignore_the_last_stable_offset(patch: pytest.MonkeyPatch) -> None:
    """B10: one read path of two looks at the high watermark."""
    right = Fetches.turn

    def turn(self: Fetches) -> None:
        for call in self._woken.values():
            call.committed = False
        right(self)

    patch.setattr(Fetches, "turn", turn)


def sequences_are_lost_with_the_leader(patch: pytest.MonkeyPatch) -> None:
    """Redpanda #3039: a repeat that another leader gets is taken for something new."""
    right_role, right_decide = Partition._note_role, ProducerTable.decide

    def note_role(self: Partition) -> None:
        before = self._led_term
        right_role(self)
        if self._led_term is not None and self._led_term != before:
            self.state.producers.known_from = self.log.last_index  # type: ignore[attr-defined]

    def decide(self: ProducerTable, batch: Any) -> Any:
        found = right_decide(self, batch)
        is_older = found.known is not None and found.known.index <= getattr(self, "known_from", 0)
        return producer_stm.APPEND if is_older else found

    patch.setattr(Partition, "_note_role", note_role)
    patch.setattr(ProducerTable, "decide", decide)


def compaction_drops_markers(patch: pytest.MonkeyPatch) -> None:
    """A transaction whose marker is gone is open again for whoever folds the log anew."""
    right_rewrite, right_end = compaction._without_obsolete, PartitionState._end_transaction

    def without(job: Any, header: Any, frame: Any, rule: Any) -> Any:
        if header.kind is FrameKind.DATA:
            payload = frame_payload(frame, header)
            batch = batch_header(payload)
            if batch.is_control and batch.count and batch.base_offset < rule.end:
                emptied = with_records(bytes(payload), [])
                assert emptied is not None
                return rewrite_frame(job.group, bytes(frame), emptied), 1
        return right_rewrite(job, header, frame, rule)

    def end_transaction(self: PartitionState, header: Any, batch: Any, payload: Any) -> Any:
        if batch.count:
            return right_end(self, header, batch, payload)
        return None

    patch.setattr(compaction, "_without_obsolete", without)
    patch.setattr(PartitionState, "_end_transaction", end_transaction)
