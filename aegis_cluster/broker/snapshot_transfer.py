"""Snapshots on their way to another shard, in pieces that the receiver asks for one by one.

The idea: the giver captures the state at the first question and encodes each piece when it is asked
for; the receiver checks each piece, folds it into a state aside, and uses nothing before it has
the last one. Pulling makes order, repeats and losses plain: an answer belongs to its question, a
lost one is asked for again, and a giver that has forgotten means a new beginning.

Three ask: a follower that its leader has offered a snapshot (Raft §7), a damaged replica that is
rebuilt, and a shard that follows `__cluster/0` as a reader and finds its place cut off.

request fields:  [group, capture (0: a new one), piece number, whether the giver must lead]
reply fields:    [capture, whether this is the last piece, the giver's last index], one raw part

Piece 0 is a `Package`, the others are the slices of the state, each a checked block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.links import Call
from aegis_cluster.broker.snapshots import Package, decode_package, encode_package
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    NotReady,
    PeerViolation,
    Throttled,
    Unavailable,
)
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.limits import SNAPSHOT_CAPTURES_MAX
from aegis_cluster.storage.snapshot import decode_slice, encode_slice
from aegis_cluster.wire.protocol import Api, Part, Reply, take_bool, take_int, take_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster.broker.folds import StateLoader
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transport import PeerKey
    from aegis_cluster.ids import Member
    from aegis_cluster.raft import InstallSnapshot

    Answer = Callable[[list[Any], list[Part]], None]

CAPTURE_MS: Final = 10_000
"""A capture that nobody asked for so long is forgotten."""
CALL_MS: Final = 2_000
AGAIN_MS: Final = 200
TRIES_MAX: Final = 10
"""For one piece, before the receiver begins anew."""

log = logging.getLogger(__name__)


# The giver's half


@dataclass(slots=True)
class _Capture:
    """A state as it was when it was first asked for; it remembers the last piece only."""

    group: GroupId
    pieces: Iterator[bytes]
    last_index: LogIndex
    expires_ms: int
    number: int = -1
    piece: bytes = b""
    following: bytes | None = None

    def take(self, number: int) -> bytes:
        """The next piece, or the last one again."""
        if number == self.number + 1 and (number == 0 or self.following is not None):
            self.piece = next(self.pieces) if self.following is None else self.following
            self.following = next(self.pieces, None)
            self.number = number
        if number != self.number:
            raise NotReady("Another piece of the snapshot is due.", have=self.number, want=number)
        return self.piece


class SnapshotServer:
    """One per shard: answers the questions of all receivers."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._captures: dict[int, _Capture] = {}
        self._count = 0

    def tick(self) -> None:
        now_ms = self._shard.now_ms
        for number in [n for n, one in self._captures.items() if one.expires_ms <= now_ms]:
            del self._captures[number]

    def ask(
        self, group: GroupId, capture: int, piece: int, answer: Answer, *, confirm: bool
    ) -> None:
        """Give one piece. Raises `NotLeader`, `NotReady`, `Throttled`."""
        if capture:
            self._answer(group, capture, piece, answer)
            return
        partition = self._shard.manager.partitions.get(group)
        if partition is None or partition.replica.damaged or partition.damage is not None:
            raise NotLeader("This shard has no whole replica of the partition.")
        if len(self._captures) >= SNAPSHOT_CAPTURES_MAX:
            raise Throttled("Too many snapshots are being taken from here.")
        if confirm:
            partition.wait_for_read(_Confirmed(self, partition, answer))
        else:
            self.begin(partition, answer)

    def begin(self, partition: Partition, answer: Answer) -> None:
        """Capture the state as it is now, and give piece 0."""
        package, slices = partition.capture()
        self._count += 1
        self._captures[self._count] = _Capture(
            partition.group,
            _pieces(partition.group, package, slices),
            partition.replica.log.last_index,
            self._shard.now_ms + CAPTURE_MS,
        )
        self._answer(partition.group, self._count, 0, answer)

    def _answer(self, group: GroupId, number: int, piece: int, answer: Answer) -> None:
        capture = self._captures.get(number)
        if capture is None or capture.group != group:
            raise NotReady("The snapshot is forgotten; begin anew.", have=number)
        data = capture.take(piece)
        capture.expires_ms = self._shard.now_ms + CAPTURE_MS
        answer([number, capture.following is None, capture.last_index], [data])


def _pieces(group: GroupId, package: Package, slices: Iterator[bytes]) -> Iterator[bytes]:
    yield encode_slice(group, 0, encode_package(package))
    for number, data in enumerate(slices):
        yield encode_slice(group, number, data)


class _Confirmed:
    """Waits for the read index; a leader that was deposed says nothing, and is asked no more."""

    def __init__(self, server: SnapshotServer, partition: Partition, answer: Answer) -> None:
        self._server = server
        self._partition = partition
        self._answer = answer

    def committed(self) -> None:
        self._server.begin(self._partition, self._answer)

    def lost(self, error: AegisError) -> None:
        log.debug("A replica that asked for a snapshot asks in vain: %s", error)


# The receiver's half


