"""One replica of one partition: its Raft core, its log, and what is folded over it.

This is the shell around the core (`raft.Replica`) and still does no I/O of its own: it stages
writes with the shard's store, puts messages on the shard's outbox, and is told when a round of
writes is on disk. The order is the core's order: what is `durable` before what reflects it leaves,
promises (`reply`) only after the round that holds them was synced, effects finished in order.

The rule it protects: a producer hears "done" for an index only when that index is committed and
applied here, and hears "unknown" when this replica stopped leading before it knew.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from aegis_cluster.broker.snapshots import Body, Package
from aegis_cluster.errors import (
    AegisError,
    Corruption,
    CorruptLog,
    CorruptRecord,
    DiskFull,
    InvariantBroken,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    PeerViolation,
    Refused,
    invariant,
)
from aegis_cluster.ids import GroupId, LogIndex, Member, RecordOffset, Term, TopicPartition
from aegis_cluster.limits import MIB, RAFT_APPEND_BYTES_MAX
from aegis_cluster.raft import AppendRequest, Entry, InstallSnapshot, Role, TimeoutNow
from aegis_cluster.raft.codec import membership_from_fields, membership_to_fields
from aegis_cluster.raft.progress import Following
from aegis_cluster.storage.checked_file import pack_body, unpack_body
from aegis_cluster.storage.snapshot import decode_slice
from aegis_cluster.storage.types import HardState, ReadResult
from aegis_cluster.wire.batch import BatchHeader, batch_header
from aegis_cluster.wire.frame import (
    FRAME_HEADER_BYTES,
    FrameKind,
    check_frame,
    decode_header,
    encode_data_frame,
    encode_frame,
    frame_annotation,
    frame_payload,
    iter_frames,
)
from aegis_cluster.wire.protocol import decode_fields, encode_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.broker.folds import PartitionState
    from aegis_cluster.broker.snapshot_transfer import Copied
    from aegis_cluster.raft import Effects, Envelope, Membership, Replica, SnapshotInstall
    from aegis_cluster.raft import Message as RaftMessage
    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.rounds import SnapshotTicket
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.wire.frame import FrameHeader

SNAPSHOT_FRAMES: Final = 100_000
SNAPSHOT_BYTES: Final = 64 * MIB
OWN_SNAPSHOT_FRAMES: Final = 2_500
OWN_SNAPSHOT_BYTES: Final = MIB // 2
"""The same for the cluster's own logs, whose frames are many and small and are all folded again
after a restart. Their state may be large, so at least half its size has come as well."""
EVENT_SNAPSHOT_FRAMES: Final = 10_000
"""The same for event stores: to fold an append again takes ten times as long as to read it from a
snapshot."""
APPLY_READ_BYTES: Final = 1 * MIB
_NEED_ROOM: Final = frozenset({FrameKind.DATA, FrameKind.POSITION})
"""What users have written; it waits while the disk is full."""
SNAPSHOT_TICKS: Final = 100
"""A snapshot that brought its receiver no further for so long is offered again."""

log_ = logging.getLogger(__name__)


T = TypeVar("T")


class Waiter(Protocol):
    """Someone who wants to hear what became of an index."""

    def committed(self) -> None: ...

    def lost(self, error: AegisError) -> None: ...


class Rounds(Protocol):
    """The shard's group commit, as a replica sees it."""

    def wait_for_round(self, partition: Partition) -> int:
        """Number of the round that will hold what is staged now; `round_done` follows."""

    def due(self, partition: Partition) -> None:
        """Have `step` called in this turn."""

    def want_snapshot(self, partition: Partition) -> None:
        """Have a snapshot made, in its own time; `snapshot_saved` follows."""

    def offered(self, partition: Partition, leader: Member, offer: InstallSnapshot) -> None:
        """Fetch the snapshot that the leader offers; `install_copied` follows."""


class ReadLater(Protocol):
    """Run a blocking read in a helper thread; `done` gets its result in the shard's own."""

    def __call__(self, job: Callable[[], T], done: Callable[[T], None]) -> None: ...


