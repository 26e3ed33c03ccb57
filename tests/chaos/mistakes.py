"""Mistakes to be planted in the code under test, one at a time: the simulator must see each.

Each is a function that patches methods for the time of one test; nothing in the product knows of
them. Most are mistakes that other systems shipped (the name of the trap in PITFALLS stands behind),
some are our own, found by the simulator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.broker import produce, producer_stm
from aegis_cluster.broker.fetch import Fetches
from aegis_cluster.broker.membership_backend import MembershipBackend
from aegis_cluster.broker.partition import Partition
from aegis_cluster.broker.producer_stm import ProducerTable
from aegis_cluster.broker.retention import Retention
from aegis_cluster.client.partition_queue import PartitionQueue
from aegis_cluster.errors import AegisError, NotLeader
from aegis_cluster.ids import LogIndex
from aegis_cluster.limits import RAFT_APPEND_BYTES_MAX
from aegis_cluster.raft import AppendReply, AppendRequest, Envelope, PreVoteRequest, Replica
from aegis_cluster.storage import scan, shard_recovery
from aegis_cluster.storage.log_recovery import LogRecovery
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.types import HardState
from aegis_cluster.testing.node import SimulatedNode
from aegis_cluster.wire.frame import decode_header, encode_frame, frame_payload, iter_frames

if TYPE_CHECKING:
    import pytest

    from aegis_cluster.ids import GroupId, Member
    from aegis_cluster.raft import Entry, Message, VoteRequest
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.wire.descriptions import TopicSettings

# ---- what is promised before it is durable


def vote_is_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """A2"""
    right = ShardStore.set_hard_state

    def set_hard_state(self: ShardStore, group: GroupId, state: HardState) -> None:
        right(self, group, HardState(state.term, None))

    patch.setattr(ShardStore, "set_hard_state", set_hard_state)


def term_is_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """A2"""

    def set_hard_state(self: ShardStore, group: GroupId, state: HardState) -> None:
        self._touch(self._get(group))

    patch.setattr(ShardStore, "set_hard_state", set_hard_state)


def leader_counts_itself_before_its_fsync(patch: pytest.MonkeyPatch) -> None:
    """A1"""
    patch.setattr(Replica, "_held_by_me", lambda self: self.log.last_index)


def follower_acknowledges_before_its_fsync(patch: pytest.MonkeyPatch) -> None:
    """A1"""

    def acknowledge(self: Replica, sender: Member, matched: LogIndex) -> None:
        self._send.append(Envelope(sender, AppendReply(self.term, matched, self.commit_index)))

    patch.setattr(Replica, "_acknowledge", acknowledge)


def promises_leave_before_the_round(patch: pytest.MonkeyPatch) -> None:
    """A1, A2: everything at once, votes too."""

    def promise(self: Replica, to: Member, message: Message) -> None:
        self._send.append(Envelope(to, message))

    patch.setattr(Replica, "_promise", promise)


def sync_does_nothing(patch: pytest.MonkeyPatch) -> None:
    """NATS, etcd #14370"""

    def sync(self: ShardStore, ticket: Round) -> None:
        ticket.started = ticket.synced = True

    patch.setattr(ShardStore, "sync", sync)


def failed_fsync_is_retried(patch: pytest.MonkeyPatch) -> None:
    """C1: the second try succeeds, and the pages are gone."""
    right = ShardStore.sync

    def sync(self: ShardStore, ticket: Round) -> None:
        try:
            for file in ticket.files.values():
                file.fdatasync()
        except OSError:
            pass
        right(self, ticket)

    patch.setattr(ShardStore, "sync", sync)


# ---- Raft


def votes_twice(patch: pytest.MonkeyPatch) -> None:
    """A2"""
    right = Replica._may_vote

    def may_vote(self: Replica, sender: Member, request: VoteRequest) -> bool:
        if self.leader is None:
            self.vote = None
        return right(self, sender, request)

    patch.setattr(Replica, "_may_vote", may_vote)


