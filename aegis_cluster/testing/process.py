"""One shard process of a simulated node.

The idea: it is a real `broker.Shard` over a real `ShardStore`, driven in the order of
`broker.loop`: finished disk work, peers, links, clients, step, write. What the loop gives to
helper threads takes virtual time here: a round's sync happens at one event and is known at a later
one, and anything may come between, a crash too.

The rule it protects: of a process that ended nothing goes on; every event names the start (`boot`)
that it belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from aegis_cluster.broker.compaction import compact_here
from aegis_cluster.broker.shard import Shard
from aegis_cluster.broker.transport import Listener
from aegis_cluster.config import peers_endpoint
from aegis_cluster.storage.manifest import PARTITIONS_DIR, entry_from_directory
from aegis_cluster.storage.segment import parse_segment_name
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.testing.network import Port
from aegis_cluster.testing.scheduler import MS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.storage.compaction_job import CompactionJob, CompactionResult
    from aegis_cluster.storage.rounds import Checkpoint, Round
    from aegis_cluster.testing.network import Connection, Network
    from aegis_cluster.testing.node import SimulatedNode
    from aegis_cluster.testing.scheduler import Scheduler
    from aegis_cluster.wire.protocol import Part

T = TypeVar("T")

INBOX_MESSAGES_MAX: Final = 1_000
"""As many wait at a process that stands still; ZeroMQ's high-water mark."""
READ_US: Final = 200
"""A read in the helper thread; nearly all come from the page cache."""
STEP_US: Final = 20
"""From a message's arrival to the turn that handles it."""


class _PeerSink:
    """One link of ours to another shard; its events wait for the shard's next turn."""

    def __init__(self, process: SimulatedProcess, key: PeerKey, boot: int) -> None:
        self._process = process
        self._key = key
        self._boot = boot

    def connected(self) -> None:
        self._process.input(self._boot, self._process.link_changed, self._key, True)

    def lost(self) -> None:
        self._process.input(self._boot, self._process.link_changed, self._key, False)

    def received(self, message: Sequence[Part]) -> None:
        self._process.input(self._boot, self._process.link_message, self._key, message)


