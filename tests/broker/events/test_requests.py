"""Appends and reads of streams at real shards, with leaders that go and indexes that are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker import partition as partition_module
from aegis_cluster.broker.events import indexer
from aegis_cluster.errors import (
    AegisError,
    InvalidBatch,
    InvalidTopic,
    NotLeader,
    OutcomeUnknown,
    PeerViolation,
    Throttled,
    WrongExpectedVersion,
)
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.event_frames import ANY, NO_STREAM
from aegis_cluster.wire.protocol import Api
from tests.broker.events.test_event_fold import ids
from tests.broker.harness import Client, Cluster, Host, batch, records_of

if TYPE_CHECKING:
    from collections.abc import Sequence

STORE = TopicSettings(kind="eventstore")


class Store:
    """One partition of an event store, and a client of its leader."""

    def __init__(self, nodes: int = 3) -> None:
        self.cluster = Cluster(nodes)
        info = self.cluster.topic("events", replicas=nodes, settings=STORE)
        self.group = info.partitions[0].group
        self.client = self.of(self.cluster.elect(self.group))
        self._number = 0

    def of(self, host: Host) -> Client:
        return Client(self.cluster, host)

    def send(self, *streams: Sequence[Any], client: Client | None = None) -> int:
        """Rows of [stream, expected, ids, marks]."""
        rows = [[*row, *[None] * (4 - len(row))] for row in streams]
        count = sum(len(row[2]) // 16 for row in rows)
        values = [b"%d" % (self._number + n) for n in range(count)]
        self._number += count
        client = client or self.client
        return client.send(Api.EVENT_APPEND, [[[self.group, rows]]], [batch(*values)])

    def outcome(self, number: int, client: Client | None = None) -> Any:
        client = client or self.client
        self.cluster.until(lambda: client.reply(number) is not None, "an answer to an append")
        reply = client.reply(number)
        assert reply is not None
        assert reply.code == 0, reply
        (result,) = reply.fields[0]
        return result[3] if result[0] == 0 else error_from_reply(result[0], result[1:])

    def append(self, *streams: Sequence[Any]) -> Any:
        return self.outcome(self.send(*streams))

    def read(
        self,
        stream: str,
        start: int | None = None,
        limit: int | None = None,
        *,
        backwards: bool = False,
        bytes_max: int = 1 << 20,
        client: Client | None = None,
    ) -> tuple[int, list[bytes | None], int | None]:
        """Last version, values in the order of the answer, and where to go on."""
        fields = [self.group, stream, start, limit, backwards, bytes_max]
        reply = (client or self.client).ask(Api.EVENT_READ, fields)
        if reply.code:
            raise error_from_reply(reply.code, reply.fields)
        last, _, _, following, spans, _ = reply.fields
        by_offset = {record.offset: record.value for record in records_of(reply.parts[0])}
        values = [by_offset[offset + n] for _, count, offset in spans for n in range(count)]
        return last, values, following


def test_an_append_is_one_frame_and_a_stream_is_read_back() -> None:
    store = Store()
    assert store.append(["a", NO_STREAM, ids(1, 2)], ["b", NO_STREAM, ids(3)]) == [[0, 1], [0, 0]]
    assert store.append(["a", 1, ids(4)]) == [[2, 2]]
    assert store.read("a") == (2, [b"0", b"1", b"3"], None)
    assert store.read("b") == (0, [b"2"], None)
    assert store.read("nobody") == (-1, [], None)
    assert store.read("a", 1, 1) == (2, [b"0", b"1"], None)  # whole frames; the client cuts
    assert store.read("a", backwards=True, limit=1) == (2, [b"3"], None)
    assert store.read("a", bytes_max=1) == (2, [b"0", b"1"], 2)
    assert store.read("a", 2, bytes_max=1) == (2, [b"3"], None)
    assert store.read("a", backwards=True, bytes_max=1) == (2, [b"3"], 1)


def test_conflicts_name_both_versions_and_write_nothing() -> None:
    store = Store()
    first, second = store.send(["a", NO_STREAM, ids(1)]), store.send(["a", NO_STREAM, ids(2)])
    assert store.outcome(first) == [[0, 0]]
    lost = store.outcome(second)
    assert isinstance(lost, WrongExpectedVersion)
    assert (lost.stream, lost.expected, lost.actual) == ("a", NO_STREAM, 0)
    both = store.append(["b", NO_STREAM, ids(3)], ["a", 7, ids(4)])
    assert isinstance(both, WrongExpectedVersion)
    assert store.read("b")[0] == -1


def test_a_repeat_is_answered_by_the_next_leader_as_by_the_first() -> None:
    store = Store()
    assert store.append(["a", NO_STREAM, ids(1, 2)]) == [[0, 1]]
    store.cluster.kill(store.client.host)
    store.client = store.of(store.cluster.elect(store.group))
    assert store.append(["a", NO_STREAM, ids(1, 2)]) == [[0, 1]]
    assert store.append(["a", 1, ids(3)]) == [[2, 2]]
    assert store.read("a")[0] == 2


def test_answers_that_rest_on_what_is_lost_are_not_given() -> None:
    store = Store()
    leader = store.client.host
    store.cluster.isolate(leader.key.node)
    mine, refused = store.send(["a", NO_STREAM, ids(1)]), store.send(["a", NO_STREAM, ids(2)])
    others = [host for host in store.cluster.hosts.values() if host is not leader]
    store.cluster.until(
        lambda: any(host.partition(store.group).serving for host in others), "another leader"
    )
    store.cluster.heal()
    assert isinstance(store.outcome(mine), OutcomeUnknown)
    assert isinstance(store.outcome(refused), NotLeader)


def test_every_replica_has_the_index_and_a_lost_one_is_made_anew() -> None:
    store = Store()
    for number in range(20):
        store.append([f"s{number % 3}", ANY, ids(number)])
    index = store.client.host.alive.events._indexer._index
    index.close()  # it was in memory
    assert store.read("s0")[0] == 6
    store.cluster.kill(store.client.host)
    store.client = store.of(store.cluster.elect(store.group))
    last, values, _ = store.read("s1")
    assert (last, values) == (6, [b"%d" % n for n in range(1, 20, 3)])


def test_streams_are_in_snapshots_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_module, "EVENT_SNAPSHOT_FRAMES", 20)
    store = Store(nodes=1)
    for number in range(30):
        store.append(["a", number - 1, ids(number)])
    host = store.client.host
    store.cluster.until(lambda: host.partition(store.group)._snapshot_index >= 20, "a snapshot")
    store.cluster.kill(host)
    host.start()
    store.client = store.of(store.cluster.elect(store.group))
    assert store.append(["a", 28, ids(99)]).actual == 29
    assert store.append(["a", 28, ids(29)]) == [[29, 29]]  # a repeat, as before
    assert store.read("a")[0] == 29


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE spans SET frame = frame - 1",
        "UPDATE spans SET first = 9 WHERE first = 5",
        "DELETE FROM spans WHERE first = 2",
        "DELETE FROM spans",
        "DROP TABLE spans",
    ],
)
def test_an_index_is_never_believed(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(nodes=1)
    for number in range(6):
        store.append(["a", number - 1, ids(number)])
    store.read("a")
    index = store.client.host.alive.events._indexer._index
    with index._guarded() as connection:
        connection.execute(damage)
    assert store.read("a") == (5, [b"0", b"1", b"2", b"3", b"4", b"5"], None)
    assert "made anew" in caplog.text


def test_reads_that_meet_a_damaged_index_while_too_many_wait_for_it_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(nodes=1)
    store.append(["a", NO_STREAM, ids(1)])
    store.read("a")
    with store.client.host.alive.events._indexer._index._guarded() as connection:
        connection.execute("DELETE FROM spans")
    monkeypatch.setattr(indexer, "EVENT_READS_WAITING_MAX", 1)
    fields = [store.group, "a", None, None, False, 1 << 20]
    numbers = [store.client.send(Api.EVENT_READ, fields) for _ in range(2)]
    store.cluster.until(lambda: all(map(store.client.reply, numbers)), "answers")
    replies = [one for one in store.client.replies if one.correlation in numbers]
    answered, refused = sorted(replies, key=lambda one: one.code)
    assert answered.code == 0
    assert isinstance(error_from_reply(refused.code, refused.fields), Throttled)
    assert store.client.host.alive.clients.reading_bytes == 0


def test_what_is_no_event_store_has_no_streams_and_the_other_way_round() -> None:
    store = Store(nodes=1)
    plain = store.cluster.topic("plain", replicas=1).partitions[0].group
    fields = [[[plain, [["a", ANY, ids(1), None]]]]]
    reply = store.client.ask(Api.EVENT_APPEND, fields, [batch(b"x")])
    assert isinstance(_error(reply.fields[0][0]), InvalidTopic)
    fields = [[[store.group, [["a", ANY, ids(1, 2), None]]]]]
    reply = store.client.ask(Api.EVENT_APPEND, fields, [batch(b"x")])
    assert isinstance(_error(reply.fields[0][0]), InvalidBatch)
    number = store.client.produce(store.group, batch(b"x"))
    store.cluster.settle()
    assert isinstance(store.client.outcome(number), InvalidTopic)


@pytest.mark.parametrize(
    "row",
    [
        ["", ANY, ids(1), None],
        ["$a", ANY, ids(1), None],
        ["a", -3, ids(1), None],
        ["a", ANY, b"short", None],
        ["a", ANY, ids(1), {"deleted": True}],
        ["$$a", ANY, ids(1), {"unheard of": 1}],
        ["x" * 300, ANY, ids(1), None],
        "a",
    ],
)
def test_malformed_appends_break_the_protocol(row: Any) -> None:
    store = Store(nodes=1)
    error = store.client.refusal(Api.EVENT_APPEND, [[[store.group, [row]]]], [batch(b"x")])
    assert isinstance(error, PeerViolation)


def _error(result: list[Any]) -> AegisError:
    return error_from_reply(result[0], result[1:])
