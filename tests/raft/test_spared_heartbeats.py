"""A busy group spares its heartbeats where followers need not hear of a commit at once."""

from __future__ import annotations

from aegis_cluster.raft import Heartbeat, RaftConfig
from tests.raft.harness import DATA, Cluster

LEAN = RaftConfig(tells_commit_soon=False)


def heartbeats(cluster: Cluster) -> int:
    """How many one tick of the leader sends."""
    leader = cluster.elect(1)
    leader.tick()
    effects = leader.take_effects()
    leader.effects_done(effects)
    return sum(isinstance(message, Heartbeat) for _, message in effects.send)


def busy(config: RaftConfig, ticks: int) -> int:
    """Heartbeats of a leader that appends in every tick, and whose followers answer."""
    cluster = Cluster(1, 2, 3, config=config)
    leader = cluster.elect(1)
    cluster.tick()
    said = 0
    for _ in range(ticks):
        leader.propose(DATA, 10)
        cluster.settle()
        said += heartbeats(cluster)
    return said


def test_appends_take_the_place_of_heartbeats() -> None:
    assert busy(LEAN, 20) == 0
    assert busy(RaftConfig(), 20) > 20


def test_an_idle_leader_beats_and_tells_the_commit() -> None:
    cluster = Cluster(1, 2, 3, config=LEAN)
    leader = cluster.elect(1)
    cluster.tick()
    index = leader.propose(DATA, 10).index
    cluster.settle()
    for _ in range(2 * LEAN.heartbeat_ticks + 1):
        cluster.tick()
    assert [cluster[node].commit_index for node in (1, 2, 3)] == [index] * 3


def test_a_read_is_answered_while_the_group_is_busy() -> None:
    cluster = Cluster(1, 2, 3, config=LEAN)
    leader = cluster.elect(1)
    cluster.tick()
    leader.propose(DATA, 10)
    leader.take_effects()
    leader.read_index(7)
    leader.take_effects()  # this round of heartbeats is lost
    leader.propose(DATA, 10)
    leader.take_effects()
    for _ in range(LEAN.heartbeat_ticks):
        leader.tick()
    assert any(isinstance(message, Heartbeat) for _, message in leader.take_effects().send)