@dataclass(slots=True)
class Copied:
    """A snapshot that is here in whole; `loader.finish()` makes it the state."""

    package: Package
    blocks: list[bytes]
    """Slices, as they go into the file."""
    loader: StateLoader
    last_index: LogIndex
    """What the giver's log ended with when the state was captured."""


@dataclass(slots=True, eq=False)
class SnapshotCopy:
    """One snapshot on its way here; `done` is called once, with it or with why there is none."""

    shard: Shard
    key: PeerKey
    group: GroupId
    confirm: bool
    loader: StateLoader
    done: Callable[[Copied | AegisError], None]
    package: Package | None = None
    blocks: list[bytes] = field(default_factory=list)
    ended: bool = False
    _capture: int = 0
    _asking: bool = False
    _tries: int = 0
    _ask_at_ms: int = 0

    def tick(self) -> None:
        """Ask for the next piece, unless a question is out."""
        if self.ended or self._asking or self.shard.now_ms < self._ask_at_ms:
            return
        self._asking = True
        self._tries += 1
        shard = self.shard
        fields = [self.group, self._capture, self._number, self.confirm]
        call = Call(shard.now_ms + CALL_MS, self._answered)
        shard.ensure_link(self.key)  # a mute replica sends nothing that would have opened it
        shard.links.call(self.key, Api.COPY_SNAPSHOT, fields, now_ms=shard.now_ms, call=call)

    @property
    def _number(self) -> int:
        return 0 if self.package is None else len(self.blocks) + 1

    def _answered(self, reply: Reply | AegisError) -> None:
        self._asking = False
        if self.ended:
            return
        try:
            if isinstance(reply, AegisError):
                raise reply
            last_index, is_last = self._take(reply)
        except AegisError as error:
            self._ask_at_ms = self.shard.now_ms + AGAIN_MS
            if self._tries >= TRIES_MAX or not self._may_ask_again(reply):
                self._end(error)
            return
        self._tries = 0
        if is_last and self.package is not None:
            self._end(Copied(self.package, self.blocks, self.loader, last_index))
        else:
            self.tick()

    def _may_ask_again(self, reply: Reply | AegisError) -> bool:
        """Whether the giver may still answer this question: it was busy, or the answer was lost."""
        return isinstance(reply, Unavailable | Throttled)

    def _take(self, reply: Reply) -> tuple[LogIndex, bool]:
        """Fold the piece that came. Raises `Corruption`, `PeerViolation`."""
        capture = take_int(reply.fields, 0, "capture", low=1)
        is_last = take_bool(reply.fields, 1, "is_last")
        last_index = LogIndex(take_int(reply.fields, 2, "last_index"))
        block = bytes(take_part(reply.parts, 0, "piece"))
        if self.package is None:
            self.package = decode_package(decode_slice(block, self.group, 0))
            self._capture = capture
        elif capture != self._capture:
            raise PeerViolation("A piece of another snapshot came.", have=capture)
        else:
            self.loader.add(decode_slice(block, self.group, len(self.blocks)))
            self.blocks.append(block)
        return last_index, is_last

    def _end(self, result: Copied | AegisError) -> None:
        self.ended = True
        self.done(result)


class SnapshotCopies:
    """All snapshots that are on their way to one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._copies: list[SnapshotCopy] = []
        self._installing: set[GroupId] = set()

    def tick(self) -> None:
        self._copies = [copy for copy in self._copies if not copy.ended]
        for copy in self._copies:
            copy.tick()

    def start(
        self,
        key: PeerKey,
        group: GroupId,
        loader: StateLoader,
        done: Callable[[Copied | AegisError], None],
        *,
        confirm: bool = False,
    ) -> None:
        """Fetch a snapshot; confirm: from a leader that has made sure that it still leads."""
        copy = SnapshotCopy(self._shard, key, group, confirm, loader, done)
        self._copies.append(copy)
        copy.tick()

    # ---- snapshots that a leader offers to its follower

    def offered(self, partition: Partition, leader: Member, offer: InstallSnapshot) -> None:
        """Fetch it, and hand it to the replica once it is here and written aside."""
        group, shard = partition.group, self._shard
        if group in self._installing:
            return
        self._installing.add(group)
        log.info("Fetching a snapshot of %s from node %s.", partition.name, leader.node)

        def done(copied: Copied | AegisError) -> None:
            if isinstance(copied, AegisError):
                self._installing.discard(group)
                log.info("No snapshot of %s came: %s", partition.name, copied)
            elif shard.manager.partitions.get(group) is partition:
                self._write(partition, leader, offer, copied)
            else:
                self._installing.discard(group)

        key = shard.addresses.key_of(shard.table, leader.node, group)
        self.start(key, group, partition.state.loader(), done)

    def _write(
        self, partition: Partition, leader: Member, offer: InstallSnapshot, copied: Copied
    ) -> None:
        store, package = self._shard.store, copied.package
        body = package.body(rebuilding=False).to_values()
        ticket = store.begin_install(partition.group, package.point, body)

        def written(has_room: bool) -> None:
            self._installing.discard(partition.group)
            if has_room and self._shard.manager.partitions.get(partition.group) is partition:
                partition.install_copied(leader, offer.term, copied, ticket)
                self._shard.manager.due(partition)

        self._shard.transport.read_later(
            lambda: store.write_snapshot(ticket, copied.blocks), written
        )
