"""A follower that lags is brought up as fast as messages travel, also from cold segments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.limits import KIB
from aegis_cluster.raft.config import RaftConfig
from tests.broker.harness import SMALL, Client, Cluster, batch

COLD = replace(SMALL, segment_bytes=16 * KIB, tail_cache_bytes=KIB)


@pytest.mark.parametrize("size", [100, 4_000])
def test_the_border_of_a_segment_costs_a_lagging_follower_no_pause(size: int) -> None:
    """An append that ended there would leave its leader waiting for an answer to the rest."""
    cluster = Cluster(limits=COLD)
    group = cluster.topic().partitions[0].group
    client = Client(cluster, cluster.elect(group))
    host = cluster.followers(group)[0]
    cluster.kill(host)
    cluster.tick(30)
    for _ in range(60_000 // size):
        client.produce(group, batch(bytes(size)))
        cluster.settle()
    cluster.tick(2)
    leader = cluster.elect(group).partition(group)
    assert len(leader.log.segments) >= 4
    host.start()
    cluster.tick(RaftConfig().resend_ticks - 1)
    mine = host.partition(group)
    assert mine.log.last_index == leader.log.last_index, "without waiting to be asked again"