class SimulatedProcess:
    """See the module's first lines. It is the `Transport` of its shard, and a `Host`."""

    def __init__(
        self,
        node: SimulatedNode,
        number: int,
        *,
        scheduler: Scheduler,
        network: Network,
        rng: random.Random,
        on_turn: Callable[[SimulatedNode, SimulatedProcess], None],
    ) -> None:
        self.node = node
        self.number = number
        self.port = Port(node.number, number)
        self.up = False
        self.boot = 0
        """Number of its start; no two starts on one machine share one."""
        self.shard: Shard | None = None
        self._scheduler = scheduler
        self._network = network
        self._rng = rng
        self._on_turn = on_turn
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._turn_planned = False
        self._links: dict[PeerKey, Connection] = {}
        self._store: ShardStore | None = None
        self._syncing = False
        self._checkpointing = False
        self._reads_until_us = 0
        network.add(self.port, self)

    # ---- its life

    @property
    def accepts(self) -> bool:
        return self.up and not self.node.paused

    def start(self, boot: int) -> None:
        """Recover the files, open the links."""
        self.up = True
        self.boot = boot
        self._inbox, self._links = [], {}
        self._syncing = self._checkpointing = self._turn_planned = False
        self.node.guarded(self, self._open_shard)
        self._plan_tick()

    def _open_shard(self) -> None:
        node = self.node
        self._store = ShardStore(
            node.disk, node.directory, self.number, clock_ms=lambda: node.now_ms, limits=node.limits
        )
        self.shard = Shard(
            context=node.context(self.number, self.boot),
            store=self._store,
            transport=self,
            rng=self._rng,
            wall_ms=node.wall_ms,
            now_ms=node.now_ms,
        )

    def end(self, *, silent: bool) -> None:
        """Nothing of it goes on; others notice at once, or after a while."""
        if self.up:
            self.up, self.shard, self._store = False, None, None
            self._network.process_ended(self.port, silent=silent, notice_us=1_000 * MS)

    def step_aside(self) -> None:
        """Hand every leadership over, as an operator who stops a node would."""
        self.input(self.boot, self._step_aside)

    def _step_aside(self) -> None:
        for partition in self._running.manager.partitions.values():
            if partition.leads and len(partition.replica.membership.voters) > 1:
                partition.step_aside()

    def wake(self) -> None:
        """The machine goes on: whatever waits is handled now."""
        if self.up:
            self._plan_turn()

    # ---- turns, in the order of broker.loop

    def input(self, boot: int, call: Callable[..., None], *arguments: Any) -> None:
        """Something for the next turn of the process that was started as number `boot`."""
        if boot != self.boot or not self.up:
            return
        self._inbox.append((call, arguments))
        self._plan_turn()

    def _plan_turn(self) -> None:
        if not self._turn_planned and not self.node.paused:
            self._turn_planned = True
            self._scheduler.after(STEP_US, self._turn, self.boot)

    def _plan_tick(self) -> None:
        if self.shard is not None:
            wait_ms = max(0, self.shard.next_tick_ms - self.node.now_ms) + 1
            self._scheduler.after(
                int(wait_ms * MS / (1 + self.node.traits.drift)), self._tick, self.boot
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
        if self.node.paused:
            return
        self.node.guarded(self, self._handle_inbox)
        if self.up:
            self._on_turn(self.node, self)

    def _handle_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        for call, arguments in inbox:
            call(*arguments)
        self._running.turn(self.node.now_ms)
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
            self._running.turn(self.node.now_ms)
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
        if self._checkpointing or not self._opened.checkpoint_due(self.node.now_ms):
            return
        self._checkpointing = True
        begun = self._opened.begin_checkpoint()
        stored: dict[str, bytes] | None = None
        if self.node.keeps_settled:
            stored = self.node.disk.stored(".log")
            stored = {path: data for path, data in stored.items() if self._is_settled(path)}
        self._scheduler.after(
            self._sync_time(), self._in_thread, self.boot, self._sync_checkpoint, begun, stored
        )

    def _sync_checkpoint(self, begun: Checkpoint, stored: dict[str, bytes] | None) -> None:
        self._opened.sync_checkpoint(begun)
        self._later(self._checkpointed, begun, stored)

    def _checkpointed(self, begun: Checkpoint, stored: dict[str, bytes] | None) -> None:
        self._opened.end_checkpoint(begun)
        self._checkpointing = False
        if stored is not None:
            self.node.checkpointed(self.number, stored)

    def _is_settled(self, path: str) -> bool:
        """Whether the watermark of this checkpoint covers a segment of this shard.

        Of a round that is under way more may be stored, and of a new segment only its header;
        damage there looks like a torn tail.
        """
        directory, _, name = path.partition(f"/{PARTITIONS_DIR}/")[2].partition("/")
        entry, base = entry_from_directory(directory), parse_segment_name(name)
        partition = self._running.manager.partitions.get(entry.group) if entry else None
        if partition is None or base is None:
            return False
        return base <= partition.log.durable_index == partition.log.last_index

    def _sync_time(self) -> int:
        traits = self.node.traits
        time_us = traits.sync_us + int(self._rng.random() * traits.sync_us)
        if traits.sync_slow and self._rng.random() < traits.sync_slow:
            time_us += self._rng.randrange(traits.sync_slow_us)
        return time_us

    def _in_thread(self, boot: int, work: Callable[..., None], *arguments: Any) -> None:
        """What a helper thread does, at the one moment that it happens; paused with its process."""
        if boot != self.boot or not self.up:
            return
        if self.node.paused:
            self._scheduler.after(10 * MS, self._in_thread, boot, work, *arguments)
            return
        self.node.guarded(self, work, *arguments)

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        """A thread's result reaches the loop a little later, and is never dropped."""
        delay_us = int(self._rng.random() * 2 * self.node.traits.sync_us)
        self._scheduler.after(delay_us, self._finished, self.boot, call, arguments)

    def _finished(self, boot: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if boot == self.boot and self.up:
            self._inbox.insert(0, (call, arguments))
            self._plan_turn()

    # ---- Transport

    def open_peer(self, key: PeerKey, endpoint: str) -> None:
        assert endpoint == peers_endpoint(*self.node.address_of(key.node), key.shard)
        self._dial(key)

    def _dial(self, key: PeerKey) -> None:
        sink = _PeerSink(self, key, self.boot)
        self._links[key] = self._network.dial(
            self.port, Port(key.node, key.shard), Listener.PEERS, sink
        )

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

    def compact_later(
        self, job: CompactionJob, done: Callable[[CompactionResult | None], None]
    ) -> None:
        store = self._running.store
        self.read_later(lambda: compact_here(store, job), done)

    def _read(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        self.input(self.boot, done, job())
