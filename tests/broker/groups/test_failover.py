"""The coordinator dies, its connections close, time passes: what moves, and what must not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.transport import Listener
from aegis_cluster.limits import REBALANCE_TIMEOUT_MS
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId

TIMEOUT_MS = 5_000
TICK_MS = 50


class Group:
    """One member's talk with whoever coordinates its group."""

    def __init__(self, cluster: Cluster, name: str = "m") -> None:
        self.cluster = cluster
        self.name = name
        self.version = 0
        self.epoch = 0
        self.places: dict[str, list[int]] = {}

    @property
    def raft_group(self) -> GroupId:
        info = self.cluster.elect().alive.table.topics["__groups"]
        return info.partitions[partition_for(b"g", len(info.partitions))].group

    @property
    def coordinator(self) -> Host:
        return self.cluster.elect(self.raft_group)

    def client(self) -> Client:
        return Client(self.cluster, self.coordinator, listener=Listener.CONTROL)

    def beat(self, client: Client | None = None, *, wait_ms: int = 0) -> None:
        fields: list[Any] = [
            *("g", self.name, "session", False, ["t"], TIMEOUT_MS, "here"),
            *(self.version, self.places),
        ]
        client = client or self.client()
        number = client.send(Api.GROUP_BEAT, fields, ms_left=max(100, 2 * wait_ms))
        self.cluster.until(lambda: client.reply(number) is not None, "a heartbeat's answer")
        reply = client.reply(number)
        assert reply is not None
        assert reply.code == 0, reply.fields
        self.epoch, self.version, self.places = reply.fields

    def members(self) -> list[Any]:
        reply = self.client().ask(Api.GROUP_DESCRIBE, ["g"])
        assert reply.code == 0, reply.fields
        return list(reply.fields[3])


@pytest.fixture
def cluster() -> Cluster:
    return ready(Cluster(3))


def ready(found: Cluster) -> Cluster:
    """With a topic of four partitions, and all that groups need."""
    found.registered()
    assert Client(found, found.elect()).ask(Api.INTERNAL_TOPIC, ["__groups"]).code == 0
    found.topic("t", partitions=4, replicas=found.nodes)
    found.settle()
    return found


def test_a_coordinators_death_moves_nothing(cluster: Cluster) -> None:
    one = Group(cluster)
    one.beat()
    before = (one.epoch, one.version, one.places)
    assert sum(map(len, one.places.values())) == 4
    cluster.kill(one.coordinator)
    cluster.elect(one.raft_group)
    one.beat()
    assert (one.epoch, one.version, one.places) == before


