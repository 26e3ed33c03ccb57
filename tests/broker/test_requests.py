"""What clients may ask of a shard: greetings, produce, fetch, offsets, and what is refused."""

from __future__ import annotations

import pytest

from aegis_cluster.broker import clients as clients_module
from aegis_cluster.broker import fetch as fetch_module
from aegis_cluster.broker import producer_ids as producer_ids_module
from aegis_cluster.broker import requests as requests_module
from aegis_cluster.broker.clients import Share
from aegis_cluster.broker.transport import Listener
from aegis_cluster.errors import (
    InvalidBatch,
    MessageTooLarge,
    NotLeader,
    NotReady,
    OffsetOutOfRange,
    OutOfOrderSequence,
    PeerViolation,
    ProducerFenced,
    Throttled,
    UnsupportedVersion,
    WrongCluster,
)
from aegis_cluster.limits import (
    BATCH_BYTES_MAX,
    FETCHES_WAITING_PER_CLIENT_MAX,
    REQUEST_WAIT_MS_MAX,
)
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.codes import Code, error_from_reply
from aegis_cluster.wire.protocol import Api, Hello
from tests.broker.harness import (
    CLUSTER_ID,
    WALL_MS,
    Client,
    Cluster,
    batch,
    hello,
    metadata_of,
    records_of,
)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def group(cluster: Cluster) -> int:
    (placed,) = cluster.topic().partitions
    return placed.group


@pytest.fixture
def client(cluster: Cluster, group: int) -> Client:
    """Greeted at the leader of the topic's only partition."""
    return Client(cluster, cluster.elect(group))


# ---- hello


def test_a_greeting_is_answered_with_an_identity(cluster: Cluster) -> None:
    client = Client(cluster, cluster.host(2), greet=False)
    answer = Hello.from_fields(client.ask(Api.HELLO, hello(cluster_id="").to_fields()).fields)
    assert (answer.cluster_id, answer.node, answer.shard) == (CLUSTER_ID, 2, 0)
    assert client.ask(Api.STATUS).code == 0


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        (hello(cluster_id="another"), WrongCluster),
        (hello(version=2), UnsupportedVersion),
        (hello(version=0), UnsupportedVersion),
    ],
)
def test_strangers_are_refused_and_stay_strangers(
    cluster: Cluster, greeting: Hello, error: type[Exception]
) -> None:
    client = Client(cluster, cluster.host(1), greet=False)
    assert isinstance(client.refusal(Api.HELLO, greeting.to_fields()), error)
    assert isinstance(client.refusal(Api.STATUS), NotReady)


@pytest.mark.parametrize("api", [api for api in Api if api is not Api.HELLO])
def test_nothing_is_answered_before_a_greeting(cluster: Cluster, api: Api) -> None:
    client = Client(cluster, cluster.host(1), greet=False)
    refusal = client.refusal(api)
    assert isinstance(refusal, NotReady)
    assert refusal.details["hello"], "so that a client knows what to do"


def test_a_greeting_counts_for_its_own_listener_only(cluster: Cluster) -> None:
    client = Client(cluster, cluster.host(1), Listener.CONTROL)
    client.listener = Listener.DATA
    assert isinstance(client.refusal(Api.STATUS), NotReady)


@pytest.mark.parametrize("api", [Api.RAFT, Api.REGISTER_NODE, Api.PRODUCER_IDS])
def test_what_is_for_peers_is_not_for_clients(cluster: Cluster, api: Api) -> None:
    client = Client(cluster, cluster.host(1))
    assert isinstance(client.refusal(api), PeerViolation)
    assert isinstance(client.refusal(Api.STATUS), NotReady), "and costs the connection's standing"


def test_an_unknown_api_or_version_is_refused_and_costs_nothing(cluster: Cluster) -> None:
    client = Client(cluster, cluster.host(1))
    assert isinstance(client.refusal(99), UnsupportedVersion)
    assert isinstance(client.refusal(Api.STATUS, version=7), UnsupportedVersion)
    assert client.ask(Api.STATUS).code == 0


