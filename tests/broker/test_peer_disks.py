"""A leader whose disk crawls hands over to nodes whose disks do not (PITFALLS A19, A20)."""

from __future__ import annotations

import pytest

from tests.broker.harness import Client, Cluster, Host, batch

pytestmark = pytest.mark.timeout(120)  # much computing; a busy machine stretches it


def sync(cluster: Cluster, times: dict[Host, int], ticks: int) -> None:
    """Let time pass in which every disk syncs now and then, each as slow as it is."""
    for _ in range(ticks):
        for host, took_ms in times.items():
            host.alive.peer_disks.note_sync(took_ms)
        cluster.tick()


def test_a_leader_with_a_far_slower_disk_hands_over_and_gets_nothing_back() -> None:
    cluster = Cluster()
    groups = [placed.group for placed in cluster.topic(partitions=3).partitions]
    cluster.tick(150)
    slow = cluster.elect(groups[0])
    times = {host: 800 if host is slow else 2 for host in cluster.alive}

    def leads() -> list[int]:
        return [group for group in (0, *groups) if cluster.leader(group) in (None, slow)]

    for _ in range(40):
        sync(cluster, times, 10)
        if not leads():
            break
    assert not leads(), "of its own log and of those of topics"
    sync(cluster, times, 200)
    assert not leads(), "and the balancer gives it nothing back"
    for group in groups:
        Client(cluster, cluster.elect(group)).stored(group, batch(b"x"))
    sync(cluster, dict.fromkeys(cluster.alive, 2), 500)
    preferred = [group for group in groups if slow.alive.backend.prefers_us(slow.partition(group))]
    cluster.until(
        lambda: all(cluster.leader(group) is slow for group in preferred), "until it is well again"
    )


def test_disks_that_are_slow_alike_change_nothing() -> None:
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    cluster.tick(150)
    leader, term = cluster.elect(group), cluster.elect(group).partition(group).replica.term
    sync(cluster, dict.fromkeys(cluster.alive, 300), 150)
    assert cluster.elect(group) is leader
    assert leader.partition(group).replica.term == term


def test_a_single_slow_sync_changes_nothing() -> None:
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    cluster.tick(150)
    leader = cluster.elect(group)
    for _ in range(5):
        leader.alive.peer_disks.note_sync(2_000)
        sync(cluster, dict.fromkeys(cluster.alive, 2), 20)
    assert cluster.elect(group) is leader


def test_after_a_stall_the_inbox_comes_before_the_timers() -> None:
    """Time that a process slept through says nothing about others: one tick, however long."""
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    Client(cluster, cluster.elect(group)).stored(group, batch(b"x"))
    leader = cluster.elect(group)
    term = leader.partition(group).replica.term
    for _ in range(60):
        cluster.now_ms += 5_000  # far beyond every election time-out
        cluster.settle()
    assert cluster.leader(group) is leader
    assert leader.partition(group).replica.term == term