def test_a_silent_member_is_dead_after_its_session_and_not_before(cluster: Cluster) -> None:
    one = Group(cluster)
    one.beat()
    cluster.tick(TIMEOUT_MS // TICK_MS - 10)
    assert len(one.members()) == 1
    cluster.tick(20)
    assert one.members() == []


def test_a_new_coordinator_gives_everybody_one_session(cluster: Cluster) -> None:
    one = Group(cluster)
    one.beat()
    cluster.tick(TIMEOUT_MS // TICK_MS // 2)
    cluster.kill(one.coordinator)
    cluster.elect(one.raft_group)
    cluster.tick(TIMEOUT_MS // TICK_MS // 2 + 20)
    assert len(one.members()) == 1
    cluster.tick(TIMEOUT_MS // TICK_MS)
    assert one.members() == []


def test_a_member_that_dies_during_a_handover_that_comes_to_nothing_is_dead(
    cluster: Cluster,
) -> None:
    """While leadership is being handed over, nothing is appended; then the same one leads on."""
    one = Group(cluster)
    client = one.client()
    one.beat(client)
    coordinator = one.coordinator
    partition = coordinator.partition(one.raft_group)
    term = partition.replica.term
    away = cluster.followers(one.raft_group)[0]
    cluster.cut.add(frozenset((coordinator.key.node, away.key.node)))
    partition.step_aside(cluster.member(away.key.node))
    coordinator.alive.client_gone(Listener.CONTROL, client.origin)
    cluster.until(lambda: not partition.replica.transferring, "the end of the attempt")
    cluster.heal()
    cluster.tick(TIMEOUT_MS // TICK_MS + 20)
    assert one.members() == []
    assert partition.replica.term == term


def test_a_coordinator_that_has_not_heard_of_a_topic_knows_the_positions_in_it(
    cluster: Cluster,
) -> None:
    """Cut off from the controller alone, a node leads `__groups` with old metadata."""
    one = Group(cluster)
    controller = cluster.elect()
    near, far = (host for host in cluster.alive if host is not controller)
    cluster.hand_over(one.raft_group, near)
    cluster.cut.add(frozenset((controller.key.node, far.key.node)))
    cluster.topic("late")
    commit = ["g", "", "", 0, 0, [["late", 0, 5]]]
    assert one.client().ask(Api.GROUP_COMMIT, commit).code == 0
    cluster.hand_over(one.raft_group, far)
    assert "late" not in far.alive.table.topics
    reply = one.client().ask(Api.GROUP_OFFSETS, ["g", [["late", 0]]])
    assert [row[:3] for row in reply.fields[0]] == [["late", 0, 5]]
    cluster.heal()
    cluster.until(lambda: "late" in far.alive.table.topics, "news of the topic")
    deleted = Client(cluster, cluster.elect()).ask(Api.DELETE_TOPIC, ["late"])
    assert deleted.code == 0
    cluster.until(lambda: "late" not in far.alive.table.topics, "news of its end")
    reply = one.client().ask(Api.GROUP_OFFSETS, ["g", [["late", 0]]])
    assert [row[:3] for row in reply.fields[0]] == [["late", 0, -1]]


def test_a_closed_connection_is_a_dead_member_at_once(cluster: Cluster) -> None:
    one = Group(cluster)
    client = one.client()
    one.beat(client)
    one.coordinator.alive.client_gone(Listener.CONTROL, client.origin)
    cluster.tick(20)
    assert one.members() == []


def test_one_that_comes_back_over_another_connection_stays(cluster: Cluster) -> None:
    one = Group(cluster)
    client = one.client()
    one.beat(client)
    one.coordinator.alive.client_gone(Listener.CONTROL, client.origin)
    one.beat(one.client())
    cluster.tick(20)
    assert len(one.members()) == 1


def test_a_coordinator_that_slept_holds_that_against_nobody() -> None:
    """Neither that a member said nothing meanwhile, nor that it gave nothing up."""
    cluster = ready(Cluster(1))
    one, two = Group(cluster, "a"), Group(cluster, "b")
    one.beat()
    two.beat()
    one.beat()
    cluster.tick(5)
    revoking = [row[6] for row in one.members()]
    assert revoking == [{"t": [2, 3]}, {}]
    cluster.now_ms += 2 * REBALANCE_TIMEOUT_MS
    cluster.tick(5)
    assert [row[6] for row in one.members()] == revoking


def test_a_second_member_shares_and_takes_over_by_itself(cluster: Cluster) -> None:
    one, two = Group(cluster, "a"), Group(cluster, "b")
    one.beat()
    two.beat()
    for _ in range(4):
        one.beat()
        two.beat()
    assert len(one.places["t"]) == len(two.places["t"]) == 2
    client = two.client()
    number = client.send(
        Api.GROUP_BEAT,
        ["g", "b", "session", False, ["t"], TIMEOUT_MS, "here", two.version, two.places],
        ms_left=60_000,
    )
    # "a" says nothing more; "b", whose heartbeat waits at the coordinator, hears of it.
    cluster.until(
        lambda: client.reply(number) is not None, "news", ticks=TIMEOUT_MS // TICK_MS + 40
    )
