"""Shards together: electing, acknowledging only what a majority holds, handing over, recovering."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import NotLeader, OutcomeUnknown
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host, batch

if TYPE_CHECKING:
    from aegis_cluster.storage.rounds import Round


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_one_node_leads_and_all_know_it(cluster: Cluster) -> None:
    leader = cluster.elect()
    cluster.tick(4)
    for host in cluster.alive:
        known = host.partition(0).replica.leader
        assert known is not None
        assert known.node == leader.key.node


def test_a_batch_is_stored_and_read_from_the_leader(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    client = Client(cluster, cluster.elect(placed.group))
    assert client.stored(placed.group, batch(b"a", b"b")) == 0
    assert client.stored(placed.group, batch(b"c")) == 2
    assert client.read(placed.group) == [b"a", b"b", b"c"]


@pytest.mark.parametrize("synced", ["none", "leader", "one follower"])
def test_no_acknowledgement_before_a_majority_has_synced(cluster: Cluster, synced: str) -> None:
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    followers = cluster.followers(placed.group)
    client = Client(cluster, leader)
    cluster.settle()
    for host in cluster.alive:
        host.hold_syncs = True
    number = client.produce(placed.group, batch(b"a"))
    cluster.settle()
    chosen = {"none": [], "leader": [leader], "one follower": followers[:1]}[synced]
    for host in chosen:
        assert host.under_way is not None
        host.hold_syncs = False
    cluster.tick(3)
    assert client.reply(number) is None
    assert leader.partition(placed.group).high_watermark == 0
    second = leader if leader not in chosen else followers[0]
    second.hold_syncs = False
    cluster.tick(3)
    if synced == "none":
        assert client.reply(number) is None
        followers[0].hold_syncs = False
        cluster.tick(3)
    assert client.outcome(number) is not None


def test_two_followers_are_a_majority_without_their_leader(cluster: Cluster) -> None:
    """Thesis §10.2.1: a leader writes in parallel, and may commit before its own disk is done."""
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader)
    cluster.settle()
    leader.hold_syncs = True
    number = client.produce(placed.group, batch(b"a"))
    cluster.tick(3)
    assert leader.under_way is not None
    assert isinstance(client.outcome(number), tuple)


def test_a_leader_alone_acknowledges_nothing(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader)
    cluster.isolate(leader.key.node)
    number = client.produce(placed.group, batch(b"a"))
    cluster.tick(3)
    assert client.reply(number) is None
    cluster.heal()
    cluster.until(lambda: client.reply(number) is not None, "an answer once it is healed")


def _depose(cluster: Cluster, old: Host, group: int) -> None:
    """Let the others elect, then let the old leader hear of it."""
    cluster.until(lambda: cluster.leader(group) not in (None, old), "another leader")
    cluster.heal()
    cluster.until(lambda: not old.partition(group).leads, "the old leader steps down")


def test_a_write_of_a_leader_that_was_deposed_is_unknown(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader)
    cluster.isolate(leader.key.node)
    number = client.produce(placed.group, batch(b"a", producer=(7, 0, 0)))
    repeat = client.produce(placed.group, batch(b"a", producer=(7, 0, 0)))
    _depose(cluster, leader, placed.group)
    assert isinstance(client.outcome(number), OutcomeUnknown)
    assert isinstance(client.outcome(repeat), NotLeader), "a repeat has appended nothing itself"
    assert Client(cluster, cluster.elect(placed.group)).read(placed.group) == []


def test_a_repeat_gets_the_first_answer_from_the_next_leader_too(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader)
    client.stored(placed.group, batch(b"before"))
    data = batch(b"a", b"b", producer=(7, 0, 0))
    first = client.stored(placed.group, data)
    assert client.stored(placed.group, data) == first == 1
    cluster.kill(leader)
    cluster.until(lambda: cluster.leader(placed.group) is not None, "another leader")
    other = Client(cluster, cluster.elect(placed.group))
    assert other.stored(placed.group, data) == first
    assert other.stored(placed.group, batch(b"c", producer=(7, 0, 2))) == 3
    assert other.read(placed.group) == [b"before", b"a", b"b", b"c"]


def test_a_follower_says_who_leads(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    leader = cluster.elect(placed.group)
    for host in cluster.followers(placed.group):
        client = Client(cluster, host)
        number = client.produce(placed.group, batch(b"a"))
        refusal = client.outcome(number)
        assert isinstance(refusal, NotLeader)
        assert refusal.details["leader"] == leader.key.node


def test_stepping_down_hands_every_leadership_over(cluster: Cluster) -> None:
    info = cluster.topic(partitions=6)
    host = cluster.elect()
    assert any(host.partition(placed.group).leads for placed in info.partitions)
    reply = Client(cluster, host).ask(Api.STEP_DOWN)
    assert reply.fields == [0]
    for group in (0, *(placed.group for placed in info.partitions)):
        assert cluster.elect(group) is not host


def test_stepping_down_alone_says_what_is_left(cluster: Cluster) -> None:
    cluster.topic(partitions=3)
    host = cluster.elect()
    led = sum(partition.leads for partition in host.alive.manager.partitions.values())
    client = Client(cluster, host)
    cluster.isolate(host.key.node)
    assert client.ask(Api.STEP_DOWN, ms_left=200).fields == [led]


def test_a_preferred_leader_leads(cluster: Cluster) -> None:
    info = cluster.topic(partitions=3)
    for placed in info.partitions:
        assert cluster.elect(placed.group).key.node == placed.replicas[0].node


def test_everything_comes_back_after_all_are_killed(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    client = Client(cluster, cluster.elect(placed.group))
    for number in range(5):
        client.stored(placed.group, batch(str(number).encode(), producer=(7, 0, number)))
    for host in cluster.alive:
        cluster.kill(host)
    for host in cluster.hosts.values():
        host.start()
    again = Client(cluster, cluster.elect(placed.group))
    assert again.read(placed.group) == [b"0", b"1", b"2", b"3", b"4"]
    assert again.stored(placed.group, batch(b"4", producer=(7, 0, 4))) == 4


@pytest.mark.parametrize("seed", range(12))
def test_what_was_acknowledged_survives_power_loss_at_any_moment(seed: int) -> None:
    """All machines lose power at a random step of a random run, again and again."""
    rng = random.Random(seed)
    cluster = Cluster(seed=seed)
    (placed,) = cluster.topic().partitions
    group = placed.group
    acknowledged: list[bytes] = []
    sent = 0
    for _ in range(3):
        client = Client(cluster, cluster.elect(group))
        open_requests: dict[int, bytes] = {}
        for _ in range(rng.randrange(1, 8)):
            value = b"%d" % sent
            sent += 1
            open_requests[client.produce(group, batch(value))] = value
            for host in cluster.alive:
                host.hold_syncs = rng.random() < 0.4
            cluster.settle(turns=rng.randrange(0, 6))
        acknowledged += [
            value
            for number, value in open_requests.items()
            if isinstance(client.outcome(number), tuple)
        ]
        for host in cluster.alive:
            cluster.power_off(host, rng)
        for host in cluster.hosts.values():
            host.hold_syncs = False
            host.start()
            assert not host.alive.damaged
        found = Client(cluster, cluster.elect(group)).read(group)
        assert [value for value in found if value in acknowledged] == acknowledged
        assert len(found) == len(set(found))


def test_an_operation_of_the_disk_that_never_returns_loses_nothing() -> None:
    """One machine dies in the middle of each of many different disk operations."""
    rng = random.Random(5)
    for after in range(0, 60, 7):
        cluster = Cluster(seed=after)
        (placed,) = cluster.topic().partitions
        leader = cluster.elect(placed.group)
        client = Client(cluster, leader)
        _crash_at(cluster, client, placed.group, after, rng)
        found = Client(cluster, cluster.elect(placed.group)).read(placed.group)
        assert found[:1] == [b"first"]
        leader.start()
        cluster.tick(30)
        assert leader.partition(placed.group).high_watermark == len(found)


def _crash_at(cluster: Cluster, client: Client, group: int, after: int, rng: random.Random) -> None:
    """Store one batch, then write until the leader's disk stops at operation `after`."""
    assert client.stored(group, batch(b"first")) == 0
    disk = client.host.disk
    end = disk.operations + after

    class _PowerLost(BaseException):
        pass

    def stop(_operation: str, _path: str) -> None:
        if disk.operations >= end:
            raise _PowerLost

    disk.before = stop
    try:
        for number in range(200):
            client.produce(group, batch(b"%d" % number))
            cluster.tick()
    except _PowerLost:
        cluster.power_off(client.host, rng)
        return
    raise AssertionError("the disk was not used so often")


def test_a_disk_that_lies_about_its_syncs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of power loss above can fail: here they must."""

    def lie(_store: ShardStore, ticket: Round) -> None:
        ticket.started = ticket.synced = True

    monkeypatch.setattr(ShardStore, "sync", lie)

    def run_all() -> None:
        for seed in range(12):
            test_what_was_acknowledged_survives_power_loss_at_any_moment(seed)

    with pytest.raises(AssertionError):
        run_all()
