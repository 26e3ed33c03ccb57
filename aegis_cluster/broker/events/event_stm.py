"""Streams of one partition: how far each is, what was decided about it, and the newest event ids.

The idea (DESIGN §2): the table is folded over committed frames and so is the same on every replica;
a leader decides on the table and the *overlay*, what it has appended and not seen committed. An
answer that rests on the overlay waits for that entry's commit, refusals included.

An append of a transaction *holds* its streams, those it only depends on included, until the marker
comes: nothing else is appended to them meanwhile, so its versions are known when it is prepared and
nobody has to be told other ones, or none, later.

The rule it protects: versions of a stream start at 0 and have no gap, one append wins each version,
and an event id that is remembered is never stored twice in its stream.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import (
    CorruptRecord,
    InvalidBatch,
    InvariantBroken,
    Refused,
    StreamDeleted,
    StreamHeld,
    Throttled,
    WrongExpectedVersion,
    invariant,
)
from aegis_cluster.ids import LogIndex, ProducerId, RecordOffset
from aegis_cluster.limits import EVENT_IDS_REMEMBERED, STREAMS_PER_PARTITION_MAX
from aegis_cluster.storage.compaction_job import Hidden
from aegis_cluster.wire.event_frames import (
    ANY,
    BEFORE,
    DELETED,
    EVENT_ID_BYTES,
    EXISTS,
    MAX_AGE_MS,
    MAX_COUNT,
    NO_STREAM,
    SETTINGS_PREFIX,
    TOMBSTONE,
    StreamEvents,
    decode_annotation,
)
from aegis_cluster.wire.layout import CONTROL_BIT, TRANSACTIONAL_BIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.wire.batch import BatchHeader
    from aegis_cluster.wire.frame import FrameHeader
    from aegis_cluster.wire.layout import Bytes
    from aegis_cluster.wire.markers import Marker

SLICE_ROWS: Final = 2_000
"""In one slice of a snapshot: about a millisecond's work."""
_STREAMS: Final = "streams"
_SETTINGS: Final = "settings"
_KNOWN: Final = "known"
_PREPARED: Final = "prepared"


class StreamState(NamedTuple):
    """version: of the last event. index: the frame that holds it."""

    version: int
    index: LogIndex  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """before: events below that version are not shown any more. deleted: hidden until the next
    append; tombstone: nothing is ever appended again."""

    before: int = 0
    deleted: bool = False
    tombstone: bool = False
    max_count: int | None = None
    max_age_ms: int | None = None

    def first_shown(self, last: int) -> int:
        """The lowest version that is shown while `last` is the newest, whatever is too old."""
        if self.max_count is None:
            return self.before
        return max(self.before, last + 1 - self.max_count)

    def hidden_below(self, last: int) -> int:
        """As `first_shown`; of a stream that was deleted nothing is."""
        return last + 1 if self.deleted or self.tombstone else self.first_shown(last)


NOTHING_SET: Final = StreamSettings()


class Append(NamedTuple):
    """What one call wants of one stream; without ids it is only a condition."""

    stream: str
    expected: int
    ids: bytes
    marks: dict[str, Any] | None = None


class Known(NamedTuple):
    """Events of one stream that were appended together; offset: of the first of them."""

    stream: str
    first: int
    ids: bytes
    index: LogIndex  # type: ignore[assignment]  # hides tuple.index
    offset: RecordOffset
    time_ms: int

    @property
    def last(self) -> int:
        return self.first + len(self.ids) // EVENT_ID_BYTES - 1


class Prepared(NamedTuple):
    """What one transaction has appended here, in one frame; those without ids it depends on."""

    streams: tuple[StreamEvents, ...]
    index: LogIndex  # type: ignore[assignment]  # hides tuple.index
    offset: RecordOffset
    time_ms: int


class _Place(NamedTuple):
    """One event among those that were appended together."""

    known: Known
    place: int

    @property
    def version(self) -> int:
        return self.known.first + self.place


class Decision(NamedTuple):
    """Append `placed`, or answer as before with `known`, or refuse with `error`.

    wait_for: an answer that appends nothing may leave once this index is committed; 0 = at once.
    """

    placed: tuple[StreamEvents, ...] = ()
    known: tuple[Known, ...] = ()
    error: Refused | None = None
    wait_for: LogIndex = LogIndex(0)


