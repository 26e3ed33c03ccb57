"""A damaged replica promises nothing until its leader has rebuilt it, whatever comes between."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from aegis_cluster.errors import CorruptLog, Refused
from aegis_cluster.ids import LogIndex
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import DIRECTORY, Client, Cluster, Host, batch
from tests.storage.support import run_checkpoint

VALUES = [b"%06d" % number + bytes(1_000) for number in range(150)]


def filled(cluster: Cluster, *, replicas: int = 3) -> tuple[int, list[bytes]]:
    """A topic with several segments on its replicas, all in the checkpoints."""
    group = cluster.topic(replicas=replicas).partitions[0].group
    client = Client(cluster, cluster.elect(group))
    for number, value in enumerate(VALUES):
        assert client.stored(group, batch(value)) == number
    cluster.tick(30)
    return group, list(VALUES)


def segments(host: Host, group: int) -> list[str]:
    directory = f"{DIRECTORY}/partitions/t-0-g{group}"
    return [f"{directory}/{n}" for n in host.disk.list_dir(directory) if n.endswith(".log")]


def is_whole(host: Host, group: int) -> bool:
    partition = host.partition(group)
    return not partition.replica.damaged and partition.damage is None and not host.alive.damaged


def holds_all(host: Host, cluster: Cluster, group: int) -> bool:
    leader = cluster.elect(group).partition(group)
    mine = host.partition(group)
    return (
        is_whole(host, group)
        and mine.log.last_chain == leader.log.last_chain
        and mine.applied == leader.applied
        and mine.high_watermark == leader.high_watermark
        and mine.state.to_body() == leader.state.to_body()
    )


def lead_with(cluster: Cluster, host: Host, group: int) -> None:
    """Have this replica lead."""

    def leads() -> bool:
        leader = cluster.elect(group)
        if leader is not host:
            with suppress(Refused):
                leader.partition(group).replica.transfer_leadership(host.alive.context.me)
            leader.alive.manager.due(leader.partition(group))
        return leader is host

    cluster.until(leads, "leadership moves", 2_000)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_is_found_at_the_start_and_repaired(place: str) -> None:
    cluster = Cluster()
    group, values = filled(cluster)
    host = cluster.followers(group)[0]
    cluster.kill(host)
    paths = segments(host, group)
    assert len(paths) >= 3
    path = {"first": paths[0], "middle": paths[1], "last": paths[-1]}[place]
    size = host.disk.open(path).size()
    host.disk.flip_bit(path, size - 10 if place != "middle" else size // 2)
    if place != "last":  # sealed segments are trusted by their index: damage shows when it is read
        host.disk.remove(path.removesuffix(".log") + ".index")
    host.start()
    assert host.partition(group).replica.damaged
    assert "byte" in host.alive.damaged[0]["why"]
    cluster.until(lambda: holds_all(host, cluster, group), "it is rebuilt")
    lead_with(cluster, host, group)
    assert Client(cluster, host).read(group) == values


def test_a_replica_asks_a_shard_that_it_has_no_link_to() -> None:
    """Links to shards other than the first are opened by what is sent, and a mute replica sends
    nothing: found by chaos on real processes, seed 102."""
    cluster = Cluster(shards=2)
    group, values = filled(cluster)
    host = cluster.followers(group)[0]
    assert host.key.shard == 1
    cluster.kill(host)
    path = segments(host, group)[-1]
    host.disk.flip_bit(path, host.disk.open(path).size() - 10)
    host.start()
    assert host.partition(group).replica.damaged
    cluster.until(lambda: holds_all(host, cluster, group), "it is rebuilt")
    lead_with(cluster, host, group)
    assert Client(cluster, host).read(group) == values


def test_a_restart_in_the_middle_finds_a_replica_that_may_not_vote() -> None:
    cluster = Cluster()
    group, values = filled(cluster)
    host = cluster.followers(group)[0]
    for seed in range(6):
        cluster.kill(host)
        path = segments(host, group)[-1]
        host.disk.flip_bit(path, host.disk.open(path).size() - 10)
        host.start()
        target = seed * 25

        def copied(target: int = target) -> bool:
            return host.partition(group).log.last_index >= target and (
                host.partition(group).log.damage is None
            )

        for _ in range(500):
            if copied():
                break
            cluster.now_ms += 50
            cluster.settle(1)
        cluster.power_off(host, random.Random(seed))
        host.start()
        mine = host.partition(group)
        whole = cluster.elect(group).partition(group).log.last_chain
        assert mine.replica.damaged or mine.log.last_chain == whole
        cluster.until(lambda: holds_all(host, cluster, group), "it is rebuilt")
    lead_with(cluster, host, group)
    assert Client(cluster, host).read(group) == values


def test_a_leader_that_reads_damage_hands_over_and_is_rebuilt() -> None:
    cluster = Cluster()
    group, values = filled(cluster)
    old = cluster.elect(group)
    cluster.kill(old)  # so that nothing is read from memory
    old.start()
    lead_with(cluster, old, group)
    path = segments(old, group)[0]
    old.disk.flip_bit(path, 2_000)
    client = Client(cluster, old)
    reply = client.ask(Api.FETCH, [0, [[group, 0, 1 << 20]]])
    assert reply.fields[0][0][0] == 150, "the reader is sent elsewhere"
    cluster.until(lambda: cluster.leader(group) not in (None, old), "another leads", 2_000)
    cluster.until(lambda: holds_all(old, cluster, group), "the old leader is rebuilt")
    lead_with(cluster, old, group)
    assert Client(cluster, old).read(group) == values


def test_a_leader_that_cannot_read_what_its_successors_lack_gives_up() -> None:
    """It has the longest log, so it is elected, and nobody ever catches up with it: found by the
    simulator, seed 1859."""
    cluster = Cluster()
    group, values = filled(cluster)
    old = cluster.elect(group)
    followers = cluster.followers(group)
    for host in followers:
        cluster.kill(host)
    client = Client(cluster, old)
    for number in range(60):  # durable here, and nowhere else: never acknowledged
        client.produce(group, batch(b"lost %d" % number + bytes(1_000)))
    cluster.tick(4)
    cluster.settle()
    last = old.partition(group).log.last_index
    assert last > len(VALUES) + 50
    assert old.store is not None
    run_checkpoint(old.store)
    path = segments(old, group)[-1]
    cluster.kill(old)  # so that nothing is read from memory
    place = {one: old.disk.open(one).size() for one in segments(old, group)}
    assert place[path] > 10_000
    old.disk.flip_bit(path, 3_000)
    for host in (old, *followers):
        host.start()

    def all_are_one() -> bool:
        return old.partition(group).log.last_index < last and all(
            holds_all(host, cluster, group) for host in (old, *followers)
        )

    cluster.until(all_are_one, "what can be read is everywhere", 2_000)
    lead_with(cluster, old, group)
    assert Client(cluster, old).read(group)[: len(values)] == values


def test_a_follower_that_cannot_read_where_to_cut_its_log_is_rebuilt() -> None:
    """It must not acknowledge what was to follow the cut: found by the simulator, seed 21228."""
    cluster = Cluster()
    group, values = filled(cluster)
    old = cluster.elect(group)
    followers = cluster.followers(group)
    for host in followers:
        cluster.kill(host)
    client = Client(cluster, old)
    for number in range(3):  # durable here, and nowhere else: never acknowledged
        client.produce(group, batch(b"lost %d" % number + bytes(1_000)))
    cluster.tick(4)
    cluster.settle()
    cluster.kill(old)
    for host in followers:
        host.start()
    values.append(b"kept")
    assert Client(cluster, cluster.elect(group)).stored(group, batch(b"kept")) == len(values) - 1

    def unreadable(_group: int, from_index: LogIndex) -> None:
        raise CorruptLog(f"damaged before index {from_index}")

    old.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(old.store, "truncate", unreadable)
        cluster.until(lambda: old.partition(group).replica.damaged, "the damage is met")
    cluster.until(lambda: holds_all(old, cluster, group), "it is rebuilt")
    lead_with(cluster, old, group)
    assert Client(cluster, old).read(group) == values


def test_the_only_replica_stops_and_says_so() -> None:
    cluster = Cluster(1)
    group, _ = filled(cluster, replicas=1)
    host = cluster.host(1)
    cluster.kill(host)
    path = segments(host, group)[-1]
    host.disk.flip_bit(path, host.disk.open(path).size() - 10)
    host.start()
    cluster.tick(40)
    (said,) = host.alive.damaged
    assert "only replica" in said["why"]
    client = Client(cluster, host)
    outcome = client.outcome(client.produce(group, batch(b"more")))
    assert isinstance(outcome, CorruptLog)
    assert "only replica" in str(outcome)


def test_the_metadata_is_rebuilt_like_any_other_partition() -> None:
    cluster = Cluster()
    group, values = filled(cluster)
    host = cluster.followers(0)[0]
    cluster.kill(host)
    path = f"{DIRECTORY}/partitions/__cluster-0-g0/{1:020}.log"
    host.disk.flip_bit(path, host.disk.open(path).size() - 10)
    host.start()
    assert host.partition(0).replica.damaged
    cluster.until(lambda: is_whole(host, 0) and is_whole(host, group), "it is rebuilt")
    cluster.tick(10)
    assert host.alive.reader is None
    assert "t" in host.alive.table.topics
    lead_with(cluster, host, 0)
    assert cluster.topic("another").partitions[0].group > group
    lead_with(cluster, host, group)
    assert Client(cluster, host).read(group) == values


def drop(cluster: Cluster, host: Host, group: int) -> None:
    """What retention does, by hand."""
    partition = host.partition(group)
    saved = partition._snapshot_index
    host.alive.manager.want_snapshot(partition)
    cluster.until(lambda: partition._snapshot_index > saved, "the snapshot is durable")
    assert host.store is not None
    first = host.store.drop_before(partition.group, LogIndex(120))
    partition.replica.compact(LogIndex(first - 1))
    assert first > 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_follower_behind_the_start_of_the_log_gets_a_snapshot(restart: bool) -> None:
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    leader = cluster.elect(group)
    host = cluster.followers(group)[0]
    cluster.kill(host)
    client = Client(cluster, leader)
    for value in VALUES:
        client.stored(group, batch(value, producer=(7, 0, VALUES.index(value))))
    cluster.tick(30)
    drop(cluster, leader, group)
    if restart:  # what was dropped must also be known after a restart
        assert leader.store is not None
        run_checkpoint(leader.store)
        cluster.kill(leader)
        leader.start()
        lead_with(cluster, leader, group)
    host.start()
    cluster.until(lambda: holds_all(host, cluster, group), "it has caught up")
    assert host.partition(group).log.first_index == leader.partition(group).log.first_index
    cluster.kill(host)
    host.start()
    cluster.until(lambda: holds_all(host, cluster, group), "so it is after a restart")
    lead_with(cluster, host, group)
    again = Client(cluster, host)
    assert again.stored(group, batch(VALUES[-1], producer=(7, 0, len(VALUES) - 1))) == 149


def test_an_unreadable_manifest_is_damage_like_any_other() -> None:
    cluster = Cluster()
    group, _ = filled(cluster)
    host = cluster.followers(group)[0]
    cluster.kill(host)
    host.disk.flip_bit(f"{DIRECTORY}/manifest/{group:020}", 40)
    host.start()
    assert host.partition(group).replica.damaged
    cluster.until(lambda: holds_all(host, cluster, group), "it is rebuilt")
    cluster.kill(host)
    host.start()
    assert not host.partition(group).replica.damaged
    cluster.until(lambda: holds_all(host, cluster, group), "and stays whole")
