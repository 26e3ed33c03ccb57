"""What an operator of a simulated cluster sees and does.

The idea: the adversary asks here before it takes a disk away, because a correct cluster survives
the loss of one member's data only while all others hold theirs; and it moves replicas through the
controller, as an operator would.

The rule it protects: it decides nothing; the cluster may refuse, and what it is asked for may be
done late or never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.broker.membership_backend import wanted_members
from aegis_cluster.cluster.controller import place_replicas
from aegis_cluster.ids import METADATA_GROUP, NodeId

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId
    from aegis_cluster.testing.node import SimulatedNode
    from aegis_cluster.testing.sessions import Topic

REPLICAS_MIN = 2
"""Moves leave at least so many replicas: an only one could not be brought up anywhere else."""

WIPE_VOTERS_MIN = 3


class Operations:
    """One cluster, seen from outside."""

    def __init__(self, nodes: Sequence[SimulatedNode], topic: Topic) -> None:
        self._nodes = nodes
        self._topic = topic
        self.others: list[Topic] = []
        """Topics beside the one that is always there."""

    @property
    def groups(self) -> list[GroupId]:
        """The metadata's group and those of the topics."""
        others = [group for topic in self.others for group in topic.groups]
        return [METADATA_GROUP, *self._topic.groups, *others]

    def coordinators(self) -> list[Partition]:
        """Those replicas that lead a log of groups or transactions."""
        internal = [topic for topic in self.others if topic.name.startswith("__")]
        leaders = [self.leader(group) for topic in internal for group in topic.groups]
        return [leader for leader in leaders if leader is not None]

    def coordinating_nodes(self) -> list[SimulatedNode]:
        """Where they are, each as often as it leads such a log."""
        return [self._nodes[one.replica.me.node - 1] for one in self.coordinators()]

    def leader(self, group: GroupId) -> Partition | None:
        """Whoever serves in the newest term."""
        found = [p for node in self._nodes if (p := node.partition(group)) is not None]
        serving = [partition for partition in found if partition.serving]
        return max(serving, key=lambda partition: partition.replica.term, default=None)

    def controller(self) -> Shard | None:
        """The shard that leads the metadata's group."""
        leader = self.leader(METADATA_GROUP)
        for node in self._nodes:
            for shard in node.running():
                if shard.manager.partitions.get(METADATA_GROUP) is leader is not None:
                    return shard
        return None

    def is_whole(self) -> bool:
        """Every group has the members that it should have, and all of them are well."""
        controller = self.controller()
        return controller is not None and all(
            self._is_whole(group, controller) for group in self.groups
        )

    def survives_loss_of(self, node: SimulatedNode) -> bool:
        """All is well, and no group consists of so few that a majority would be gone.

        A voter counts once it is committed that it is one: before, its leader alone may know it.
        """
        replicas = [leader.replica for group in self.groups if (leader := self.leader(group))]
        return self.is_whole() and all(
            one.membership_at(one.commit_index) == one.membership
            and len(one.membership.voters) >= WIPE_VOTERS_MIN
            for one in replicas
            if node.member in one.membership.voters
        )

    def _is_whole(self, group: GroupId, controller: Shard) -> bool:
        leader = self.leader(group)
        if leader is None:
            return False
        membership = leader.replica.membership
        wanted = wanted_members(leader, controller.table)
        return (
            not membership.learners
            and set(membership.voters) == set(wanted)
            and all(self._is_well(group, number) for number in membership.voters)
        )

    def _is_well(self, group: GroupId, voter: Any) -> bool:
        node = self._nodes[voter.node - 1]
        partition = node.partition(group)
        return (
            node.member == voter
            and partition is not None
            and partition.damage is None
            and not partition.replica.damaged
        )

    def members(self, group: GroupId) -> list[Partition]:
        """The open replicas of those who are members now; others may be left over from a move."""
        leader = self.leader(group)
        if leader is None:
            return []
        members = leader.replica.membership.members
        found = [node.partition(group) for node in self._nodes if node.member in members]
        return [partition for partition in found if partition is not None]

    def move_one(self, rng: random.Random) -> str:
        """Ask for one replica more, one less, or one elsewhere; return what was asked for."""
        controller = self.controller()
        partition = rng.randrange(len(self._topic.groups))
        found = controller and controller.table.partition_of(self._topic.groups[partition])
        if controller is None or not found:
            return "nobody to ask"
        nodes = [member.node for member in found[1].replicas]
        wanted = self._other_nodes(nodes, rng)
        name = self._topic.name
        submit = controller.controller
        if submit is not None:
            submit.submit(
                lambda table: place_replicas(table, topic=name, partition=partition, nodes=wanted),
                lambda _result, _index: None,
            )
        return f"partition {partition}: {nodes} -> {wanted}"

    def _other_nodes(self, nodes: list[NodeId], rng: random.Random) -> list[NodeId]:
        others = [NodeId(n.number) for n in self._nodes if n.number not in nodes]
        kinds = ["turn"]
        if others:
            kinds += ["add", "swap", "swap"]
        if len(nodes) > REPLICAS_MIN:
            kinds += ["remove"]
        kind = rng.choice(kinds)
        kept = list(nodes)
        if kind in ("remove", "swap"):
            kept.remove(rng.choice(kept))
        if kind in ("add", "swap"):
            kept.insert(rng.randint(0, len(kept)), rng.choice(others))
        return kept if kind != "turn" else kept[1:] + kept[:1]
