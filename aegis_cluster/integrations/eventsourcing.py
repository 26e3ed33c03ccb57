"""Persistence for the Python library `eventsourcing`: its aggregates and applications on our logs.

Its users switch by one environment variable, and a second one says where the events are:

    PERSISTENCE_MODULE=aegis_cluster.integrations.eventsourcing
    AEGIS_BOOTSTRAP=tcp://127.0.0.1:7101,tcp://127.0.0.1:7201    # a cluster; or
    AEGIS_DIRECTORY=./my-events                                   # files of this process alone

Without either, the files lie in `./eventsourcing-data`. An application's events are one topic of
kind `eventstore` with one partition (`<application>_events`, `stored_events` without a name), so
that they have one order (`AEGIS_TOPIC_PREFIX` goes before such names, to keep several systems apart
on one cluster): the id of a notification is the offset of its event plus one. Several
aggregates that are saved together are one frame of it.

The rule it protects: an aggregate's version is recorded once, whoever else writes; and tracking
ids are recorded in the same step as the events that came of them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    DataError,
    InfrastructureFactory,
    IntegrityError,
    InterfaceError,
    Notification,
    OperationalError,
    PersistenceError,
    ProcessRecorder,
    ProgrammingError,
    StoredEvent,
    Subscription,
    Tracking,
    TrackingRecorder,
)
from eventsourcing.utils import resolve_topic

from aegis_cluster.errors import (
    AegisError,
    MessageTooLarge,
    Misuse,
    UnsupportedPayload,
    WrongExpectedVersion,
)
from aegis_cluster.event import Event, ExpectedVersion
from aegis_cluster.integrations.shared_engine import SharedEngine, shared_engine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    from aegis_cluster.event.store import EventStore

BOOTSTRAP: Final = "AEGIS_BOOTSTRAP"
DIRECTORY: Final = "AEGIS_DIRECTORY"
TOPIC_PREFIX: Final = "AEGIS_TOPIC_PREFIX"
DIRECTORY_DEFAULT: Final = "eventsourcing-data"
TRACKING_PREFIX: Final = "~tracking:"
"""Streams of an application's topic that hold what it has processed of others."""
TRACKING_TYPE: Final = "Tracking"
WAIT_MS: Final = 1_000
TIPS_MAX: Final = 10_000
"""Aggregates whose last version a recorder remembers, so that saving them needs no question."""
TRIES_MAX: Final = 20
"""Of one insert, when others insert beside it what does not contradict it."""

_VERSION: Final = "version"
_IS_UUID: Final = "uuid"
_UNORDERED: Final = "unordered"


