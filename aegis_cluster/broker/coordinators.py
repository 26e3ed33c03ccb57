"""Coordinators of the cluster's own topics: who answers for groups, transactions, subscriptions.

The idea: whatever has a name is kept in one partition of its topic, chosen by murmur2 of the name,
and coordinated by whoever leads that partition, for one term of leadership. This is what the three
kinds share: finding the partition, beginning and ending coordinators with leaderships, and answers
that wait for what they rest on.

The rule it protects: no answer leaves that rests on something uncommitted, or on a leadership that
has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from aegis_cluster.errors import NotLeader
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.errors import AegisError
    from aegis_cluster.ids import GroupId, LogIndex, Term


class Exchange(Protocol):
    """One request that waits for its answer."""

    def reply(self, fields: list[Any]) -> None: ...

    def refuse(self, error: AegisError) -> None: ...


class Coordinator(Protocol):
    """Of one partition, for one term of our leadership."""

    partition: Partition
    term: Term

    def tick(self, now_ms: int) -> None: ...

    def close(self) -> None:
        """Leadership is lost: those who wait are sent to the next coordinator."""


C = TypeVar("C", bound=Coordinator)


class Coordinators(Generic[C]):
    """Those of one topic that are led by this shard."""

    def __init__(self, shard: Shard, topic: str, make: Callable[[Partition], C]) -> None:
        """make: begins one; raises `NotLeader` for a partition of another kind."""
        self._shard = shard
        self._topic = topic
        self._make = make
        self._led: dict[GroupId, C] = {}

    def of(self, name: str) -> C:
        """Whoever answers for this name. Raises `NotLeader`, `NotReady`."""
        placed = self._placed()
        return self._of(placed[partition_for(name.encode(), len(placed))])

    def at(self, number: int) -> C:
        """The coordinator of one partition. Raises `NotLeader`, `NotReady`."""
        placed = self._placed()
        if number >= len(placed):
            raise NotLeader(f"{self._topic} has no partition {number}.")
        return self._of(placed[number])

    def __iter__(self) -> Iterator[C]:
        """All that have begun and not ended."""
        return iter(self._led.values())

    def tick(self) -> None:
        """Begin and end with the leaderships here, and let time pass."""
        partitions = self._shard.manager.partitions
        for group, one in list(self._led.items()):
            if partitions.get(group) is one.partition and is_current(one):
                one.tick(self._shard.now_ms)
            else:
                self._end(group)
        info = self._shard.table.topics.get(self._topic)
        for placed in () if info is None else info.partitions:
            partition = partitions.get(placed.group)
            if partition is not None and partition.serving and placed.group not in self._led:
                self._begin(partition)

    # ---- inside

    def _placed(self) -> list[GroupId]:
        info = self._shard.table.topics.get(self._topic)
        if info is None:
            raise NotLeader(f"There is no {self._topic} yet; have it made first.")
        return [one.group for one in info.partitions]

    def _of(self, group: GroupId) -> C:
        partition = self._shard.manager.partitions.get(group)
        if partition is None:
            raise NotLeader(f"This shard has no replica of that partition of {self._topic}.")
        if not partition.serving:
            raise partition.unable()
        found = self._led.get(group)
        if found is not None and found.partition is partition and is_current(found):
            return found
        self._end(group)
        return self._begin(partition)

    def _begin(self, partition: Partition) -> C:
        made = self._led[partition.group] = self._make(partition)
        return made

    def _end(self, group: GroupId) -> None:
        old = self._led.pop(group, None)
        if old is not None:
            old.close()


def is_current(coordinator: Coordinator) -> bool:
    """It still is the leadership that the coordinator was made for."""
    partition = coordinator.partition
    return partition.serving and partition.replica.term == coordinator.term


class _Waiting:
    """Whoever asked hears of it once the index, or the leadership, that the answer rests on is
    certain. own: what was appended is the request's own, so without it nobody knows."""

    __slots__ = ("_done", "_exchange", "_own")

    def __init__(self, done: Callable[[], None], exchange: Exchange, *, own: bool) -> None:
        self._done = done
        self._exchange = exchange
        self._own = own

    def committed(self) -> None:
        self._done()

    def lost(self, error: AegisError) -> None:
        if not self._own:
            error = NotLeader("The coordinator has changed; ask the new one.")
        self._exchange.refuse(error)


def answer(
    partition: Partition, index: LogIndex, exchange: Exchange, fields: list[Any], *, own: bool
) -> None:
    """Reply once the index is committed. own: the request itself has appended up to there."""
    partition.wait_for(index, _Waiting(lambda: exchange.reply(fields), exchange, own=own))


def refuse(partition: Partition, index: LogIndex, exchange: Exchange, error: AegisError) -> None:
    """Refuse once the index that this rests on is committed."""
    partition.wait_for(index, _Waiting(lambda: exchange.refuse(error), exchange, own=False))


def read(partition: Partition, exchange: Exchange, done: Callable[[], None]) -> None:
    """Go on once this replica is known to have led after the question (read index)."""
    partition.wait_for_read(_Waiting(done, exchange, own=True))