def votes_for_any_log(patch: pytest.MonkeyPatch) -> None:
    """Raft §5.4.1 forgotten."""

    def may_vote(self: Replica, sender: Member, request: VoteRequest) -> bool:
        return self.vote in (None, sender) and self.leader is None

    def would_vote(self: Replica, request: PreVoteRequest) -> bool:
        return request.proposed_term > self.term and not self._hears_leader()

    patch.setattr(Replica, "_may_vote", may_vote)
    patch.setattr(Replica, "_would_vote", would_vote)


def truncates_on_a_stale_append(patch: pytest.MonkeyPatch) -> None:
    """A21"""
    right = Replica._store

    def store(self: Replica, entries: tuple[Entry, ...]) -> None:
        if entries and entries[0].index <= self.log.last_index:
            self._truncate_log(entries[0].index)
        right(self, entries)

    patch.setattr(Replica, "_store", store)


def acknowledges_its_whole_log(patch: pytest.MonkeyPatch) -> None:
    """Says what it has, not what was found to match."""

    def acknowledge(self: Replica, sender: Member, matched: LogIndex) -> None:
        self._promise(sender, AppendReply(self.term, self.log.last_index, self.commit_index))

    patch.setattr(Replica, "_acknowledge", acknowledge)


def skips_the_consistency_check(patch: pytest.MonkeyPatch) -> None:
    """Raft §5.3 forgotten."""
    right = Replica._refuse

    def refuse(self: Replica, sender: Member, request: AppendRequest) -> None:
        if request.prev_index <= self.log.last_index:
            self._accept(sender, request)
        else:
            right(self, sender, request)

    patch.setattr(Replica, "_refuse", refuse)


def believes_the_leaders_commit_index(patch: pytest.MonkeyPatch) -> None:
    """Commits what the leader committed, not only what was found to match."""
    right = Replica._accept

    def accept(self: Replica, sender: Member, request: AppendRequest) -> None:
        right(self, sender, request)
        self._commit(min(request.commit_index, self.log.last_index))

    patch.setattr(Replica, "_accept", accept)


def stale_read_from_an_old_leader(patch: pytest.MonkeyPatch) -> None:
    """A5"""
    patch.setattr(Replica, "_confirmed_round", lambda self: self._read_round)


def reads_before_its_noop(patch: pytest.MonkeyPatch) -> None:
    """A6"""
    patch.setattr(Replica, "_is_established", lambda self: True)
    patch.setattr(Partition, "serving", property(lambda self: self.leads))


def quiet_group_never_wakes(patch: pytest.MonkeyPatch) -> None:
    """A15 done wrong."""
    patch.setattr(Replica, "_wake", lambda self: None)


def lost_appends_are_never_sent_again(patch: pytest.MonkeyPatch) -> None:
    """Liveness."""
    patch.setattr(Replica, "_is_stalled", lambda self, progress: False)


def older_terms_are_committed_by_counting(patch: pytest.MonkeyPatch) -> None:
    """A7: Raft §5.4.2, figure 8."""
    patch.setattr(Replica, "_may_commit", lambda self, index: index > 0)


def pre_votes_raise_terms(patch: pytest.MonkeyPatch) -> None:
    """A3: the term that a pre-vote only proposes leaks."""
    right = Replica._on_pre_vote_request

    def on_request(self: Replica, sender: Member, request: PreVoteRequest) -> None:
        right(self, sender, request)
        if request.proposed_term > self.term and not self._hears_leader():
            self._become_follower(request.proposed_term, None)

    patch.setattr(Replica, "_on_pre_vote_request", on_request)


def members_change_before_the_noop(patch: pytest.MonkeyPatch) -> None:
    """A8"""

    def tick(self: MembershipBackend) -> None:
        for partition in self._shard.manager.partitions.values():
            if partition.leads:
                self._mend(partition)

    patch.setattr(Replica, "_may_change_membership", lambda self: True)
    patch.setattr(MembershipBackend, "tick", tick)


def living_voters_are_removed_beside_dead_ones(patch: pytest.MonkeyPatch) -> None:
    """Ours: the rest was no majority any more, and the group stood still for ever."""
    patch.setattr(Replica, "_check_majority", lambda self, membership: None)


