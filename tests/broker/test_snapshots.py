"""Snapshots are made, sent and taken in piece by piece; folded logs are cut to them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from aegis_cluster.broker import partition as partition_module
from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.broker.metadata_stm import MetadataFold
from aegis_cluster.broker.producer_stm import SLICE_PRODUCERS, ProducerTable
from aegis_cluster.cluster.metadata_table import SLICE_ENTRIES, MetadataTable, TableLoader
from aegis_cluster.errors import CorruptLog, NotReady, Throttled
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset
from aegis_cluster.limits import KIB, SNAPSHOT_CAPTURES_MAX
from aegis_cluster.storage.checked_file import pack_body
from aegis_cluster.storage.snapshot import decode_slice
from aegis_cluster.wire.batch import batch_header
from aegis_cluster.wire.descriptions import PartitionInfo, TopicInfo, TopicSettings
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import SMALL, Client, Cluster, Host, batch
from tests.broker.test_repair import holds_all, lead_with
from tests.broker.test_retention import segments, starts

pytestmark = pytest.mark.timeout(120)  # much computing; a busy machine stretches it

FRAMES = 16
LIMITS = replace(SMALL, segment_bytes=4 * KIB, journal_bytes=64 * KIB)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is due after a few frames."""
    monkeypatch.setattr(partition_module, "SNAPSHOT_FRAMES", FRAMES)


# ---- slices


def a_table(producers: int) -> ProducerTable:
    table = ProducerTable()
    for number in range(producers):
        apply(table, number, 0, number + 1)
    return table


def apply(table: ProducerTable, producer: int, sequence: int, index: int) -> None:
    header = batch_header(batch(b"x", producer=(producer, 0, sequence)))
    table.apply(header, index=LogIndex(index), offset=RecordOffset(index), time_ms=index)


def loaded(pieces: list[list[Any]]) -> ProducerTable:
    table = ProducerTable()
    for piece in pieces:
        table.add(piece)
    return table


def test_slices_are_those_of_one_moment_whatever_is_applied_meanwhile() -> None:
    count = 2 * SLICE_PRODUCERS + 7
    table = a_table(count)
    before = table.to_body()
    pieces = table.slices()
    first = next(pieces)
    for number in range(count + 5):  # all of them move on, some are new
        apply(table, number, int(number < count), count + number + 1)
    rest = list(pieces)
    assert [len(piece) for piece in (first, *rest)] == [SLICE_PRODUCERS, SLICE_PRODUCERS, 7]
    assert loaded([first, *rest]).to_body() == before
    assert table.to_body() != before
    again = loaded(list(table.slices()))
    assert again.to_body() == table.to_body()


def test_a_table_of_any_size_comes_in_bounded_pieces() -> None:
    table, group = MetadataTable(), 1
    for number, count in enumerate((1, 3 * SLICE_ENTRIES + 2, 5, SLICE_ENTRIES)):
        placed = tuple(
            PartitionInfo(place, GroupId(group + place), (Member(NodeId(1), "one"),))
            for place in range(count)
        )
        group += count
        table._add_topic(TopicInfo(f"topic-{number}", TopicSettings(), placed, "token"))
        table._founders[GroupId(group - 1)] = (Member(NodeId(9), "nine"),)
    table.index = LogIndex(77)
    pieces = table.slices()
    loader = TableLoader()
    loader.add(next(pieces))
    before = table.to_body()
    table._drop_topic("topic-1")
    for piece in pieces:
        size = sum(len(topic[2]) for topic in piece[1:]) if piece[0] == "topics" else len(piece)
        assert size <= SLICE_ENTRIES + 1
        loader.add(piece)
    assert loader.table.to_body() == before
    for placed_group in range(1, group):
        found = loader.table.partition_of(GroupId(placed_group))
        assert found is not None
        assert found[1].group == placed_group
        assert found[0].partitions[found[1].partition] == found[1]


def test_malformed_slices_are_refused_and_change_nothing() -> None:
    state = PartitionState(MetadataFold())
    before = state.to_body()
    for bad in (b"", b"\xc1", pack_body([]), pack_body([3, "fold", []]), pack_body([2, "?", []])):
        loader = state.loader()
        with pytest.raises(CorruptLog):
            loader.add(bad)
    for piece in (["table", 1], ["nodes", 1], ["?"], [], 7):
        with pytest.raises(CorruptLog):
            state.loader().add(pack_body([2, "fold", piece]))
    assert state.to_body() == before


