"""A transaction's first batch in a partition: its leader asks the coordinator whether it may come.

The rule it protects (KIP-890, part 1): a partition takes nothing of a transaction that its
coordinator does not know to be open with this very partition in it; so every transaction that is
open here gets its marker, and none can hold readers back for longer than its time-out, whatever a
client sends, and however late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.broker.transactions.leaders import Leaders
from aegis_cluster.errors import AegisError, InvalidBatch, NotReady
from aegis_cluster.ids import TRANSACTIONS_TOPIC, GroupId, ProducerId
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.wire.batch import BatchHeader

    Go = Callable[[AegisError | None], None]

CALL_MS: Final = 1_000


class Admission:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._leaders = Leaders(shard)
        self._waiting: dict[tuple[GroupId, ProducerId, int], list[Go]] = {}
        """Batches that wait for one answer, in their order; bounded by what clients may send."""

    def admit(self, partition: Partition, batch: BatchHeader, name: str | None, go: Go) -> None:
        """Call `go` with None when the batch may be judged, else with the reason why not."""
        producer, epoch = ProducerId(batch.producer_id), batch.producer_epoch
        key = (partition.group, producer, epoch)
        if key in self._waiting:
            self._waiting[key].append(go)
        elif partition.serving and partition.state.producers.opens(batch):
            self._waiting[key] = [go]
            self._ask(partition, name, producer, epoch, lambda error: self._settle(key, error))
        else:
            go(None)

    def _settle(self, key: tuple[GroupId, ProducerId, int], error: AegisError | None) -> None:
        for go in self._waiting.pop(key, ()):
            go(error)

    def _ask(
        self, partition: Partition, name: str | None, producer: ProducerId, epoch: int, done: Go
    ) -> None:
        shard = self._shard
        if name is None:
            done(InvalidBatch("A transaction's batch comes with its transactional id."))
            return
        info = shard.table.topics.get(TRANSACTIONS_TOPIC)
        if info is None:
            done(NotReady("This node does not know of any transactions yet."))
            return
        log = info.partitions[partition_for(name.encode(), len(info.partitions))].group
        key = self._leaders.of(log)
        if key is None:
            done(NotReady("This node does not know of the transaction's coordinator yet."))
            return

        def answered(reply: Reply | AegisError) -> None:
            if isinstance(reply, Reply):
                done(None)
                return
            if reply.retriable:
                self._leaders.failed(log, reply)
            done(reply)

        fields: list[Any] = [name, producer, epoch, partition.group]
        if self._leaders.is_here(key):
            try:
                shard.transactions.verify(fields, answered)
            except AegisError as error:
                answered(error)
            return
        shard.ensure_link(key)
        call = Call(shard.now_ms + CALL_MS, answered)
        shard.links.call(key, Api.VERIFY_TRANSACTION, fields, now_ms=shard.now_ms, call=call)
