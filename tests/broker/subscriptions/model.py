"""A coordinator over a log that a test commits, or loses, as it likes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.subscriptions.commands import Bury, Create, Key, Letter, Rules, Run
from aegis_cluster.broker.subscriptions.subscription_coordinator import (
    Mark,
    Poll,
    SubscriptionCoordinator,
)
from aegis_cluster.broker.subscriptions.subscription_stm import SubscriptionFold
from aegis_cluster.errors import AegisError, NotLeader, OutcomeUnknown
from aegis_cluster.ids import GroupId, LogIndex, ProducerId
from aegis_cluster.wire.markers import Marker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.broker.partition import Waiter

KEY: Final = Key("orders", "billing")
LOG: Final = GroupId(7)
TOKEN: Final = "token"
PRODUCER: Final = ProducerId(5)


@dataclass
class Placed:
    index: LogIndex
    time_ms: int


@dataclass
class Header:
    index: int
    time_ms: int


@dataclass
class FakeReplica:
    term: int = 1


class FakeProducers:
    """What markers say of producers, those that are not committed included."""

    def __init__(self, partition: FakePartition) -> None:
        self._partition = partition

    def epoch_of(self, producer: ProducerId) -> tuple[int, LogIndex]:
        found = [
            (frame.producer_epoch, LogIndex(place))
            for place, frame in enumerate(self._partition.frames, 1)
            if isinstance(frame, Marker) and frame.producer_id == producer
        ]
        return max(found, default=(-1, LogIndex(0)))


@dataclass
class FakeState:
    producers: FakeProducers


class FakePartition:
    """What a coordinator sees of a partition; frames are committed when a test says so."""

    def __init__(self) -> None:
        self.replica = FakeReplica()
        self.fold = SubscriptionFold()
        self.applied = LogIndex(0)
        self.frames: list[bytes | Marker] = []
        self.state = FakeState(FakeProducers(self))
        self.waiters: list[tuple[int, Waiter]] = []
        self.now_ms = 1_000_000
        self.leads = True

    def append(self, batch: bytes, header: object) -> Placed:
        if not self.leads:
            raise NotLeader("gone")
        self.frames.append(batch)
        return Placed(LogIndex(len(self.frames)), self.now_ms)

    def mark(self, epoch: int, *, committed: bool) -> None:
        """A coordinator's marker comes, which ends the transaction of `PRODUCER` and this epoch."""
        self.frames.append(Marker(PRODUCER, epoch + 1, committed, 1))

    def wait_for(self, index: LogIndex, waiter: Waiter) -> None:
        if index <= self.applied:
            waiter.committed()
        else:
            self.waiters.append((index, waiter))

    def wait_for_read(self, waiter: Waiter) -> None:
        waiter.committed()

    def not_leader(self) -> NotLeader:
        return NotLeader("another one leads")

    def commit(self, index: int | None = None) -> None:
        end = len(self.frames) if index is None else index
        while self.applied < end:
            frame = self.frames[self.applied]
            self.applied = LogIndex(self.applied + 1)
            header: Any = Header(self.applied, self.now_ms)
            if isinstance(frame, Marker):
                self.fold.transaction_ended(header, frame)
            else:
                self.fold.apply(header, None, memoryview(frame))  # type: ignore[arg-type] # unused
        done = [one for one in self.waiters if one[0] <= self.applied]
        self.waiters = [one for one in self.waiters if one[0] > self.applied]
        for _, waiter in done:
            waiter.committed()

    def lose(self) -> None:
        """What is not committed is gone, and so is whoever waits for it."""
        del self.frames[self.applied :]
        waiters, self.waiters = self.waiters, []
        for _, waiter in waiters:
            waiter.lost(OutcomeUnknown("the leader changed"))
        self.replica.term += 1


@dataclass
class Exchange:
    """One request; answer: what came back."""

    answer: list[Any] | None = None
    error: AegisError | None = None

    def reply(self, fields: list[Any]) -> None:
        assert self.answer is None
        assert self.error is None
        self.answer = fields

    def refuse(self, error: AegisError) -> None:
        self.error = error


