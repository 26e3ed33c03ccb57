"""One node of a simulated cluster: a machine with disk and clocks, and the process on it.

The idea: the process is a real `broker.Shard` over a real `ShardStore`, driven in the order of
`broker.loop`: finished disk work, peers, links, clients, step, write. What the loop gives to
helper threads takes virtual time here: a round's sync happens at one event and is known at a later
one, and anything may come between, a crash too.

The rule it protects: of a process that ended nothing goes on; every event names the start (`boot`)
that it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aegis_cluster.broker.context import ShardContext
from aegis_cluster.broker.shard import Shard
from aegis_cluster.broker.transport import Listener
from aegis_cluster.config import NodeAddress, peers_endpoint
from aegis_cluster.errors import Corruption, StorageFailed
from aegis_cluster.ids import Member, NodeId, ShardId
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.testing.disk import SimulatedCrash, SimulatedDisk
from aegis_cluster.testing.scheduler import MS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.storage.rounds import Checkpoint, Round
    from aegis_cluster.storage.types import StoreLimits
    from aegis_cluster.testing.network import Connection, Network
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.wire.protocol import Part

T = TypeVar("T")

NODE_DIR: Final = "/node"
CLUSTER_ID: Final = "simulated"
INBOX_MESSAGES_MAX: Final = 1_000
"""As many wait at a process that stands still; ZeroMQ's high-water mark."""
READ_US: Final = 200
"""A read in the helper thread; nearly all come from the page cache."""
STEP_US: Final = 20
"""From a message's arrival to the turn that handles it."""


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


class _PeerSink:
    """One link of ours to another node; its events wait for the shard's next turn."""

    def __init__(self, node: SimulatedNode, key: PeerKey, boot: int) -> None:
        self._node = node
        self._key = key
        self._boot = boot

    def connected(self) -> None:
        self._node.input(self._boot, self._node.link_changed, self._key, True)

    def lost(self) -> None:
        self._node.input(self._boot, self._node.link_changed, self._key, False)

    def received(self, message: Sequence[Part]) -> None:
        self._node.input(self._boot, self._node.link_message, self._key, message)


