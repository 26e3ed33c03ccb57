"""Looks into every replica after each of its turns: what clients can't see yet is wrong already.

The idea: Raft's promises (figure 3) over all replicas at once. One leader a term; an index that was
applied anywhere is the same bytes everywhere, for ever; whoever leads a later term has it.

The rule it protects: it only reads, through the same logs that serve clients.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

from aegis_cluster.errors import AegisError
from aegis_cluster.ids import METADATA_GROUP, GroupId, LogIndex
from aegis_cluster.storage.log import read_log_start
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.layout import batch_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.ids import Member
    from aegis_cluster.testing.node import SimulatedNode
    from aegis_cluster.testing.process import SimulatedProcess

READ_BYTES = 1 << 20


class _Group:
    """What one group is known to have committed: frames one after the other, and where each is."""

    def __init__(self, retention_ms: int | None) -> None:
        self.retention_ms = retention_ms
        self.data = bytearray()
        self.starts: list[int] = [0, 0]
        """Position of frame i at place i; the last one is the end."""
        self.terms: list[int] = [0]
        self.links: list[tuple[int, bytes]] = [(0, b"")]
        """(term, chain) of frame i at place i: what stays of it when the log is compacted."""
        self.leaders: dict[int, int] = {}
        self.campaigns: set[int] = set()
        """Terms in which somebody voted for itself; asked for membership only."""
        self.log_start = 0
        """The highest that a committed LOG_START frame has decided."""
        self.young: deque[tuple[int, int]] = deque()
        """(last offset, append time) of the frames that hold records and stay."""
        self.time_ms = 0
        """When the newest frame was appended."""
        self.broken: list[str] = []
        """What the frames themselves show to be wrong."""

    @property
    def last(self) -> int:
        return len(self.terms) - 1

    def note_link(self, term: int, chain: bytes) -> None:
        self.terms.append(term)
        self.links.append((term, chain))

    def slice(self, first: int, last: int) -> bytes:
        return bytes(self.data[self.starts[first] : self.starts[last + 1]])

    def extend(self, frames: bytes) -> None:
        for position, header in iter_frames(frames):
            self.starts.append(self.starts[-1] + header.size)
            self.note_link(header.term, header.chain)
            if header.time_ms < self.time_ms:
                self.broken.append(f"index {header.index} is older than the one before it")
            self.time_ms = max(self.time_ms, header.time_ms)
            if header.kind is FrameKind.DATA:
                batch = batch_header(frame_payload(frames, header, position))
                last = batch.base_offset + batch.last_offset_delta
                self.young.append((last, header.time_ms))
            elif header.kind is FrameKind.LOG_START:
                frame = frames[position : position + header.size]
                self.log_start = max(self.log_start, read_log_start(frame))
                self._let_go(header.time_ms)
        self.data += frames

    def _let_go(self, now_ms: int) -> None:
        """Retention goes by append time: nothing goes that was appended within it."""
        while self.young and self.young[0][0] < self.log_start:
            offset, time_ms = self.young.popleft()
            if self.retention_ms is not None and time_ms >= now_ms - self.retention_ms:
                self.broken.append(f"offset {offset} went after {now_ms - time_ms} ms")


class ReplicaWatch:
    """`violations` grows by a sentence for each promise that was seen broken."""

    def __init__(self, retention_ms: int | None = None) -> None:
        """retention_ms: for how long the topic keeps its records, if that is bounded."""
        self.violations: list[str] = []
        self.compacted: set[GroupId] = set()
        """Frames of these may have lost records; asked for membership only."""
        self.elections = 0
        self._groups: defaultdict[GroupId, _Group] = defaultdict(lambda: _Group(retention_ms))
        self._groups[METADATA_GROUP] = _Group(None)  # it is cut to its snapshots
        self._promises: dict[tuple[Member, GroupId], tuple[int, int, object]] = {}
        """(member, group) -> the start in which it was seen, term, vote."""
        self._kept: dict[tuple[Member, GroupId], tuple[int, int]] = {}
        """(member, group) -> the start in which it was seen, the last index applied and durable."""
        self._states: dict[tuple[int, int, GroupId], tuple[object, ...]] = {}
        """What was looked at last, by node, start and group."""
        self._applied: dict[tuple[int, int, GroupId], tuple[Partition, int | None]] = {}
        self._commits: dict[tuple[Member, GroupId, int], int] = {}
        """(member, group, term it leads) -> commit index when it was last seen."""

    def keep(self, groups: Iterable[GroupId], *, compacted: bool) -> None:
        """Logs whose records do not expire, or go only because later ones have the same key."""
        for group in groups:
            self._groups[group].retention_ms = None
            if compacted:
                self.compacted.add(group)

    def look(self, node: SimulatedNode, process: SimulatedProcess) -> None:
        """Check what the newest turn of a process may have changed."""
        node.disk.inspected = True
        try:
            self._look(node, process)
        finally:
            node.disk.inspected = False

    def _look(self, node: SimulatedNode, process: SimulatedProcess) -> None:
        if process.shard is None:
            return
        for group, partition in process.shard.manager.partitions.items():
            if self._is_as_before(node, process.boot, group, partition):
                continue
            self._check_promise(node, process.boot, group, partition)
            self._check_kept(node, process.boot, group, partition)
            self._check_term(node, group, partition)
            if partition.leads:
                self._check_leader(node, group, partition)
                self._check_rules_of_leading(node, group, partition)
            key = (node.number, process.boot, group)
            # A replica that was rebuilt is opened anew, and applies its log from the beginning.
            opened, before = self._applied.get(key, (partition, None))
            before = before if opened is partition else None
            if before != partition.applied:
                self._check_applied(node, group, partition, before)
                self._check_log_start(node, group, partition)
                for what in self._groups[group].broken:
                    self._violated(group, what)
                self._groups[group].broken.clear()
                self._applied[key] = (partition, partition.applied)

    def _is_as_before(
        self, node: SimulatedNode, boot: int, group: GroupId, partition: Partition
    ) -> bool:
        """Nothing that is checked here has changed since the last look; so it is for most groups
        in most turns."""
        replica = partition.replica
        key = (node.number, boot, group)
        state = (
            replica.term,
            replica.vote,
            replica._hard_state_durable,
            replica.role,
            replica.log.last_index,
            replica.durable_index,
            replica.commit_index,
            replica.membership_index,
            replica.damaged,
            partition.applied,
        )
        if self._states.get(key) == state:
            return True
        self._states[key] = state
        return False

    def _check_promise(
        self, node: SimulatedNode, now: int, group: GroupId, partition: Partition
    ) -> None:
        """A term and vote that were durable come back with the next start (Raft §5.2)."""
        replica = partition.replica
        key = (node.member, group)
        boot, term, vote = self._promises.get(key, (now, 0, None))
        if boot != now and not node.keeps_settled:
            if replica.term < term:
                self._violated(group, f"node {node.number} forgot its term {term}")
            elif replica.term == term and vote not in (None, replica.vote):
                self._violated(group, f"node {node.number} forgot its vote in term {term}")
        if replica._hard_state_durable:
            self._promises[key] = (now, replica.term, replica.vote)

    def _check_kept(
        self, node: SimulatedNode, now: int, group: GroupId, partition: Partition
    ) -> None:
        """What was applied and durable comes back with the next start, or the replica says that it
        is damaged (C3: nothing durable is cut in silence)."""
        replica = partition.replica
        key = (node.member, group)
        boot, kept = self._kept.get(key, (now, 0))
        last = replica.log.last_index
        if boot != now and not replica.damaged and last < kept:
            self._violated(group, f"node {node.number} had {kept} durable, and now ends at {last}")
        self._kept[key] = (now, min(partition.applied, replica.durable_index))

    def _check_term(self, node: SimulatedNode, group: GroupId, partition: Partition) -> None:
        """Terms rise by campaigns alone; pre-votes leave them as they are (thesis §9.6)."""
        replica, campaigns = partition.replica, self._groups[group].campaigns
        if replica.term in campaigns or replica.term == 0:
            return
        if replica.vote == replica.me:
            campaigns.add(replica.term)
        elif not node.keeps_settled:
            campaigns.add(replica.term)  # once is enough
            self._violated(group, f"node {node.number} has term {replica.term}, nobody's campaign")

    def _check_rules_of_leading(
        self, node: SimulatedNode, group: GroupId, partition: Partition
    ) -> None:
        """A leader commits by counting, and changes members, only behind an entry of its own term
        that is committed (Raft §5.4.2; the single-server bug of 2015)."""
        replica, log = partition.replica, partition.replica.log
        place = (node.member, group, replica.term)
        before = self._commits.setdefault(place, replica.commit_index)
        commit, change = replica.commit_index, replica.membership_index
        own_is_committed = commit >= log.first_index and log.term_at(commit) == replica.term
        if commit > before and not own_is_committed:
            self._violated(group, f"node {node.number} committed {commit} of an older term")
        if change > commit and log.term_at(change) == replica.term and not own_is_committed:
            self._violated(group, f"node {node.number} changes members before its no-op")
        self._commits[place] = commit

    def _check_log_start(self, node: SimulatedNode, group: GroupId, partition: Partition) -> None:
        """Nobody's log begins later than a leader has decided; folded logs are cut by everybody."""
        start, decided = partition.log_start_offset, self._groups[group].log_start
        if start > decided and not partition.is_internal:
            self._violated(group, f"node {node.number} begins at offset {start}, not {decided}")

    def _check_leader(self, node: SimulatedNode, group: GroupId, partition: Partition) -> None:
        known = self._groups[group]
        term = partition.replica.term
        leader = known.leaders.get(term)
        if leader is None:
            known.leaders[term] = node.number
            self.elections += 1
            self._check_completeness(node, group, partition)
        elif leader != node.number:
            self._violated(group, f"nodes {leader} and {node.number} both lead term {term}")

    def _check_completeness(
        self, node: SimulatedNode, group: GroupId, partition: Partition
    ) -> None:
        """A leader has every entry that was committed in an earlier term (Raft §5.4)."""
        known, log = self._groups[group], partition.replica.log
        last = known.last
        if not last or known.terms[last] >= partition.replica.term:
            return
        if log.last_index < last:
            self._violated(group, f"node {node.number} leads and lacks the committed index {last}")
        elif last >= log.first_index and log.term_at(LogIndex(last)) != known.terms[last]:
            self._violated(group, f"node {node.number} leads with another index {last}")

    def _check_applied(
        self, node: SimulatedNode, group: GroupId, partition: Partition, before: int | None
    ) -> None:
        known = self._groups[group]
        first = max(1 + (before or 0), partition.log.first_index)
        if before is not None and partition.applied < before:
            self._violated(group, f"node {node.number} took back what it had applied")
        for index, frames in _read(partition, first, partition.applied):
            self._compare(node, group, known, index, frames)

    def _compare(
        self, node: SimulatedNode, group: GroupId, known: _Group, first: int, frames: bytes
    ) -> None:
        """One run of applied frames against what others applied at the same places."""
        if first > known.last + 1:
            return  # it begins after a snapshot; its log is compared in the end
        if first > known.last:
            known.extend(frames)
            return
        if group in self.compacted:
            self._compare_links(node, group, known, frames)
            return
        both = known.slice(first, known.last)
        if not (frames.startswith(both) or both.startswith(frames)):
            if node.keeps_settled and _is_rotten(frames, both):
                return  # its disk has damaged them since
            self._violated(group, f"node {node.number} applied other bytes from index {first} on")
        elif len(frames) > len(both):
            known.extend(frames[len(both) :])

    def _compare_links(
        self, node: SimulatedNode, group: GroupId, known: _Group, frames: bytes
    ) -> None:
        """Compaction takes records out of frames; each frame's link of the chain stays."""
        for _, header in iter_frames(frames):
            if header.index > known.last:
                known.note_link(header.term, header.chain)
            elif known.links[header.index] != (header.term, header.chain):
                self._violated(group, f"node {node.number} applied another index {header.index}")

    def _violated(self, group: GroupId, what: str) -> None:
        self.violations.append(f"state machine safety: group {group}: {what}")

    def applied(self, group: GroupId) -> int:
        """The last index that any replica is known to have applied."""
        return self._groups[group].last


