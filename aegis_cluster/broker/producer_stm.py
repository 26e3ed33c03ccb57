"""What a partition remembers of its idempotent producers, so that a retry is never a duplicate.

The idea (KIP-98, KIP-360): every batch carries producer id, epoch and first sequence. The table is
folded over committed frames and so is the same on every replica. The leader decides on table plus
*overlay*, the batches it has appended that are not committed yet; an answer that rests on the
overlay waits for that entry's commit (`Decision.wait_for`), refusals included.

The rule it protects: a repeat is answered with its first offset, over any number of leader
changes, and what cannot be told from a repeat is refused, never accepted in silence.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import (
    InvalidBatch,
    OutOfOrderSequence,
    ProducerFenced,
    Refused,
    UnknownProducer,
    invariant,
)
from aegis_cluster.ids import LogIndex, ProducerId, RecordOffset
from aegis_cluster.limits import PRODUCER_WINDOW_BATCHES, PRODUCERS_PER_PARTITION_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.wire.batch import BatchHeader

SEQUENCES: Final = 2**31
"""Sequences are int32 and wrap to 0."""

NO_PRODUCER: Final = -1
SLICE_PRODUCERS: Final = 200
"""In one slice of a snapshot: about a millisecond's work."""


@dataclass(frozen=True, slots=True)
class KnownBatch:
    """One batch of a producer: sequences first..last (inclusive) got offsets from `offset` on."""

    first: int
    last: int
    offset: RecordOffset
    index: LogIndex
    time_ms: int


@dataclass(slots=True)
class ProducerState:
    """One producer's newest epoch here and its last batches, oldest first."""

    epoch: int
    batches: deque[KnownBatch] = field(
        default_factory=lambda: deque(maxlen=PRODUCER_WINDOW_BATCHES)
    )
    captures: int = 0
    """How many snapshots had been begun when this object was made: later ones share it."""

    def copy(self, captures: int = 0) -> ProducerState:
        return ProducerState(self.epoch, deque(self.batches, PRODUCER_WINDOW_BATCHES), captures)


class Decision(NamedTuple):
    """What to do with a batch: append it (`known` and `error` absent), answer as before, refuse.

    wait_for: the answer may leave once this index is committed; 0 = at once.
    """

    known: KnownBatch | None = None
    error: Refused | None = None
    wait_for: LogIndex = LogIndex(0)


APPEND: Final = Decision()


class ProducerTable:
    """Producers of one partition: `decide` and `appended` on a leader, `apply` on every replica."""

    def __init__(self, producers_max: int = PRODUCERS_PER_PARTITION_MAX) -> None:
        self._producers_max = producers_max
        self._table: OrderedDict[ProducerId, ProducerState] = OrderedDict()
        self._overlay: dict[ProducerId, ProducerState] = {}
        self._captures = 0
        """Snapshots begun so far; see `slices`."""

    def decide(self, batch: BatchHeader) -> Decision:
        """Judge one batch of a client against all that is appended, committed or not."""
        if batch.producer_id == NO_PRODUCER:
            return APPEND
        producer = ProducerId(batch.producer_id)
        ahead = self._overlay.get(producer)
        state = ahead or self._table.get(producer)
        decision = _judge(state, batch)
        if decision.error is None or ahead is None:
            return decision
        return decision._replace(wait_for=ahead.batches[-1].index)

    def appended(
        self, batch: BatchHeader, *, index: LogIndex, offset: RecordOffset, time_ms: int
    ) -> None:
        """Note a batch that the leader has appended and not committed yet."""
        if batch.producer_id == NO_PRODUCER:
            return
        producer = ProducerId(batch.producer_id)
        state = self._overlay.get(producer)
        if state is None:
            committed = self._table.get(producer)
            state = committed.copy() if committed else ProducerState(batch.producer_epoch)
            self._overlay[producer] = state
        _record(state, batch, index=index, offset=offset, time_ms=time_ms)

    def apply(
        self, batch: BatchHeader, *, index: LogIndex, offset: RecordOffset, time_ms: int
    ) -> None:
        """Fold one committed batch."""
        if batch.producer_id == NO_PRODUCER:
            return
        producer = ProducerId(batch.producer_id)
        state = self._table.get(producer)
        if state is None:
            state = ProducerState(batch.producer_epoch, captures=self._captures)
            self._table[producer] = state
        elif state.captures != self._captures:  # a snapshot may still have to write it down
            state = self._table[producer] = state.copy(self._captures)
        invariant(batch.producer_epoch >= state.epoch, "an old epoch was committed", at=index)
        _record(state, batch, index=index, offset=offset, time_ms=time_ms)
        self._table.move_to_end(producer)
        while len(self._table) > self._producers_max:
            self._table.popitem(last=False)
        ahead = self._overlay.get(producer)
        if ahead is not None and ahead.batches[-1].index <= index:
            del self._overlay[producer]

    def drop_overlay(self) -> None:
        """Forget what is not committed: leadership is lost, or the entries were truncated."""
        self._overlay.clear()

    def slices(self) -> Iterator[list[Any]]:
        """The committed table as it is at the call, in pieces of bounded size, least recently used
        producers first. Producers that move on meanwhile do so on copies.
        """
        self._captures += 1
        return _slices(list(self._table.items()))

    def to_body(self) -> list[Any]:
        """All of it at once, for a comparison."""
        return [values for piece in self.slices() for values in piece]

    def load_body(self, body: list[Any]) -> None:
        """Replace the table by that of a snapshot."""
        self.clear()
        self.add(body)

    def clear(self) -> None:
        self._overlay.clear()
        self._table.clear()

    def add(self, piece: list[Any]) -> None:
        """Take in a piece of a snapshot, after those before it."""
        for producer, epoch, batches in piece:
            known = (KnownBatch(*values) for values in batches)
            state = ProducerState(epoch, deque(known, PRODUCER_WINDOW_BATCHES), self._captures)
            self._table[ProducerId(producer)] = state

    def take_over(self, other: ProducerTable) -> None:
        """Become what another table is; it is not used any more."""
        self._overlay.clear()
        self._table, self._captures = other._table, other._captures


