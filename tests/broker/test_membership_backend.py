"""A node with an empty directory takes the places of the old one, step by step, or says why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.broker.membership_backend import metadata_members, next_step
from aegis_cluster.cluster.metadata import ReplaceMember, decode_command, encode_command
from aegis_cluster.cluster.metadata_table import MetadataTable
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId
from aegis_cluster.raft import Membership
from aegis_cluster.wire.descriptions import NodeInfo
from tests.broker.harness import Client, Cluster, Host, batch

A, B, C, NEW = (Member(NodeId(n), inc) for n, inc in ((1, "a"), (2, "b"), (3, "c"), (3, "new")))
VALUES = [b"%d" % number for number in range(60)]


def steps_of(gone: tuple[Member, ...]) -> list[Membership]:
    now, wanted, steps = Membership.of((A, B, C)), (A, B, NEW), []
    while (following := next_step(now, wanted, gone=gone, caught_up=now.learners)) is not None:
        now = following
        steps.append(now)
    return steps


def test_one_step_at_a_time() -> None:
    assert steps_of(()) == [
        Membership.of((A, B, C), (NEW,)),
        Membership.of((A, B, C, NEW)),
        Membership.of((A, B, NEW)),
    ], "one that lives keeps its vote until its successor has one"


def test_one_that_is_gone_leaves_before_its_successor_counts() -> None:
    assert steps_of((C,)) == [
        Membership.of((A, B, C), (NEW,)),
        Membership.of((A, B), (NEW,)),
        Membership.of((A, B, NEW)),
    ], "so never are more than two live voters needed"


def test_nobody_leaves_for_a_learner_that_has_not_caught_up() -> None:
    now = Membership.of((A, B, C), (NEW,))
    assert next_step(now, (A, B, NEW), gone=(C,)) is None
    assert next_step(now, (A, B, C), gone=()) == Membership.of((A, B, C)), "it is not wanted"


def registered(*members: Member) -> dict[NodeId, NodeInfo]:
    return {
        one.node: NodeInfo(one.node, one.incarnation, f"node-{one.node}", "127.0.0.1", 7100, 1, "")
        for one in members
    }


@pytest.mark.parametrize(
    ("now", "nodes", "wanted"),
    [
        ((A,), (A,), (A,)),
        ((A,), (A, B), (A,)),
        ((A,), (A, B, C), (A, B, C)),
        ((A, B), (A, B, C), (A, B, C)),
        ((A, B), (A, B), (A, B)),
        ((A, B, C), (A, B, NEW), (A, B, NEW)),
        ((A, B, C), (), (A, B, C)),
        ((B,), (A, B, C, Member(NodeId(4), "d")), (A, B, C)),
    ],
)
def test_a_small_cluster_keeps_its_metadata_on_three_nodes_once_there_are_three(
    now: tuple[Member, ...], nodes: tuple[Member, ...], wanted: tuple[Member, ...]
) -> None:
    assert metadata_members(now, registered(*nodes)) == list(wanted)


def is_member(host: Host, group: int) -> bool:
    if GroupId(group) not in host.alive.manager.partitions:
        return False
    partition = host.partition(group)
    me, members = host.alive.context.me, partition.replica.membership
    return me in members.voters and len(members.members) == 3 and partition.applied > 0


@pytest.mark.parametrize("shards", [1, 2])
def test_a_wiped_node_is_brought_up_everywhere(shards: int) -> None:
    cluster = Cluster(shards=shards)
    groups = [placed.group for placed in cluster.topic(partitions=3).partitions]
    lost = cluster.topic("single", replicas=1).partitions[0]
    cluster.registered()
    for group in groups:
        client = Client(cluster, cluster.elect(group))
        for value in VALUES:
            client.stored(group, batch(value))
    node = lost.replicas[0].node
    cluster.wipe(node)
    cluster.tick(40)
    hosts = [host for host in cluster.hosts.values() if host.key.node == node]
    for host in hosts:
        host.start()

    def all_there() -> bool:
        return is_member(hosts[0], 0) and all(
            is_member(cluster.host(node, group % shards), group) for group in groups
        )

    cluster.until(all_there, "the new member votes everywhere", 2_000)
    cluster.tick(20)
    assert hosts[0].alive.reader is None
    said = [one["why"] for host in hosts for one in host.alive.damaged]
    assert any("single/0 had its only replica" in why for why in said)
    for other in range(1, 4):  # the new one and either of the old ones are a majority
        if other != node:
            for host in [host for host in cluster.hosts.values() if host.key.node == other]:
                cluster.kill(host)
            for group in groups:
                assert Client(cluster, cluster.elect(group)).read(group) == VALUES
            for host in [host for host in cluster.hosts.values() if host.key.node == other]:
                host.start()
            cluster.tick(60)
    for host in list(cluster.alive):  # and what the members are is known after a restart
        cluster.kill(host)
        host.start()
    cluster.until(all_there, "after a restart of all", 2_000)
    assert cluster.topic("later").partitions[0].group > lost.group


def test_replacing_a_gone_member_never_needs_three_live_voters() -> None:
    """Wherever another node is killed meanwhile, what is left goes on or needs just its return."""
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    client = Client(cluster, cluster.elect(group))
    for value in VALUES:
        client.stored(group, batch(value))
    cluster.wipe(3)
    cluster.tick(40)
    cluster.host(3).start()
    seen: set[tuple[int, bool]] = set()

    def replaced() -> bool:
        for number in (0, group):
            for host in cluster.alive:
                if GroupId(number) in host.alive.manager.partitions:
                    voters = host.partition(number).replica.membership.voters
                    seen.add((len(voters), cluster.member(NodeId(3)) in voters))
        return all(is_member(cluster.host(3), number) for number in (0, group))

    cluster.until(replaced, "the new member votes", 2_000)
    assert seen == {(3, False), (2, False), (3, True)}
    cluster.kill(cluster.host(1))
    assert Client(cluster, cluster.elect(group)).read(group) == VALUES


def test_two_of_three_wiped_is_said_and_loses_nothing() -> None:
    cluster = Cluster()
    group = cluster.topic().partitions[0].group
    client = Client(cluster, cluster.elect(group))
    for value in VALUES:
        client.stored(group, batch(value))
    cluster.tick(10)
    kept = cluster.host(1)
    before = kept.partition(group).log.last_index
    for node in (2, 3):
        cluster.wipe(node)
    for node in (2, 3):
        cluster.host(node).start()
    cluster.tick(400)
    assert cluster.leader(0) is None
    assert cluster.leader(group) is None
    said = {one["group"]: one["why"] for one in kept.alive.damaged}
    assert "2 of its 3 voters came back with empty data directories" in said[0]
    assert "2 of its 3 voters" in said[group]
    assert "waits to join" in cluster.host(2).alive.damaged[0]["why"]
    assert kept.partition(group).log.last_index == before
    assert all(group not in cluster.host(n).alive.manager.partitions for n in (2, 3))


def test_the_command_and_the_table_keep_who_came_first() -> None:
    cluster = Cluster()
    cluster.topic()
    table = MetadataTable.from_body(cluster.elect().alive.table.to_body())
    group = table.topics["t"].partitions[0].group
    first = table.founders_of(group)
    old = table.nodes[NodeId(2)]
    new = cluster.member(NodeId(2))._replace(incarnation="new")
    command = ReplaceMember(replace(old, incarnation="new"), old.member)
    assert decode_command(encode_command(command)) == command
    table.apply(LogIndex(table.index + 1), command)
    again = MetadataTable.from_body(table.to_body())
    for one in (table, again):
        assert one.founders_of(group) == first
        assert new in one.topics["t"].partitions[0].replicas
        assert old.member not in one.topics["t"].partitions[0].replicas
