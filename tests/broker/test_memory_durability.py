"""`durability = "memory"`: what counts before it is on disk, and what a power cut leaves of it."""

from __future__ import annotations

import random

import pytest

from tests.broker.harness import Client, Cluster, batch
from tests.broker.test_repair import holds_all


def value(number: int) -> bytes:
    return b"%06d" % number + bytes(200)


def filled(cluster: Cluster, *, synced: int, behind: int) -> tuple[int, list[bytes]]:
    """A topic with so many acknowledged records on disk, and so many more in memory only."""
    group = cluster.topic().partitions[0].group
    client = Client(cluster, cluster.elect(group))
    for number in range(synced + behind):
        cluster.sync_nothing_behind = number >= synced
        assert client.stored(group, batch(value(number))) == number
    return group, [value(number) for number in range(synced + behind)]


def converge(cluster: Cluster, group: int) -> list[bytes]:
    """Wait until all replicas hold the same, whole; return it."""
    cluster.sync_nothing_behind = False
    cluster.elect(group)
    cluster.until(
        lambda: all(holds_all(host, cluster, group) for host in cluster.alive),
        "all replicas are whole and equal",
    )
    return [found or b"" for found in Client(cluster, cluster.elect(group)).read(group)]


def test_a_write_counts_before_it_is_synced() -> None:
    cluster = Cluster(in_memory=True)
    group, _ = filled(cluster, synced=0, behind=5)
    leader = cluster.elect(group)
    log = leader.partition(group).log
    assert leader.partition(group).high_watermark == 5
    assert log.durable_index < log.last_index, "storage knows what is really on disk"
    cluster.sync_nothing_behind = False
    cluster.tick()
    assert log.durable_index == log.last_index


def test_killed_processes_lose_nothing() -> None:
    cluster = Cluster(in_memory=True)
    group, sent = filled(cluster, synced=3, behind=20)
    for host in cluster.alive:
        cluster.kill(host)
    for host in cluster.hosts.values():
        host.start()
    assert converge(cluster, group) == sent


@pytest.mark.parametrize("node", [1, 2, 3])
def test_a_power_cut_of_one_node_loses_nothing(node: int) -> None:
    cluster = Cluster(in_memory=True)
    group, sent = filled(cluster, synced=3, behind=20)
    victim = cluster.host(node)
    cluster.power_off(victim, random.Random(node))
    cluster.elect(group)
    victim.start()
    assert converge(cluster, group) == sent


@pytest.mark.parametrize("seed", range(12))
def test_after_a_power_cut_of_all_nodes_the_cluster_goes_on(seed: int) -> None:
    """The last moments may be gone; what is left is a beginning of what was sent, the same
    everywhere, and new writes follow it."""
    rng = random.Random(seed)
    cluster = Cluster(in_memory=True, seed=seed)
    group, sent = filled(cluster, synced=rng.randrange(1, 8), behind=rng.randrange(1, 40))
    for host in list(cluster.alive):
        cluster.power_off(host, rng)
    order = list(cluster.hosts.values())
    rng.shuffle(order)
    for host in order:
        host.start()
        cluster.tick(rng.randrange(60))  # a leader may be found before the last one is there
    left = converge(cluster, group)
    assert left == sent[: len(left)]
    client = Client(cluster, cluster.elect(group))
    assert client.stored(group, batch(b"after")) == len(left)
    assert converge(cluster, group) == [*left, b"after"]


def test_what_the_cluster_knows_of_itself_is_synced_first() -> None:
    """Topics and votes are never lost, whatever the topics' durability is."""
    cluster = Cluster(in_memory=True)
    cluster.sync_nothing_behind = True
    group = cluster.topic().partitions[0].group
    terms = {host.key: host.partition(group).replica.term for host in cluster.alive}
    rng = random.Random(1)
    for host in list(cluster.alive):
        cluster.power_off(host, rng)
    for host in cluster.hosts.values():
        host.start()
    assert all(host.partition(group).replica.term >= terms[host.key] for host in cluster.alive)
    cluster.elect(group)
    assert "t" in cluster.elect().alive.table.topics
