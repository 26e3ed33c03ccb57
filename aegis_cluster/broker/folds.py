"""The state that a partition folds over its committed frames, whatever its kind.

A fold is applied on every replica in index order; the leader alone may look ahead of what is
committed (see `producer_stm`). Everything it keeps can be written to a snapshot and read back, in
*slices*: pieces of bounded size, all of one moment, made and taken in one after the other, so that
a shard's loop is never held up by the size of a state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from aegis_cluster.broker.events.event_stm import EventFold
from aegis_cluster.broker.feed_stm import FeedTable
from aegis_cluster.broker.producer_stm import ProducerTable
from aegis_cluster.errors import CorruptLog, PeerViolation
from aegis_cluster.ids import RecordOffset
from aegis_cluster.storage.checked_file import pack_body, unpack_body
from aegis_cluster.wire.layout import CONTROL_BIT
from aegis_cluster.wire.markers import Marker, decode_marker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader

SNAPSHOT_VERSION: Final = 4
"""1 held the state in one body; 2 knew no transactions; 3 had positions of groups row by row."""
PRODUCERS: Final = "producers"
ABORTED: Final = "aborted"
FOLD: Final = "fold"
FEED: Final = "feed"
EVENTS: Final = "events"


class FoldLoader(Protocol):
    """Takes in the slices of one fold; nothing is changed before `finish`."""

    def add(self, piece: list[Any]) -> None: ...

    def finish(self) -> None: ...


class Fold(Protocol):
    """What a kind of partition adds to its producer table."""

    def apply(self, header: FrameHeader, batch: BatchHeader, payload: memoryview) -> None: ...

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """A transaction that this log takes part in is committed or aborted."""

    def leadership_lost(self) -> None: ...

    def slices(self) -> Iterator[list[Any]]:
        """The state as it is at the call, whatever is applied while it is read."""

    def loader(self) -> FoldLoader: ...

    def load_body(self, body: Any) -> None: ...


class PartitionState:
    """Everything folded over one partition: its producers, its streams of events, the position of
    its source where it is a change feed, and its kind's own fold, if any.

    A partition's kind is not known before the cluster's metadata is; so every one can hold streams
    or a position, and only those whose frames name some do.
    """

    def __init__(self, fold: Fold | None = None) -> None:
        self.producers = ProducerTable()
        self.events = EventFold()
        self.feed = FeedTable()
        self.fold = fold

    def apply(
        self,
        header: FrameHeader,
        batch: BatchHeader,
        payload: memoryview,
        annotation: memoryview | bytes = b"",
    ) -> None:
        """Fold one committed DATA frame."""
        if annotation:
            self.feed.apply(annotation, header.index)
            self.events.apply(header, batch, annotation)
        if batch.attributes & CONTROL_BIT:
            self._end_transaction(header, batch, payload)
            return
        self.producers.apply(
            batch,
            index=header.index,
            offset=RecordOffset(batch.base_offset),
            time_ms=header.time_ms,
        )
        if self.fold is not None:
            self.fold.apply(header, batch, payload)

    def _end_transaction(
        self, header: FrameHeader, batch: BatchHeader, payload: memoryview
    ) -> None:
        marker = decode_marker(payload)
        offset = RecordOffset(batch.base_offset)
        self.producers.end_transaction(marker, index=header.index, offset=offset)
        self.events.transaction_ended(header, marker)
        if self.fold is not None:
            self.fold.transaction_ended(header, marker)

    def leadership_lost(self) -> None:
        """Drop what was decided ahead of the commit."""
        self.producers.drop_overlay()
        self.events.leadership_lost()
        self.feed.drop_ahead()
        if self.fold is not None:
            self.fold.leadership_lost()

    def slices(self) -> Iterator[bytes]:
        """The state as it is at the call; each piece is encoded when it is asked for."""
        producers, aborted = self.producers.slices(), self.producers.aborted_slices()
        events, feed = self.events.slices(), self.feed.slices()
        fold = self.fold.slices() if self.fold is not None else iter(())
        return _encoded(
            (PRODUCERS, producers), (ABORTED, aborted), (EVENTS, events), (FEED, feed), (FOLD, fold)
        )

    def to_body(self) -> list[bytes]:
        """All of it at once, for a comparison."""
        return list(self.slices())

    def loader(self) -> StateLoader:
        """Takes in the slices of a state that is to take this one's place."""
        return StateLoader(self)

    def load_body(self, body: list[Any]) -> None:
        """What snapshots without slices hold (version 1)."""
        version, producers, fold = body
        _check_version(version, at_most=1)
        self.producers.load_body(producers)
        if self.fold is not None:
            self.fold.load_body(fold)


def _encoded(*parts: tuple[str, Iterator[list[Any]]]) -> Iterator[bytes]:
    for kind, pieces in parts:
        for piece in pieces:
            yield pack_body([SNAPSHOT_VERSION, kind, piece])


class StateLoader:
    """See `PartitionState.loader`."""

    def __init__(self, state: PartitionState) -> None:
        self._state = state
        self._producers = ProducerTable()
        self._feed = FeedTable()
        self._events = state.events.loader()
        self._fold = state.fold.loader() if state.fold is not None else None

    def add(self, data: bytes) -> None:
        """One slice, in its turn. Raises `CorruptLog`."""
        try:
            version, kind, piece = unpack_body(data)
            _check_version(version, at_most=SNAPSHOT_VERSION)
            if kind == PRODUCERS:
                self._producers.add(piece)
            elif kind == FEED:
                self._feed.add(piece)
            elif kind == ABORTED:
                self._producers.add_aborted(piece)
            elif kind == EVENTS:
                self._events.add(piece)
            elif kind == FOLD and self._fold is not None:
                self._fold.add(piece)
            else:
                raise ValueError(f"{kind!r} is nothing that is kept here")
        except (TypeError, ValueError, KeyError, PeerViolation) as error:
            raise CorruptLog(f"A slice of a snapshot is malformed: {error}.") from error

    def finish(self) -> None:
        """All slices are in: from now on the state is this one."""
        self._state.producers.take_over(self._producers)
        self._events.finish()
        self._state.feed.take_over(self._feed)
        if self._fold is not None:
            self._fold.finish()


def _check_version(version: int, *, at_most: int) -> None:
    if version > at_most:
        raise CorruptLog(
            f"A snapshot has version {version}; this program reads up to {at_most}."
            " Run a newer aegis-cluster."
        )
