"""A full disk takes no messages and loses none; a failed one ends the process and loses none."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.errors import AegisError, DiskFull, NotLeader, StorageFailed
from aegis_cluster.limits import KIB
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import SMALL, Client, Cluster, Host, batch
from tests.broker.test_repair import holds_all, lead_with

if TYPE_CHECKING:
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.ids import Member

pytestmark = pytest.mark.timeout(120)  # much computing; a busy machine stretches it

LIMITS = replace(SMALL, reserve_bytes=32 * KIB)


def fill_up(cluster: Cluster, host: Host, left: int) -> None:
    """Something else on that machine uses the disk up."""
    host.disk.capacity = host.disk.used() + left
    store = host.store
    assert store is not None
    cluster.until(lambda: store.disk_full, "the store notices")


def refusal(cluster: Cluster, host: Host, group: int) -> AegisError:
    client = Client(cluster, host)
    number = client.produce(group, batch(b"refused"))
    cluster.until(lambda: client.reply(number) is not None, "an answer")
    outcome = client.outcome(number)
    assert isinstance(outcome, AegisError)
    return outcome


def test_a_full_node_leads_no_longer_and_catches_up_when_there_is_room() -> None:
    cluster = Cluster(limits=LIMITS)
    group = cluster.topic().partitions[0].group
    full = cluster.elect(group)
    assert Client(cluster, full).stored(group, batch(b"before")) == 0
    fill_up(cluster, full, 20 * KIB)
    assert isinstance(refusal(cluster, full, group), DiskFull | NotLeader)
    cluster.until(lambda: cluster.leader(group) not in (None, full), "another leads", 2_000)
    leader = cluster.elect(group)
    client = Client(cluster, leader)
    for number in range(100):
        assert client.stored(group, batch(bytes(1_000))) == number + 1
    assert full.partition(group).log.last_index < 20, "it took nothing"
    assert "is full" in full.alive.damaged[0]["why"]
    cluster.tick(100)
    assert cluster.elect(group) is not full
    full.disk.capacity = None
    cluster.until(lambda: holds_all(full, cluster, group), "it catches up", 2_000)
    lead_with(cluster, full, group)
    assert len(Client(cluster, full).read(group)) == 101


def test_a_leader_knows_that_its_follower_is_full_and_sends_it_nothing() -> None:
    cluster = Cluster(limits=LIMITS)
    group = cluster.topic().partitions[0].group
    leader = cluster.elect(group)
    full, other = cluster.followers(group)
    fill_up(cluster, full, 20 * KIB)
    member = cluster.member(full.key.node)
    progress = leader.partition(group).replica.progress[member]
    cluster.until(lambda: progress.held, "the leader has heard")
    sent: list[int] = []
    queue_raft = leader.alive.links.queue_raft

    def count(key: PeerKey, recipient: Member, **message: Any) -> None:
        if key.node == full.key.node and message["frames"] is not None:
            sent.append(len(message["frames"]))
        queue_raft(key, recipient, **message)

    leader.alive.links.queue_raft = count  # type: ignore[method-assign]
    client = Client(cluster, leader)
    for _ in range(50):
        client.stored(group, batch(bytes(1_000)))
    cluster.tick(100)
    assert sent == [], "nothing that it would only refuse"
    words = [one["why"] for one in leader.alive.damaged]
    assert any(f"Node {full.key.node} takes no messages" in why and "t/0" in why for why in words)
    leader.partition(group).step_aside()
    cluster.until(lambda: cluster.leader(group) not in (None, leader), "another leads")
    assert cluster.leader(group) is other, "not the one that has no room"
    full.disk.capacity = None
    cluster.until(lambda: holds_all(full, cluster, group), "it goes on by itself", 2_000)
    assert all(not host.alive.damaged for host in cluster.alive)


def test_a_cluster_that_is_full_still_deletes_and_goes_on_by_itself() -> None:
    cluster = Cluster(limits=LIMITS)
    old = cluster.topic("old").partitions[0].group
    group = cluster.topic("t").partitions[0].group
    client = Client(cluster, cluster.elect(old))
    for _ in range(100):
        client.stored(old, batch(bytes(1_000)))
    client = Client(cluster, cluster.elect(group))
    assert client.stored(group, batch(b"kept")) == 0
    for host in cluster.alive:
        fill_up(cluster, host, 10 * KIB)
    cluster.until(
        lambda: isinstance(refusal(cluster, cluster.elect(group), group), DiskFull), "full"
    )
    for host in cluster.alive:
        assert host.store is not None
        assert host.store.free_bytes > 10 * KIB, "the reserve was given up"
    for host in list(cluster.alive):  # a start needs room as well
        cluster.kill(host)
        host.start()
    assert Client(cluster, cluster.elect(0)).ask(Api.DELETE_TOPIC, ["old"]).code == 0

    def has_room() -> bool:
        return not any(host.store is None or host.store.disk_full for host in cluster.alive)

    cluster.until(has_room, "the topic's files are gone", 2_000)
    client = Client(cluster, cluster.elect(group))
    assert client.stored(group, batch(b"more")) == 1
    assert client.read(group) == [b"kept", b"more"]


def write_on(
    cluster: Cluster, client: Client, group: int, rng: random.Random, numbers: dict[int, bytes]
) -> None:
    """Produce for a while; `numbers` says what was sent under which number."""
    for _ in range(400):
        value = rng.randbytes(800)
        numbers[client.produce(group, batch(value))] = value
        if rng.random() < 0.3:
            cluster.tick()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_acknowledged_is_lost_when_a_sync_fails(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(3 if seed % 2 else 1)
    group = cluster.topic(replicas=cluster.nodes).partitions[0].group
    acknowledged: list[bytes] = []
    for _ in range(4):
        host = cluster.elect(group)
        client = Client(cluster, host)
        numbers: dict[int, bytes] = {}
        host.disk.fail_next("sync", rng.choice(["journal", ".log", ""]))
        with pytest.raises(StorageFailed):
            write_on(cluster, client, group, rng, numbers)
        for number, value in numbers.items():
            if client.reply(number) is not None and isinstance(client.outcome(number), tuple):
                acknowledged.append(value)
        cluster.power_off(host, rng)
        host.start()
        cluster.until(lambda: cluster.leader(group) is not None, "a leader", 1_000)
    found = Client(cluster, cluster.elect(group)).read(group)
    kept = iter(found)
    assert all(value in kept for value in acknowledged), "in their order, and all of them"
