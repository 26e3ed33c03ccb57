"""Appends of transactions at real shards: leaders die while streams are held, answers are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.errors import (
    AegisError,
    InvalidBatch,
    ProducerFenced,
    StreamHeld,
    WrongExpectedVersion,
)
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.event_frames import ANY, NO_STREAM
from aegis_cluster.wire.protocol import Api
from tests.broker.events.test_event_fold import ids
from tests.broker.events.test_requests import Store
from tests.broker.transactions.test_failover import NAME, Producer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.broker.harness import Client


class TransactionalStore(Store):
    """One partition of an event store, and a producer whose transaction it is in."""

    def __init__(self) -> None:
        super().__init__()
        for topic in ("__groups", "__transactions"):
            admin = self.of(self.cluster.elect())
            assert admin.ask(Api.INTERNAL_TOPIC, [topic]).code == 0
        self.cluster.settle()
        self.producer = Producer(self.cluster)
        self.producer.begin()
        assert self.producer.join(["events", 0]) is None

    def prepare(self, *streams: Sequence[Any]) -> Any:
        """As the producer's transaction; versions, or why not."""
        rows = [[*row, *[None] * (4 - len(row))] for row in streams]
        batch = self.producer.batch(self.group, b"prepared")
        return self.outcome(self.send_prepared(rows, batch))

    def send_prepared(self, rows: list[Any], batch: bytes) -> int:
        return self.client.send(Api.EVENT_APPEND, [[[self.group, rows, NAME]]], [batch])

    def fail_over(self) -> None:
        self.cluster.kill(self.client.host)
        self.client = self.of(self.cluster.elect(self.group))

    def values(self, stream: str, client: Client | None = None) -> Any:
        client = client or self.client
        fields = [self.group, stream, None, None, False, 1 << 20]
        reply = client.ask(Api.EVENT_READ, fields)
        return error_from_reply(reply.code, reply.fields) if reply.code else self.read(stream)[1]

    def until_free(self, stream: str) -> None:
        self.cluster.until(lambda: not isinstance(self.values(stream), AegisError), "the marker")


@pytest.mark.parametrize("committed", [True, False])
def test_the_next_leader_holds_what_the_last_one_has_prepared(*, committed: bool) -> None:
    store = TransactionalStore()
    assert store.append(["a", NO_STREAM, ids(1)]) == [[0, 0]]
    assert store.prepare(["a", 0, ids(2)], ["b", NO_STREAM, b""]) == [[1, 1]]
    store.fail_over()
    for _ in range(2):
        assert isinstance(store.append(["a", ANY, ids(3)]), StreamHeld)
        assert isinstance(store.append(["b", ANY, ids(4)]), StreamHeld)
        assert isinstance(store.values("a"), StreamHeld)
        assert store.append(["c", ANY, ids(5)]) == [[0, 0]]
    assert isinstance(store.producer.end(committed=committed), tuple)
    store.until_free("a")
    assert store.values("a") == ([b"0", b"prepared"] if committed else [b"0"])
    follow = store.append(["a", 1 if committed else 0, ids(3)])
    assert follow == ([[2, 2]] if committed else [[1, 1]])
    index = store.client.host.alive.events._indexer._index
    index.close()  # it was in memory, and is made anew from the log
    assert len(store.values("a")) == (3 if committed else 2)


def test_the_same_batch_again_is_answered_as_before() -> None:
    store = TransactionalStore()
    rows, batch = [["a", NO_STREAM, ids(1), None]], store.producer.batch(store.group, b"once")
    assert store.outcome(store.send_prepared(rows, batch)) == [[0, 0]]
    store.fail_over()
    assert store.outcome(store.send_prepared(rows, batch)) == [[0, 0]]
    more = store.producer.batch(store.group, b"more")
    assert isinstance(store.outcome(store.send_prepared(rows, more)), InvalidBatch)
    assert store.producer.end() == (True, "")
    store.until_free("a")
    assert store.values("a") == [b"once"]
    assert store.append(["a", NO_STREAM, ids(1)]) == [[0, 0]]  # outside of it: known by its id


def test_conditions_that_are_not_met_hold_nothing() -> None:
    store = TransactionalStore()
    store.append(["a", NO_STREAM, ids(1)])
    refused = store.prepare(["a", 7, b""], ["b", ANY, ids(2)])
    assert isinstance(refused, WrongExpectedVersion)
    assert store.append(["b", ANY, ids(3)]) == [[0, 0]]


def test_a_client_that_dies_holds_its_streams_until_the_time_out() -> None:
    store = TransactionalStore()
    assert store.prepare(["a", ANY, ids(1)]) == [[0, 0]]
    store.until_free("a")
    assert store.values("a") == []
    assert store.append(["a", NO_STREAM, ids(2)]) == [[0, 0]]
    late = store.prepare(["b", ANY, ids(3)])
    assert isinstance(late, ProducerFenced)


def test_a_transactions_batch_comes_with_its_id() -> None:
    store = TransactionalStore()
    batch = store.producer.batch(store.group, b"x")
    number = store.client.send(
        Api.EVENT_APPEND, [[[store.group, [["a", ANY, ids(1), None]]]]], [batch]
    )
    assert isinstance(store.outcome(number), InvalidBatch)
