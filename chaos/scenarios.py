"""Plans that aim at one published failure each; the seed still decides everything else.

The idea: a scenario is a drawn plan with its faults replaced, so the same checkers judge it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.testing.network import NetworkFaults
from aegis_cluster.testing.plan import Plan, add_transactions, draw_plan
from aegis_cluster.testing.scheduler import MS, SECOND

if TYPE_CHECKING:
    from collections.abc import Mapping

PAUSE_KILL: Final = {"pause_kill": 1}
"""RELIABILITY §2.3: one sleeps, another loses its power and is left alone with the sleeper."""

PARTITION_KILL: Final = {"cut_kill": 1}
"""Its twin with cuts."""

POWER: Final = {"power": 2, "power_all": 2, "disk_crash": 1}
"""Coordinated and single power failures (NATS 2.12.1)."""

OLD_LEADER: Final = {"cut_leader": 3, "reset": 2}
"""A leader that others have replaced without its knowing, and clients that still talk to it."""

BAD_DISK: Final = {"rot": 2, "roll_back": 1, "cut_tail": 1, "kill": 1}
"""One disk damages what was durable (NATS: 49.7 % of all records lost)."""

FAILED_SYNC: Final = {"sync_error": 2, "write_error": 1, "power": 2}
"""fsyncgate, with the power failure that shows what was lost."""

TORN: Final = {"power": 4, "power_all": 1}
"""Power goes while big batches are written, past the journal; a part of one reaches the disk."""

WIPED: Final = {"wipe": 2, "kill": 1}
"""One directory after the other is gone; whoever comes back is a new member."""

MOVES: Final = {"move": 3, "wipe": 1, "kill": 1, "cut_leader": 1}
"""Replicas are added, removed and moved while nodes fail (Redpanda's worst runs)."""

FALLING_LEADERS: Final = {"cut_leader": 3, "power": 1, "step_down": 2}
"""One leader after the other, with entries that its followers have only in part (figure 8)."""

LEASE: Final = {"cut_leader": 1, "pause": 1}
"""A lease goes round while links and processes stand still; several believe that they hold it."""

RETENTION: Final = {"cut_node": 1, "kill": 1, "step_down": 2}
"""Old records go while replicas lag behind what is dropped, and leaders change."""

QUIET: Final[dict[str, int]] = {}
"""Nothing happens for so long that groups fall quiet; then a node dies, perhaps a leader."""

SMALL_SEGMENT: Final = 8 * 1024
"""So small that a compacted topic has closed segments within seconds."""


def scenario(seed: int, faults: Mapping[str, int], *, nodes: int | None = None) -> Plan:
    """The plan of a seed with other faults, often enough to meet each other."""
    plan = draw_plan(random.Random(seed))
    if nodes is not None and plan.nodes != nodes:
        plan.nodes, plan.machines = nodes, (plan.machines * nodes)[:nodes]
    plan.faults = dict(faults)
    plan.fault_every_us = 300 * MS
    plan.safety_us = 4 * SECOND
    if not faults:
        plan.pause_from_us, plan.pause_to_us = SECOND, plan.safety_us
        plan.raft = replace(plan.raft, quiet_ticks=5)
        plan.network = NetworkFaults()
        plan.down_after_heal = 1
    if faults is TORN:
        plan.partitions, plan.shards, plan.producers = 1, 1, 3
        plan.value_bytes_max, plan.records_max, plan.write_every_us = 3_000, 3, 15 * MS
        plan.safety_us, plan.fault_every_us = 3 * SECOND, 500 * MS
        plan.limits = replace(plan.limits, segment_bytes=64 * 1024, journal_bytes=64 * 1024)
        plan.network = NetworkFaults()
        for machine in plan.machines:  # the power goes between a write and its sync
            machine.sync_us = 20_000
        plan.heal_us = 60 * SECOND  # such disks need long for what waits on them
    if faults is RETENTION:
        plan.retention_ms, plan.write_every_us, plan.value_bytes_max = 1_000, 20 * MS, 400
    if faults is LEASE:
        plan.lease_us = 300 * MS
    if faults is FALLING_LEADERS:
        plan.raft = replace(plan.raft, append_bytes_max=4_000, in_flight_appends_max=2)
        plan.value_bytes_max, plan.records_max, plan.write_every_us = 2_000, 3, 20 * MS
        plan.network = NetworkFaults(latency_us=5_000, jitter_us=20_000, slow=0.1)
    plan.settle()
    return plan


def transactional(
    seed: int, faults: Mapping[str, int] | None = None, *, nodes: int | None = None, **load: Any
) -> Plan:
    """The plan of a seed with transactions; faults: instead of those that the seed draws; load:
    fields of its `TransactionLoad`."""
    if faults is None:
        plan = draw_plan(random.Random(seed))
    else:
        plan = scenario(seed, faults, nodes=nodes)
    add_transactions(plan, random.Random(f"transactions {seed}"))
    assert plan.transactions is not None, "they were added"
    plan.transactions = replace(plan.transactions, **load)
    if faults is not None:
        plan.faults = dict(faults)
        plan.pause_from_us = plan.pause_to_us = 0
        plan.limits = replace(plan.limits, segment_bytes=SMALL_SEGMENT)
    plan.settle()
    return plan