class _Tip(NamedTuple):
    """Where a stream ends. version: ours. highest: of the library's versions in it. unordered:
    these do not rise all along (snapshots may be taken of the past)."""

    version: int = ExpectedVersion.NO_STREAM
    highest: int = -1
    unordered: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether each of the library's versions is ours or one above ours: they rise by one from 0
        or 1 on, nearly always."""
        return not self.unordered and self.highest - self.version <= 1


class _Datastore:
    """One topic of a shared engine, for threads; and the errors of the library for ours."""

    def __init__(self, engine: SharedEngine, topic: str) -> None:
        self._engine = engine
        self.store: EventStore = engine.store(topic)
        self._tips: OrderedDict[str, _Tip] = OrderedDict()

    def run(self, work: Any) -> Any:
        """Do it on the engine's loop and wait. Raises what the library calls such errors."""
        try:
            return self._engine.run(work)
        except AegisError as error:
            raise _their_error(error) from error

    def submit(self, work: Any) -> Future[Any]:
        return self._engine.submit(work)

    # ---- streams

    def insert(self, events: Mapping[str, Sequence[tuple[int, Event]]]) -> dict[str, int]:
        """Append events with versions of the library's, all or nothing; the offsets of the first
        of each stream. Raises `IntegrityError` where a version is taken."""
        streams = list(events)
        tips = {stream: self._tips.get(stream) for stream in streams}
        for _ in range(TRIES_MAX):
            known = {stream: tip or _Tip() for stream, tip in tips.items()}
            try:
                for stream in streams:
                    _mark(events[stream], known[stream])
                    if tips[stream] is None or known[stream].version < 0:
                        continue
                    self._check_free(stream, events[stream], known[stream])
                return self._append(events, known)
            except WrongExpectedVersion as error:
                tips[error.stream] = self._tip_of(error.stream)
                self._check_free(error.stream, events[error.stream], tips[error.stream] or _Tip())
        raise OperationalError(f"Others insert into {streams} all the time; try again.")

    def _append(
        self, events: Mapping[str, Sequence[tuple[int, Event]]], tips: Mapping[str, _Tip]
    ) -> dict[str, int]:
        try:
            done = self._engine.run(
                self.store.append_many(
                    {stream: [event for _, event in rows] for stream, rows in events.items()},
                    {stream: tip.version for stream, tip in tips.items()},
                )
            )
        except WrongExpectedVersion:
            raise
        except AegisError as error:
            for stream in events:
                self._tips.pop(stream, None)
            raise _their_error(error) from error
        for stream, rows in events.items():
            old = tips[stream]
            highest = max(old.highest, *(version for version, _ in rows))
            unordered = old.unordered or rows[0][0] <= old.highest
            self._remember(stream, _Tip(done[stream].version, highest, unordered))
        return {stream: one.offset for stream, one in done.items()}

    def _remember(self, stream: str, tip: _Tip) -> None:
        self._tips[stream] = tip
        self._tips.move_to_end(stream)
        while len(self._tips) > TIPS_MAX:
            self._tips.popitem(last=False)

    def _tip_of(self, stream: str) -> _Tip:
        """As it is stored."""
        last = self.run(self.store.load(stream, backwards=True, limit=1))
        if not last:
            return _Tip()
        unordered = bool(last[0].metadata.get(_UNORDERED))
        highest = last[0].metadata[_VERSION]
        if unordered:
            found = self.run(self.store.load(stream))
            highest = max(event.metadata[_VERSION] for event in found)
        tip = _Tip(last[0].version, highest, unordered)
        self._remember(stream, tip)
        return tip

    def _check_free(self, stream: str, rows: Sequence[tuple[int, Event]], tip: _Tip) -> None:
        """Raise `IntegrityError` if any of these versions is recorded."""
        versions = {version for version, _ in rows}
        if min(versions) > tip.highest:
            return
        taken = set(map(_version_of, self._those_at(stream, versions, tip)))
        if versions & taken:
            raise IntegrityError(
                f"Versions {sorted(versions & taken)} of {stream} are recorded already."
            )

    def _those_at(self, stream: str, versions: set[int], tip: _Tip) -> list[Event]:
        """Events among which those of these versions are, if there are any."""
        first, count = 0, None
        if tip.is_dense:
            first = max(0, min(versions) - 1)
            count = max(versions) - first + 1
        found: list[Event] = self.run(self.store.load(stream, from_version=first, limit=count))
        return found

    def load(
        self, stream: str, *, gt: int | None, lte: int | None, desc: bool, limit: int | None
    ) -> list[Event]:
        """Events of a stream by the library's versions."""
        if gt is None and lte is None and not (desc and limit):
            found = self.run(self.store.load(stream))
        elif gt is None and lte is None:
            found = self.run(self.store.load(stream, backwards=True, limit=limit))
            if any(event.metadata.get(_UNORDERED) for event in found):
                found = self.run(self.store.load(stream))
        else:
            tip = self._tip_of(stream)
            found = self._load_some(stream, tip, gt=gt, lte=lte, desc=desc, limit=limit)
        if any(event.metadata.get(_UNORDERED) for event in found):
            found.sort(key=_version_of, reverse=desc)
        found = [
            event
            for event in found
            if (gt is None or _version_of(event) > gt)
            and (lte is None or _version_of(event) <= lte)
        ]
        return found if limit is None else found[:limit]

    def _load_some(
        self,
        stream: str,
        tip: _Tip,
        *,
        gt: int | None,
        lte: int | None,
        desc: bool,
        limit: int | None,
    ) -> list[Event]:
        """All that may be wanted, and where that can be told not much more."""
        if tip.version < 0:
            return []
        if not tip.is_dense:
            return sorted(self.run(self.store.load(stream)), key=_version_of, reverse=desc)
        low = 0 if gt is None else max(0, gt)
        high = tip.version if lte is None else min(tip.version, lte)
        if low > high:
            return []
        count = high - low + 1
        if limit is not None:
            count = min(count, limit + 1)
        start = high if desc else low
        load = self.store.load(stream, from_version=start, backwards=desc, limit=count)
        found: list[Event] = self.run(load)
        return found


def _version_of(event: Event) -> int:
    version: int = event.metadata[_VERSION]
    return version


def _mark(rows: Sequence[tuple[int, Event]], tip: _Tip) -> None:
    """Note in each event whether versions have ceased to rise."""
    highest, unordered = tip.highest, tip.unordered
    for version, event in rows:
        unordered = unordered or version <= highest
        highest = max(highest, version)
        if unordered:
            event.metadata[_UNORDERED] = True


def _their_error(error: AegisError) -> PersistenceError:
    if isinstance(error, WrongExpectedVersion):
        return IntegrityError(str(error))
    if isinstance(error, MessageTooLarge | UnsupportedPayload):
        return DataError(str(error))
    if isinstance(error, Misuse):
        return ProgrammingError(str(error))
    return OperationalError(str(error))


