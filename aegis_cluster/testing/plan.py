"""What a seed decides before anything runs: the cluster, its load, and which faults it meets.

The idea (FoundationDB, TigerBeetle): the configuration is drawn too, and many kinds of fault are
off in many runs, so that the system recovers now and then and rare combinations appear. A plan is
plain data: a test takes one apart, changes it, and runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aegis_cluster.raft import RaftConfig
from aegis_cluster.storage.types import StoreLimits
from aegis_cluster.testing.network import NetworkFaults
from aegis_cluster.testing.node import MachineTraits
from aegis_cluster.testing.scheduler import MS, SECOND

if TYPE_CHECKING:
    import random

FAULTS: Final = (
    "kill",
    "power",
    "power_all",
    "pause_kill",
    "cut_kill",
    "disk_crash",
    "pause",
    "cut_node",
    "cut_half",
    "cut_one_way",
    "cut_leader",
    "reset",
    "sync_error",
    "write_error",
    "disk_full",
    "client_crash",
    "step_down",
    "wall_jump",
    "kill_shard",
    "reshard",
    "move",
)
"""Every kind of fault that the code under test is expected to survive today."""

DISK_FAULTS: Final = ("rot", "roll_back", "cut_tail")
"""Damage to what was durable: on one node of a run at most, so that a good copy is left."""

LOST_DISK: Final = "wipe"
"""A whole directory is gone, and the node comes back as a new member; one at a time."""

COORDINATOR_FAULTS: Final = ("kill_coordinator", "pause_coordinator", "cut_coordinator")
"""They strike whoever coordinates a group or a transaction, where there are any."""

SHARDS_MAX: Final = 3

SMALL_STORE: Final = StoreLimits(
    segment_bytes=4 * 1024,
    journal_bytes=16 * 1024,
    index_interval_bytes=512,
    tail_cache_bytes=4 * 1024,
    checkpoint_interval_ms=200,
    reserve_bytes=1024,
    direct_group_bytes=1024,
    direct_groups=2,
    open_segments=2,
)


@dataclass(slots=True)
class TransactionLoad:
    """Transactions beside the other load."""

    workers: int = 2
    """Members of one group that handle orders exactly once."""
    tellers: int = 2
    """Producers that move money of their own accord."""
    inputs: int = 2
    """Partitions of the orders."""
    accounts: int = 3
    """Partitions that money is moved between, at least two."""
    timeout_ms: int = 1_000
    aborted: float = 0.2
    """Share of transactions whose producer changes its mind."""
    think_us: int = 400 * MS
    """A worker takes so long at most between its results and its position, so that it may be lost
    to its group just then."""
    balance_bytes: int = 0
    """A record of the compacted topic is so much larger than it has to be."""
    restarts: bool = False
    """Before all is read, all nodes but one start anew, and fold what compaction has left."""
    troubles: tuple[str, ...] = ("freeze", "freeze", "crash", "zombie", "frozen zombie")
    """What happens to clients; see `TransactionRun`."""
    trouble_every_us: int = 700 * MS
    """A process stands still, ends or is replaced about so often."""
    repeated: float = 0.05
    """Share of the requests that come once more."""
    repeated_us: int = 60 * SECOND
    """They come 1 s to so long later."""


@dataclass(slots=True)
class Plan:
    """One run. Times are microseconds of virtual time."""

    nodes: int = 3
    shards: int = 1
    """Processes on each node, at first."""
    partitions: int = 1
    producers: int = 2
    readers: int = 1
    safety_us: int = 4 * SECOND
    """How long faults and load last."""
    heal_us: int = 20 * SECOND
    """Within so long after healing everything must work again."""
    down_after_heal: int = 0
    """So many nodes (a minority) are dead while progress is required; they come back later."""
    write_every_us: int = 60 * MS
    records_max: int = 3
    value_bytes_max: int = 0
    pause_from_us: int = 0
    pause_to_us: int = 0
    """Between these nobody writes, so that groups may fall quiet."""
    faults: dict[str, int] = field(default_factory=dict)
    """Kind -> weight; a kind that is not there does not happen."""
    fault_every_us: int = 400 * MS
    network: NetworkFaults = field(default_factory=NetworkFaults)
    machines: list[MachineTraits] = field(default_factory=list)
    limits: StoreLimits = SMALL_STORE
    raft: RaftConfig = field(default_factory=RaftConfig)
    retention_ms: int | None = None
    retention_bytes: int | None = None
    lease_us: int = 0
    """A lease goes to another client every so often; 0: there is none."""
    snapshot_frames: int = 100_000
    """A snapshot of the folded state is due after so many frames."""
    transactions: TransactionLoad | None = None

    @property
    def expires(self) -> bool:
        """Records go after a time, or when there are too many."""
        return self.retention_ms is not None or self.retention_bytes is not None

    @property
    def damages_disks(self) -> bool:
        """One node may be without its data for a while; then no other one may be dead."""
        return any(kind in self.faults for kind in (*DISK_FAULTS, LOST_DISK))

    @property
    def needs_all(self) -> bool:
        """No node may be dead while progress is required."""
        return self.nodes == 1 or self.damages_disks or "move" in self.faults

    def settle(self) -> None:
        """Bring what was chosen into a whole that a correct cluster can survive."""
        if self.nodes == 1:
            for kind in (*DISK_FAULTS, LOST_DISK, "move"):
                self.faults.pop(kind, None)
        if any(kind in self.faults for kind in DISK_FAULTS):
            # A move can leave a group with two voters for a while, and then one damaged disk is
            # one too many: nobody could lead, so nobody could repair it.
            self.faults.pop("move", None)
        if self.needs_all:
            self.down_after_heal = 0


def draw_plan(rng: random.Random) -> Plan:
    """Everything that a seed decides beforehand."""
    plan = Plan(
        nodes=rng.choice((1, 3, 3, 3, 3, 4, 5)),
        shards=rng.choice((1, 1, 1, 1, 2, 3)),
        partitions=rng.choice((1, 1, 2, 3)),
        producers=rng.choice((1, 2, 3)),
        readers=rng.choice((1, 1, 2)),
        safety_us=rng.choice((1, 2, 4)) * SECOND,
        write_every_us=rng.choice((40, 100, 250)) * MS,
        records_max=rng.choice((1, 3)),
        value_bytes_max=rng.choice((0, 0, 400, 2_000)),
        fault_every_us=rng.choice((150, 400, 1_000)) * MS,
        network=_draw_network(rng),
        raft=_draw_raft(rng),
        snapshot_frames=rng.choice((3, 20, 100_000)),
    )
    plan.limits = _draw_limits(rng, plan.value_bytes_max)
    plan.down_after_heal = rng.randint(0, 1)
    plan.machines = [_draw_machine(rng) for _ in range(plan.nodes)]
    if rng.random() < 0.3:
        plan.safety_us = 5 * SECOND
        plan.pause_from_us, plan.pause_to_us = SECOND // 2, 4 * SECOND
    if rng.random() < 0.9:
        some = rng.sample(FAULTS, rng.randint(1, 6))
        plan.faults = {kind: rng.choice((1, 3)) for kind in sorted(some)}
    if rng.random() < 0.3:
        plan.faults[rng.choice((*DISK_FAULTS, LOST_DISK, LOST_DISK))] = rng.choice((1, 3))
    if rng.random() < 0.2:
        plan.lease_us = rng.choice((300, 1_000)) * MS
    plan.settle()
    return plan


def draw_retention(plan: Plan, rng: random.Random) -> None:
    """Let some runs' topics lose what is old or too much.

    From a generator of its own, so that the plans of all other runs stay what they are.
    """
    kind = rng.choice(("all", "all", "all", "time", "bytes"))
    if kind == "time":
        plan.retention_ms = rng.choice((300, 2_000))
    elif kind == "bytes":
        plan.retention_bytes = rng.choice((1_000, 10_000))


TRANSACTIONAL_SHARE: Final = 1 / 24
"""Of the seeds; they take many times longer than others."""


def draw_transactions(plan: Plan, rng: random.Random) -> None:
    """Let some runs have transactions; from a generator of its own, too."""
    if rng.random() < TRANSACTIONAL_SHARE:
        add_transactions(plan, rng)


def add_transactions(plan: Plan, rng: random.Random) -> None:
    """Transactions beside what the plan has, and coordinators that die and sleep."""
    plan.transactions = TransactionLoad(
        workers=rng.choice((2, 3)),
        tellers=rng.choice((0, 1, 2)),
        inputs=rng.choice((1, 2, 3)),
        accounts=rng.choice((2, 3)),
        timeout_ms=rng.choice((1_000, 2_000, 6_000)),
        aborted=rng.choice((0.05, 0.3)),
        trouble_every_us=rng.choice((500, 2_000)) * MS,
        repeated=rng.choice((0.0, 0.03, 0.1)),
        repeated_us=rng.choice((5, 5, 5, 60)) * SECOND,
        restarts=rng.random() < 0.5,
        balance_bytes=rng.choice((0, 200)),
    )
    plan.safety_us = max(plan.safety_us, 6 * SECOND)
    for kind in COORDINATOR_FAULTS:
        if plan.faults and rng.random() < 0.5:
            plan.faults[kind] = rng.choice((1, 3))


def _draw_network(rng: random.Random) -> NetworkFaults:
    return NetworkFaults(
        latency_us=rng.choice((50, 200, 5_000)),
        jitter_us=rng.choice((50, 300, 20_000)),
        loss=rng.choice((0.0, 0.0, 0.005, 0.05)),
        duplication=rng.choice((0.0, 0.0, 0.05)),
        reordering=rng.choice((0.0, 0.0, 0.1)),
        slow=rng.choice((0.0, 0.0, 0.02)),
    )


def _draw_raft(rng: random.Random) -> RaftConfig:
    return RaftConfig(
        quiet_ticks=rng.choice((5, 30, 0)),
        append_bytes_max=rng.choice((4_000, 20_000, 4_000_000)),
        in_flight_bytes_max=rng.choice((5_000_000, 16_000_000)),
        in_flight_appends_max=rng.choice((2, 8, 64)),
        probe_bytes_max=rng.choice((0, 200, 64_000)),
    )


def _draw_limits(rng: random.Random, value_bytes_max: int) -> StoreLimits:
    limits = replace(SMALL_STORE, checkpoint_interval_ms=rng.choice((50, 200, 1_000)))
    if value_bytes_max > 400 or rng.random() < 0.3:
        limits = replace(limits, journal_bytes=64 * 1024, segment_bytes=64 * 1024)
    return limits


def _draw_machine(rng: random.Random) -> MachineTraits:
    return MachineTraits(
        drift=rng.choice((0.0, 0.0, 0.01, -0.01, 0.05)),
        wall_offset_ms=rng.choice((0, 0, -3_600_000, 500)),
        sync_us=rng.choice((100, 300, 5_000, 30_000)),
        sync_slow=rng.choice((0.0, 0.0, 0.05, 0.3)),
    )