# ---- produce


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", InvalidBatch),
        (b"\0" * 61, InvalidBatch),
        (batch(b"a")[:-1], InvalidBatch),
        (batch(b"a") + b"x", InvalidBatch),
        (batch(b"a")[:-1] + b"!", InvalidBatch),
        (b"\0" * (BATCH_BYTES_MAX + 1), MessageTooLarge),
        (batch(b"x" * 1_100_000), MessageTooLarge),
    ],
    ids=["empty", "zeros", "short", "long", "checksum", "batch size", "message size"],
)
def test_a_batch_that_may_not_enter_a_log(
    client: Client, group: int, data: bytes, error: type[Exception]
) -> None:
    number = client.produce(group, data)
    assert isinstance(client.outcome(number), error)
    assert client.stored(group, batch(b"good")) == 0
    assert client.host.alive.clients.in_flight_bytes == 0


def test_one_bad_batch_does_not_stop_the_others_of_its_request(client: Client, group: int) -> None:
    parts = [batch(b"a"), b"junk", batch(b"b"), batch(b"c")]
    items = [[group], [group], [9_999], [group]]
    results = client.ask(Api.PRODUCE, [items], parts).fields[0]
    assert [result[0] for result in results] == [0, Code.INVALID_BATCH, Code.NOT_LEADER, 0]
    assert client.read(group) == [b"a", b"c"]


@pytest.mark.parametrize(
    ("items", "parts"),
    [([], []), ([[1]], []), ([], [b"x"]), ([[1], [1]], [b"x"]), (["no"], [b"x"]), ([[]], [b"x"])],
)
def test_a_produce_request_that_is_none(
    client: Client, items: list[object], parts: list[bytes]
) -> None:
    assert isinstance(client.refusal(Api.PRODUCE, [items], parts), PeerViolation)
    assert client.host.alive.clients.in_flight_bytes == 0


def test_sequences_are_kept_in_order(client: Client, group: int) -> None:
    assert client.stored(group, batch(b"a", producer=(5, 1, 0))) == 0
    gap = client.produce(group, batch(b"c", producer=(5, 1, 2)))
    assert isinstance(client.outcome(gap), OutOfOrderSequence)
    fenced = client.produce(group, batch(b"x", producer=(5, 0, 1)))
    assert isinstance(client.outcome(fenced), ProducerFenced)
    assert client.stored(group, batch(b"b", producer=(5, 1, 1))) == 1


def test_compressed_and_large_batches_come_back(
    cluster: Cluster, client: Client, group: int
) -> None:
    rows = [(WALL_MS, b"k", b"%d" % n * 50, [("h", b"v")]) for n in range(100)]
    assert client.stored(group, encode_batch(rows, compression="lz4")) == 0
    assert client.read(group) == [row[2] for row in rows]


# ---- limits of one client