class SimulatedNode:
    """See the module's first lines. It is the `Transport` of its shard, and a `Host`."""

    def __init__(
        self,
        *,
        number: int,
        members: Sequence[Member],
        scheduler: Scheduler,
        network: Network,
        rng: random.Random,
        limits: StoreLimits,
        on_turn: Callable[[SimulatedNode], None],
    ) -> None:
        self.number = number
        self.disk = SimulatedDisk()
        self.traits = MachineTraits()
        self.up = False
        self.paused = False
        self.held_down = False
        """Starts do nothing: somebody wants it dead for now."""
        self.boot = 0
        self.shard: Shard | None = None
        self.keeps_settled = False
        self.settled: dict[str, bytes] = {}
        """Segments as the last checkpoint found them stored: damage in there is no torn tail."""
        self.older: dict[str, bytes] = {}
        """The same, one checkpoint earlier."""
        self.ends: list[str] = []
        """Why its processes ended, for the report."""
        self._members = tuple(members)
        self._scheduler = scheduler
        self._network = network
        self._rng = rng
        self._limits = limits
        self._on_turn = on_turn
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._turn_planned = False
        self._links: dict[PeerKey, Connection] = {}
        self._store: ShardStore | None = None
        self._syncing = False
        self._checkpointing = False
        self._reads_until_us = 0
        self.restart_after_us: Callable[[], int | None] = lambda: None
        """Asked when a process ends by itself; None leaves it down."""
        self.disk.make_dir(NODE_DIR)
        self.disk.sync_dir("/")
        network.add(number, self)

    # ---- questions and orders

    @property
    def leads_something(self) -> bool:
        return self.shard is not None and any(
            partition.leads for partition in self.shard.manager.partitions.values()
        )

    def step_aside(self) -> None:
        """Hand every leadership over, as an operator who stops a node would."""
        self.input(self.boot, self._step_aside)

    def _step_aside(self) -> None:
        for partition in self._running.manager.partitions.values():
            if partition.leads and len(partition.replica.membership.voters) > 1:
                partition.step_aside()

    # ---- clocks

    @property
    def now_ms(self) -> int:
        """The monotonic clock of this machine."""
        return int(self._scheduler.now_us * (1 + self.traits.drift)) // MS

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.traits.wall_offset_ms + self._scheduler.now_us // MS

    # ---- the life of a process

    @property
    def accepts(self) -> bool:
        return self.up and not self.paused

    def start(self) -> None:
        """Start the process: recover the files, open the links."""
        if self.up or self.held_down:
            return
        self.up, self.paused = True, False
        self.boot += 1
        self._inbox, self._links = [], {}
        self._syncing = self._checkpointing = self._turn_planned = False
        self._guarded(self._open_shard)
        self._plan_tick()

    def _open_shard(self) -> None:
        prepare_node_dir(self.disk, NODE_DIR, 1, limits=self._limits)
        self._store = ShardStore(
            self.disk, NODE_DIR, 0, clock_ms=lambda: self.now_ms, limits=self._limits
        )
        self.shard = Shard(
            context=self._context(),
            store=self._store,
            transport=self,
            rng=self._rng,
            wall_ms=self.wall_ms,
            now_ms=self.now_ms,
        )

    def _context(self) -> ShardContext:
        me = self._members[self.number - 1]
        peers = tuple(address_of(member.node) for member in self._members)
        return ShardContext(
            cluster_id=CLUSTER_ID,
            me=me,
            name=f"node-{self.number}",
            address=address_of(me.node),
            shard=ShardId(0),
            shards=1,
            boot_id=f"{self.number}-{self.boot}",
            founders=self._members,
            peers=peers,
        )

    def kill(self, why: str = "killed") -> None:
        """kill -9: what was written stays in the page cache."""
        if self.up:
            self.disk.restart()
            self._ended(why, silent=False)

    def lose_power(self, why: str = "power lost") -> None:
        """Any subset of what was not synced is gone."""
        if self.up:
            self.disk.crash(self._rng)
            self._ended(why, silent=self._rng.random() < 0.5)

    def _ended(self, why: str, *, silent: bool) -> None:
        self.ends.append(f"{self._scheduler.now_us} {why}")
        self.up, self.shard, self._store = False, None, None
        self._network.process_ended(self.number, silent=silent, notice_us=1_000 * MS)
        pause_us = self.restart_after_us()
        if pause_us is not None:
            self._scheduler.after(pause_us, self.start)

    def pause(self) -> None:
        """SIGSTOP: it handles nothing, and does not know that time passes."""
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self._plan_turn()

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run a part of the process, and let it end as it would: by power, disk or supervisor."""
        try:
            call(*arguments)
        except SimulatedCrash:
            self.lose_power("power lost within a disk operation")
        except (StorageFailed, Corruption) as error:
            self.kill(f"{type(error).__name__}: {error}")

    # ---- turns, in the order of broker.loop

    def input(self, boot: int, call: Callable[..., None], *arguments: Any) -> None:
        """Something for the next turn of the process that was started as number `boot`."""
        if boot != self.boot or not self.up:
            return
        self._inbox.append((call, arguments))
        self._plan_turn()

    def _plan_turn(self) -> None:
        if not self._turn_planned and not self.paused:
            self._turn_planned = True
            self._scheduler.after(STEP_US, self._turn, self.boot)

    def _plan_tick(self) -> None:
        if self.shard is not None:
            wait_ms = max(0, self.shard.next_tick_ms - self.now_ms) + 1
            self._scheduler.after(
                int(wait_ms * MS / (1 + self.traits.drift)), self._tick, self.boot
            )

    def _tick(self, boot: int) -> None:
        if boot != self.boot or not self.up:
            return
        self._plan_turn()
        self._plan_tick()

    def _turn(self, boot: int) -> None:
        if boot != self.boot or not self.up:
            return
        self._turn_planned = False
        if self.paused:
            return
        self._guarded(self._handle_inbox)
        if self.up:
            self._on_turn(self)

    def _handle_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        for call, arguments in inbox:
            call(*arguments)
        self._running.turn(self.now_ms)
        self._write()
        self._checkpoint()

    @property
    def _running(self) -> Shard:
        assert self.shard is not None, "only a running process has turns"
        return self.shard

    def requested(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> None:
        if len(self._inbox) < INBOX_MESSAGES_MAX:
            self.input(self.boot, self._request, listener, origin, message)

    def _request(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> None:
        if listener is Listener.PEERS:
            self._running.peer_request(origin, message)
        else:
            self._running.client_request(listener, origin, message)

    def link_message(self, key: PeerKey, message: Sequence[Part]) -> None:
        self._running.link_message(key, message)

    def link_changed(self, key: PeerKey, is_up: bool) -> None:
        if is_up:
            self._running.link_connected(key)
            return
        if key in self._links:
            self.close_peer(key)
            self._dial(key)
        self._running.link_disconnected(key)

    # ---- disk work that takes time

    def _write(self) -> None:
        if self._syncing:
            return
        begun = self._running.begin_round()
        if begun is None:
            return
        number, written = begun
        if written is None:
            self._running.end_round(number, None)
            self._running.turn(self.now_ms)
            return
        self._syncing = True
        self._scheduler.after(
            self._sync_time(), self._in_thread, self.boot, self._sync, number, written
        )

    def _sync(self, number: int, written: Round) -> None:
        self._opened.sync(written)
        self._later(self._synced, number, written)

    def _synced(self, number: int, written: Round) -> None:
        self._syncing = False
        self._running.end_round(number, written)

    @property
    def _opened(self) -> ShardStore:
        assert self._store is not None, "only a running process has a store"
        return self._store

    def _checkpoint(self) -> None:
        if self._checkpointing or not self._opened.checkpoint_due(self.now_ms):
            return
        self._checkpointing = True
        begun = self._opened.begin_checkpoint()
        stored = self.disk.stored(".log") if self.keeps_settled else {}
        self._scheduler.after(
            self._sync_time(), self._in_thread, self.boot, self._sync_checkpoint, begun, stored
        )

    def _sync_checkpoint(self, begun: Checkpoint, stored: dict[str, bytes]) -> None:
        self._opened.sync_checkpoint(begun)
        self._later(self._checkpointed, begun, stored)

    def _checkpointed(self, begun: Checkpoint, stored: dict[str, bytes]) -> None:
        self._opened.end_checkpoint(begun)
        self._checkpointing = False
        if stored:
            self.older, self.settled = self.settled, stored

    def _sync_time(self) -> int:
        traits = self.traits
        time_us = traits.sync_us + int(self._rng.random() * traits.sync_us)
        if traits.sync_slow and self._rng.random() < traits.sync_slow:
            time_us += self._rng.randrange(traits.sync_slow_us)
        return time_us

    def _in_thread(self, boot: int, work: Callable[..., None], *arguments: Any) -> None:
        """What a helper thread does, at the one moment that it happens; paused with its process."""
        if boot != self.boot or not self.up:
            return
        if self.paused:
            self._scheduler.after(10 * MS, self._in_thread, boot, work, *arguments)
            return
        self._guarded(work, *arguments)

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        """A thread's result reaches the loop a little later, and is never dropped."""
        delay_us = int(self._rng.random() * 2 * self.traits.sync_us)
        self._scheduler.after(delay_us, self._finished, self.boot, call, arguments)

    def _finished(self, boot: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if boot == self.boot and self.up:
            self._inbox.insert(0, (call, arguments))
            self._plan_turn()

    # ---- Transport

    def open_peer(self, key: PeerKey, endpoint: str) -> None:
        assert endpoint == peers_endpoint(*address_of(key.node), key.shard)
        self._dial(key)

    def _dial(self, key: PeerKey) -> None:
        sink = _PeerSink(self, key, self.boot)
        self._links[key] = self._network.dial(self.number, key.node, Listener.PEERS, sink)

    def close_peer(self, key: PeerKey) -> None:
        connection = self._links.pop(key, None)
        if connection is not None:
            connection.close()

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool:
        connection = self._links.get(key)
        return connection is not None and connection.send(message)

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool:
        return self._network.reply(origin, self.boot, message)

    def unsent(self, listener: Listener, origin: bytes) -> int:
        return 0

    def unsent_to(self, key: PeerKey) -> int:
        return 0

    @property
    def unsent_total(self) -> int:
        return 0

    def read_later(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        """One thread reads for all, so answers come in the order of the questions."""
        now_us = self._scheduler.now_us
        self._reads_until_us = max(now_us, self._reads_until_us) + READ_US
        delay_us = self._reads_until_us - now_us
        self._scheduler.after(delay_us, self._in_thread, self.boot, self._read, job, done)

    def _read(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        self.input(self.boot, done, job())


def address_of(node: int) -> NodeAddress:
    """Where a simulated node listens; nothing is ever bound there."""
    return NodeAddress("127.0.0.1", 7_000 + 100 * node)


def members_of(nodes: int) -> tuple[Member, ...]:
    """The founding members of a simulated cluster."""
    return tuple(Member(NodeId(n), f"incarnation-{n}") for n in range(1, nodes + 1))
