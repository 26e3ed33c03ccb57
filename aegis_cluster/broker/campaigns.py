"""Who may ask for votes now, where hundreds of replicas lost their leaders at once.

The idea: an election costs each of its voters some work. Where a whole shard's replicas campaign
in the same instant, the answers come after the campaigns have timed out, everybody asks again, and
nobody is ever elected. So time passes for only so many replicas without a leader in one tick, in
turn; those that placement prefers here come first. Where few lack a leader nothing is held back.

The rule it protects: every replica has its turn, so none waits for one that cannot win.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.ids import GroupId, NodeId

CAMPAIGNS_PER_TICK: Final = 64


class Campaigns:
    """One per shard."""

    def __init__(self, node: NodeId) -> None:
        self._wanted: dict[GroupId, Partition] = {}
        """Asked for, and not begun."""
        self._room = CAMPAIGNS_PER_TICK
        """How many may begin before the next tick."""
        self._next = 2 * CAMPAIGNS_PER_TICK * node
        """Whose turn is next: others on each node, so that few ask against each other."""

    def want(self, partition: Partition) -> None:
        """Let it campaign as soon as it may."""
        if self._room:
            self._room -= 1
            partition.replica.campaign()
        else:
            self._wanted[partition.group] = partition

    def want_soon(self, partition: Partition) -> None:
        """Let it campaign at the next tick, or a later one; the other voters then know as well
        that there is no leader.
        """
        self._wanted[partition.group] = partition

    def those_to_tick(self, waiting: Sequence[Partition]) -> Iterator[Partition]:
        """Begin the campaigns that are wanted, and give out those whose turn it is.

        waiting: all replicas that are awake and lack a leader.
        """
        self._room = CAMPAIGNS_PER_TICK
        yield from self._begin({partition.group: partition for partition in waiting})
        count = min(self._room, len(waiting))
        start, self._next = self._next, self._next + count
        for place in range(start, start + count):
            yield waiting[place % len(waiting)]

    def _begin(self, waiting: dict[GroupId, Partition]) -> Iterator[Partition]:
        for group, partition in list(self._wanted.items())[: self._room]:
            del self._wanted[group]
            if waiting.get(group) is partition:  # otherwise it has a leader by now, or is gone
                self._room -= 1
                partition.replica.campaign()
                yield partition
