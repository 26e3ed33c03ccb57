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
    from aegis_cluster.wire.descriptions import NodeInfo, PartitionInfo, TopicInfo


def place(
    *, nodes: Sequence[NodeInfo], topics: Iterable[TopicInfo], partitions: int, replicas: int
) -> list[tuple[Member, ...]]:
    """Replicas of each new partition, preferred leader first.

    Raises `NotEnoughReplicas` when fewer nodes are registered than replicas are asked for.
    """
    members = sorted(node.member for node in nodes)
    if len(members) < replicas:
        raise _too_few(have=len(members), want=replicas)
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


def resize(
    *,
    nodes: Sequence[NodeInfo],
    topics: Iterable[TopicInfo],
    partitions: Sequence[PartitionInfo],
    replicas: int,
) -> tuple[PartitionInfo, ...]:
    """The partitions with more replicas, on the nodes that carry least, or with fewer.

    Whoever holds a partition keeps it as far as possible, its preferred leader first. Raises
    `NotEnoughReplicas`.
    """
    members = sorted(node.member for node in nodes)
    if len(members) < replicas:
        raise _too_few(have=len(members), want=replicas)
    _, holds = _load(topics)
    resized = []
    for placed in partitions:
        turn = {
            member: (rank - placed.partition) % len(members) for rank, member in enumerate(members)
        }
        others = sorted(
            (member for member in members if member not in placed.replicas),
            key=lambda member: (holds[member], turn[member]),
        )
        kept = placed.replicas[:replicas]
        added = others[: replicas - len(kept)]
        holds.update(added)
        resized.append(placed._replace(replicas=(*kept, *added)))
    return tuple(resized)


def _too_few(*, have: int, want: int) -> NotEnoughReplicas:
    return NotEnoughReplicas(
        f"{want} replicas need {want} nodes, and {have} are registered."
        " Start more nodes, or ask for fewer replicas.",
        have=have,
        want=want,
    )


def _load(topics: Iterable[TopicInfo]) -> tuple[Counter[Member], Counter[Member]]:
    """How many partitions each member is meant to lead, and how many replicas it holds."""
    leads: Counter[Member] = Counter()
    holds: Counter[Member] = Counter()
    for topic in topics:
        for partition in topic.partitions:
            leads[partition.replicas[0]] += 1
            holds.update(partition.replicas)
    return leads, holds