@dataclass
class Model:
    """One subscription of a topic with one partition."""

    rules: Rules
    partition: FakePartition = field(default_factory=FakePartition)
    now_ms: int = 0
    polls: int = 0
    settles: dict[str, int] = field(default_factory=dict)
    coordinator: SubscriptionCoordinator = field(init=False)

    def __post_init__(self) -> None:
        self._begin()
        exchange = Exchange()
        command = Create(KEY, TOKEN, self.rules, ((LOG, 0),))
        self.coordinator.create(exchange, command, given=True)
        self.partition.commit()
        assert exchange.answer == [TOKEN, list(self.rules)]

    def _begin(self) -> None:
        self.coordinator = SubscriptionCoordinator(
            self.partition,  # type: ignore[arg-type]
            self.partition.fold,
            wall_ms=lambda: self.partition.now_ms,
            logs_of=self._logs_of,
            now_ms=self.now_ms,
        )

    def _logs_of(self, topic: str) -> dict[GroupId, int]:
        return {LOG: 0} if topic == KEY.topic else {}

    def fail_over(self) -> None:
        """The leader dies; another one begins with what was committed."""
        self.partition.lose()
        self.coordinator.close()
        self._begin()

    def pass_time(self, ms: int) -> None:
        left = ms
        while left > 0:
            step = min(left, 50)
            self.now_ms += step
            self.partition.now_ms += step
            left -= step
            self.coordinator.tick(self.now_ms)

    def report(
        self, first: int, end: int, keys: Sequence[int | None] | None = None, *, gone: int = 0
    ) -> int:
        """Returns the next offset that the coordinator wants to hear of. gone: how many of the
        first messages are not in the log any more."""
        exchange = Exchange()
        runs = [(first + gone, end)] if end > first + gone else []
        self.coordinator.report(
            exchange, KEY, TOKEN, "scout", log=LOG, first=first, end=end, runs=runs, keys=keys
        )
        assert exchange.answer is not None
        wanted: int = exchange.answer[0]
        return wanted

    def poll(self, consumer: str, want: int = 10, number: int | None = None) -> Exchange:
        if number is None:
            self.polls += 1
            number = self.polls
        exchange = Exchange()
        poll = Poll(consumer, "client", number, want, (0,))
        self.coordinator.poll(exchange, KEY, TOKEN, poll, origin=consumer, wait_ms=100)
        return exchange

    def settle(
        self,
        consumer: str,
        kind: str,
        offset: int,
        count: int,
        *,
        delay_ms: int = 0,
        number: int | None = None,
    ) -> Exchange:
        if number is None:
            number = self.settles[consumer] = self.settles.get(consumer, 0) + 1
        exchange = Exchange()
        mark = Mark(kind, Run(LOG, offset, offset + 1), count, delay_ms, "reason")
        self.coordinator.settle(exchange, KEY, TOKEN, session=consumer, number=number, marks=[mark])
        return exchange

    def bury(self, consumer: str, epoch: int, letters: Sequence[tuple[int, int]]) -> Exchange:
        """letters: (offset, count)."""
        exchange = Exchange()
        command = Bury(KEY, PRODUCER, epoch, tuple(Letter(LOG, *one) for one in letters))
        self.coordinator.bury(exchange, command, TOKEN, consumer)
        return exchange


def to_bury(exchange: Exchange) -> list[tuple[int, int]]:
    """(offset, count) of the dead letters that a poll's answer gives a consumer to write."""
    assert exchange.error is None, exchange.error
    return [] if exchange.answer is None else [(row[1], row[2]) for row in exchange.answer[2]]


def leases(exchange: Exchange) -> dict[int, int]:
    """Delivery count by offset."""
    assert exchange.error is None, exchange.error
    if exchange.answer is None:
        return {}
    return {
        offset: count for _, first, end, count in exchange.answer[1] for offset in range(first, end)
    }
