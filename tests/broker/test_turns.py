"""A turn over many replicas, when one of them is removed in the middle of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from aegis_cluster.ids import GroupId
from tests.broker.harness import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.partition import Partition


class FakePartition:
    """Runs a function where a replica would step."""

    def __init__(self, group: int, step: Callable[[], object]) -> None:
        self.group = GroupId(group)
        self.step = step
        self.replica = SimpleNamespace(quiet=True)


def test_a_replica_that_was_removed_in_a_turn_is_not_stepped_in_it() -> None:
    """A deletion applied by `__cluster/0` removes replicas that may be due in the same turn; to
    step one of them ended the process, and at a restart again and again."""
    manager = Cluster().host(1).alive.manager
    stepped: list[int] = []
    removed = FakePartition(98, lambda: stepped.append(98))

    def remove() -> None:
        stepped.append(97)
        del manager.partitions[removed.group]

    for fake in (FakePartition(97, remove), removed):
        partition = cast("Partition", fake)
        manager.partitions[fake.group] = partition
        manager.due(partition)
    manager.turn()
    assert stepped == [97]