def a_whole_append_is_acknowledged_when_a_part_came(patch: pytest.MonkeyPatch) -> None:
    """The answer names what was asked for, while the shell had cut the append short."""
    right = Replica._accept

    def accept(self: Replica, sender: Member, request: AppendRequest) -> None:
        right(self, sender, request)
        if request.entries:
            self._acknowledge(sender, request.last_index)

    def send_append(self: Partition, to: Member, message: AppendRequest) -> None:
        first = LogIndex(message.prev_index + 1)
        found = self.log.read(first, message.last_index, 1_000)
        self._send(self, to, message, found.data)

    def with_entries(self: Partition, message: AppendRequest, frames: memoryview) -> AppendRequest:
        return whole(self, message, frames)._replace(last_index=message.last_index)

    whole = Partition._with_entries
    patch.setattr(Replica, "_accept", accept)
    patch.setattr(Partition, "_send_append", send_append)
    patch.setattr(Partition, "_with_entries", with_entries)


# ---- disks


def a_torn_tail_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """C3: a frame whose checksum fails is taken as it is."""

    def check(group: GroupId, data: Any, position: int = 0, **_: Any) -> Any:
        return decode_header(data, position)

    patch.setattr(scan, "check_frame", check)


def damage_is_cut_as_a_torn_tail(patch: pytest.MonkeyPatch) -> None:
    """C3: what was acknowledged is thrown away in silence (NATS)."""
    right = LogRecovery._end

    def end(self: LogRecovery, stop: Any) -> None:
        self._journal.durable = LogIndex(0)
        right(self, stop)

    patch.setattr(LogRecovery, "_end", end)


def a_log_that_lost_its_end_begins_after_its_snapshot(patch: pytest.MonkeyPatch) -> None:
    """Ours: earliest moved, and readers were told that what others still had is gone."""
    patch.setattr(
        shard_recovery,
        "_log_restarts",
        lambda snapshot, state, journal: snapshot.at > (state.durable.index if state else 0),
    )


def a_wiped_node_votes_under_its_old_name(patch: pytest.MonkeyPatch) -> None:
    """A10"""
    patch.setattr(SimulatedNode, "_next_member", lambda self: self.member)


def a_follower_moves_its_log_start(patch: pytest.MonkeyPatch) -> None:
    """Earliest is the leader's to decide."""
    right = Partition.tick

    def tick(self: Partition) -> None:
        right(self)
        if not self.leads and not self.is_internal and len(self.log.segments) > 2:
            self.drop_before(self.log.segments[1].base_index)

    patch.setattr(Partition, "tick", tick)


def a_new_leader_ignores_its_predecessors_clock(patch: pytest.MonkeyPatch) -> None:
    """Ours (seed 1304): its first frame was older than those before it; retention went by it."""
    patch.setattr(Partition, "_follow_clock", lambda self: None)


def records_go_before_their_time(patch: pytest.MonkeyPatch) -> None:
    """A segment is too old by its own beginning, not by that of the one behind it."""
    right = Retention._wanted_start

    def wanted_start(self: Retention, partition: Partition, settings: TopicSettings) -> int:
        segments = partition.log.segments
        limit = partition.now() - (settings.retention_ms or 0)
        for segment in segments[:-1]:
            if segment.first_append_ms() >= limit and segment.base_index <= partition.applied:
                return segment.header.before.offset
        return right(self, partition, settings)

    patch.setattr(Retention, "_wanted_start", wanted_start)


# ---- the shell around it


def old_frames_are_restamped_by_a_new_leader(patch: pytest.MonkeyPatch) -> None:
    """DESIGN §5: frames of older terms are sent again byte for byte."""

    def send_append(self: Partition, to: Member, message: AppendRequest) -> None:
        first = LogIndex(message.prev_index + 1)
        found = self.log.read(first, message.last_index, RAFT_APPEND_BYTES_MAX)
        frames = _restamped(self, found.data, self.log.point_at(message.prev_index).chain)
        self._send(self, to, message._replace(last_index=found.last), frames)

    patch.setattr(Partition, "_send_append", send_append)