class EventFold:
    """One per partition of a user's topic; it costs nothing until events come.

    `decide` and `appended` on a leader, `apply` on every replica.
    """

    def __init__(
        self,
        *,
        streams_max: int = STREAMS_PER_PARTITION_MAX,
        remembered: int = EVENT_IDS_REMEMBERED,
    ) -> None:
        self._streams_max = streams_max
        self._remembered = remembered
        self._table = _Table()
        self._ahead: dict[str, StreamState] = {}
        self._ahead_settings: dict[str, tuple[StreamSettings, LogIndex]] = {}
        self._ahead_known: dict[bytes, Known] = {}
        self._ahead_prepared: dict[ProducerId, Prepared] = {}
        self._ahead_held: set[str] = set()

    # ---- questions

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever folded here."""
        return not self._table.streams

    def stream(self, name: str) -> StreamState | None:
        """As committed."""
        return self._table.streams.get(name)

    def settings(self, name: str) -> StreamSettings:
        """As committed."""
        return self._table.settings.get(name, NOTHING_SET)

    @property
    def hidden_events(self) -> int:
        """How many events of all streams are not shown any more, but for those that are too old."""
        return self._table.hidden_events

    @property
    def has_max_ages(self) -> bool:
        """Whether any stream hides what is too old."""
        return bool(self._table.max_ages)

    def hidden(self, now_ms: int) -> Hidden:
        """What is not shown any more, as committed."""
        table = self._table
        too_old = {name: now_ms - age_ms for name, age_ms in table.max_ages.items()}
        return Hidden(dict(table.hidden), too_old)

    def is_held(self, name: str) -> bool:
        """Whether a transaction has prepared events of a stream, as committed, and not ended."""
        return name in self._table.held

    def prepared_by(self, producer: ProducerId) -> Prepared | None:
        """What the open transaction of a producer has appended here, committed or not."""
        return self._ahead_prepared.get(producer) or self._table.prepared.get(producer)

    # ---- a leader's decisions

    def decide(self, appends: Sequence[Append], *, transaction: bool = False) -> Decision:
        """Judge one call against all that is appended, committed or not; all of it or nothing.

        transaction: `placed` also has the streams that it only depends on, to be held.
        """
        names = [append.stream for append in appends]
        if len(set(names)) != len(names):
            return Decision(error=InvalidBatch("An append names a stream twice."))
        known = self._all_known(appends)
        if known:
            return Decision(known=known, wait_for=max(one.index for one in known))
        for append in appends:
            decision = self._check(append)
            if decision is not None:
                return decision
        wanted = (append for append in appends if append.ids or transaction)
        return Decision(placed=tuple(map(self._placed, wanted)))

    def _state(self, name: str) -> StreamState | None:
        return self._ahead.get(name) or self._table.streams.get(name)

    def _settings_ahead(self, name: str) -> StreamSettings:
        ahead = self._ahead_settings.get(name)
        return ahead[0] if ahead is not None else self.settings(name)

    def _depends_on(self, name: str) -> LogIndex:
        """The newest uncommitted entry that says something about a stream."""
        ahead, settings = self._ahead.get(name), self._ahead_settings.get(name)
        return LogIndex(max(ahead.index if ahead else 0, settings[1] if settings else 0))

    def _all_known(self, appends: Sequence[Append]) -> tuple[Known, ...]:
        """Where all of these events stand already; nothing unless that goes for each of them."""
        found = [self._where(append) for append in appends if append.ids]
        known = tuple(one for one in found if one is not None)
        return known if len(known) == len(found) else ()

    def _where(self, append: Append) -> Known | None:
        """Where the events of one stream stand, in their order and with nothing between them."""
        first = self._find(append.stream, append.ids[:EVENT_ID_BYTES])
        if first is None:
            return None
        start, index = first
        version, offset = start.version, RecordOffset(start.known.offset + start.place)
        for number, position in enumerate(range(0, len(append.ids), EVENT_ID_BYTES)):
            found = self._find(append.stream, append.ids[position : position + EVENT_ID_BYTES])
            if found is None or found[0].version != version + number:
                return None
            index = max(index, found[1])
        return Known(append.stream, version, append.ids, index, offset, start.known.time_ms)

    def _find(self, stream: str, event_id: bytes) -> tuple[_Place, LogIndex] | None:
        key = _key(stream, event_id)
        known = self._ahead_known.get(key) or self._table.known.get(key)
        return None if known is None else (_place_of(event_id, known), known.index)

    def _check(self, append: Append) -> Decision | None:
        """None where the append may be done."""
        name = append.stream
        state, settings = self._state(name), self._settings_ahead(name)
        error: Refused | None = None
        if name in self._table.held or name in self._ahead_held:
            return Decision(error=_held(name))
        if settings.tombstone and append.ids:
            error = StreamDeleted(
                f"Stream {name!r} was deleted for ever; nothing is appended to it any more. Use"
                " another name.",
                stream=name,
            )
        elif not _is_met(append.expected, state, settings):
            error = _wrong_version(append, state, settings)
        elif state is None and append.ids and len(self._table.streams) >= self._streams_max:
            error = Throttled(
                f"This partition holds {self._streams_max} streams, as many as it may. Make the"
                " topic with more partitions.",
                at_most=self._streams_max,
            )
        else:
            error = self._repeated_id(append)
        return None if error is None else Decision(error=error, wait_for=self._depends_on(name))

    def _repeated_id(self, append: Append) -> Refused | None:
        seen = set()
        for position in range(0, len(append.ids), EVENT_ID_BYTES):
            event_id = append.ids[position : position + EVENT_ID_BYTES]
            if event_id in seen:
                return InvalidBatch(f"An append to {append.stream!r} has an event id twice.")
            seen.add(event_id)
            found = self._find(append.stream, event_id)
            if found is not None:
                return _id_taken(append, event_id, found[0], self._state(append.stream))
        return None

    def _placed(self, append: Append) -> StreamEvents:
        state = self._state(append.stream)
        first = 0 if state is None else state.version + 1
        marks = append.marks
        if marks is not None and marks.get(DELETED):
            subject = self._state(append.stream.removeprefix(SETTINGS_PREFIX))
            marks = {**marks, BEFORE: 0 if subject is None else subject.version + 1}
        return StreamEvents(append.stream, first, append.ids, marks)

    def appended(
        self,
        placed: Sequence[StreamEvents],
        *,
        index: LogIndex,
        offset: RecordOffset,
        time_ms: int,
        producer: ProducerId | None = None,
    ) -> None:
        """Note what the leader has just put into its log. producer: whose transaction it is."""
        if producer is not None:
            self._ahead_prepared[producer] = Prepared(tuple(placed), index, offset, time_ms)
            self._ahead_held.update(one.stream for one in placed)
            return
        for one in placed:
            self._ahead[one.stream] = StreamState(one.last, index)
            known = Known(one.stream, one.first, one.ids, index, offset, time_ms)
            for key in _keys(known):
                self._ahead_known[key] = known
            offset = RecordOffset(offset + one.count)
            name, settings = _decided(one, self._settings_ahead)
            if settings is not None:
                self._ahead_settings[name] = (settings, index)

    def leadership_lost(self) -> None:
        """Drop what was decided ahead of the commit."""
        self._ahead.clear()
        self._ahead_settings.clear()
        self._ahead_known.clear()
        self._ahead_prepared.clear()
        self._ahead_held.clear()

    # ---- every replica

    def apply(self, header: FrameHeader, batch: BatchHeader, annotation: Bytes) -> None:
        """Fold one committed frame."""
        if batch.attributes & CONTROL_BIT:
            return
        offset = RecordOffset(batch.base_offset)
        streams = decode_annotation(annotation)
        if batch.attributes & TRANSACTIONAL_BIT:
            prepared = Prepared(tuple(streams), header.index, offset, header.time_ms)
            self._prepare(ProducerId(batch.producer_id), prepared)
            return
        self._apply_all(streams, header.index, offset, header.time_ms)

    def _prepare(self, producer: ProducerId, prepared: Prepared) -> None:
        invariant(producer not in self._table.prepared, "a transaction appends once in a partition")
        for one in prepared.streams:
            invariant(
                one.stream not in self._table.held, "a stream is held once", stream=one.stream
            )
        self._table.prepare(producer, prepared)
        ahead = self._ahead_prepared.get(producer)
        if ahead is not None and ahead.index <= prepared.index:
            del self._ahead_prepared[producer]
        self._ahead_held.difference_update(one.stream for one in prepared.streams)

    def transaction_ended(self, header: FrameHeader, marker: Marker) -> None:
        """Fold a marker: what its producer has prepared is appended now, or never was."""
        prepared = self._table.end(ProducerId(marker.producer_id))
        if prepared is not None and marker.committed:
            events = [one for one in prepared.streams if one.ids]
            self._apply_all(events, header.index, prepared.offset, prepared.time_ms)

    def _apply_all(
        self, streams: Sequence[StreamEvents], index: LogIndex, offset: RecordOffset, time_ms: int
    ) -> None:
        for one in streams:
            self._apply(one, index, offset, time_ms)
            offset = RecordOffset(offset + one.count)

    def _apply(
        self, one: StreamEvents, index: LogIndex, offset: RecordOffset, time_ms: int
    ) -> None:
        table = self._table
        state = table.streams.get(one.stream)
        want = 0 if state is None else state.version + 1
        invariant(one.first == want, "a version was left out or given twice", stream=one.stream)
        table.streams[one.stream] = StreamState(one.last, index)
        known = Known(one.stream, one.first, one.ids, index, offset, time_ms)
        keys = table.remember(known, self._remembered)
        name, settings = _decided(one, self.settings)
        if settings is not None:
            table.settings[name] = settings
        table.note_hidden(name)
        if self._ahead:
            self._drop_ahead(one.stream, name, index, keys)

    def _drop_ahead(self, stream: str, subject: str, index: LogIndex, keys: list[bytes]) -> None:
        ahead = self._ahead.get(stream)
        if ahead is not None and ahead.index <= index:
            del self._ahead[stream]
        decided = self._ahead_settings.get(subject)
        if decided is not None and decided[1] <= index:
            del self._ahead_settings[subject]
        for key in keys:
            self._ahead_known.pop(key, None)

    # ---- snapshots

    def slices(self) -> Iterator[list[Any]]:
        """The committed table as it is at the call, in pieces of bounded size."""
        return self._table.slices()

    def loader(self) -> EventLoader:
        return EventLoader(self)

    def replace(self, table: _Table) -> None:
        """Become what a snapshot holds."""
        for name in table.settings:
            table.note_hidden(name)
        self._table = table
        self.leadership_lost()


class EventLoader:
    """A table that takes the place of a fold's once it is complete."""

    def __init__(self, fold: EventFold) -> None:
        self._fold = fold
        self._table = _Table()

    def add(self, piece: list[Any]) -> None:
        self._table.add(piece)

    def finish(self) -> None:
        self._fold.replace(self._table)