def _to_event(stored: StoredEvent) -> Event:
    metadata: dict[str, Any] = {_VERSION: stored.originator_version}
    if isinstance(stored.originator_id, UUID):
        metadata[_IS_UUID] = True
    return Event(stored.topic, bytes(stored.state), metadata)


def _originator_id(event: Event) -> UUID | str:
    name = str(event.aggregate_id)
    return UUID(name) if event.metadata.get(_IS_UUID) else name


def _to_stored(event: Event) -> StoredEvent:
    return StoredEvent(_originator_id(event), _version_of(event), event.event_type, event.data)


def _to_notification(event: Event) -> Notification:
    return Notification(
        _originator_id(event),
        _version_of(event),
        event.event_type,
        event.data,
        (event.offset or 0) + 1,
    )


class _AegisRecorder:
    """What all recorders have."""

    def __init__(self, datastore: _Datastore) -> None:
        self._datastore = datastore


class AegisAggregateRecorder(_AegisRecorder, AggregateRecorder):
    """Events of aggregates by their versions, without an order of all of them."""

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        """All or none. Raises `IntegrityError` where a version of an aggregate is taken."""
        self._insert(stored_events, **kwargs)
        return None

    def _insert(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> list[int]:
        """Ids of the notifications, in the order of the events."""
        rows: dict[str, list[tuple[int, Event]]] = self._beside(**kwargs)
        places: list[tuple[str, int]] = []
        for stored in stored_events:
            stream = str(stored.originator_id)
            listed = rows.setdefault(stream, [])
            if any(version == stored.originator_version for version, _ in listed[-1:]):
                raise IntegrityError(f"Stored events are not unique: {stored}")
            places.append((stream, len(listed)))
            listed.append((stored.originator_version, _to_event(stored)))
        for stream, listed in rows.items():
            if len({version for version, _ in listed}) != len(listed):
                raise IntegrityError(f"Versions of {stream} are not unique: {listed}")
        if not rows:
            return []
        offsets = self._datastore.insert(rows)
        return [offsets[stream] + place + 1 for stream, place in places]

    def _beside(self, **kwargs: Any) -> dict[str, list[tuple[int, Event]]]:
        """What else is to be stored in the same step."""
        return {}

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        """Of one aggregate, by version."""
        found = self._datastore.load(str(originator_id), gt=gt, lte=lte, desc=desc, limit=limit)
        return [_to_stored(event) for event in found]


class AegisApplicationRecorder(AegisAggregateRecorder, ApplicationRecorder):
    """Events of aggregates, and the order of all of them."""

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        """As of aggregates; returns the ids of the notifications."""
        return self._insert(stored_events, **kwargs)

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        """Of all aggregates, by id."""
        first = 1 if start is None else max(1, start if inclusive_of_start else start + 1)
        found: list[Notification]
        found, _ = self._datastore.run(self.scan(first, limit, stop, topics))
        return found

    async def scan(
        self,
        first: int,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        wait_ms: int = 0,
    ) -> tuple[list[Notification], int]:
        """Notifications from the id `first` on, and the id to go on from. wait_ms: for the first
        event, when there is none."""
        found: list[Notification] = []
        wanted = frozenset(topics)
        while len(found) < limit and (stop is None or first <= stop):
            events = await self._datastore.store.scan(0, first - 1, limit, wait_ms=wait_ms)
            if not events:
                break
            wait_ms = 0
            for event in events:
                first = (event.offset or 0) + 2
                if str(event.aggregate_id).startswith(TRACKING_PREFIX):
                    continue
                if stop is not None and first - 1 > stop:
                    break
                if not wanted or event.event_type in wanted:
                    found.append(_to_notification(event))
                    if len(found) == limit:
                        break
        return found, first

    def max_notification_id(self) -> int | None:
        """Of the newest event; None where there is none."""
        end = self._datastore.run(self._datastore.store.end_of(0))
        step = 64
        while end > 0:
            first = max(1, end - step + 1)
            found, _ = self._datastore.run(self.scan(first, step, stop=end))
            if found:
                return int(found[-1].id)
            end, step = first - 1, step * 4
        return None

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        """Notifications with higher ids than `gt`, those that are there and those that come."""
        return AegisSubscription(self, gt, topics)

    def wait_for(self, first: int, topics: Sequence[str]) -> Future[Any]:
        """As `scan`, waiting a while for something new."""
        return self._datastore.submit(self.scan(first, 500, None, topics, wait_ms=WAIT_MS))


class AegisSubscription(Subscription[AegisApplicationRecorder]):
    """Asks for what is new, and waits for it at the partition's leader."""

    def __init__(
        self, recorder: AegisApplicationRecorder, gt: int | None, topics: Sequence[str]
    ) -> None:
        super().__init__(recorder=recorder, gt=gt, topics=topics)
        self._next = 1 if gt is None else gt + 1
        self._found: list[Notification] = []
        self._waiting: Future[Any] | None = None

    def __next__(self) -> Notification:
        """Blocks until there is one. Raises `StopIteration` once stopped."""
        while not self._has_been_stopped:
            if self._found:
                return self._found.pop(0)
            self._waiting = self._recorder.wait_for(self._next, self._topics)
            if self._has_been_stopped:
                self._waiting.cancel()
            try:
                self._found, self._next = self._waiting.result()
            except AegisError as error:
                raise _their_error(error) from error
            except BaseException:
                if self._has_been_stopped:
                    break
                raise
        raise StopIteration

    def stop(self) -> None:
        """Also from another thread."""
        super().stop()
        if self._waiting is not None:
            self._waiting.cancel()


class AegisTrackingRecorder(_AegisRecorder, TrackingRecorder):
    """How far other applications were processed; ids only rise."""

    def insert_tracking(self, tracking: Tracking) -> None:
        """Raises `IntegrityError` unless the id is above those recorded."""
        self._datastore.insert(self.tracked(tracking))

    def tracked(self, tracking: Tracking) -> dict[str, list[tuple[int, Event]]]:
        """What records it, for those that record more in the same step. Raises `IntegrityError`."""
        highest = self.max_tracking_id(tracking.application_name)
        if highest is not None and highest >= tracking.notification_id:
            raise IntegrityError(
                f"Tracking id {tracking.notification_id} of {tracking.application_name} is not"
                f" above {highest}, which is recorded."
            )
        number = tracking.notification_id
        event = Event(TRACKING_TYPE, number, {_VERSION: number})
        return {TRACKING_PREFIX + tracking.application_name: [(number, event)]}

    def max_tracking_id(self, application_name: str) -> int | None:
        """The highest recorded id of another application; None where there is none."""
        stream = TRACKING_PREFIX + application_name
        last = self._datastore.load(stream, gt=None, lte=None, desc=True, limit=1)
        return _version_of(last[0]) if last else None


class AegisProcessRecorder(AegisTrackingRecorder, AegisApplicationRecorder, ProcessRecorder):
    """An application's events, and in the same step how far another one was processed."""

    def _beside(self, **kwargs: Any) -> dict[str, list[tuple[int, Event]]]:
        tracking: Tracking | None = kwargs.get("tracking")
        return {} if tracking is None else self.tracked(tracking)


class AegisFactory(InfrastructureFactory[AegisTrackingRecorder]):
    """Makes recorders on one engine, which all factories of a process for one place share."""

    aggregate_recorder_class = AegisAggregateRecorder
    application_recorder_class = AegisApplicationRecorder
    tracking_recorder_class = AegisTrackingRecorder
    process_recorder_class = AegisProcessRecorder

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        bootstrap = self.env.get(BOOTSTRAP) or None
        directory = self.env.get(DIRECTORY) or DIRECTORY_DEFAULT
        try:
            self._engine: SharedEngine | None = shared_engine(bootstrap, directory)
        except AegisError as error:
            raise InterfaceError(str(error)) from error

    def close(self) -> None:
        """The last one closes the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.release()

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        return self.aggregate_recorder_class(self._datastore(purpose))

    def application_recorder(self) -> ApplicationRecorder:
        topic = self.env.get(self.APPLICATION_RECORDER_TOPIC)
        kind = resolve_topic(topic) if topic else self.application_recorder_class
        recorder: ApplicationRecorder = kind(self._datastore("events"))
        return recorder

    def tracking_recorder(
        self, tracking_recorder_class: type[AegisTrackingRecorder] | None = None
    ) -> AegisTrackingRecorder:
        if tracking_recorder_class is None:
            topic = self.env.get(self.TRACKING_RECORDER_TOPIC)
            tracking_recorder_class = (
                resolve_topic(topic) if topic else self.tracking_recorder_class
            )
        assert tracking_recorder_class is not None
        return tracking_recorder_class(self._datastore("tracking"))

    def process_recorder(self) -> ProcessRecorder:
        topic = self.env.get(self.PROCESS_RECORDER_TOPIC)
        kind = resolve_topic(topic) if topic else self.process_recorder_class
        recorder: ProcessRecorder = kind(self._datastore("events"))
        return recorder

    def _datastore(self, purpose: str) -> _Datastore:
        if self._engine is None:
            raise ProgrammingError("The factory is closed.")
        prefix = self.env.get(TOPIC_PREFIX) or ""
        name = re.sub(r"[^A-Za-z0-9._-]", "-", self.env.name.lower()) or "stored"
        return _Datastore(self._engine, f"{prefix}{name}_{purpose}")


Factory = AegisFactory