def _restamped(partition: Partition, frames: bytes, chain: bytes) -> bytes:
    """Frames of earlier terms get the time at which they are sent."""
    made = []
    for position, header in iter_frames(frames):
        frame = encode_frame(
            group=partition.group,
            index=header.index,
            term=header.term,
            kind=header.kind,
            time_ms=header.time_ms + (header.term < partition.replica.term),
            previous_chain=chain,
            payload=frame_payload(frames, header, position),
        )
        chain = decode_header(frame).chain
        made.append(frame)
    return b"".join(made)


def producer_table_is_left_out_of_snapshots(patch: pytest.MonkeyPatch) -> None:
    """A13"""
    patch.setattr(ProducerTable, "slices", lambda self: iter(()))


def repeat_is_acknowledged_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    """KIP-98: the first answer was never given, so the second must not be early."""
    right = ProducerTable.decide

    def decide(self: ProducerTable, batch: Any) -> Any:
        found = right(self, batch)
        return found._replace(wait_for=LogIndex(0)) if found.known is not None else found

    patch.setattr(ProducerTable, "decide", decide)


def repeats_are_not_recognised(patch: pytest.MonkeyPatch) -> None:
    """Redpanda #3039"""
    right = ProducerTable.decide

    def decide(self: ProducerTable, batch: Any) -> Any:
        found = right(self, batch)
        return found._replace(known=None) if found.known is not None else found

    patch.setattr(ProducerTable, "decide", decide)


def old_epochs_are_let_in(patch: pytest.MonkeyPatch) -> None:
    """Who held a lease before goes on writing (etcd's locks under Jepsen)."""
    right = producer_stm._judge

    def judge(state: Any, batch: Any) -> Any:
        is_old = state is not None and batch.producer_epoch < state.epoch
        return producer_stm.APPEND if is_old else right(state, batch)

    patch.setattr(producer_stm, "_judge", judge)
    patch.setattr(producer_stm, "invariant", lambda *_, **__: None)


def unknown_is_reported_as_refused(patch: pytest.MonkeyPatch) -> None:
    """G1a: a write that may be there is called certainly not there."""

    def lost(self: produce._Commit, _: AegisError) -> None:
        self._call.settle(self._slot, produce.refusal(NotLeader("not any more")))

    patch.setattr(produce._Commit, "lost", lost)


def acknowledged_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    """acks=1 by accident."""

    def wait_for(self: Partition, index: LogIndex, waiter: Any) -> None:
        waiter.committed()

    patch.setattr(Partition, "wait_for", wait_for)


def readers_see_what_is_not_committed(patch: pytest.MonkeyPatch) -> None:
    """A12, Redpanda #3003"""

    def look(
        self: Fetches, partition: Partition, item: Any, bytes_max: int, *, committed: bool
    ) -> Any:
        partition.high_watermark = partition.log.end_offset
        return right(self, partition, item, bytes_max, committed=committed)

    right = Fetches._find
    patch.setattr(Fetches, "_find", look)
    patch.setattr(Partition, "readable_end", lambda self, **_: self.log.end_offset)


def failed_recovery_leaves_a_marker(patch: pytest.MonkeyPatch) -> None:
    """Ours: it said that nothing had ever been durable."""
    right = ShardStore._leave_marker

    def leave(self: ShardStore, reason: str) -> None:
        before = self._journal_files
        self._journal_files = before or object()  # type: ignore[assignment]
        right(self, reason)
        self._journal_files = before

    patch.setattr(ShardStore, "_leave_marker", leave)


# ---- clients


def client_gives_a_second_sequence(patch: pytest.MonkeyPatch) -> None:
    """KIP-360: a batch that may have been stored is stamped anew."""
    right = PartitionQueue.take

    def take(self: PartitionQueue) -> Any:
        if self.waiting[0].epoch not in (-1, self.epoch):
            self.waiting[0].unanswered = False
        return right(self)

    patch.setattr(PartitionQueue, "take", take)


def client_calls_unanswered_refused(patch: pytest.MonkeyPatch) -> None:
    """A request without an answer is taken for one that never left."""
    right = PartitionQueue.retry

    def retry(self: PartitionQueue, batch: Any, *, unanswered: bool, at: float) -> None:
        right(self, batch, unanswered=False, at=at)

    patch.setattr(PartitionQueue, "retry", retry)
