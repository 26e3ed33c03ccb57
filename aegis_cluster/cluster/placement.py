"""Where the replicas of a new topic go: pure, so that the same cluster gives the same answer.

The idea: count what each node carries already, then hand every partition to the nodes that carry
least, leaders counted apart from replicas, because a leader works more than its followers. Ties
go round robin from partition to partition, so that one topic alone is spread evenly too.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from aegis_cluster.errors import NotEnoughReplicas

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.ids import Member
    from aegis_cluster.wire.descriptions import NodeInfo, TopicInfo


def place(
    *, nodes: Sequence[NodeInfo], topics: Iterable[TopicInfo], partitions: int, replicas: int
) -> list[tuple[Member, ...]]:
    """Replicas of each new partition, preferred leader first.

    Raises `NotEnoughReplicas` when fewer nodes are registered than replicas are asked for.
    """
    members = sorted(node.member for node in nodes)
    if len(members) < replicas:
        raise NotEnoughReplicas(
            f"{replicas} replicas need {replicas} nodes, and {len(members)} are registered."
            " Start more nodes, or ask for fewer replicas.",
            have=len(members),
            want=replicas,
        )
    leads, holds = _load(topics)
    placed: list[tuple[Member, ...]] = []
    for number in range(partitions):
        turn = {member: (rank - number) % len(members) for rank, member in enumerate(members)}
        least = sorted(members, key=lambda m: (holds[m], turn[m]))[:replicas]
        leader = min(least, key=lambda m: (leads[m], turn[m]))
        chosen = (leader, *(member for member in least if member != leader))
        leads[leader] += 1
        holds.update(chosen)
        placed.append(chosen)
    return placed


def _load(topics: Iterable[TopicInfo]) -> tuple[Counter[Member], Counter[Member]]:
    """How many partitions each member is meant to lead, and how many replicas it holds."""
    leads: Counter[Member] = Counter()
    holds: Counter[Member] = Counter()
    for topic in topics:
        for partition in topic.partitions:
            leads[partition.replicas[0]] += 1
            holds.update(partition.replicas)
    return leads, holds
