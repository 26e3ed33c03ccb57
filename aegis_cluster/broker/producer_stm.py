"""What a partition remembers of its idempotent producers, so that a retry is never a duplicate.

The idea (KIP-98, KIP-360): every batch carries producer id, epoch and first sequence. The table is
folded over committed frames and so is the same on every replica. The leader decides on table plus
*overlay*, the batches it has appended that are not committed yet; an answer that rests on the
overlay waits for that entry's commit (`Decision.wait_for`), refusals included.

Transactions (KIP-98, KIP-890): a producer's first transactional batch of an epoch opens one here,
and a marker with the next epoch ends it. Readers of committed records go up to the start of the
oldest open one, and are told which ranges were aborted.

The rule it protects: a repeat is answered with its first offset, over any number of leader
changes, and what cannot be told from a repeat is refused, never accepted in silence. An epoch is
one transaction: after its marker nothing of it is accepted any more.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import (
    InvalidBatch,
    NotReady,
    OutOfOrderSequence,
    ProducerFenced,
    Refused,
    Throttled,
    UnknownProducer,
    invariant,
)
from aegis_cluster.ids import NO_INDEX, LogIndex, ProducerId, RecordOffset
from aegis_cluster.limits import (
    ABORTED_PER_FETCH_MAX,
    OPEN_TRANSACTIONS_PER_PARTITION_MAX,
    PRODUCER_WINDOW_BATCHES,
    PRODUCERS_PER_PARTITION_MAX,
)
from aegis_cluster.wire.layout import CONTROL_BIT, TRANSACTIONAL_BIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.markers import Marker

SEQUENCES: Final = 2**31
"""Sequences are int32 and wrap to 0."""

NO_PRODUCER: Final = -1
SLICE_PRODUCERS: Final = 200
"""In one slice of a snapshot: about a millisecond's work."""
SLICE_ABORTED: Final = 2_000
NOT_OPEN: Final = -1


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
    open_since: RecordOffset | None = None
    """First offset of its open transaction, which is that of `epoch`; None: it has none here."""
    index: LogIndex = NO_INDEX
    """Of its newest entry, where that may not be committed yet."""

    def copy(self, captures: int = 0) -> ProducerState:
        batches = deque(self.batches, PRODUCER_WINDOW_BATCHES)
        return ProducerState(self.epoch, batches, captures, self.open_since)


class Aborted(NamedTuple):
    """Records of this producer from `first` on, up to the marker at `last`, never happened."""

    producer: ProducerId
    first: RecordOffset
    last: RecordOffset


