"""Disks that need longer for a sync than a campaign waits for answers: leaders are found still."""

from __future__ import annotations

import pytest

from tests.raft.harness import Cluster, Host, Letter

TICKS = 2_000


class SlowCluster(Cluster):
    """Hosts whose disks write for `sync_ticks` what has come together meanwhile.

    Messages take a tick.
    """

    def __init__(self, *voters: int, sync_ticks: int, seed: str) -> None:
        super().__init__(*voters, seed=seed)
        self.sync_ticks = sync_ticks
        self.rounds = dict.fromkeys(voters, (0, 0))
        """Per host: how many effects the round under way covers, ticks until it ends."""

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            for host in self.hosts.values():
                host.replica.tick()
            for letter in [self.letters.popleft() for _ in range(len(self.letters))]:
                self.deliver(letter)
            for node, host in self.hosts.items():
                self.letters.extend(self.step(node, host))

    def step(self, node: int, host: Host) -> list[Letter]:
        """A tick of one host; what leaves it."""
        letters: list[Letter] = []
        covered, left = self.rounds[node]
        if left == 1:
            for _ in range(covered):
                letters.extend(host.sync_one())
        while host.replica.has_effects:
            letters.extend(host.take())
        self.rounds[node] = (
            (covered, left - 1)
            if left > 1
            else (len(host.unsynced), self.sync_ticks if host.unsynced else 0)
        )
        return letters


@pytest.mark.parametrize("voters", [1, 3, 5])
@pytest.mark.parametrize("sync_ticks", [5, 10, 20])
def test_a_leader_is_found_and_stays(voters: int, sync_ticks: int) -> None:
    for seed in range(20):
        cluster = SlowCluster(
            *range(1, voters + 1),
            sync_ticks=sync_ticks,
            seed=str(seed),
        )
        for _ in range(TICKS):
            cluster.tick()
            if any(cluster[node].serving for node in cluster.leaders()):
                break
        else:
            pytest.fail(f"seed {seed}: nobody leads after {TICKS} ticks")
        leader, term = cluster.leaders()[-1], cluster[cluster.leaders()[-1]].term
        cluster.tick(TICKS)
        assert cluster.leaders() == [leader], f"seed {seed}"
        assert cluster[leader].term == term, f"seed {seed}: deposed for no reason"
