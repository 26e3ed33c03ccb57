"""Acknowledgements short of a majority: what is known when they come, and what may be lost."""

from __future__ import annotations

import pytest

from aegis_cluster.errors import NotLeader, OutcomeUnknown, PeerViolation
from aegis_cluster.wire.protocol import Acks, Api
from tests.broker.harness import Client, Cluster, batch


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    found.registered()
    return found


@pytest.fixture
def group(cluster: Cluster) -> int:
    (placed,) = cluster.topic().partitions
    cluster.elect(placed.group)
    return placed.group


def produce(client: Client, group: int, acks: int, value: bytes = b"a") -> int:
    return client.send(Api.PRODUCE, [[[group, "t", 0]], acks], [batch(value)])


def test_the_leader_answers_for_its_own_disk_alone(cluster: Cluster, group: int) -> None:
    leader = Client(cluster, cluster.elect(group))
    for host in cluster.followers(group):
        host.hold_syncs = True
    number = produce(leader, group, Acks.LEADER)
    waits = produce(leader, group, Acks.QUORUM, b"b")
    cluster.settle()
    assert leader.outcome(number) is not None
    assert leader.outcome(waits) is None
    assert leader.host.partition(group).high_watermark == 0, "nobody reads it before it is safe"
    for host in cluster.followers(group):
        host.hold_syncs = False
    cluster.until(lambda: leader.outcome(waits) is not None, "a majority")
    assert leader.read(group) == [b"a", b"b"]


def test_the_leader_does_not_answer_before_its_own_sync(cluster: Cluster, group: int) -> None:
    leader = Client(cluster, cluster.elect(group))
    leader.host.hold_syncs = True
    number = produce(leader, group, Acks.LEADER)
    hasty = produce(leader, group, Acks.NONE, b"b")
    cluster.settle()
    assert leader.outcome(number) is None
    assert leader.outcome(hasty) is not None, "who waits for nothing is answered at once"
    leader.host.hold_syncs = False
    cluster.until(lambda: leader.outcome(number) is not None, "its sync")


def test_who_stops_leading_before_its_sync_says_that_nobody_knows(
    cluster: Cluster, group: int
) -> None:
    old = Client(cluster, cluster.elect(group))
    old.host.hold_syncs = True
    number = produce(old, group, Acks.LEADER)
    cluster.settle()
    cluster.isolate(old.host.key.node)
    cluster.until(lambda: old.outcome(number) is not None, "the end of its leadership")
    assert isinstance(old.outcome(number), OutcomeUnknown)
    assert old.host.alive.clients.in_flight_bytes == 0


@pytest.mark.parametrize("acks", list(Acks))
def test_who_does_not_lead_refuses_whatever_is_waited_for(
    cluster: Cluster, group: int, acks: Acks
) -> None:
    follower = Client(cluster, cluster.followers(group)[0])
    assert isinstance(follower.outcome(produce(follower, group, acks)), NotLeader)


@pytest.mark.parametrize("acks", [3, -1, "all", None])
def test_unknown_acks_break_the_protocol(cluster: Cluster, group: int, acks: object) -> None:
    leader = Client(cluster, cluster.elect(group))
    fields = [[[group, "t", 0]], acks]
    assert isinstance(leader.refusal(Api.PRODUCE, fields, [batch(b"a")]), PeerViolation)
