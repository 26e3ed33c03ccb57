"""The library `eventsourcing` on our event store: its own reusable cases, on an embedded engine."""

from __future__ import annotations

import os
import tempfile
from threading import Thread
from typing import TYPE_CHECKING, Any
from unittest import TestCase
from uuid import uuid4

import pytest
from eventsourcing.persistence import (
    InfrastructureFactory,
    IntegrityError,
    Notification,
    StoredEvent,
)
from eventsourcing.tests import application, persistence, projection
from eventsourcing.utils import Environment, get_topic

from aegis_cluster.integrations.eventsourcing import (
    AegisAggregateRecorder,
    AegisApplicationRecorder,
    AegisFactory,
    AegisProcessRecorder,
    AegisTrackingRecorder,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eventsourcing.persistence import Tracking

MODULE = "aegis_cluster.integrations.eventsourcing"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("default:'log' is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def directory() -> Iterator[None]:
    """One directory for all; each case uses an application name, so topics, of its own."""
    with tempfile.TemporaryDirectory() as path:
        os.environ["PERSISTENCE_MODULE"] = MODULE
        os.environ["AEGIS_DIRECTORY"] = path
        keeper = InfrastructureFactory.construct(environment("keeper"))
        yield
        keeper.close()
        del os.environ["PERSISTENCE_MODULE"], os.environ["AEGIS_DIRECTORY"]


def environment(name: str) -> Environment:
    """As an application of that name has it."""
    return Environment(name, dict(os.environ))


class OnAegis(TestCase):
    """Closes the factories that a case has made."""

    def setUp(self) -> None:
        super().setUp()
        self.made: list[InfrastructureFactory[Any]] = []

    def tearDown(self) -> None:
        for factory in self.made:
            factory.close()
        super().tearDown()

    def fresh(self) -> InfrastructureFactory[Any]:
        """A factory for an application that nobody else uses."""
        factory = InfrastructureFactory.construct(environment(f"app-{uuid4().hex}"))
        assert isinstance(factory, AegisFactory)
        self.made.append(factory)
        return factory


class TestAggregateRecorder(OnAegis, persistence.AggregateRecorderTestCase):
    INITIAL_VERSION = 1

    def create_recorder(self) -> Any:
        return self.fresh().aggregate_recorder()


class TestApplicationRecorder(OnAegis, persistence.ApplicationRecorderTestCase[Any]):
    def create_recorder(self) -> Any:
        return self.fresh().application_recorder()

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestTrackingRecorder(OnAegis, persistence.TrackingRecorderTestCase):
    def create_recorder(self) -> Any:
        return self.fresh().tracking_recorder()


class TestProcessRecorder(OnAegis, persistence.ProcessRecorderTestCase):
    def create_recorder(self) -> Any:
        return self.fresh().process_recorder()


class TestNonInterleaving(OnAegis, persistence.NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> Any:
        return self.fresh().application_recorder()


class OtherTrackingRecorder(AegisTrackingRecorder):
    """What a user might make of it."""


class TestFactory(persistence.InfrastructureFactoryTestCase[AegisFactory]):
    def setUp(self) -> None:
        self.env = environment("TestCase")
        super().setUp()

    def expected_factory_class(self) -> type[AegisFactory]:
        return AegisFactory

    def expected_aggregate_recorder_class(self) -> type[AegisAggregateRecorder]:
        return AegisAggregateRecorder

    def expected_application_recorder_class(self) -> type[AegisApplicationRecorder]:
        return AegisApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[AegisTrackingRecorder]:
        return AegisTrackingRecorder

    def tracking_recorder_subclass(self) -> type[AegisTrackingRecorder]:
        return OtherTrackingRecorder

    def expected_process_recorder_class(self) -> type[AegisProcessRecorder]:
        return AegisProcessRecorder


@pytest.fixture
def topics_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For cases that make applications whose names others have, and count their events."""
    monkeypatch.setenv("AEGIS_TOPIC_PREFIX", f"{uuid4().hex}-")


@pytest.mark.usefixtures("topics_of_its_own")
class TestExampleApplication(application.ExampleApplicationTestCase):
    expected_factory_topic = get_topic(AegisFactory)


@pytest.mark.usefixtures("topics_of_its_own")
class TestApplication(application.ApplicationTestCase):
    pass


class Counters(AegisTrackingRecorder, projection.EventCountersView):
    """Counters in streams of the tracking recorder's topic, in one step with the tracking."""

    def _count(self, name: str) -> int:
        return len(self._datastore.load(name, gt=None, lte=None, desc=False, limit=None))

    def _increment(self, name: str, tracking: Tracking) -> None:
        from aegis_cluster.event import Event

        count = self._count(name)
        rows = self.tracked(tracking)
        self._datastore.insert({**rows, name: [(count, Event("Counted", 1, {"version": count}))]})

    def get_created_event_counter(self) -> int:
        return self._count("created")

    def get_subsequent_event_counter(self) -> int:
        return self._count("subsequent")

    def incr_created_event_counter(self, tracking: Tracking) -> None:
        self._increment("created", tracking)

    def incr_subsequent_event_counter(self, tracking: Tracking) -> None:
        self._increment("subsequent", tracking)


class TestEventCountersView(OnAegis, projection.EventCountersViewTestCase):
    def construct_event_counters_view(self) -> Any:
        return self.fresh().tracking_recorder(Counters)


@pytest.mark.usefixtures("topics_of_its_own")
class TestProjection(projection.AggregateEventCountersProjectionTestCase):
    view_class = Counters
    env = {"APPLICATION_NAME": "projected"}  # noqa: RUF012 - the library's own name


@pytest.mark.usefixtures("topics_of_its_own")
class TestEventSourcedProjection(projection.EventSourcedProjectionTestCase):
    pass


class TestBeyondTheirCases(OnAegis):
    """What a log might do wrong where a table does not."""

    def test_the_same_events_again_are_a_conflict_also_for_another_recorder(self) -> None:
        factory = self.fresh()
        one, other = factory.application_recorder(), factory.application_recorder()
        stored = [StoredEvent("a", version, "t", b"s") for version in range(3)]
        assert one.insert_events(stored) == [1, 2, 3]
        for recorder in (one, other):
            with pytest.raises(IntegrityError):
                recorder.insert_events(stored)
        more = [StoredEvent("a", 3, "t", b"s"), StoredEvent("b", 0, "t", b"s")]
        assert other.insert_events(more) == [4, 5]
        assert one.insert_events([StoredEvent("a", 4, "t", b"s")]) == [6]
        assert one.select_events("a", gt=1, lte=3) == stored[2:] + more[:1]
        assert one.select_events("a", gt=4) == []

    def test_snapshots_may_be_taken_of_the_past(self) -> None:
        recorder = self.fresh().aggregate_recorder("snapshots")
        for version in (4, 9, 6, 2):
            recorder.insert_events([StoredEvent("a", version, "t", b"%d" % version)])
        with pytest.raises(IntegrityError):
            recorder.insert_events([StoredEvent("a", 6, "t", b"again")])
        found = [event.originator_version for event in recorder.select_events("a")]
        assert found == [2, 4, 6, 9]
        last = recorder.select_events("a", desc=True, limit=1)
        assert [event.originator_version for event in last] == [9]
        below = recorder.select_events("a", lte=8, desc=True, limit=1)
        assert [event.originator_version for event in below] == [6]

    def test_a_subscription_that_waits_is_stopped_from_another_thread(self) -> None:
        recorder = self.fresh().application_recorder()
        with recorder.subscribe() as subscription:
            found: list[Notification] = []
            thread = Thread(target=lambda: list(map(found.append, subscription)))
            thread.start()
            recorder.insert_events([StoredEvent("a", 0, "t", b"s")])
            wait_until(lambda: len(found) == 1, "the notification is there")
            subscription.stop()
            thread.join(timeout=10)
            assert not thread.is_alive()
        assert [one.id for one in found] == [1]
