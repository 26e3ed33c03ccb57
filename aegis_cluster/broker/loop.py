"""The loop of a shard process: plain, single, and in an order that is the design.

    wait → finished disk work → peers → links → control → data → step → write → send

Draining first makes batches by itself: the busier the shard, the fewer system calls and syncs a
record costs. Peers come first, so that a flood of data never delays a heartbeat. A round of writes
is synced here while syncs are quick (`sync_pace`), else in a helper thread, where the next one
gathers meanwhile; only one is under way at a time.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aegis_cluster.broker.compaction import compact_here
from aegis_cluster.broker.shard import Shard
from aegis_cluster.broker.sync_pace import SyncPace
from aegis_cluster.broker.transport import Listener
from aegis_cluster.limits import (
    ROUNDS_BEHIND_MAX,
    SHARD_DRAIN_BYTES,
    SHARD_DRAIN_MESSAGES,
    SHARD_DRAIN_MS,
    SYNC_BEHIND_MS,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.context import ShardContext
    from aegis_cluster.broker.sockets import Sockets
    from aegis_cluster.broker.supervisor_line import SupervisorLine
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.broker.workers import Workers
    from aegis_cluster.storage.compaction_job import CompactionJob, CompactionResult
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.protocol import Part

T = TypeVar("T")

SYNC: Final = "sync"
CHECKPOINT: Final = "checkpoint"
READ: Final = "read"
COMPACT: Final = "compact"
LOOK_MS: Final = 20
"""How often to look at what need not be looked at in each turn."""

log = logging.getLogger(__name__)


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class ShardLoop:
    """Drives one `Shard` with real sockets, a real disk and the real clock."""

    def __init__(
        self,
        *,
        context: ShardContext,
        store: ShardStore,
        sockets: Sockets,
        workers: Workers,
        rng: random.Random,
        supervisor: SupervisorLine | None = None,
        compact: Callable[[ShardStore, CompactionJob], CompactionResult | None] = compact_here,
    ) -> None:
        """supervisor: the line to the process that started this one, if there is one.
        compact: makes one pass of compaction; called in a helper thread."""
        self._compact_pass = compact
        self._store = store
        self._sockets = sockets
        self._workers = workers
        self._supervisor = supervisor
        self._syncing = False
        self._pace = SyncPace()
        self._unsynced: Round | None = None
        """The newest round that counts already, but is not on disk (`durability = "memory"`)."""
        self._syncing_behind = False
        self._sync_behind_ms = 0
        """When the next sync of those is due."""
        self._checkpointing = False
        self._look_ms = 0
        """When to look around again."""
        self._stopping = False
        self.shard = Shard(
            context=context,
            store=store,
            transport=self,
            rng=rng,
            wall_ms=wall_ms,
            now_ms=monotonic_ms(),
            supervisor=supervisor,
        )
        sockets.register(workers.fd)
        self._supervisor_fd = -1 if supervisor is None else supervisor.fileno()
        if supervisor is not None:
            sockets.register(self._supervisor_fd)

    def stop(self) -> None:
        """End after the present turn; may be called from a signal handler."""
        self._stopping = True

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Turn until told to stop, or until something holds. Raises `StorageFailed` when the disk
        can't be trusted."""
        while not self._stopping and not (until is not None and until()):
            self._turn()
        if self._stopping and self._unsynced is not None and not self._syncing_behind:
            self._store.sync(self._unsynced)

    def _turn(self) -> None:
        shard, sockets = self.shard, self._sockets
        pause_ms = 0 if shard.has_more_to_do else shard.next_tick_ms - monotonic_ms()
        sockets.poll(max(0, pause_ms))
        if sockets.is_ready(self._workers.fd):
            self._workers.drain()
        self._drain(Listener.PEERS)
        for key, message in sockets.peer_messages(SHARD_DRAIN_MESSAGES):
            shard.link_message(key, message)
        self._follow_links()
        self._drain(Listener.CONTROL)
        for listener, origin in sockets.clients_gone():
            shard.client_gone(listener, origin)
        self._drain(Listener.DATA)
        if self._supervisor is not None and sockets.is_ready(self._supervisor_fd):
            self._hear_supervisor(self._supervisor)
        now_ms = monotonic_ms()
        if now_ms >= self._look_ms:
            self._look_ms = now_ms + LOOK_MS
            self._look_around(now_ms)
        shard.turn(now_ms)
        self._write()
        self._sync_behind()
        if self._store.blocked:
            self._checkpoint(now_ms)

    def _look_around(self, now_ms: int) -> None:
        """What is to be done now and then, but not in each turn."""
        self._follow_keys()
        self._sockets.look_around(now_ms)
        for said in self._sockets.cut_off():
            self.shard.complaints.say("%s", said)
        self._checkpoint(now_ms)

    def _drain(self, listener: Listener) -> None:
        """Take what waits, but for bounds that leave others their turn.

        Peers have no bound in time. Each sends one message a turn, with all that its turn produced;
        taking less than has come makes a backlog of answers to questions that were given up, and
        no election ever ends.
        """
        received = self._sockets.receive(listener)
        if received is None:
            return
        size, taken, until_ms = 0, 0, monotonic_ms() + SHARD_DRAIN_MS
        while received is not None:
            origin, message = received
            if listener is Listener.PEERS:
                self.shard.peer_request(origin, message)
            else:
                self.shard.client_request(listener, origin, message)
            size, taken = size + sum(map(len, message)), taken + 1
            if size >= SHARD_DRAIN_BYTES or taken >= SHARD_DRAIN_MESSAGES:
                return
            if listener is not Listener.PEERS and monotonic_ms() >= until_ms:
                return
            received = self._sockets.receive(listener)

    def _hear_supervisor(self, supervisor: SupervisorLine) -> None:
        supervisor.drain()
        if not supervisor.is_open:
            self._sockets.unregister(self._supervisor_fd)
            self._supervisor = None

    def _follow_links(self) -> None:
        for key, is_up in list(self._sockets.link_events()):
            if is_up:
                self.shard.link_connected(key)
            else:
                self._sockets.renew_peer(key)
                self.shard.link_disconnected(key)

    def _follow_keys(self) -> None:
        """Look now and then whether keys were added or withdrawn; files are read elsewhere."""
        read = self._sockets.keys_to_read()
        if read is None:
            return

        def done(result: Any) -> None:
            for key in self._sockets.take_keys(result):
                self.shard.link_disconnected(key)

        self._workers.submit(READ, read, done)

    # ---- disk

    def _write(self) -> None:
        """Begin a round with all that is staged, unless one is still under way."""
        while not self._syncing:
            begun = self.shard.begin_round()
            if begun is None:
                return
            number, written = begun
            if written is None:
                self.shard.end_round(number, None)
            elif self.shard.end_in_memory(number, written):
                self._unsynced = written
            elif self._pace.is_quick and not self._syncing_behind:  # one sync at a time
                self._unsynced = None  # covered by this one
                self._synced(number, written, self._timed_sync(written))
            else:
                self._sync(number, written)
                return
            self.shard.turn(monotonic_ms())  # what this has set free may have more to write

    def _sync(self, number: int, written: Round) -> None:
        self._syncing = True
        self._unsynced = None  # covered by this one

        def done(took_ms: float) -> None:
            self._syncing = False
            self._synced(number, written, took_ms)

        self._workers.submit(SYNC, lambda: self._timed_sync(written), done)

    def _timed_sync(self, written: Round) -> float:
        """Milliseconds that it took; in whatever thread."""
        begun = time.perf_counter()
        self._store.sync(written)
        return (time.perf_counter() - begun) * 1_000

    def _synced(self, number: int, written: Round, took_ms: float) -> None:
        self._pace.note(took_ms)
        self.shard.peer_disks.note_sync(round(took_ms))
        self.shard.end_round(number, written)

    def _sync_behind(self) -> None:
        """Bring to disk what counts already, now and then, and without waiting for it."""
        unsynced, store = self._unsynced, self._store
        if unsynced is None or self._syncing_behind:
            return
        if monotonic_ms() < self._sync_behind_ms and len(store.open_rounds) < ROUNDS_BEHIND_MAX:
            return
        self._unsynced = None
        self._syncing_behind = True

        def done(_: object) -> None:
            store.end_round(unsynced)
            self._syncing_behind = False
            self._sync_behind_ms = monotonic_ms() + SYNC_BEHIND_MS

        self._workers.submit(SYNC, lambda: store.sync(unsynced), done)

    def _checkpoint(self, now_ms: int) -> None:
        if self._checkpointing or not self._store.checkpoint_due(now_ms):
            return
        self._checkpointing = True
        store, begun = self._store, self._store.begin_checkpoint()

        def done(_: object) -> None:
            store.end_checkpoint(begun)
            self._checkpointing = False

        self._workers.submit(CHECKPOINT, lambda: store.sync_checkpoint(begun), done)

    # ---- Transport

    def open_peer(self, key: PeerKey, endpoint: str) -> None:
        self._sockets.open_peer(key, endpoint)

    def close_peer(self, key: PeerKey) -> None:
        self._sockets.close_peer(key)

    def send_peer(self, key: PeerKey, message: Sequence[Part]) -> bool:
        return self._sockets.send_peer(key, message)

    def reply(self, listener: Listener, origin: bytes, message: Sequence[Part]) -> bool:
        return self._sockets.reply(listener, origin, message)

    def unsent(self, listener: Listener, origin: bytes) -> int:
        return self._sockets.unsent_answers.of((listener, origin))

    def unsent_to(self, key: PeerKey) -> int:
        return self._sockets.unsent_to_peers.of(key)

    @property
    def unsent_total(self) -> int:
        return self._sockets.unsent_answers.total

    def read_later(self, job: Callable[[], T], done: Callable[[T], None]) -> None:
        self._workers.submit(READ, job, done)

    def compact_later(
        self, job: CompactionJob, done: Callable[[CompactionResult | None], None]
    ) -> None:
        self._workers.submit(COMPACT, lambda: self._compact_pass(self._store, job), done)