def test_a_client_with_too_much_under_way_is_throttled_alone(
    cluster: Cluster, client: Client, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch(b"x" * 1_000)
    monkeypatch.setattr(clients_module, "IN_FLIGHT", Share(3 * len(data), 1 << 20, 0, 0))
    for host in cluster.alive:
        host.hold_syncs = True
    waiting = [client.produce(group, data) for _ in range(3)]
    cluster.settle()
    refused = client.reply(client.produce(group, data))
    assert refused is not None
    assert isinstance(error_from_reply(refused.code, refused.fields), Throttled)
    other = Client(cluster, client.host)
    waiting_too = other.produce(group, data)
    assert other.reply(waiting_too) is None, "the others are let in"
    for host in cluster.alive:
        host.hold_syncs = False
    cluster.tick(3)
    assert [client.outcome(number) is not None for number in waiting] == [True] * 3
    assert client.stored(group, data) == 4
    assert client.host.alive.clients.in_flight_bytes == 0


def test_one_request_of_any_size_may_always_go(
    client: Client, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "IN_FLIGHT", Share(10, 1_000, 0, 0))
    assert client.stored(group, batch(b"longer than ten")) == 0


def test_a_client_may_wait_for_so_many_fetches_only(client: Client, group: int) -> None:
    fetch = [5_000, [[group, 0, 1_000]]]
    numbers = [client.send(Api.FETCH, fetch) for _ in range(FETCHES_WAITING_PER_CLIENT_MAX)]
    assert isinstance(client.refusal(Api.FETCH, fetch), Throttled)
    client.stored(group, batch(b"a"))
    assert all(client.reply(number) is not None for number in numbers)
    assert client.ask(Api.FETCH, fetch).code == 0


def test_a_shard_that_holds_enough_for_all_refuses_more_and_goes_on_answering(
    cluster: Cluster, client: Client, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "IN_FLIGHT", Share(10, 10, 0, 0))
    cluster.isolate(client.host.key.node)
    waiting = client.produce(group, batch(b"a"))
    other = Client(cluster, client.host, Listener.DATA)
    assert isinstance(other.refusal(Api.PRODUCE, [[[group, "t", 0]]], [batch(b"b")]), Throttled)
    assert other.ask(Api.FETCH, [0, [[group, 0, 1_000]]]).code == 0
    cluster.heal()
    cluster.until(lambda: client.reply(waiting) is not None, "an answer")
    assert client.host.alive.clients.in_flight_bytes == 0


# ---- fetch


def test_a_long_poll_wakes_with_the_commit_and_not_before(
    cluster: Cluster, client: Client, group: int
) -> None:
    waiting = client.send(Api.FETCH, [5_000, [[group, 0, 1_000]]])
    cluster.tick(3)
    assert client.reply(waiting) is None
    for host in cluster.followers(group):
        host.hold_syncs = True
    written = client.produce(group, batch(b"a"))
    cluster.tick(2)
    assert client.reply(waiting) is None, "what is not committed is not shown"
    for host in cluster.alive:
        host.hold_syncs = False
    cluster.tick()
    assert client.outcome(written) is not None
    reply = client.reply(waiting)
    assert reply is not None
    assert reply.fields[0][0][:3] == [0, 1, 0]
    assert [record.value for record in records_of(reply.parts[0])] == [b"a"]


def test_a_long_poll_ends_empty_at_its_deadline(
    cluster: Cluster, client: Client, group: int
) -> None:
    number = client.send(Api.FETCH, [200, [[group, 0, 1_000]]])
    cluster.tick(3)
    assert client.reply(number) is None
    cluster.tick(2)
    reply = client.reply(number)
    assert reply is not None
    assert reply.fields[0] == [[0, 0, 0, 0, [], 0]]
    assert reply.parts == [b""]
    short = client.send(Api.FETCH, [5_000, [[group, 0, 1_000]]], ms_left=100)
    cluster.tick(3)
    assert client.reply(short) is not None, "nobody waits for longer than the asker does"


def test_a_long_poll_ends_when_leadership_moves(
    cluster: Cluster, client: Client, group: int
) -> None:
    number = client.send(Api.FETCH, [20_000, [[group, 0, 1_000]]], ms_left=20_000)
    Client(cluster, client.host).ask(Api.STEP_DOWN)
    cluster.tick(2)
    reply = client.reply(number)
    assert reply is not None
    assert reply.fields[0][0][0] == Code.NOT_LEADER


def test_a_fetch_stays_within_its_budget_and_always_moves_on(client: Client, group: int) -> None:
    for _ in range(10):
        client.stored(group, batch(b"x" * 500))
    reply = client.ask(Api.FETCH, [0, [[group, 0, 1_500]]])
    assert 1 <= len(records_of(reply.parts[0])) <= 3
    assert len(reply.parts[0]) <= 1_500
    reply = client.ask(Api.FETCH, [0, [[group, 4, 1]]])
    assert [record.offset for record in records_of(reply.parts[0])] == [4], "one at least"


def test_offsets_outside_of_the_log_are_refused(client: Client, group: int) -> None:
    client.stored(group, batch(b"a"))
    (result,) = client.ask(Api.FETCH, [1_000, [[group, 2, 1_000]]]).fields[0]
    error = error_from_reply(result[0], result[1:])
    assert isinstance(error, OffsetOutOfRange)
    assert (error.details["log_start"], error.details["high_watermark"]) == (0, 1)


def test_cold_frames_are_read_from_the_disk(cluster: Cluster, client: Client, group: int) -> None:
    for number in range(5):
        client.stored(group, batch(b"%d" % number))
    for host in cluster.alive:
        cluster.kill(host)
    for host in cluster.hosts.values():
        host.start()
    reader = Client(cluster, cluster.elect(group))
    assert reader.read(group) == [b"0", b"1", b"2", b"3", b"4"]


# ---- offsets


def test_offsets_need_a_round_with_a_majority(cluster: Cluster, client: Client, group: int) -> None:
    client.stored(group, batch(b"a", b"b"))
    assert client.ask(Api.LIST_OFFSETS, [[group]]).fields == [[[0, 0, 2, 2]]]
    cluster.isolate(client.host.key.node)
    number = client.send(Api.LIST_OFFSETS, [[group]])
    cluster.tick(2)
    assert client.reply(number) is None
    cluster.until(lambda: client.reply(number) is not None, "an answer once it leads no more")
    reply = client.reply(number)
    assert reply is not None
    assert reply.fields[0][0][0] == Code.NOT_LEADER


def test_offsets_by_time(client: Client, group: int) -> None:
    for seconds in (10, 30, 20):
        client.stored(group, encode_batch([(1000 * seconds, None, b"x", [])] * 2))

    def ask(time_ms: int | None) -> list[int | None]:
        found: list[int | None] = client.ask(Api.LIST_OFFSETS, [[group], time_ms]).fields[0][0]
        return found

    assert ask(None) == [0, 0, 6, 6]
    for time_ms, wanted in ((0, 0), (10_000, 0), (10_001, 2), (20_000, 2), (30_001, None)):
        assert ask(time_ms) == [0, 0, 6, 6, wanted]


def test_offsets_of_what_is_not_here(client: Client, group: int) -> None:
    results = client.ask(Api.LIST_OFFSETS, [[group, 9_999]]).fields[0]
    assert results[0][0] == 0
    assert isinstance(error_from_reply(results[1][0], results[1][1:]), NotLeader)
    assert client.ask(Api.LIST_OFFSETS, [[]]).fields == [[]]


# ---- metadata


def test_metadata_names_nodes_topics_and_leaders(
    cluster: Cluster, client: Client, group: int
) -> None:
    reply = client.ask(Api.METADATA, [0, None])
    cluster_id, index, controller, nodes, topics = reply.fields
    assert cluster_id == CLUSTER_ID
    assert index == client.host.alive.table.index
    assert controller == cluster.elect(0).key.node
    assert [node[0] for node in nodes] == [1, 2, 3]
    assert topics[0][1] == [client.host.key.node]
    assert list(metadata_of(reply)) == ["t"]
    assert metadata_of(client.ask(Api.METADATA, [0, ["t", "unknown"]])).keys() == {"t"}
    assert metadata_of(client.ask(Api.METADATA, [0, []])) == {}


def test_metadata_of_the_future_is_waited_for(cluster: Cluster, client: Client) -> None:
    index = client.host.alive.table.index
    waiting = client.send(Api.METADATA, [index + 1, None], ms_left=5_000)
    late = client.send(Api.METADATA, [index + 100, None], ms_left=200)
    cluster.tick(6)
    assert client.reply(waiting) is None
    refused = client.reply(late)
    assert refused is not None
    assert isinstance(error_from_reply(refused.code, refused.fields), NotReady)
    Client(cluster, cluster.elect()).ask(Api.INIT_PRODUCER)
    cluster.tick(3)
    assert client.reply(waiting) is not None


def test_only_so_many_may_wait_for_what_is_not_there(
    cluster: Cluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "REQUESTS_WAITING_MAX", 3)
    monkeypatch.setattr(producer_ids_module, "REQUESTS_WAITING_MAX", 3)
    for_ever = 2**63 - 1
    waiting = [client.send(Api.METADATA, [10_000, None], ms_left=for_ever) for _ in range(3)]
    assert isinstance(client.refusal(Api.METADATA, [10_000, None]), Throttled)
    cluster.isolate(client.host.key.node)
    cluster.tick(40)
    waiting += [client.send(Api.INIT_PRODUCER, ms_left=for_ever) for _ in range(3)]
    assert isinstance(client.refusal(Api.INIT_PRODUCER), Throttled)
    assert not any(client.reply(number) for number in waiting)
    cluster.now_ms += REQUEST_WAIT_MS_MAX
    cluster.tick(2)
    assert all(client.reply(number) for number in waiting), "and none of them for ever"


def test_cold_reads_share_one_budget(
    cluster: Cluster, client: Client, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        client.stored(group, batch(b"x" * 500))
    for host in cluster.alive:
        cluster.kill(host)
    for host in cluster.hosts.values():
        host.start()
    monkeypatch.setattr(fetch_module, "FETCH_BYTES_MAX", 2_000)
    reader = Client(cluster, cluster.elect(group))
    reply = reader.ask(Api.FETCH, [0, [[group, 0, 1_500]] * 20])
    assert 500 < sum(map(len, reply.parts)) <= 2_000