_LAST: Final = attrgetter("last")
_FIRST: Final = attrgetter("first")


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
        self._open: dict[ProducerId, RecordOffset] = {}
        """Open transactions of the committed table, the oldest first."""
        self._aborted: list[Aborted] = []
        """By rising `last`."""
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
        if batch.attributes & TRANSACTIONAL_BIT and decision is APPEND:
            decision = self._room_for_another(producer)
        if decision.error is None or ahead is None:
            return decision
        return decision._replace(wait_for=ahead.index)

    def _room_for_another(self, producer: ProducerId) -> Decision:
        full = len(self._open) >= OPEN_TRANSACTIONS_PER_PARTITION_MAX
        if not full or producer in self._open:
            return APPEND
        return Decision(
            error=Throttled(
                f"{len(self._open)} transactions are open in this partition, the most that may be."
            )
        )

    def opens(self, batch: BatchHeader) -> bool:
        """Whether a transactional batch would be the first of its transaction here."""
        producer = ProducerId(batch.producer_id)
        state = self._overlay.get(producer) or self._table.get(producer)
        if state is None or batch.producer_epoch > state.epoch:
            return True
        return batch.producer_epoch == state.epoch and state.open_since is None

    def decide_marker(self, marker: Marker) -> LogIndex | None:
        """None: append it. Else it, or a later one, stands here already, and is known to once this
        index is committed.
        """
        producer = ProducerId(marker.producer_id)
        ahead = self._overlay.get(producer)
        state = ahead or self._table.get(producer)
        if state is None or state.epoch < marker.producer_epoch:
            return None
        return ahead.index if ahead is not None else NO_INDEX

    def epoch_of(self, producer: ProducerId) -> tuple[int, LogIndex]:
        """The newest epoch of a producer here (-1: none known), known once the index is committed.

        For logs that keep something else of a transaction than its records.
        """
        ahead = self._overlay.get(producer)
        state = ahead or self._table.get(producer)
        index = ahead.index if ahead is not None else NO_INDEX
        return (-1 if state is None else state.epoch), index

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
        state.index = index
        if batch.attributes & CONTROL_BIT:
            _end(state, batch.producer_epoch)
        else:
            _record(state, batch, index=index, offset=offset, time_ms=time_ms)

    def apply(
        self, batch: BatchHeader, *, index: LogIndex, offset: RecordOffset, time_ms: int
    ) -> None:
        """Fold one committed batch."""
        if batch.producer_id == NO_PRODUCER:
            return
        producer = ProducerId(batch.producer_id)
        state = self._own_state(producer, batch.producer_epoch)
        invariant(batch.producer_epoch >= state.epoch, "an old epoch was committed", at=index)
        _record(state, batch, index=index, offset=offset, time_ms=time_ms)
        if state.open_since is not None and producer not in self._open:
            self._open[producer] = state.open_since
        self._applied(producer, index)

    def end_transaction(self, marker: Marker, *, index: LogIndex, offset: RecordOffset) -> None:
        """Fold one committed marker."""
        producer = ProducerId(marker.producer_id)
        state = self._own_state(producer, marker.producer_epoch)
        invariant(marker.producer_epoch >= state.epoch, "an old marker was committed", at=index)
        first = self._open.pop(producer, None)
        if first is not None and not marker.committed:
            self._aborted.append(Aborted(producer, first, offset))
        _end(state, marker.producer_epoch)
        self._applied(producer, index)

    def _own_state(self, producer: ProducerId, epoch: int) -> ProducerState:
        """One that no snapshot under way shares."""
        state = self._table.get(producer)
        if state is None:
            state = self._table[producer] = ProducerState(epoch, captures=self._captures)
        elif state.captures != self._captures:  # a snapshot may still have to write it down
            state = self._table[producer] = state.copy(self._captures)
        return state

    def _applied(self, producer: ProducerId, index: LogIndex) -> None:
        self._table.move_to_end(producer)
        while len(self._table) > self._producers_max and self._forgot_one():
            pass
        ahead = self._overlay.get(producer)
        if ahead is not None and ahead.index <= index:
            del self._overlay[producer]

    def _forgot_one(self) -> bool:
        """Forget the least recently used producer that has no transaction open."""
        for producer in self._table:
            if producer not in self._open:
                del self._table[producer]
                return True
        return False

    # ---- transactions, for readers

    def last_stable_offset(self, high_watermark: RecordOffset) -> RecordOffset:
        """Below it, everything is decided: the start of the oldest open transaction, if any."""
        for first in self._open.values():
            return min(first, high_watermark)
        return high_watermark

    @property
    def open_transactions(self) -> dict[ProducerId, tuple[int, RecordOffset]]:
        """Epoch and first offset by producer, the oldest first."""
        return {one: (self._table[one].epoch, first) for one, first in self._open.items()}

    def aborted_from(
        self, offset: RecordOffset, end: RecordOffset
    ) -> tuple[list[Aborted], RecordOffset]:
        """The aborted ranges that overlap offsets `offset` to `end`, as many as may be told at
        once; and up to where these are all there are."""
        if not self._aborted or self._aborted[-1].last < offset:
            return [], end
        place = bisect_left(self._aborted, offset, key=_LAST)
        found = [one for one in self._aborted[place:] if one.first < end]
        if len(found) <= ABORTED_PER_FETCH_MAX:
            return found, end
        nearest = heapq.nsmallest(ABORTED_PER_FETCH_MAX + 1, found, key=_FIRST)
        return nearest[:-1], max(nearest[-1].first, RecordOffset(offset + 1))

    def forget_below(self, log_start: RecordOffset) -> None:
        """Nobody can read below any more."""
        if self._aborted and self._aborted[0].last < log_start:
            self._aborted = [one for one in self._aborted if one.last >= log_start]

    # ---- snapshots

    def drop_overlay(self) -> None:
        """Forget what is not committed: leadership is lost, or the entries were truncated."""
        self._overlay.clear()

    def slices(self) -> Iterator[list[Any]]:
        """The committed table as it is at the call, in pieces of bounded size, least recently used
        producers first. Producers that move on meanwhile do so on copies.
        """
        self._captures += 1
        return _slices(list(self._table.items()))

    def aborted_slices(self) -> Iterator[list[Any]]:
        """The aborted ranges as they are at the call."""
        return _aborted_slices(list(self._aborted))

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
        self._open.clear()
        self._aborted.clear()

    def add(self, piece: list[Any]) -> None:
        """Take in a piece of a snapshot, after those before it."""
        for number, epoch, batches, *later in piece:
            known = (KnownBatch(*values) for values in batches)
            state = ProducerState(epoch, deque(known, PRODUCER_WINDOW_BATCHES), self._captures)
            producer = ProducerId(number)
            self._table[producer] = state
            if later and later[0] != NOT_OPEN:
                state.open_since = self._open[producer] = RecordOffset(later[0])

    def add_aborted(self, piece: list[Any]) -> None:
        """Take in a piece of `aborted_slices`."""
        self._aborted.extend(Aborted(*values) for values in piece)

    def take_over(self, other: ProducerTable) -> None:
        """Become what another table is; it is not used any more."""
        self._overlay.clear()
        self._table, self._captures = other._table, other._captures
        self._open = dict(sorted(other._open.items(), key=lambda item: item[1]))
        self._aborted = other._aborted


