"""What a producer has under way for one partition: pure decisions about order and retries.

The idea (KIP-98, KIP-360): batches get consecutive sequences when they are first sent and keep
them over every retry, so the leader can tell a repeat. When one fails, nothing new is sent until
all others under way have come back, and then everything is sent again in order. When a batch's
outcome can no longer be known, or its sequence was used up in vain, the partition moves to a new
epoch: late copies of older ones are then fenced. Epochs are int16 on the wire; a producer id that
has used up its last one makes way for a new id (`needs_producer_id`), which begins at epoch 0.

A queue of a transaction has one epoch and no next one (KIP-890): where another would go on in a new
epoch, it fails for good, and the transaction has to be aborted, which fences whatever may have been
appended.

The rule it protects: a batch is given a second sequence only if it certainly was not appended
under the first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import (
    AegisError,
    OutcomeUnknown,
    OutOfOrderSequence,
    RequestTimeout,
    TransactionAborted,
    UnknownProducer,
    invariant,
)
from aegis_cluster.limits import PRODUCER_WINDOW_BATCHES
from aegis_cluster.wire.batch import with_producer
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.wire.batch import BatchBuilder

SEQUENCES: Final = 2**31
EPOCH_MAX: Final = 32_766

Outcome = tuple[int, int]
"""Base offset, append time in milliseconds."""


@dataclass(slots=True, eq=False)
class PendingBatch:
    """Records that belong together from their first sending on.

    done: called once, with offset and time or with the reason why not.
    unanswered: at least one sending of it got no answer, so it may have been appended.
    """

    builder: BatchBuilder
    deadline: float
    done: Callable[[Outcome | AegisError], None]
    count: int = 0
    size: int = 0
    data: bytes = b""
    epoch: int = -1
    """The queue's, when it was last stamped; -1 before."""
    sequence: int = -1
    unanswered: bool = False
    sent: Callable[[], None] | None = None
    """For someone who does not wait for the outcome: called when it has left."""


