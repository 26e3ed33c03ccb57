"""Plans that aim at one published failure each; the seed still decides everything else.

The idea: a scenario is a drawn plan with its faults replaced, so the same checkers judge it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.network import NetworkFaults
from aegis_cluster.testing.plan import Plan, draw_plan
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

QUIET: Final[dict[str, int]] = {}
"""Nothing happens for so long that groups fall quiet; then a node dies, perhaps a leader."""


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
    if plan.nodes == 1 or plan.damages_disks:
        plan.down_after_heal = 0
    return plan
