"""One node of a simulated cluster: a machine with disk and clocks, and the processes on it.

The idea: a node starts like a real one: its directory is laid out for as many shards as it runs
this time, then each shard's process starts. A shard that ends alone is started again alone, as the
supervisor would; a power loss takes all of them. A wiped machine comes back with an empty disk and
a new incarnation.

The rule it protects: everything that a machine knows about itself is drawn from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.context import ShardContext
from aegis_cluster.config import NodeAddress
from aegis_cluster.errors import Corruption, StorageFailed
from aegis_cluster.ids import GroupId, Member, NodeId, ShardId
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.testing.disk import SimulatedCrash, SimulatedDisk
from aegis_cluster.testing.process import SimulatedProcess
from aegis_cluster.testing.scheduler import MS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.storage.types import StoreLimits
    from aegis_cluster.testing.network import Network
    from aegis_cluster.testing.scheduler import Scheduler

NODE_DIR: Final = "/node"
CLUSTER_ID: Final = "simulated"


@dataclass(slots=True)
class MachineTraits:
    """What one machine is like; drawn from the seed.

    drift: how much faster than virtual time its monotonic clock runs.
    """

    drift: float = 0.0
    wall_offset_ms: int = 0
    sync_us: int = 300
    sync_slow: float = 0.0
    """Share of syncs that take up to `sync_slow_us` longer."""
    sync_slow_us: int = 200 * MS


class SimulatedNode:
    """See the module's first lines."""

    def __init__(
        self,
        *,
        number: int,
        founders: Sequence[Member],
        scheduler: Scheduler,
        network: Network,
        rng: random.Random,
        limits: StoreLimits,
        on_turn: Callable[[SimulatedNode, SimulatedProcess], None],
        shards: int = 1,
    ) -> None:
        self.number = number
        self.member = founders[number - 1]
        self.directory = NODE_DIR
        self.disk = _new_disk()
        self.limits = limits
        self.traits = MachineTraits()
        self.shards = shards
        self.up = False
        self.paused = False
        self.held_down = False
        """Starts do nothing: somebody wants it dead for now."""
        self.keeps_settled = False
        self.settled: dict[int, dict[str, bytes]] = {}
        """By shard: segments as its last checkpoint found them stored; damage there is no torn
        tail."""
        self.older: dict[int, dict[str, bytes]] = {}
        """The same, one checkpoint earlier."""
        self.ends: list[str] = []
        """Why its processes ended, for the report."""
        self.restart_after_us: Callable[[], int | None] = lambda: None
        """Asked when a process ends by itself; None leaves it down."""
        self._founders = tuple(founders)
        self._nodes = len(founders)
        self._boots = 0
        self._wipes = 0
        self._scheduler = scheduler
        self._network = network
        self._rng = rng
        self._on_turn = on_turn
        self._processes: list[SimulatedProcess] = []
        """One for each shard that ever ran here; those beyond `shards` are down."""

    # ---- questions and orders

    def running(self) -> Iterator[Shard]:
        """The shards that are up now."""
        for process in self._processes:
            if process.shard is not None:
                yield process.shard

    def partitions(self) -> Iterator[tuple[GroupId, Partition]]:
        """Every replica that is open here."""
        for shard in self.running():
            yield from shard.manager.partitions.items()

    def partition(self, group: GroupId) -> Partition | None:
        """This node's replica of a group, if it is open now."""
        for number, partition in self.partitions():
            if number == group:
                return partition
        return None

    @property
    def leads_something(self) -> bool:
        return any(partition.leads for _, partition in self.partitions())

    def step_aside(self) -> None:
        """Hand every leadership over, as an operator who stops a node would."""
        for process in self._processes:
            process.step_aside()

    # ---- clocks

    @property
    def now_ms(self) -> int:
        """The monotonic clock of this machine."""
        return int(self._scheduler.now_us * (1 + self.traits.drift)) // MS

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.traits.wall_offset_ms + self._scheduler.now_us // MS

    # ---- who it is

    @property
    def is_founder(self) -> bool:
        return self.member in self._founders

    def context(self, shard: int, boot: int) -> ShardContext:
        """What a shard's process is told when it starts."""
        return ShardContext(
            cluster_id=CLUSTER_ID,
            me=self.member,
            name=f"node-{self.number}",
            address=self.address_of(self.number),
            shard=ShardId(shard),
            shards=self.shards,
            boot_id=f"{self.number}-{boot}",
            founders=self._founders if self.is_founder else (),
            peers=tuple(self.address_of(number) for number in range(1, self._nodes + 1)),
        )

    def address_of(self, node: int) -> NodeAddress:
        """Where a simulated node listens; nothing is ever bound there."""
        return NodeAddress("127.0.0.1", 7_000 + 100 * node)

    # ---- its life

    def start(self) -> None:
        """Lay the directory out and start every shard."""
        if self.up or self.held_down:
            return
        self.up, self.paused = True, False
        self.guarded(None, self._prepare)
        for number in range(self.shards):
            if self.up:  # the power may go while another shard recovers
                self._start_process(number)

    def _prepare(self) -> None:
        prepare_node_dir(self.disk, self.directory, self.shards, limits=self.limits)

    def _start_process(self, number: int) -> None:
        while number >= len(self._processes):
            self._processes.append(self._new_process(len(self._processes)))
        self._boots += 1
        self._processes[number].start(self._boots)

    def _new_process(self, number: int) -> SimulatedProcess:
        return SimulatedProcess(
            self,
            number,
            scheduler=self._scheduler,
            network=self._network,
            rng=self._rng,
            on_turn=self._on_turn,
        )

    def kill(self, why: str = "killed") -> None:
        """kill -9 of all its processes: what was written stays in the page cache."""
        if self.up:
            self.disk.restart()
            self._ended(why, silent=False)

    def lose_power(self, why: str = "power lost") -> None:
        """Any subset of what was not synced is gone."""
        if self.up:
            self.disk.crash(self._rng)
            self._ended(why, silent=self._rng.random() < 0.5)

    def wipe(self) -> SimulatedDisk:
        """The directory is lost; return what was on it. It starts again as another member."""
        self.kill("its disk was wiped")
        lost, self.disk = self.disk, _new_disk()
        self.member = self._next_member()
        self.settled, self.older = {}, {}
        return lost

    def _next_member(self) -> Member:
        """Whom the formatting of an empty directory makes of this node."""
        self._wipes += 1
        return Member(self.member.node, f"incarnation-{self.number}-{self._wipes}")

    def give_back(self, disk: SimulatedDisk, member: Member) -> None:
        """The directory that was lost is found; it belongs to the member that it had."""
        self.kill("it gets its old disk back")
        self.disk, self.member = disk, member
        self.disk.restart()

    def reshard(self, shards: int) -> None:
        """Start again with another number of shards."""
        self.kill(f"it is to run {shards} shards")
        self.shards = shards
        self.settled, self.older = {}, {}

    def kill_shard(self, number: int, why: str = "killed alone") -> None:
        """One process ends; its supervisor starts it again."""
        process = self._processes[number] if number < len(self._processes) else None
        if process is None or not process.up:
            return
        self.ends.append(f"{self._scheduler.now_us} shard {number}: {why}")
        process.end(silent=False)
        pause_us = self.restart_after_us()
        if pause_us is not None:
            self._scheduler.after(pause_us, self._restart_shard, number)

    def _restart_shard(self, number: int) -> None:
        process = self._processes[number]
        if self.up and number < self.shards and not process.up:
            self._start_process(number)

    def _ended(self, why: str, *, silent: bool) -> None:
        self.ends.append(f"{self._scheduler.now_us} {why}")
        self.up = False
        for process in self._processes:
            process.end(silent=silent)
        pause_us = self.restart_after_us()
        if pause_us is not None:
            self._scheduler.after(pause_us, self.start)

    def pause(self) -> None:
        """SIGSTOP: it handles nothing, and does not know that time passes."""
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            for process in self._processes:
                process.wake()

    def guarded(
        self, process: SimulatedProcess | None, call: Callable[..., None], *arguments: Any
    ) -> None:
        """Run a part of a process, and let it end as it would: by power, disk or supervisor."""
        try:
            call(*arguments)
        except SimulatedCrash:
            self.lose_power("power lost within a disk operation")
        except (StorageFailed, Corruption) as error:
            why = f"{type(error).__name__}: {error}"
            if process is None:
                self.kill(why)
            else:
                self.kill_shard(process.number, why)

    def checkpointed(self, shard: int, stored: dict[str, bytes]) -> None:
        """A shard's checkpoint found this much stored."""
        self.older[shard] = self.settled.get(shard, {})
        self.settled[shard] = stored


def _new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_dir(NODE_DIR)
    disk.sync_dir("/")
    return disk


def founders_of(nodes: int) -> tuple[Member, ...]:
    """The founding members of a simulated cluster."""
    return tuple(Member(NodeId(n), f"incarnation-{n}") for n in range(1, nodes + 1))
