"""The event store: streams of events, appended with an expected version, read back and followed.

In go events of named streams; out come the same events with their versions, which start at 0 and
have no gap. An `EventStore` stands on an engine and a topic of kind `eventstore`; aggregates are
plain classes that apply events.

    store = EventStore(engine)
    await store.append("account-123", [Event("AccountCreated", {"owner": "Alice"})],
                       expected_version=ExpectedVersion.NO_STREAM)
    account = Account.from_events(await store.load("account-123"))

It must never change an event once it is stored, nor hand one out twice.
"""

from aegis_cluster.errors import StreamDeleted, WrongExpectedVersion
from aegis_cluster.event.aggregate import AggregateRoot
from aegis_cluster.event.consumer import EventConsumer, LeasedEvent
from aegis_cluster.event.model import Appended, Event, ExpectedVersion, StreamInfo
from aegis_cluster.event.projection import (
    Projection,
    ProjectionRunner,
    SQLiteTarget,
    StateProjection,
    Target,
)
from aegis_cluster.event.store import TOPIC, EventStore
from aegis_cluster.event.subjects import ERASED, SubjectErased, SubjectKeys
from aegis_cluster.event.subscription import EventSubscription, Position

__all__ = [
    "ERASED",
    "TOPIC",
    "AggregateRoot",
    "Appended",
    "Event",
    "EventConsumer",
    "EventStore",
    "EventSubscription",
    "ExpectedVersion",
    "LeasedEvent",
    "Position",
    "Projection",
    "ProjectionRunner",
    "SQLiteTarget",
    "StateProjection",
    "StreamDeleted",
    "StreamInfo",
    "SubjectErased",
    "SubjectKeys",
    "Target",
    "WrongExpectedVersion",
]