def _slices(items: list[tuple[ProducerId, ProducerState]]) -> Iterator[list[Any]]:
    for start in range(0, len(items), SLICE_PRODUCERS):
        yield [
            [
                producer,
                state.epoch,
                [_values(known) for known in state.batches],
                NOT_OPEN if state.open_since is None else state.open_since,
            ]
            for producer, state in items[start : start + SLICE_PRODUCERS]
        ]


def _aborted_slices(aborted: list[Aborted]) -> Iterator[list[Any]]:
    for start in range(0, len(aborted), SLICE_ABORTED):
        yield [list(one) for one in aborted[start : start + SLICE_ABORTED]]


def _values(known: KnownBatch) -> list[int]:
    return [known.first, known.last, known.offset, known.index, known.time_ms]


def _judge(state: ProducerState | None, batch: BatchHeader) -> Decision:
    if batch.base_sequence < 0 or batch.producer_epoch < 0:
        return Decision(error=InvalidBatch("A batch with a producer id needs epoch and sequence."))
    if state is None:
        return APPEND if batch.base_sequence == 0 else Decision(error=_unknown(batch))
    if batch.producer_epoch < state.epoch:
        return Decision(error=_fenced(state, batch))
    transactional = bool(batch.attributes & TRANSACTIONAL_BIT)
    if batch.producer_epoch > state.epoch:
        if state.open_since is not None:
            return Decision(error=_still_open(state, batch))
        return APPEND if batch.base_sequence == 0 else Decision(error=_gap(0, batch))
    if not state.batches:  # the epoch that a marker has given it
        return APPEND if batch.base_sequence == 0 else Decision(error=_gap(0, batch))
    if transactional != (state.open_since is not None):
        return Decision(error=_mixed(batch))
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
    if batch.attributes & TRANSACTIONAL_BIT and state.open_since is None:
        state.open_since = offset
    first = batch.base_sequence
    state.batches.append(KnownBatch(first, _last_sequence(batch), offset, index, time_ms))


def _end(state: ProducerState, epoch: int) -> None:
    """A marker: whatever was open has ended, and nothing of it is accepted any more."""
    state.epoch = epoch
    state.batches.clear()
    state.open_since = None


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


def _still_open(state: ProducerState, batch: BatchHeader) -> NotReady:
    return NotReady(
        f"The transaction of epoch {state.epoch} of producer {batch.producer_id} has no marker here"
        " yet; it is on its way.",
        have=state.epoch,
        got=batch.producer_epoch,
    )


def _mixed(batch: BatchHeader) -> InvalidBatch:
    return InvalidBatch(
        f"Epoch {batch.producer_epoch} of producer {batch.producer_id} is a transaction, or is"
        " none; batches of both kinds do not go together.",
        producer_id=batch.producer_id,
    )


def _gap(wanted: int, batch: BatchHeader) -> OutOfOrderSequence:
    return OutOfOrderSequence(
        f"Producer {batch.producer_id} sent sequence {batch.base_sequence} where {wanted} was due;"
        " a batch before it is missing.",
        have=batch.base_sequence,
        want=wanted,
    )
