"""Which groups of a round skip the journal: one pure decision.

The idea: the journal costs one sync for any number of groups, but its bytes are written twice. A
group with many bytes is cheaper synced in its own segment, as long as there are few such groups,
for each costs a sync of its own. The rule it protects: a group whose log was cut since the last
checkpoint never skips the journal, because only the journal can tell its new frames from the old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.types import StoreLimits


class GroupWork(NamedTuple):
    """What one group has staged for a round."""

    group: GroupId
    size: int
    """Bytes of its frames."""
    forced: bool
    """It must go through the journal."""


def sync_plan(work: Sequence[GroupWork], limits: StoreLimits) -> frozenset[GroupId]:
    """Groups whose segments are synced directly; all others go through the journal."""
    able = [one for one in work if not one.forced and one.size >= limits.direct_group_bytes]
    largest = sorted(able, key=lambda one: (-one.size, one.group))
    return frozenset(one.group for one in largest[: limits.direct_groups])
