"""Compares who should hold a partition with who does, and mends the difference one step at a time.

A node whose disk was wiped comes back as a new member: it registers, the metadata names it in
place of the old one, and the leader of every partition that the old one held makes it a learner,
lets it catch up, removes the old one, and makes it a voter. In this order no change needs more live
voters than the one before it did. `__cluster/0` stands in no table: its members follow the
registrations themselves. In a cluster that began smaller they become three once three nodes are
registered, and not two before: of two, both would have to live.

The rule it protects: nobody counts towards a majority before it has caught up (A11), one change
at a time (A8), and where a majority of disks is gone, nothing is led, changed or thrown away: it is
said in plain words instead.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import Refused
from aegis_cluster.ids import METADATA_GROUP, METADATA_VOTERS, GroupId, LogIndex, Member
from aegis_cluster.raft.quorum import quorum_size

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.cluster.metadata_table import MetadataTable
    from aegis_cluster.ids import NodeId
    from aegis_cluster.raft import Membership
    from aegis_cluster.wire.descriptions import NodeInfo

EVERY_MS: Final = 250
LOOK_EVERY_MS: Final = 1_000
"""At the partitions of which nothing is known to be wrong."""
UNREGISTERED_MS: Final = 10_000
"""After so long without being registered a node says so."""

log = logging.getLogger(__name__)


def next_step(
    now: Membership,
    wanted: Collection[Member],
    *,
    gone: Collection[Member] = (),
    caught_up: Collection[Member] = (),
) -> Membership | None:
    """The next single change towards these voters; None where there is nothing to do now.

    gone: members whose directory is another one by now. They are removed before their successor
    counts: with it, three voters of which two live need both; with four, all three would be needed
    until the removal commits. Not before it has caught up, though, or a group would stay at two.
    """
    for member in sorted(wanted):
        if member not in now.members:
            return now.with_learner(member)
    leaving = [member for member in now.voters if member not in wanted]
    dead = [member for member in leaving if member in gone]
    for member in now.learners:
        if member not in wanted:
            return now.without(member)
        if member in caught_up:
            return now.without(dead[0]) if dead else now.with_voter(member)
    return now.without(leaving[0]) if leaving and not now.learners else None


def wanted_members(partition: Partition, table: MetadataTable) -> list[Member]:
    """Who should hold the partition, as far as the table knows."""
    if partition.group == METADATA_GROUP:
        return metadata_members(partition.replica.membership.members, table.nodes)
    found = table.partition_of(partition.group)
    return list(found[1].replicas) if found else list(partition.replica.membership.voters)


def metadata_members(now: Collection[Member], nodes: Mapping[NodeId, NodeInfo]) -> list[Member]:
    """Who should hold `__cluster/0`: the nodes that do, as they are registered now, and where
    these are fewer than three the first others, once there are enough of them.

    now: voters and learners; a learner is on its way to a vote.
    """
    kept = {nodes[one.node].member if one.node in nodes else one for one in now}
    others = [nodes[node].member for node in sorted(nodes) if nodes[node].member not in kept]
    missing = METADATA_VOTERS - len(kept)
    return sorted([*kept, *(others[:missing] if 0 < missing <= len(others) else ())])


class MembershipBackend:
    """One per shard; acts on the partitions that are led here."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._due_ms = shard.now_ms
        self._look_at_ms = shard.now_ms
        self._seen_index = LogIndex(0)
        self._moving: set[GroupId] = set()
        """Partitions on their way to other members."""
        self._started_ms = shard.now_ms
        self._said: dict[GroupId, str] = {}

    def tick(self) -> None:
        """Propose the next change of each partition, and say what cannot be mended."""
        shard = self._shard
        if shard.now_ms < self._due_ms:
            return
        self._due_ms = shard.now_ms + EVERY_MS
        partitions = shard.manager.partitions
        if shard.now_ms < self._look_at_ms and shard.table.index == self._seen_index:
            looked_at = [partitions[group] for group in sorted(self._moving & partitions.keys())]
        else:
            self._look_at_ms, self._seen_index = shard.now_ms + LOOK_EVERY_MS, shard.table.index
            looked_at = list(partitions.values())
            self._say()
        self._moving = {one.group for one in looked_at if one.serving and self._mend(one)}

    def _mend(self, partition: Partition) -> bool:
        """Take the next step, if there is one now; whether there is one to take or to wait for."""
        replica = partition.replica
        now, wanted = replica.membership, wanted_members(partition, self._shard.table)
        if not now.learners and set(now.voters) == set(wanted):
            return False
        following = next_step(
            now,
            wanted,
            gone=[member for member in now.voters if self._is_replaced(member)],
            caught_up=[member for member in now.learners if replica.is_caught_up(member)],
        )
        if following is None:
            return True
        with suppress(Refused):  # not yet: an earlier change, or a learner, is not finished
            partition.change_membership(following)
            log.info(
                "Members of %s: voters %s, learners %s.",
                partition.name,
                _names(following.voters),
                _names(following.learners),
            )
        return True

    def _is_replaced(self, member: Member) -> bool:
        """The node is registered with another directory: this member will hardly come back."""
        known = self._shard.table.nodes.get(member.node)
        return known is not None and known.incarnation != member.incarnation

    # ---- what cannot be mended

    def report(self) -> list[dict[str, Any]]:
        """Partitions that have lost too many disks, for a status answer."""
        problems = self._problems()
        return [
            {"group": group, "topic": topic, "why": why}
            for group, (topic, why) in sorted(problems.items())
        ]

    def _say(self) -> None:
        problems = {group: why for group, (_, why) in self._problems().items()}
        for group, why in problems.items():
            if self._said.get(group) != why:
                log.error("%s", why)
        self._said = problems

    def _problems(self) -> dict[GroupId, tuple[str, str]]:
        links = self._shard.links
        answering = {key.node: links.incarnations(key.node) for key in links.ups()}
        found = {
            group: (partition.name.topic, why)
            for group, partition in self._shard.manager.partitions.items()
            if (why := _why_stuck(partition, answering)) is not None
        }
        unregistered = self._why_unregistered()
        if unregistered is not None:
            found.setdefault(METADATA_GROUP, ("__cluster", unregistered))
        return found | self._lost_with_our_disk()

    def _why_unregistered(self) -> str | None:
        shard = self._shard
        info = shard.context.node_info
        known = shard.table.nodes.get(info.node)
        if known is not None and known.incarnation == info.incarnation:
            self._started_ms = shard.now_ms
        if shard.now_ms - self._started_ms < UNREGISTERED_MS:
            return None
        return (
            f"Node {info.node} waits to join the cluster: no leader of __cluster/0 has registered"
            " it. A majority of the nodes that hold the cluster's metadata must run, with the data"
            " directories that they had."
        )

    def _lost_with_our_disk(self) -> dict[GroupId, tuple[str, str]]:
        """Partitions whose only replica was on a directory that this node no longer has."""
        me, table = self._shard.context.me, self._shard.table
        return {
            placed.group: (
                topic,
                f"{topic}/{placed.partition} had its only replica in an earlier data directory of"
                f" node {me.node}. Give the node that directory back, or delete the topic.",
            )
            for topic, info in table.topics.items()
            for placed in info.partitions
            if len(placed.replicas) == 1
            and placed.replicas[0].node == me.node
            and placed.replicas[0] != me
        }


def _why_stuck(partition: Partition, answering: Mapping[NodeId, set[str]]) -> str | None:
    """No majority of the voters' disks is left. answering: incarnations of each node's shards."""
    if partition.replica.leader is not None:
        return None
    voters = partition.replica.membership.voters
    gone = [
        one
        for one in voters
        if one.node in answering and one.incarnation not in answering[one.node]
    ]
    if len(voters) - len(gone) >= quorum_size(len(voters)) or partition.is_alone:
        return None
    return (
        f"{partition.name} has no leader and cannot get one: {len(gone)} of its {len(voters)}"
        f" voters came back with empty data directories (nodes {_names(gone)}), and without a"
        " majority nobody can know what was acknowledged. Nothing is changed, and what this"
        " node holds is kept. Stop those nodes and give them their old data directories back."
    )


def _names(members: Collection[Member]) -> str:
    return ", ".join(str(member.node) for member in members) or "none"
