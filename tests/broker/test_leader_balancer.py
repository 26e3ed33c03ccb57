"""Leaderships go back to the preferred replicas, once these have kept up for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.broker.leader_balancer import STEADY_MS
from aegis_cluster.limits import RAFT_TICK_MS
from tests.broker.harness import Cluster

if TYPE_CHECKING:
    from collections.abc import Sequence


def leaders(cluster: Cluster, groups: Sequence[int]) -> list[int]:
    found = [cluster.leader(group) for group in groups]
    return [0 if host is None else host.key.node for host in found]


def test_a_node_that_was_away_leads_again_what_it_is_preferred_for() -> None:
    cluster = Cluster(3)
    info = cluster.topic("orders", partitions=6)
    groups = [placed.group for placed in info.partitions]
    preferred = [placed.replicas[0].node for placed in info.partitions]
    cluster.until(lambda: leaders(cluster, groups) == preferred, "every preferred replica leads")
    away = cluster.host(2)
    cluster.kill(away)
    cluster.until(lambda: all(leaders(cluster, groups)), "others lead what it led")
    assert 2 not in leaders(cluster, groups)
    away.start()
    steady = STEADY_MS // RAFT_TICK_MS
    cluster.tick(steady // 2)
    assert 2 not in leaders(cluster, groups)
    cluster.until(lambda: leaders(cluster, groups) == preferred, "it leads again", 4 * steady)