def _slices(items: list[tuple[ProducerId, ProducerState]]) -> Iterator[list[Any]]:
    for start in range(0, len(items), SLICE_PRODUCERS):
        yield [
            [producer, state.epoch, [_values(known) for known in state.batches]]
            for producer, state in items[start : start + SLICE_PRODUCERS]
        ]


def _values(known: KnownBatch) -> list[int]:
    return [known.first, known.last, known.offset, known.index, known.time_ms]


def _judge(state: ProducerState | None, batch: BatchHeader) -> Decision:
    if batch.base_sequence < 0 or batch.producer_epoch < 0:
        return Decision(error=InvalidBatch("A batch with a producer id needs epoch and sequence."))
    if state is None:
        return APPEND if batch.base_sequence == 0 else Decision(error=_unknown(batch))
    if batch.producer_epoch < state.epoch:
        return Decision(error=_fenced(state, batch))
    if batch.producer_epoch > state.epoch:
        return APPEND if batch.base_sequence == 0 else Decision(error=_gap(0, batch))
    last = _last_sequence(batch)
    for known in state.batches:
        if known.first == batch.base_sequence and known.last == last:
            return Decision(known=known, wait_for=known.index)
    wanted = (state.batches[-1].last + 1) % SEQUENCES
    return APPEND if batch.base_sequence == wanted else Decision(error=_gap(wanted, batch))


def _record(
    state: ProducerState, batch: BatchHeader, *, index: LogIndex, offset: RecordOffset, time_ms: int
) -> None:
    if batch.producer_epoch > state.epoch:
        state.epoch = batch.producer_epoch
        state.batches.clear()
    first = batch.base_sequence
    state.batches.append(KnownBatch(first, _last_sequence(batch), offset, index, time_ms))


def _last_sequence(batch: BatchHeader) -> int:
    return (batch.base_sequence + batch.last_offset_delta) % SEQUENCES


def _unknown(batch: BatchHeader) -> UnknownProducer:
    return UnknownProducer(
        f"Producer {batch.producer_id} is not known here (any more), and its batch starts at"
        f" sequence {batch.base_sequence}: it could be a repeat. Start over with a new epoch.",
        producer_id=batch.producer_id,
    )


def _fenced(state: ProducerState, batch: BatchHeader) -> ProducerFenced:
    return ProducerFenced(
        f"Producer {batch.producer_id} has epoch {state.epoch} by now; a batch of epoch"
        f" {batch.producer_epoch} is too late.",
        have=state.epoch,
        got=batch.producer_epoch,
    )


def _gap(wanted: int, batch: BatchHeader) -> OutOfOrderSequence:
    return OutOfOrderSequence(
        f"Producer {batch.producer_id} sent sequence {batch.base_sequence} where {wanted} was due;"
        " a batch before it is missing.",
        have=batch.base_sequence,
        want=wanted,
    )