# ---- made


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_that_is_made_between_writes_is_a_whole_one(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    client = Client(cluster, cluster.elect(group))
    for number in range(60):
        producer = rng.randrange(1, 600)
        client.produce(group, batch(b"%d" % number, producer=(producer, number, 0)))
        if rng.random() < 0.5:
            cluster.settle(rng.randrange(3))
        if rng.random() < 0.2:
            cluster.tick()
    cluster.tick(20)
    expected = cluster.elect(group).partition(group).state.to_body()
    for host in cluster.alive:
        assert host.partition(group)._snapshot_index > 0
    for host in cluster.hosts.values():
        cluster.power_off(host, rng)
        host.start()
        assert host.partition(group)._snapshot_index > 0, "it starts from there"
    for host in cluster.alive:
        cluster.until(lambda host=host: holds_all(host, cluster, group), "it is back")  # type: ignore[misc]
        assert host.partition(group).state.to_body() == expected


# ---- the cluster's own log


def churn(cluster: Cluster, count: int) -> None:
    """Commands for `__cluster/0` that leave little behind."""
    for number in range(count):
        client = Client(cluster, cluster.elect())
        name = f"gone-{number % 3}"
        assert client.ask(Api.CREATE_TOPIC, [name, 1, 1, SETTINGS, f"{number}"]).code == 0
        assert client.ask(Api.DELETE_TOPIC, [name]).code == 0


SETTINGS = ["topic", None, None, "delete", "none", 1_000]


def log_bytes(host: Host) -> int:
    return sum(segment.end for segment in segments(host, 0))


def same_table(cluster: Cluster) -> bool:
    tables = [host.alive.table.to_body() for host in cluster.alive]
    return all(table == tables[0] for table in tables)


@pytest.mark.usefixtures("often")
def test_the_metadata_log_is_cut_to_its_snapshots_on_every_replica() -> None:
    cluster = Cluster(limits=LIMITS)
    kept = cluster.topic("kept", partitions=3)
    churn(cluster, 40)
    cluster.until(lambda: min(starts(cluster, 0)) >= 40, "the log is cut", 200)
    cluster.tick(60)
    (start,) = starts(cluster, 0)
    for host in cluster.alive:
        log = host.partition(0).log
        assert log.first_index > 1
        assert log.last_index - log.first_index < 4 * FRAMES
        assert host.partition(0).replica.log.first_index == log.first_index
    for seed, host in enumerate(cluster.hosts.values()):
        cluster.power_off(host, random.Random(seed))
        host.start()
    cluster.until(lambda: same_table(cluster), "all know the same")
    assert starts(cluster, 0) == {start}
    assert cluster.elect().alive.table.topics["kept"] == kept
    churn(cluster, 25)
    cluster.tick(60)
    assert min(starts(cluster, 0)) > start


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("power", [False, True])
def test_a_replica_behind_the_cut_gets_the_table(power: bool) -> None:
    cluster = Cluster(limits=LIMITS)
    cluster.topic("kept", replicas=2)
    host = cluster.followers()[0]
    cluster.kill(host)
    churn(cluster, 30)
    cluster.tick(60)
    leader = cluster.elect()
    assert leader.partition(0).log.first_index > 20
    host.start()
    cluster.until(lambda: holds_all(host, cluster, 0), "it has caught up")
    if power:
        cluster.power_off(host, random.Random(1))
        host.start()
        cluster.until(lambda: holds_all(host, cluster, 0), "after a restart as well")
    lead_with(cluster, host, 0)
    assert "kept" in host.alive.table.topics
    churn(cluster, 3)


@pytest.mark.usefixtures("often")
def test_readers_behind_the_cut_get_the_table() -> None:
    """The second shards hold no replica, and the fourth node does not either."""
    cluster = Cluster(4, shards=2, limits=LIMITS)
    cluster.registered()
    cluster.topic("kept")
    sleepers = [cluster.host(4, 0), cluster.host(4, 1)]
    for host in sleepers:
        cluster.kill(host)
    churn(cluster, 30)
    cluster.tick(60)
    assert min(host.partition(0).log_start_offset for host in cluster.alive if not host.key.shard)
    for host in sleepers:
        host.start()
    cluster.until(lambda: same_table(cluster), "all know the same")
    late = Cluster.host(cluster, 2, 1)
    cluster.kill(late)
    late.start()
    churn(cluster, 2)
    cluster.until(lambda: same_table(cluster), "and go on from there")


# ---- sent


def pieces_of(cluster: Cluster, host: Host, group: int) -> list[bytes]:
    """All pieces, each asked for twice."""
    server = host.alive.snapshot_server
    found: list[bytes] = []
    capture = 0
    while True:
        answers: list[tuple[list[Any], list[Any]]] = []
        for _ in range(2 if capture else 1):
            server.ask(
                GroupId(group),
                capture,
                len(found),
                lambda fields, parts, answers=answers: answers.append((fields, parts)),  # type: ignore[misc]
                confirm=False,
            )
        assert all(answer == answers[0] for answer in answers), "a repeat gives the same again"
        (capture, is_last, _), (piece,) = answers[0]
        found.append(piece)
        if is_last:
            return found


def fill_producers(cluster: Cluster, group: int, count: int) -> None:
    client = Client(cluster, cluster.elect(group))
    for number in range(count):
        client.produce(group, batch(b"x" * 400, producer=(number + 1, 0, 0)))
        if number % 20 == 0:
            cluster.settle()
    cluster.tick(3)


def test_a_giver_repeats_a_piece_and_refuses_to_jump() -> None:
    cluster = Cluster(1)
    group = cluster.topic(replicas=1).partitions[0].group
    fill_producers(cluster, group, 2 * SLICE_PRODUCERS + 1)
    host = cluster.elect(group)
    found = pieces_of(cluster, host, group)
    assert len(found) == 1 + 3
    state = PartitionState()
    loader = state.loader()
    for number, piece in enumerate(found[1:]):
        loader.add(decode_slice(piece, GroupId(group), number))
    loader.finish()
    assert state.to_body() == host.partition(group).state.to_body()
    server = host.alive.snapshot_server
    number = server._count
    for piece_number in (0, 1, 2, 4, 99):
        with pytest.raises(NotReady, match="Another piece"):
            server.ask(GroupId(group), number, piece_number, lambda *_: None, confirm=False)
    cluster.tick(250)
    with pytest.raises(NotReady, match="forgotten"):
        server.ask(GroupId(group), number, 3, lambda *_: None, confirm=False)


def test_only_so_many_are_given_at_once() -> None:
    cluster = Cluster(1)
    group = GroupId(cluster.topic(replicas=1).partitions[0].group)
    server = cluster.elect(group).alive.snapshot_server
    for _ in range(SNAPSHOT_CAPTURES_MAX):
        server.ask(group, 0, 0, lambda *_: None, confirm=False)
    with pytest.raises(Throttled):
        server.ask(group, 0, 0, lambda *_: None, confirm=False)
    cluster.tick(250)
    server.ask(group, 0, 0, lambda *_: None, confirm=False)


@pytest.mark.parametrize("seed", range(6))
def test_a_follower_behind_the_log_gets_the_state_whatever_is_lost_on_the_way(seed: int) -> None:
    """Links break and processes die between any two pieces; others write on meanwhile."""
    rng = random.Random(seed)
    cluster = Cluster(limits=replace(SMALL, segment_bytes=16 * KIB))
    settings = TopicSettings(retention_bytes=20_000)
    group = cluster.topic(settings=settings).partitions[0].group
    host = cluster.followers(group)[0]
    cluster.kill(host)
    fill_producers(cluster, group, 3 * SLICE_PRODUCERS)
    leader = cluster.elect(group)
    cluster.until(lambda: leader.partition(group).log.first_index > 1, "the log is cut")
    host.start()
    for number in range(12):
        for _ in range(rng.randrange(1, 6)):
            cluster._connect()
            for _ in range(min(len(cluster._queue), rng.randrange(1, 8))):
                cluster._queue.popleft()()
            for one in cluster.alive:
                one.move()
        what = rng.random()
        if what < 0.3:
            cluster.isolate(host.key.node)
            cluster.tick()
            cluster.heal()
        elif what < 0.5:
            cluster.kill(host)
            host.start()
        elif what < 0.6:
            cluster.power_off(host, rng)
            host.start()
        elif what < 0.7 and cluster.leader(group) not in (None, host):
            other = cluster.elect(group)
            cluster.kill(other)
            other.start()
        else:
            cluster.tick(rng.randrange(3))
        if (leads := cluster.leader(group)) is not None:
            Client(cluster, leads).produce(group, batch(b"y", producer=(5_000 + number, 0, 0)))
    cluster.until(lambda: holds_all(host, cluster, group), "it has caught up", 1_000)
    lead_with(cluster, host, group)
    answer = Client(cluster, host).stored(group, batch(b"x" * 400, producer=(600, 0, 0)))
    assert answer == 599, "it knows the producers whose records it never saw"


def test_a_piece_that_was_damaged_on_the_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(limits=replace(SMALL, segment_bytes=16 * KIB))
    settings = TopicSettings(retention_bytes=20_000)
    group = cluster.topic(settings=settings).partitions[0].group
    host = cluster.followers(group)[0]
    cluster.kill(host)
    fill_producers(cluster, group, SLICE_PRODUCERS + 1)
    leader = cluster.elect(group)
    cluster.until(lambda: leader.partition(group).log.first_index > 1, "the log is cut")
    server = leader.alive.snapshot_server
    right = server._answer
    harmed: list[int] = []

    def wrong(number: Any, capture: int, piece: int, answer: Any) -> None:
        def spoil(fields: list[Any], parts: list[Any]) -> None:
            if piece == 1 and not harmed:
                harmed.append(piece)
                parts = [parts[0][:-1] + bytes([parts[0][-1] ^ 1])]
            answer(fields, parts)

        right(number, capture, piece, spoil)

    monkeypatch.setattr(server, "_answer", wrong)
    host.start()
    cluster.until(lambda: holds_all(host, cluster, group), "a second one comes in whole", 1_000)
    assert harmed
