"""The next step of one member towards the group's target (KIP-848's reconciliation), pure.

    holds too much ──► told to give it up (revoking) ──► has given it up ──► reaches the epoch
                                                                        ──► gets what is free

A member gives up before it takes, and takes only what nobody holds, so nobody ever has to stop
the others: partitions that stay are read on all the while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.broker.groups.commands import GroupMember, Places
    from aegis_cluster.broker.groups.group_table import Group
    from aegis_cluster.ids import TopicPartition


@dataclass(frozen=True, slots=True)
class Seen:
    """What a member says of itself: the version it has seen of its state, and what it reads now."""

    version: int
    owned: Places


def next_step(
    group: Group, member: GroupMember, seen: Seen, holders: Mapping[TopicPartition, str]
) -> GroupMember:
    """The member as it should be now; the same object when nothing is to change.

    holders: of every partition that anybody holds. Only a member that has seen the present version
    can say that it gave something up: a late message must not be taken for that.
    """
    wanted = group.target.get(member.name, frozenset())
    revoking = member.revoking
    if seen.version == member.version:
        revoking &= seen.owned
    # What was assigned and is not read yet may be on its way to the member: given up likewise.
    revoking |= member.assigned - wanted
    assigned = member.assigned & wanted
    epoch = member.epoch
    if not revoking:
        epoch = group.epoch
        assigned |= {p for p in wanted - assigned if holders.get(p, member.name) == member.name}
    step = replace(member, epoch=epoch, assigned=assigned, revoking=revoking)
    return member if step == member else replace(step, version=member.version + 1)
