"""Answers are made only for those who take them: byte credits of each client, and of a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker import clients as clients_module
from aegis_cluster.broker.clients import Client as Standing
from aegis_cluster.broker.clients import Clients, Share
from aegis_cluster.broker.transport import Listener
from aegis_cluster.errors import NotReady, Throttled
from aegis_cluster.limits import (
    CLIENT_ANSWER_BYTES_MAX,
    CLIENT_ANSWER_BYTES_OWN,
    FETCH_ITEMS_WAITING_MAX,
    FETCH_ITEMS_WAITING_OWN,
    MIB,
    SHARD_ANSWER_BYTES_MAX,
    SHARD_ANSWER_BYTES_OWN,
    SHARD_IN_FLIGHT_BYTES_MAX,
    SHARD_IN_FLIGHT_BYTES_OWN,
)
from aegis_cluster.wire.protocol import Acks, Api
from tests.broker.harness import Client, Cluster, batch, records_of

if TYPE_CHECKING:
    from aegis_cluster.broker.transport import PeerKey

FETCH_WAIT_MS = 2_000


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(1)


@pytest.fixture
def group(cluster: Cluster) -> int:
    (placed,) = cluster.topic(replicas=1).partitions
    return placed.group


@pytest.fixture
def reader(cluster: Cluster, group: int) -> Client:
    client = Client(cluster, cluster.elect(group), Listener.DATA)
    client.stored(group, batch(b"a" * 1_000))
    return client


def hold(client: Client, size: int) -> None:
    """Say that so many bytes of answers wait for the client."""
    assert client.host.transport is not None
    client.host.transport.waiting[client.listener, client.origin] = size


def test_who_does_not_read_gets_no_more_until_it_does(
    cluster: Cluster, reader: Client, group: int
) -> None:
    hold(reader, CLIENT_ANSWER_BYTES_MAX)
    waiting = reader.send(Api.FETCH, [FETCH_WAIT_MS, [[group, 0, 1_000]]])
    cluster.tick(5)
    assert reader.reply(waiting) is None
    reader.stored(group, batch(b"b"))
    assert reader.reply(waiting) is None, "news of the partition do not feed it either"
    hold(reader, 0)
    cluster.tick()
    found = reader.reply(waiting)
    assert found is not None
    assert [record.offset for record in records_of(found.parts[0])] == [0]


def test_a_fetch_that_starves_ends_in_time_with_nothing(
    cluster: Cluster, reader: Client, group: int
) -> None:
    hold(reader, CLIENT_ANSWER_BYTES_MAX)
    reply = reader.ask(Api.FETCH, [200, [[group, 0, 1_000]]])
    assert (reply.code, reply.parts) == (0, [b""])
    assert not reader.host.alive.clients.items_waiting


def test_who_does_not_read_may_not_ask_for_answers_about_the_cluster_either(
    cluster: Cluster, reader: Client
) -> None:
    hold(reader, CLIENT_ANSWER_BYTES_MAX)
    for api in (Api.METADATA, Api.STATUS, Api.LIST_OFFSETS):
        assert isinstance(reader.refusal(api, [0, None]), Throttled)
    assert Client(cluster, reader.host).ask(Api.METADATA, [0, None]).code == 0
    hold(reader, 0)
    assert reader.ask(Api.METADATA, [0, None]).code == 0


def test_others_are_served_while_one_starves(cluster: Cluster, reader: Client, group: int) -> None:
    hold(reader, CLIENT_ANSWER_BYTES_MAX)
    reader.send(Api.FETCH, [FETCH_WAIT_MS, [[group, 0, 1_000]]])
    other = Client(cluster, reader.host, Listener.DATA)
    assert other.read(group) == [b"a" * 1_000]


def test_a_cold_fetch_of_many_partitions_reads_no_more_than_its_budget(
    cluster: Cluster, reader: Client, group: int
) -> None:
    """A read gives one frame at least; a thousand tiny budgets must not give a thousand frames."""
    partition = reader.host.partition(group)
    for _ in range(40):  # until the first ones are out of the cache
        reader.stored(group, batch(b"x" * 15_000))
    assert partition.log.read_cached(partition.log.first_index, partition.applied, 1) is None
    items = [[group, 0, 1] for _ in range(100)]
    reply = reader.ask(Api.FETCH, [0, items])
    assert reply.code == 0
    assert len([part for part in reply.parts if part]) == 1
    assert reader.host.alive.clients.reading_bytes == 0


def test_partitions_in_waiting_fetches_are_limited(
    reader: Client, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "FETCH_ITEMS", Share(6, 100, 0, 0))
    reader.send(Api.FETCH, [FETCH_WAIT_MS, [[group, 1, 1_000]] * 4])
    refused = reader.refusal(Api.FETCH, [FETCH_WAIT_MS, [[group, 1, 1_000]] * 4])
    assert isinstance(refused, Throttled)
    assert reader.ask(Api.FETCH, [0, [[group, 0, 1_000]]]).code == 0


def test_breaking_the_protocol_wins_no_fresh_credit(reader: Client, group: int) -> None:
    reader.send(Api.FETCH, [FETCH_WAIT_MS, [[group, 1, 1_000]] * 4])
    reader.raw([b"junk"])
    assert isinstance(reader.refusal(Api.STATUS), NotReady)
    before = reader.host.alive.clients.items_waiting
    Client.__init__(reader, reader.cluster, reader.host, reader.listener, greet=False)
    assert reader.host.alive.clients.items_waiting == before == 4


def test_a_produce_request_that_breaks_the_protocol_stays_counted_nowhere(
    reader: Client, group: int
) -> None:
    reader.send(Api.PRODUCE, [[[group, "t", 0]], Acks.QUORUM, 7], [batch(b"b")])
    assert reader.host.alive.clients.in_flight_bytes == 0


# ---- shares


class Waiting:
    """A transport that only says what waits."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[Listener, bytes], int] = {}

    def unsent(self, listener: Listener, origin: bytes) -> int:
        return self.waiting.get((listener, origin), 0)

    def unsent_to(self, key: PeerKey) -> int:
        return 0

    @property
    def unsent_total(self) -> int:
        return sum(self.waiting.values())