@dataclass(slots=True)
class PartitionQueue:
    """Batches of one partition: waiting in order, and in flight in order."""

    producer_id: int = -1
    epoch: int = 0
    """Of this queue: it counts on over all of its producer ids, so that it never repeats."""
    transactional: bool = False
    """Everything belongs to one transaction, that of the epoch it was made with."""
    failure: AegisError | None = None
    """Why nothing more can be sent in this transaction."""
    next_sequence: int = 0
    waiting: deque[PendingBatch] = field(default_factory=deque)
    in_flight: list[PendingBatch] = field(default_factory=list)
    retry_at: float = 0.0
    _holding: bool = False
    _id_since: int = 0
    """The epoch in which the present producer id began."""

    # ---- the producer id

    @property
    def needs_producer_id(self) -> bool:
        """The id has no epoch left: nothing is sent until `renew` (KIP-360)."""
        return self.producer_id >= 0 and self._producer_epoch > EPOCH_MAX

    @property
    def _producer_epoch(self) -> int:
        """As the leader sees it."""
        return self.epoch - self._id_since

    def renew(self, producer_id: int) -> None:
        """Go on under another id. What was sent under the old one and not answered is given up as
        unknown, as with every new epoch, so nothing can be stored under both.
        """
        invariant(producer_id != self.producer_id, "an id is used up once", id=producer_id)
        self.producer_id = producer_id
        self._id_since = self.epoch

    # ---- sending

    def add(self, batch: PendingBatch) -> None:
        if self.failure is not None:
            batch.done(self.failure)
            return
        self.waiting.append(batch)

    def fail(self, failure: AegisError) -> None:
        """Nothing more can be sent: end what waits, and what is still to come."""
        self.failure = self.failure or failure
        waiting, self.waiting = list(self.waiting), deque()
        for batch in waiting:
            batch.done(self.failure)

    def can_send(self, now: float) -> bool:
        """Whether `take` would give a batch."""
        if not self.waiting or now < self.retry_at or self.needs_producer_id:
            return False
        if self._holding and self.in_flight:
            return False
        return len(self.in_flight) < PRODUCER_WINDOW_BATCHES

    def take(self) -> PendingBatch | None:
        """The next batch to send, stamped; None when what was next had to be given up instead."""
        self._holding = False
        batch = self.waiting.popleft()
        if batch.epoch not in (-1, self.epoch) and batch.unanswered:
            batch.done(_unknown("It was sent and not answered, and its epoch has ended since."))
            return None
        self._stamp(batch)
        self.in_flight.append(batch)
        return batch

    def _stamp(self, batch: PendingBatch) -> None:
        if batch.epoch == self.epoch:
            return
        batch.epoch, batch.sequence = self.epoch, self.next_sequence
        self.next_sequence = (self.next_sequence + batch.count) % SEQUENCES
        if self.producer_id < 0:
            batch.data = batch.data or batch.builder.build()
        elif not batch.data:
            batch.data = batch.builder.build(
                self.producer_id,
                self._producer_epoch,
                batch.sequence,
                attributes=TRANSACTIONAL_BIT if self.transactional else 0,
            )
        else:
            batch.data = with_producer(
                batch.data,
                producer_id=self.producer_id,
                producer_epoch=self._producer_epoch,
                base_sequence=batch.sequence,
            )

    # ---- answers

    def acknowledged(self, batch: PendingBatch, outcome: Outcome) -> None:
        if self._returned(batch):
            batch.done(outcome)

    def refused(self, batch: PendingBatch, error: AegisError) -> None:
        """A final refusal: it was not appended, and what follows it needs another epoch."""
        if not self._returned(batch):
            return
        if isinstance(error, OutOfOrderSequence | UnknownProducer):
            self._sequence_refused(batch, error)
            return
        self._new_epoch()
        if batch.unanswered:
            error = _unknown(f"An earlier try was not answered, and now: {error}")
        batch.done(error)

    def _sequence_refused(self, batch: PendingBatch, error: AegisError) -> None:
        """Behind one that failed, that is no wonder and it goes again; else the leader's memory
        and ours differ, and only a new epoch can tell repeats from new batches."""
        earlier = [b for b in (*self.waiting, *self.in_flight) if _precedes(b, batch)]
        if earlier or batch.epoch != self.epoch:
            self._again(batch)
        elif batch.unanswered:
            self._new_epoch()
            batch.done(_unknown(f"An earlier try was not answered, and now: {error}"))
        else:
            self._new_epoch()
            self._again(batch)

    def retry(self, batch: PendingBatch, *, unanswered: bool, at: float) -> None:
        """Not done (or not known to be): send it again, not before `at`."""
        if not self._returned(batch):
            return
        batch.unanswered |= unanswered
        self.retry_at = max(self.retry_at, at)
        self._again(batch)

    def expire(self, now: float) -> None:
        """Give up what is past its deadline; what may have been appended ends as unknown."""
        for batch in [b for b in self.in_flight if b.deadline <= now]:
            self.in_flight.remove(batch)
            self._new_epoch()
            batch.done(_unknown("It was sent, and no answer came by the deadline."))
        late = [b for b in self.waiting if b.deadline <= now]
        for batch in late:
            if self.failure is not None:
                return  # in a transaction one failure has ended all of them
            self.waiting.remove(batch)
            if batch.epoch >= 0:
                self._new_epoch()
            batch.done(
                _unknown("It was sent, and no answer came by the deadline.")
                if batch.unanswered
                else RequestTimeout("The deadline passed before it could be sent.")
            )

    def _returned(self, batch: PendingBatch) -> bool:
        """Take a batch out of flight; False when it was given up already."""
        if batch not in self.in_flight:
            return False
        self.in_flight.remove(batch)
        return True

    def _again(self, batch: PendingBatch) -> None:
        """Back to the front, behind those that were sent before it."""
        self._holding = True
        if self.failure is not None:
            batch.done(self.failure)
            return
        place = 0
        while place < len(self.waiting) and _precedes(self.waiting[place], batch):
            place += 1
        self.waiting.insert(place, batch)

    def _new_epoch(self) -> None:
        self._holding = True
        if self.producer_id < 0:
            return
        if self.transactional:
            self.fail(_broken())
            return
        self.epoch += 1
        self.next_sequence = 0


def _precedes(batch: PendingBatch, other: PendingBatch) -> bool:
    """Whether `batch` was first sent before `other`."""
    if batch.epoch < 0:
        return False
    if batch.epoch != other.epoch:
        return batch.epoch < other.epoch
    return (other.sequence - batch.sequence) % SEQUENCES < SEQUENCES // 2 and batch is not other


def _broken() -> TransactionAborted:
    return TransactionAborted(
        "Another message of the transaction could not be stored, so it can only be aborted."
    )


def _unknown(why: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"It is not known whether the messages were stored. {why}")
