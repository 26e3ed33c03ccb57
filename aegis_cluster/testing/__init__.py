"""Simulated parts and checkers, for our own tests and for those of users.

In goes a seed (or a `plan.Plan`), out comes a `simulation.Report`: real shards and stores on
simulated disks, networks and clocks, with client sessions whose history is judged by checkers.

    from aegis_cluster.testing.simulation import run_seed
    report = run_seed(7)       # report.verdict, .problems, .trace

    from aegis_cluster.testing import TopologyTestDriver
    driver = TopologyTestDriver(processor)    # a stream processor without a cluster

`scheduler` is time, `network` and `disk` are the world, `node` runs a shard on them, `sessions` are
clients, `faults` is the adversary, `watch` looks into replicas, `checkers` into histories,
`streams` into those of an event store.

The rule: whatever goes wrong here goes wrong from a seed, so it goes wrong again. Nothing reads a
clock, starts a thread or takes chance from anywhere but the seed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TopologyTestDriver"]


def __getattr__(name: str) -> Any:
    """Loaded on first use: what needs the simulator alone loads no stream processing."""
    if name == "TopologyTestDriver":
        from aegis_cluster.testing.topology import TopologyTestDriver

        return TopologyTestDriver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