@pytest.mark.parametrize("count", [1, 4, 500])
def test_however_many_hold_all_they_can_the_next_one_finds_its_share(count: int) -> None:
    transport = Waiting()
    clients = Clients(transport)  # type: ignore[arg-type]
    for number in range(count):
        client = Standing(Listener.DATA, b"%d" % number)
        while (room := clients.room(client)) > 0:
            place = (client.listener, client.origin)
            transport.waiting[place] = transport.waiting.get(place, 0) + room
    assert transport.unsent_total <= SHARD_ANSWER_BYTES_MAX + SHARD_ANSWER_BYTES_OWN
    honest = Standing(Listener.DATA, b"honest")
    assert clients.room(honest) >= CLIENT_ANSWER_BYTES_OWN
    clients.check_room(honest)


def test_waiting_fetches_leave_room_for_the_next_client() -> None:
    clients = Clients(Waiting())  # type: ignore[arg-type]
    for number in range(500):
        client = Standing(Listener.DATA, b"%d" % number)
        for size in (1_024, 64):
            for _ in range(16):
                try:
                    clients.take_fetch(client, size)
                except Throttled:
                    break
    assert clients.items_waiting <= FETCH_ITEMS_WAITING_MAX + FETCH_ITEMS_WAITING_OWN
    clients.take_fetch(Standing(Listener.DATA, b"honest"), 10)


def test_bytes_in_flight_leave_room_for_the_next_client() -> None:
    clients = Clients(Waiting())  # type: ignore[arg-type]
    for number in range(20):
        client = Standing(Listener.DATA, b"%d" % number)
        for _ in range(16):
            try:
                clients.take(client, MIB)
            except Throttled:
                break
    assert clients.in_flight_bytes <= SHARD_IN_FLIGHT_BYTES_MAX + SHARD_IN_FLIGHT_BYTES_OWN
    clients.take(Standing(Listener.DATA, b"honest"), 100)


@pytest.mark.parametrize("acks", [Acks.NONE, Acks.LEADER])
def test_bytes_stay_counted_until_their_commit_however_soon_they_are_answered(acks: Acks) -> None:
    """Or a producer that waits for nothing could fill the memory of a leader without followers."""
    cluster = Cluster(3)
    (placed,) = cluster.topic(replicas=3).partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader, Listener.DATA)
    for host in cluster.followers(placed.group):
        host.hold_syncs = True
    data = batch(b"a")
    fields = [[[placed.group, "t", 0]], acks]
    assert client.ask(Api.PRODUCE, fields, [data]).code == 0
    assert leader.alive.clients.in_flight_bytes == len(data)
    for host in cluster.alive:
        host.hold_syncs = False
    cluster.until(lambda: leader.alive.clients.in_flight_bytes == 0, "given back")