class _Table:
    """What is committed."""

    def __init__(self) -> None:
        self.streams: dict[str, StreamState] = {}
        self.settings: dict[str, StreamSettings] = {}
        self.known: dict[bytes, Known] = {}
        self.prepared: dict[ProducerId, Prepared] = {}
        """By the producers whose transactions are open here."""
        self.held: set[str] = set()
        """The streams in `prepared`."""
        self.hidden: dict[str, int] = {}
        """The first version that is shown, of streams that hide some by their versions."""
        self.hidden_events = 0
        self.max_ages: dict[str, int] = {}
        """Milliseconds, of streams that hide what is older."""
        self._order: deque[tuple[Known, list[bytes]]] = deque()
        """What is in `known`, oldest first, and by which keys."""
        self._remembered = 0

    def remember(self, known: Known, at_most: int) -> list[bytes]:
        """Keep the newest event ids, so many at most, whatever their streams; the keys of these."""
        keys = _keys(known)
        self._order.append((known, keys))
        self._remembered += len(keys)
        for key in keys:
            self.known[key] = known
        while self._remembered > at_most:
            oldest, old_keys = self._order.popleft()
            self._remembered -= len(old_keys)
            for key in old_keys:
                if self.known.get(key) is oldest:
                    del self.known[key]
        return keys

    def note_hidden(self, name: str) -> None:
        """A stream, or what was decided about it, has changed."""
        settings, state = self.settings.get(name), self.streams.get(name)
        if settings is None or state is None:
            return
        below = settings.hidden_below(state.version)
        self.hidden_events += below - self.hidden.pop(name, 0)
        if below:
            self.hidden[name] = below
        if settings.max_age_ms is not None:
            self.max_ages[name] = settings.max_age_ms
        else:
            self.max_ages.pop(name, None)

    def prepare(self, producer: ProducerId, prepared: Prepared) -> None:
        self.prepared[producer] = prepared
        self.held.update(one.stream for one in prepared.streams)

    def end(self, producer: ProducerId) -> Prepared | None:
        """What a producer had prepared, which is held no longer."""
        prepared = self.prepared.pop(producer, None)
        if prepared is not None:
            self.held.difference_update(one.stream for one in prepared.streams)
        return prepared

    def slices(self) -> Iterator[list[Any]]:
        return _slices(
            (_STREAMS, list(self.streams.items())),
            (_SETTINGS, list(self.settings.items())),
            (_KNOWN, [known for known, _ in self._order]),
            (_PREPARED, list(self.prepared.items())),
        )

    def add(self, piece: list[Any]) -> None:
        kind, rows = piece
        if kind == _STREAMS:
            for name, version, index in rows:
                self.streams[name] = StreamState(version, index)
        elif kind == _SETTINGS:
            for name, *values in rows:
                self.settings[name] = StreamSettings(*values)
        elif kind == _KNOWN:
            for row in rows:
                known = Known(*row)
                self.remember(known, self._remembered + len(known.ids) // EVENT_ID_BYTES)
        elif kind == _PREPARED:
            for producer, streams, *place in rows:
                events = tuple(StreamEvents(*one) for one in streams)
                self.prepare(producer, Prepared(events, *place))
        else:
            raise CorruptRecord(f"{kind!r} is nothing that an event store keeps.")


def _slices(*tables: tuple[str, list[Any]]) -> Iterator[list[Any]]:
    for kind, rows in tables:
        for start in range(0, len(rows), SLICE_ROWS):
            yield [kind, [_values(kind, row) for row in rows[start : start + SLICE_ROWS]]]


def _values(kind: str, row: Any) -> list[Any]:
    if kind == _STREAMS:
        name, state = row
        return [name, *state]
    if kind == _SETTINGS:
        name, one = row
        return [name, one.before, one.deleted, one.tombstone, one.max_count, one.max_age_ms]
    if kind == _PREPARED:
        producer, prepared = row
        return [producer, list(map(list, prepared.streams)), *prepared[1:]]
    return list(row)


def _key(stream: str, event_id: bytes) -> bytes:
    return event_id + stream.encode()


def _keys(known: Known) -> list[bytes]:
    name, ids = known.stream.encode(), known.ids
    return [ids[at : at + EVENT_ID_BYTES] + name for at in range(0, len(ids), EVENT_ID_BYTES)]


def _place_of(event_id: bytes, known: Known) -> _Place:
    ids = known.ids
    for place in range(len(ids) // EVENT_ID_BYTES):
        if ids[place * EVENT_ID_BYTES : (place + 1) * EVENT_ID_BYTES] == event_id:
            return _Place(known, place)
    raise InvariantBroken("a remembered event id is among those it was appended with")


def _is_met(expected: int, state: StreamState | None, settings: StreamSettings) -> bool:
    """Whether a stream is as an append expects it to be."""
    version = NO_STREAM if state is None else state.version
    is_there = state is not None and not settings.deleted and not settings.tombstone
    if expected == ANY:
        return True
    if expected == EXISTS:
        return is_there
    if expected == NO_STREAM:
        return not is_there
    return version == expected


def _held(name: str) -> StreamHeld:
    return StreamHeld(
        f"Stream {name!r} is held by a transaction that is about to end; ask again.", stream=name
    )


def _wrong_version(
    append: Append, state: StreamState | None, settings: StreamSettings
) -> WrongExpectedVersion:
    have = NO_STREAM if state is None else state.version
    wanted = {EXISTS: "to exist", NO_STREAM: "not to exist"}.get(
        append.expected, f"to be at version {append.expected}"
    )
    is_at = "does not exist" if state is None else f"is at version {have}"
    if settings.deleted or settings.tombstone:
        is_at = f"was deleted at version {have}"
    return WrongExpectedVersion(
        f"Stream {append.stream!r} was expected {wanted}, and {is_at}; nothing was appended. Load"
        " it, decide anew, append.",
        stream=append.stream,
        expected=append.expected,
        actual=have,
    )


def _id_taken(
    append: Append, event_id: bytes, place: _Place, state: StreamState | None
) -> WrongExpectedVersion:
    return WrongExpectedVersion(
        f"An event of this append is version {place.version} of {append.stream!r} already,"
        " together with others; nothing was appended. Give each event an id of its own.",
        stream=append.stream,
        expected=append.expected,
        actual=NO_STREAM if state is None else state.version,
        event_id=event_id.hex(),
    )


def _decided(
    one: StreamEvents, settings_of: Callable[[str], StreamSettings]
) -> tuple[str, StreamSettings | None]:
    """The stream that a frame says something about, and what holds for it from then on.

    An append to a stream that was deleted softly begins it anew, above what is hidden.
    """
    if not one.stream.startswith(SETTINGS_PREFIX):
        old = settings_of(one.stream)
        if not old.deleted:
            return one.stream, None
        return one.stream, StreamSettings(
            old.before, False, old.tombstone, old.max_count, old.max_age_ms
        )
    name, marks = one.stream.removeprefix(SETTINGS_PREFIX), one.marks or {}
    old = settings_of(name)
    return name, StreamSettings(
        max(old.before, marks.get(BEFORE, 0)),
        bool(marks.get(DELETED, old.deleted)),
        bool(marks.get(TOMBSTONE, old.tombstone)),
        marks.get(MAX_COUNT, old.max_count),
        marks.get(MAX_AGE_MS, old.max_age_ms),
    )