def _is_rotten(frames: bytes, known: bytes) -> bool:
    """Whether frames differ from what they were only by damage: the link of the chain is not
    covered by a frame's own checksum."""
    pairs = zip(iter_frames(frames), iter_frames(known), strict=False)
    return all(one.crc == other.crc for (_, one), (_, other) in pairs)


def _read(partition: Partition, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """Runs of frames of a log; nothing where it cannot be read now."""
    while first <= last:
        try:
            found = partition.log.read(LogIndex(first), LogIndex(last), READ_BYTES)
        except AegisError:
            return
        yield found.first, found.data
        first = found.last + 1


def whole_logs(
    nodes: Iterable[SimulatedNode], group: GroupId, *, compacted: bool = False
) -> dict[str, list[tuple[int, int, bytes]]]:
    """(index, term, frame) of every replica of a group, uncommitted tails included; of compacted
    ones each frame's link of the chain."""
    found: dict[str, list[tuple[int, int, bytes]]] = {}
    for node in nodes:
        partition = node.partition(group)
        if partition is None or partition.replica.damaged:
            continue
        frames: list[tuple[int, int, bytes]] = []
        log = partition.log
        for _, data in _read(partition, log.first_index, log.last_index):
            for position, header in iter_frames(data):
                frame = data[position : position + header.size]
                if compacted:
                    frame = header.chain
                frames.append((header.index, header.term, frame))
        found[f"node {node.number}"] = frames
    return found


def folded(partition: Partition) -> tuple[object, ...]:
    """The producers that a replica has folded: id, epoch, (first, last, offset) of each batch; and
    what it knows of their transactions: those that are open, and the ranges that were aborted."""
    producers = partition.state.producers
    table = [
        (producer, state.epoch, [(one.first, one.last, one.offset) for one in state.batches])
        for producer, state in producers._table.items()
    ]
    return table, producers.open_transactions, producers._aborted


def check_folds(nodes: Iterable[SimulatedNode], group: GroupId) -> list[str]:
    """Replicas that have applied the same have folded the same, snapshots or not."""
    known: dict[int, tuple[int, object]] = {}
    found: list[str] = []
    for node in nodes:
        partition = node.partition(group)
        if partition is None or partition.replica.damaged:
            continue
        state = folded(partition)
        other, theirs = known.setdefault(partition.applied, (node.number, state))
        if theirs != state:
            found.append(
                f"state machine safety: group {group}: nodes {other} and {node.number} folded"
                f" different producers from the same log"
            )
    return found