class Sender(Protocol):
    """The shard's outbox, as a replica sees it."""

    def __call__(
        self, partition: Partition, recipient: Member, message: RaftMessage, frames: bytes | None
    ) -> None: ...


class _Proposal(NamedTuple):
    """A batch of ours between `propose` and its frame: the core has given it an index."""

    batch: bytes
    base_offset: RecordOffset
    time_ms: int
    annotation: bytes


class _Framed(NamedTuple):
    """A frame, and its header, which is read once."""

    header: FrameHeader
    data: bytes


@dataclass(slots=True)
class Placed:
    """Where an appended batch will stand once its index is committed."""

    index: LogIndex
    base_offset: RecordOffset
    time_ms: int


class Partition:
    """One replica, owned by one shard. `step` moves it on; everything else is input or a question.

    applied: last index folded here; high_watermark: offset after the last applied record.
    """

    def __init__(
        self,
        *,
        group: GroupId,
        name: TopicPartition,
        replica: Replica,
        log: PartitionLog,
        store: ShardStore,
        state: PartitionState,
        rounds: Rounds,
        wall_ms: Callable[[], int],
        send: Sender,
        read_later: ReadLater,
    ) -> None:
        self.group = group
        self.name = name
        self.is_internal = name.topic.startswith("__")
        """One of the cluster's own logs, which go on when the disk is full."""
        self.replica = replica
        self.log = log
        self.state = state
        self.applied = LogIndex(0)
        self.high_watermark = RecordOffset(0)
        self.rounds_done = 0
        """The newest round with writes of this replica that is on disk."""
        self.damage: str | None = None
        """What of this replica cannot be read, and where; None while it is whole."""
        self.on_advance: Callable[[Partition], None] = _ignore
        self._store = store
        self._rounds = rounds
        self._wall_ms = wall_ms
        self._send = send
        self._read_later = read_later
        self._proposals: dict[tuple[LogIndex, Term], _Proposal | bytes] = {}
        """What becomes a frame in the next step: a batch, or the payload of another kind."""
        self._received: dict[tuple[LogIndex, Term], _Framed] = {}
        self._unapplied: deque[_Framed] = deque()
        self._waiters: defaultdict[LogIndex, list[Waiter]] = defaultdict(list)
        self._disk_waiters: deque[tuple[LogIndex, Waiter]] = deque()
        """For our own disk alone, by rising index."""
        self._read_waiters: dict[int, Waiter] = {}
        self._next_read = 0
        self._unfinished: deque[tuple[Effects, int | None]] = deque()
        self._chain = log.last_chain
        self._chain_is_unproved = False
        self._next_offset = log.end_offset
        self._time_ms = 0
        self._led_term: Term | None = None
        self._closed = False
        self.snapshot_offset = RecordOffset(0)
        """Next offset after what the durable snapshot covers."""
        self._snapshot_index = LogIndex(0)
        self._snapshot_bytes = 0
        """Of the state in it."""
        self._bytes_since_snapshot = 0
        self._folded = LogIndex(0)
        """The state is that after this index; only after an install above `applied`."""
        self._copied: tuple[Copied, SnapshotTicket] | None = None
        self._ticks = 0
        self._snapshots_sent: dict[Member, int] = {}

    # ---- questions

    @property
    def leads(self) -> bool:
        return self.replica.role is Role.LEADER

    @property
    def serving(self) -> bool:
        """Leads, and has applied a frame of its own term (thesis §6.4)."""
        return self.replica.serving and not self._closed

    @property
    def log_start_offset(self) -> RecordOffset:
        return self.log.log_start_offset

    @property
    def last_stable_offset(self) -> RecordOffset:
        """First offset that is not decided yet: readers of committed records stop below it."""
        stable = self.state.producers.last_stable_offset(self.high_watermark)
        return max(stable, self.log_start_offset)

    def readable_end(self, *, committed: bool) -> RecordOffset:
        """How far a reader may see. Every read of clients asks here, and nowhere else (B10)."""
        return self.last_stable_offset if committed else self.high_watermark

    def not_leader(self) -> NotLeader:
        leader = self.replica.leader
        return NotLeader(
            f"This node does not lead {self.name} (now); ask the leader.",
            leader=None if leader is None or self.leads else leader.node,
        )

    @property
    def is_alone(self) -> bool:
        """No other replica could repair this one."""
        return set(self.replica.membership.voters) <= {self.replica.me}

    @property
    def has_unfinished(self) -> bool:
        """Effects of the core wait for a round of writes."""
        return bool(self._unfinished)

    def unable(self) -> AegisError:
        """Why this replica does not do what only a leader may do."""
        if self.damage is None or not self.is_alone:
            return self.not_leader()
        return CorruptLog(
            f"The only replica of {self.name} is damaged, so the partition is stopped:"
            f" {self.damage}. Offsets {self.log.log_start_offset} to {self.log.end_offset} stand"
            " before the damage; restore the files from a backup, or delete the topic.",
            log_start=self.log.log_start_offset,
            readable_to=self.log.end_offset,
        )

    def check_fetch(self, offset: RecordOffset) -> None:
        """Raise `OffsetOutOfRange` for an offset that this log does not hold and will not get."""
        if self.log_start_offset <= offset <= self.high_watermark:
            return
        raise OffsetOutOfRange(
            f"Offset {offset} of {self.name} is outside what is kept: {self.log_start_offset} to"
            f" {self.high_watermark}.",
            have=offset,
            log_start=self.log_start_offset,
            high_watermark=self.high_watermark,
        )

    # ---- inputs

    def load_snapshot(self, index: LogIndex, body: Body, slices: Sequence[bytes]) -> None:
        """Start from a folded state instead of from the log's first frame. Raises `Corruption`."""
        self.high_watermark = self.snapshot_offset = self.log.end_offset_at(index)
        if body.old_state is not None:
            self.state.load_body(body.old_state)
        else:
            loader = self.state.loader()
            self._snapshot_bytes = sum(map(len, slices))
            for number, block in enumerate(slices):
                loader.add(decode_slice(block, self.group, number))
            loader.finish()
        self._state_loaded(index, body)
        self.replica.applied(index)

    def _state_loaded(self, index: LogIndex, body: Body) -> None:
        self.applied = self._snapshot_index = index
        self._folded = body.folded
        self._time_ms = max(self._time_ms, body.time_ms)
        self._bytes_since_snapshot = 0

    def damage_met(self, error: Corruption) -> None:
        """Stored bytes fail their check: from now on this replica waits to be rebuilt."""
        if self.damage is None:
            self.damage = str(error)
            log_.error("The replica of %s on this node is damaged: %s", self.name, error)

    def receive(self, sender: Member, message: RaftMessage, frames: memoryview | None) -> None:
        """One Raft message; `frames` are the bytes that came with an `AppendRequest`.

        Raises `PeerViolation` when the frames fail their check or are not the request's.
        """
        if self._proposals:
            self.step()  # our own frames are made in the term they were proposed in
        if self.replica.damaged:
            frames = None  # its log is rebuilt by other means, see repair
        elif isinstance(message, AppendRequest) and frames is not None:
            message = self._with_entries(message, frames)
            if self._lacks_room_for(message):
                self._received.clear()
                return
        elif isinstance(message, InstallSnapshot) and self._is_news(message):
            self._rounds.offered(self, sender, message)
            return
        if isinstance(message, TimeoutNow) and self._store.disk_full and not self.is_internal:
            return
        self.replica.receive(sender, message)
        self.step()
        self._received.clear()

    def _is_news(self, offer: InstallSnapshot) -> bool:
        """A snapshot worth fetching; the core itself answers any other offer."""
        return offer.term >= self.replica.term and offer.index > self.replica.commit_index

    def install_copied(
        self, leader: Member, term: Term, copied: Copied, ticket: SnapshotTicket
    ) -> None:
        """The snapshot that a leader of that term offered is here, and written aside."""
        package = copied.package
        self._copied = (copied, ticket)
        self.replica.receive(
            leader, InstallSnapshot(term, package.index, package.term, package.membership)
        )
        self.step()
        self._copied = None

    def _lacks_room_for(self, request: AppendRequest) -> bool:
        """Users' batches are let go by while the disk is full; their leader sends them again."""
        if not self._store.disk_full or self.is_internal:
            return False
        return any(entry.kind in _NEED_ROOM for entry in request.entries)

    def tick(self) -> None:
        """One tick of the shard's clock."""
        if self._proposals:
            self.step()
        self._ticks += 1
        if self._snapshots_sent:
            self._look_after_snapshots()
        self.replica.tick()

    def append(self, batch: bytes, header: BatchHeader, annotation: bytes = b"") -> Placed:
        """Put a checked client batch into the log, ahead of its commit.

        annotation: for the fold, in the same frame. Raises `NotLeader`, `DiskFull` (certainly not
        done).
        """
        self._check_room()
        size = FRAME_HEADER_BYTES + len(annotation) + len(batch)
        entry = self._propose(FrameKind.DATA, size)
        placed = Placed(entry.index, self._next_offset, self.now())
        self._proposals[entry.index, entry.term] = _Proposal(
            batch, placed.base_offset, placed.time_ms, annotation
        )
        self._next_offset = RecordOffset(placed.base_offset + header.last_offset_delta + 1)
        self.state.producers.appended(
            header, index=placed.index, offset=placed.base_offset, time_ms=placed.time_ms
        )
        self._rounds.due(self)
        return placed

    def append_position(self, payload: bytes) -> LogIndex:
        """Put a frame without a record into a feed's log. Raises as `append` does."""
        self._check_room()
        entry = self._propose(FrameKind.POSITION, FRAME_HEADER_BYTES + len(payload))
        self._proposals[entry.index, entry.term] = payload
        self._rounds.due(self)
        return entry.index

    def _check_room(self) -> None:
        if not self.serving:
            raise self.unable()
        if self._store.disk_full and not self.is_internal:
            raise DiskFull(
                f"The disk of the node that leads {self.name} is full; nothing was written. It"
                " goes on by itself when there is room."
            )

    def _propose(self, kind: FrameKind, size: int) -> Entry:
        try:
            return self.replica.propose(kind, size)
        except NotLeader:
            raise self.not_leader() from None  # leadership is being handed over

    def wait_for(self, index: LogIndex, waiter: Waiter) -> None:
        """Tell `waiter` when `index` is committed and applied here, or can no longer be known."""
        if index <= self.applied:
            waiter.committed()
        else:
            self._waiters[index].append(waiter)

    def wait_for_own_disk(self, index: LogIndex, waiter: Waiter) -> None:
        """Tell `waiter` when `index`, which was appended here, is synced to this replica's disk,
        whatever the others have; or that nobody knows, when leadership ends first."""
        if index <= self.replica.durable_index:
            waiter.committed()
        else:
            self._disk_waiters.append((index, waiter))

    def wait_for_read(self, waiter: Waiter) -> None:
        """Tell `waiter` once this replica is known to have led after the call (Raft §8).

        Raises `NotLeader`.
        """
        if not self.serving:
            raise self.unable()
        self._next_read += 1
        self._read_waiters[self._next_read] = waiter
        self.replica.read_index(self._next_read)
        self._rounds.due(self)

    def change_membership(self, membership: Membership) -> None:
        """Propose the next membership, one step away. Raises `NotLeader`, `NotReady`."""
        payload = encode_fields(membership_to_fields(membership))
        self.replica.change_membership(membership, FRAME_HEADER_BYTES + len(payload))
        self._rounds.due(self)

    def set_log_start(self, offset: RecordOffset) -> None:
        """Decide that the log starts at `offset` from now on. Raises `NotLeader`, `Throttled`."""
        payload = pack_body(offset)
        entry = self.replica.propose(FrameKind.LOG_START, FRAME_HEADER_BYTES + len(payload))
        self._proposals[entry.index, entry.term] = payload
        log_.info("%s starts at offset %s from now on.", self.name, offset)
        self._rounds.due(self)

    def drop_before(self, index: LogIndex) -> None:
        """Drop whole segments below `index`, as far as the state on disk covers them."""
        if self._snapshot_index < index - 1:
            self._rounds.want_snapshot(self)
        upto = min(index, self._snapshot_index + 1, self.replica.commit_hint)
        first = self._store.drop_before(self.group, LogIndex(upto))
        if first > self.replica.log.first_index:
            self.replica.compact(LogIndex(first - 1))

    def round_done(self, number: int) -> None:
        """All rounds up to `number` are on disk: finish the effects that waited for them."""
        self.rounds_done = number
        while self._unfinished:
            effects, needed = self._unfinished[0]
            if needed is not None and needed > number:
                return
            self._unfinished.popleft()
            self._finish(effects)

    def step_aside(self, to: Member | None = None) -> None:
        """Hand leadership to a voter, by default the one furthest along, unless under way."""
        if self.leads and not self.replica.transferring:
            with suppress(Refused):
                self.replica.transfer_leadership(to)
            self._rounds.due(self)

    def close(self) -> None:
        """The replica is going away: nobody waits for it any more, and nobody begins to."""
        self._closed = True
        self._fail_waiters()

    # ---- the core's effects

    def step(self) -> None:
        """Stage what the core wants done, and send what may leave already."""
        self._note_role()
        while self.replica.has_effects:
            self._stage(self.replica.take_effects())

    def _stage(self, effects: Effects) -> None:
        if effects.durable is not None:
            state = HardState(effects.durable.term, effects.durable.vote)
            self._store.set_hard_state(self.group, state)
        if effects.install is not None:
            self._install(effects.install)
        if effects.truncate_from is not None and not self._truncate(effects.truncate_from):
            effects = effects._replace(truncate_from=None, append=(), send=(), reply=())
        if effects.append:
            self._append(effects.append)
        if effects.durable is None:
            self._send_all(effects.send)
        if effects.needs_disk:
            self._unfinished.append((effects, self._rounds.wait_for_round(self)))
        elif self._unfinished:
            self._unfinished.append((effects, None))
        else:
            self._finish(effects)
        for need in effects.snapshots:
            self._offer_snapshot(need.to)
        self._advance(effects)

    def _finish(self, effects: Effects) -> None:
        """What may leave only now, and the news for the core that its writes are durable."""
        if effects.durable is not None:
            self._send_all(effects.send)
        self._send_all(effects.reply)
        self.replica.effects_done(effects)
        while self._disk_waiters and self._disk_waiters[0][0] <= self.replica.durable_index:
            self._disk_waiters.popleft()[1].committed()

    def _note_role(self) -> None:
        """Begin or end a term of our own leadership."""
        term = self.replica.term if self.replica.role is Role.LEADER else None
        if term == self._led_term:
            return
        self._led_term = term
        if term is not None:
            self._follow_clock()
        self.state.leadership_lost()
        self._proposals.clear()
        self._next_offset = self.log.end_offset
        self._fail_waiters()
        self.on_advance(self)

    def _follow_clock(self) -> None:
        """Let nothing that this leader appends be older than what stands before it.

        What is not applied yet has not moved our clock; retention would take the newest frame's
        time for that of all, and drop records before their time.
        """
        last = self.log.last_index
        if last <= self.applied:
            return
        try:
            if self._unapplied and self._unapplied[-1].header.index == last:
                header = self._unapplied[-1].header
            else:
                header = decode_header(self.log.read(last, last, 1).data)
        except Corruption as error:
            self.damage_met(error)
            return
        self._time_ms = max(self._time_ms, header.time_ms)

    def _fail_waiters(self) -> None:
        waiting, self._waiters = self._waiters, defaultdict(list)
        own, self._disk_waiters = self._disk_waiters, deque()
        for _, waiter in own:
            waiter.lost(self._unknown())
        for index in sorted(waiting):
            for waiter in waiting[index]:
                waiter.lost(self._unknown())
        reads, self._read_waiters = self._read_waiters, {}
        for read in reads.values():
            read.lost(self.not_leader())

    def _unknown(self) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"This node stopped leading {self.name} before the write was known to be committed;"
            " a later leader may still commit it."
        )

    def now(self) -> int:
        """The wall clock, kept from falling within this partition (append time in frames)."""
        self._time_ms = max(self._time_ms, self._wall_ms())
        return self._time_ms

    # ---- snapshots for and from others

    def capture(self) -> tuple[Package, Iterator[bytes]]:
        """The start of this log, and the state as it is now, whatever is applied meanwhile."""
        begin = self.log.begin
        package = Package(
            begin.index,
            begin.term,
            begin.chain,
            begin.offset,
            LogIndex(max(self.applied, self._folded)),
            self._time_ms,
            self.high_watermark,
            # Of now, not of the start: it is committed, while what a joiner began with is a guess.
            self.replica.membership_at(LogIndex(max(self.applied, begin.index))),
        )
        return package, self.state.slices()

    @property
    def may_snapshot(self) -> bool:
        """Whether the state as it is may be written down: it never runs ahead of the log that is
        on our own disk.
        """
        return (
            0 < self.applied <= min(self.replica.durable_index, self.log.durable_index)
            and self.applied >= self.log.begin.index
            and not self.replica.damaged
            and not self.log.resetting
        )

    def snapshot_saved(self, index: LogIndex, size_bytes: int) -> None:
        """A snapshot of the state after `index` is durable."""
        self._snapshot_bytes = size_bytes
        if index > self._snapshot_index:
            self.snapshot_offset = max(self.snapshot_offset, self.log.end_offset_at(index))
            self._snapshot_index = index
            self._bytes_since_snapshot = 0

    def _offer_snapshot(self, to: Member) -> None:
        """The member lacks frames that are dropped here (Raft §7): it may fetch a snapshot; the
        rest follows as appends.
        """
        log_.info("Offering the snapshot of %s to node %s.", self.name, to.node)
        begin = self.log.begin
        membership = self.replica.membership_at(LogIndex(max(self.applied, begin.index)))
        message = InstallSnapshot(self.replica.term, begin.index, begin.term, membership)
        self._snapshots_sent[to] = self._ticks
        self._send(self, to, message, None)

    def _look_after_snapshots(self) -> None:
        """Nobody says that a snapshot was lost; that nothing came of it for long says it."""
        for member, sent_at in list(self._snapshots_sent.items()):
            progress = self.replica.progress.get(member)
            if progress is None or progress.state is not Following.SNAPSHOT:
                del self._snapshots_sent[member]
            elif self._ticks - sent_at >= SNAPSHOT_TICKS:
                del self._snapshots_sent[member]
                self.replica.snapshot_failed(member)

    def _install(self, install: SnapshotInstall) -> None:
        """Begin anew with a received snapshot; it is durable when storage returns."""
        found, self._copied = self._copied, None
        fits = found is not None and found[0].package.index == install.index
        invariant(fits, "a snapshot is installed with its state", at=install.index)
        if found is None:
            return
        copied, ticket = found
        package = copied.package
        self._store.install(ticket)
        copied.loader.finish()
        self._state_loaded(package.index, package.body(rebuilding=False))
        self.high_watermark = self.snapshot_offset = package.next_offset
        self._unapplied.clear()
        self._chain = self.log.last_chain
        self._chain_is_unproved = False
        self._next_offset = self.log.end_offset

    def _truncate(self, from_index: LogIndex) -> bool:
        """Whether the log was cut; if it can't be read there, the replica is mute from now on, so
        that nobody counts on the frames that were to follow.
        """
        invariant(from_index > self.applied, "an applied frame was cut", at=from_index)
        try:
            self._store.truncate(self.group, from_index)
        except Corruption as error:
            self.damage_met(error)
            self.replica.mark_damaged()
            return False
        while self._unapplied and self._unapplied[-1].header.index >= from_index:
            self._unapplied.pop()
        self._chain = self.log.last_chain
        self._chain_is_unproved = True
        self._next_offset = self.log.end_offset
        return True

    def _append(self, entries: tuple[Entry, ...]) -> None:
        framed = [self._frame_of(entry) for entry in entries]
        headers, frames = zip(*framed, strict=True)
        self._store.append(self.group, frames, headers)
        if self.log.last_chain != self._chain:
            invariant(False, "the log left its chain", group=self.group)
        self._unapplied += framed
        if not self.leads:
            self._next_offset = self.log.end_offset

    def _frame_of(self, entry: Entry) -> _Framed:
        """The bytes of an entry: received ones as they came, our own made here and now."""
        place = (entry.index, entry.term)
        framed = self._received.get(place)
        if framed is None:
            frame = self._make_frame(entry, self._proposals.pop(place, None))
            framed = _Framed(decode_header(frame), frame)
        elif self._chain_is_unproved:
            self._prove_chain(framed.data)
        self._chain = framed.header.chain
        return framed

    def _prove_chain(self, frame: bytes) -> None:
        """After a cut, the first new frame must continue from what was kept."""
        self._chain_is_unproved = False
        try:
            check_frame(self.group, frame, previous_chain=self._chain)
        except CorruptRecord as error:
            raise InvariantBroken("a leader's log left the chain of ours", why=str(error)) from None

    def _make_frame(self, entry: Entry, proposal: _Proposal | bytes | None) -> bytes:
        invariant(entry.term == self.replica.term, "only frames of our own term are made")
        if isinstance(proposal, _Proposal):
            return encode_data_frame(
                group=self.group,
                index=entry.index,
                term=entry.term,
                time_ms=proposal.time_ms,
                previous_chain=self._chain,
                batch=proposal.batch,
                base_offset=proposal.base_offset,
                annotation=proposal.annotation,
            )
        kind = FrameKind(entry.kind)
        own = kind in (FrameKind.NOOP, FrameKind.MEMBERSHIP) or proposal is not None
        invariant(own, "a proposal was lost", kind=kind)
        payload = proposal or b""
        if entry.membership is not None:
            payload = encode_fields(membership_to_fields(entry.membership))
        return encode_frame(
            group=self.group,
            index=entry.index,
            term=entry.term,
            kind=kind,
            time_ms=self.now(),
            previous_chain=self._chain,
            payload=payload,
        )

    def _with_entries(self, message: AppendRequest, frames: memoryview) -> AppendRequest:
        """Check the frames that came with a request, keep them, and name them to the core."""
        # Only a log that ends with the very frame before these has their chain: one with another
        # frame at that index is refused by the core, and then mended.
        ends = (self.log.last_index, self.log.last_term)
        chain = self._chain if (message.prev_index, message.prev_term) == ends else None
        entries = []
        try:
            position = 0
            while position < len(frames):
                header = check_frame(self.group, frames, position, previous_chain=chain)
                chain = header.chain
                frame = bytes(frames[position : position + header.size])
                entry = entry_of(header, frame)
                self._received[entry.index, entry.term] = _Framed(header, frame)
                entries.append(entry)
                position += header.size
        except CorruptRecord as error:
            raise PeerViolation(f"A leader sent damaged frames for {self.name}: {error}") from error
        expected = message.prev_index
        for entry in entries:
            expected = LogIndex(expected + 1)
            if entry.index != expected:
                raise PeerViolation(f"A leader sent frame {entry.index} as {expected}.")
        return AppendRequest(*message[:5], expected, tuple(entries))

    # ---- messages

    def _send_all(self, envelopes: tuple[Envelope, ...]) -> None:
        for to, message in envelopes:
            if isinstance(message, AppendRequest) and message.last_index > message.prev_index:
                self._send_append(to, message)
            else:
                self._send(self, to, message, None)

    def _send_append(self, to: Member, message: AppendRequest) -> None:
        """Fill in the frames that the request names, from memory or, later, from disk."""
        first, last = LogIndex(message.prev_index + 1), message.last_index
        if first < self.log.first_index:
            return  # cut to a snapshot since the core named them; it asks again
        found = self.log.read_cached(first, last, RAFT_APPEND_BYTES_MAX)
        if found is not None:
            if found.last != last:
                message = message._replace(last_index=found.last)
            self._send(self, to, message, found.data)
            return
        log = self.log

        def read() -> ReadResult | Corruption:
            try:
                return log.read_range(first, last, RAFT_APPEND_BYTES_MAX)
            except OffsetOutOfRange:
                return ReadResult(b"", first, message.prev_index)  # dropped; the core asks again
            except Corruption as error:
                return error

        def done(result: ReadResult | Corruption) -> None:
            if isinstance(result, Corruption):
                self.damage_met(result)
            elif result.data and self.leads and self.replica.term == message.term:
                self._send(self, to, message._replace(last_index=result.last), result.data)

        self._read_later(read, done)

    # ---- applying

    def _advance(self, effects: Effects) -> None:
        if effects.commit_index > self.applied and not self.replica.damaged:
            self._apply_to(effects.commit_index)
        for context, index in effects.read_ready:
            waiter = self._read_waiters.pop(context, None)
            if waiter is not None:
                self.wait_for(index, waiter)
        for context in effects.read_failed:
            waiter = self._read_waiters.pop(context, None)
            if waiter is not None:
                waiter.lost(self.not_leader())

    def _apply_to(self, commit_index: LogIndex) -> None:
        while self.applied < commit_index:
            try:
                framed = self._next_unapplied(commit_index)
            except Corruption as error:
                self.damage_met(error)
                break
            index = framed.header.index
            if index != self.applied + 1:
                invariant(False, "apply left a gap", at=index, have=self.applied)
            self._apply(framed)
            self.applied = index
            for waiter in self._waiters.pop(index, ()):
                waiter.committed()
        self.replica.applied(self.applied)
        self._store.note_commit(self.group, self.replica.commit_hint)
        if self.snapshot_is_due:
            self._rounds.want_snapshot(self)
        self.on_advance(self)

    def _next_unapplied(self, commit_index: LogIndex) -> _Framed:
        """The frame to apply next; after a restart it is not in memory and comes from the log."""
        unapplied = self._unapplied
        while unapplied and unapplied[0].header.index <= self.applied:
            unapplied.popleft()
        first = LogIndex(self.applied + 1)
        if not unapplied or unapplied[0].header.index > first:
            last = unapplied[0].header.index - 1 if unapplied else commit_index
            data = self.log.read(first, LogIndex(last), APPLY_READ_BYTES).data
            found = [
                _Framed(header, data[position : position + header.size])
                for position, header in iter_frames(data)
            ]
            unapplied.extendleft(reversed(found))
        return unapplied.popleft()

    def _apply(self, framed: _Framed) -> None:
        header, frame = framed
        self._time_ms = max(self._time_ms, header.time_ms)
        self._bytes_since_snapshot += header.size
        if header.kind is FrameKind.POSITION and header.index > self._folded:
            self.state.feed.apply(frame_payload(frame, header), header.index)
        if header.kind is not FrameKind.DATA:
            if header.kind is FrameKind.LOG_START and header.index > self._folded:
                start = RecordOffset(unpack_body(bytes(frame_payload(frame, header))))
                self.state.producers.forget_below(start)
            return
        payload = frame_payload(frame, header)
        batch = batch_header(payload)
        if header.index > self._folded:
            self.state.apply(header, batch, payload, frame_annotation(frame, header))
        self.high_watermark = RecordOffset(batch.base_offset + batch.last_offset_delta + 1)

    @property
    def snapshot_is_due(self) -> bool:
        """Enough has come since the last one."""
        frames = self.applied - self._snapshot_index
        if frames >= SNAPSHOT_FRAMES or self._bytes_since_snapshot >= SNAPSHOT_BYTES:
            return True
        if self._bytes_since_snapshot < self._snapshot_bytes // 2:
            return False
        if not self.is_internal:
            return not self.state.events.is_empty and frames >= EVENT_SNAPSHOT_FRAMES
        return frames >= OWN_SNAPSHOT_FRAMES or self._bytes_since_snapshot >= OWN_SNAPSHOT_BYTES


def _ignore(_: Partition) -> None:
    """Nobody waits for news of this partition."""


def entry_of(header: FrameHeader, frame: bytes) -> Entry:
    """A frame as the core knows it."""
    membership = None
    if header.kind is FrameKind.MEMBERSHIP:
        membership = membership_from_fields(decode_fields(frame_payload(frame, header)))
    return Entry(header.index, header.term, header.kind, header.size, membership)
