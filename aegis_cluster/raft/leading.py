"""A leader's half of replication: propose, send, count, commit; heartbeats and quiet.

The idea: proposals and acknowledgements only mark what is due; `take_effects` then sends each
member one append for everything that came together (batching by being busy).

The rule it protects: a leader commits only entries of its own term by counting (Raft §5.4.2,
figure 8), and counts a replica, itself included, only for what is on that replica's disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.errors import Throttled, invariant
from aegis_cluster.ids import NO_INDEX, LogIndex
from aegis_cluster.raft.core import Role
from aegis_cluster.raft.effects import SnapshotNeed
from aegis_cluster.raft.following import FollowerChapter
from aegis_cluster.raft.messages import (
    KIND_NOOP,
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Entry,
    Envelope,
    Heartbeat,
    HeartbeatReply,
    TimeoutNow,
)
from aegis_cluster.raft.progress import Following, Progress
from aegis_cluster.raft.quorum import majority_value

if TYPE_CHECKING:
    from aegis_cluster.ids import Member
    from aegis_cluster.raft.membership import Membership


class LeaderChapter(FollowerChapter):
    """What a replica does while it leads."""

    def _init_outbox(self) -> None:
        super()._init_outbox()
        self.progress: dict[Member, Progress] = {}
        """Every other member, in the membership's order; empty unless leading."""
        self._voter_progress: tuple[Progress, ...] = ()
        self._term_start: LogIndex = NO_INDEX
        """Index of this leader's own no-op: from here on it commits by counting."""
        self._replicate_due = False
        self._heartbeat_elapsed = 0
        self._quorum_due = 0
        """Tick at which the leader has to look whether a majority still answers."""
        self._active_at = 0
        """Tick of the last thing that keeps the group from falling quiet."""
        self._commit_told: LogIndex = NO_INDEX
        self._transfer_to: Member | None = None
        self._transfer_deadline = 0

    # -- beginning and end ------------------------------------------------------------------------

    def _start_leading(self) -> None:
        invariant(self.role is Role.CANDIDATE, "only a candidate becomes leader", role=self.role)
        invariant(not self.damaged, "a damaged replica does not lead")
        self.role = Role.LEADER
        self.leader = self.me
        self._leaderless_terms = 0
        self._term_start = LogIndex(self.log.last_index + 1)
        self._active_at = self._now
        self._heartbeat_elapsed = 0
        self._quorum_due = self._now + self.config.quorum_ticks
        self._commit_told = NO_INDEX
        self._update_progress()
        # Without an entry of its own term it could not commit anything (Raft §8, thesis §6.4).
        self._append_own(KIND_NOOP, self.config.noop_bytes, None)

    def _stop_leading(self) -> None:
        super()._stop_leading()
        self.progress = {}
        self._voter_progress = ()
        self._replicate_due = False
        self._transfer_to = None
        # The ranges they name may be replaced before the shell gets to fill them in.
        self._send = [each for each in self._send if not isinstance(each.message, AppendRequest)]

    def _membership_changed(self) -> None:
        super()._membership_changed()
        if self.role is Role.LEADER:
            self._update_progress()

    def _update_progress(self) -> None:
        """Keep what is known of members that stay; probe those that are new."""
        known = self.progress
        self.progress = {
            member: known.get(member) or self._new_progress(member)
            for member in self.membership.members
            if member != self.me
        }
        self._voter_progress = tuple(
            self.progress[voter] for voter in self._voters if voter != self.me
        )
        self._replicate_due = True

    def _new_progress(self, member: Member) -> Progress:
        made = Progress(member, next_index=LogIndex(self.log.last_index + 1), now=self._now)
        made.link_lost = member in self._links_lost
        return made

    @property
    def serving(self) -> bool:
        """Whether this leader's state is complete: its own no-op committed and applied (A6)."""
        return self.role is Role.LEADER and self.applied_index >= self._term_start

    def _is_established(self) -> bool:
        """Whether the leader's own no-op is committed, so that it knows the commit index."""
        return self.commit_index >= self._term_start

    # -- proposals --------------------------------------------------------------------------------

    def propose(self, kind: int, size: int) -> Entry:
        """Append an entry of `size` bytes; it is committed when `commit_index` reaches it.

        Raises NotLeader, also while leadership is being handed over; Throttled when too much is
        uncommitted. Both mean that nothing was appended.
        """
        if self.role is not Role.LEADER or self._transfer_to is not None:
            raise self._not_leader()
        log = self.log
        waiting = log.last_index - self.commit_index
        if waiting >= self.config.uncommitted_entries_max or (
            waiting and self._uncommitted_bytes() + size > self.config.uncommitted_bytes_max
        ):
            raise Throttled("too much is waiting for commit", entries=waiting)
        return self._append_own(kind, size, None)

    def _uncommitted_bytes(self) -> int:
        after = max(self.commit_index, LogIndex(self.log.tail_first - 1))
        return self.log.bytes_between(after, self.log.last_index)

    def _append_own(self, kind: int, size: int, membership: Membership | None) -> Entry:
        entry = Entry(LogIndex(self.log.last_index + 1), self.term, kind, size, membership)
        self._append_entry(entry)
        self._active()
        return entry

    def _active(self) -> None:
        """Something happened: no quiet for a while."""
        self._replicate_due = True
        self._active_at = self._now
        if self.quiet:
            self._wake()

    # -- sending ----------------------------------------------------------------------------------

    @property
    def has_effects(self) -> bool:
        """Whether `take_effects` has anything to hand over."""
        return self._replicate_due or super().has_effects

    def _before_effects(self) -> None:
        super()._before_effects()
        if self._replicate_due:
            self._replicate_due = False
            last_index = self.log.last_index
            for progress in self.progress.values():
                if progress.next_index <= last_index or progress.state is not Following.REPLICATE:
                    self._replicate(progress)

    def _replicate(self, progress: Progress) -> None:
        """Send a member what it may be sent now."""
        if progress.link_lost or progress.waiting:
            return
        if progress.held and self.log.can_follow(LogIndex(progress.next_index - 1)):
            return
        if progress.state is Following.REPLICATE:
            self._fill_pipeline(progress)
        elif not self.log.can_follow(LogIndex(progress.next_index - 1)):
            self._need_snapshot(progress)
        elif progress.state is Following.PROBE:
            self._send_append(progress, self._probe_end(progress))
        elif progress.next_index <= self.log.last_index:
            # Catching up: the shell cuts the range to its byte budget, the reply says where.
            self._send_append(progress, self.log.last_index)

    def _fill_pipeline(self, progress: Progress) -> None:
        config, log = self.config, self.log
        last_index = log.last_index
        while progress.next_index <= last_index:
            if progress.next_index < log.tail_first or progress.matched < log.tail_first - 1:
                self._catch_up(progress)
                return
            upto = log.fit(progress.next_index, config.append_bytes_max)
            upto = max(upto, progress.next_index)
            if not self._has_room(progress, upto):
                return
            self._send_append(progress, upto)

    def _has_room(self, progress: Progress, upto: LogIndex) -> bool:
        """Flow control: is there room for one more append up to `upto`?"""
        if not progress.in_flight:
            return True
        if len(progress.in_flight) >= self.config.in_flight_appends_max:
            return False
        in_flight = self.log.bytes_between(progress.matched, upto)
        return in_flight <= self.config.in_flight_bytes_max

    def _catch_up(self, progress: Progress) -> None:
        """The member is further back than the sizes in memory: one append at a time."""
        if progress.in_flight:
            return
        progress.become(Following.CATCH_UP)
        self._replicate(progress)

    def _probe_end(self, progress: Progress) -> LogIndex:
        """A probe's place is a guess, so it carries little."""
        if progress.next_index < self.log.tail_first:
            return LogIndex(progress.next_index - 1)
        return self.log.fit(progress.next_index, self.config.probe_bytes_max)

    def _send_append(self, progress: Progress, last_index: LogIndex) -> None:
        self._request_append(progress, last_index)
        progress.sent(last_index, self._now)

    def _request_append(self, progress: Progress, last_index: LogIndex) -> None:
        prev_index = LogIndex(progress.next_index - 1)
        request = AppendRequest(
            self.term,
            prev_index,
            self.log.term_at(prev_index),
            self.commit_index,
            progress.matched,
            last_index,
        )
        # A leader's term and vote are durable: its election counted on them.
        self._send.append(Envelope(progress.member, request))

    def _need_snapshot(self, progress: Progress) -> None:
        progress.become(Following.SNAPSHOT)
        progress.waiting = True
        self._snapshots.append(SnapshotNeed(progress.member, self.log.first_index))

    def snapshot_failed(self, member: Member) -> None:
        """The shell could not deliver a snapshot: look anew what the member needs."""
        progress = self.progress.get(member)
        if progress is not None and progress.state is Following.SNAPSHOT:
            progress.probe(LogIndex(self.log.last_index + 1))
            self._replicate_due = True

    def hold(self, member: Member, *, held: bool) -> None:
        """The member takes no entries (its disk is full), or takes them again: what it would only
        refuse is not sent. Heartbeats go on, and so does a snapshot, which may be what frees it.
        """
        progress = self.progress.get(member)
        if progress is None or progress.held == held:
            return
        progress.held = held
        if not held and progress.state is not Following.SNAPSHOT:
            progress.probe(LogIndex(self.log.last_index + 1))
        self._active()

    # -- answers ----------------------------------------------------------------------------------

    def _hear_member(self, sender: Member) -> Progress | None:
        """A message of the present term came from a member of this leader's group."""
        if self.role is not Role.LEADER:
            return None
        progress = self.progress.get(sender)
        if progress is not None:
            progress.heard_at = self._now
            if progress.link_lost:
                self._link_is_back(progress)
        return progress

    def _link_is_back(self, progress: Progress) -> None:
        self._links_lost.discard(progress.member)
        progress.link_lost = False
        if progress.state is not Following.SNAPSHOT:
            progress.probe(LogIndex(self.log.last_index + 1))
        self._replicate_due = True

    def _on_append_reply(self, sender: Member, reply: AppendReply) -> None:
        progress = self._hear_member(sender)
        if progress is None:
            return
        if reply.matched > self.log.last_index:
            invariant(False, "acknowledged beyond the log's end", have=reply, member=sender)
        progress.sent_at = self._now
        if reply.commit_index > progress.commit_known:
            progress.commit_known = reply.commit_index
        moved = progress.acknowledge(reply.matched)
        if progress.state is not Following.REPLICATE:
            self._leave_probe(progress, reply.matched)
        if progress.next_index <= self.log.last_index:
            self._replicate_due = True
        if moved:
            self._member_moved(progress)

    def _leave_probe(self, progress: Progress, matched: LogIndex) -> None:
        """The logs agree up to `matched`: from there on, send as fast as the tail allows."""
        if matched < progress.matched:
            return
        if not self.log.can_follow(matched):
            self._look_again(progress)
            return
        in_memory = progress.matched >= self.log.tail_first - 1
        progress.become(Following.REPLICATE if in_memory else Following.CATCH_UP)
        progress.next_index = LogIndex(progress.matched + 1)

    def _look_again(self, progress: Progress) -> None:
        """What follows `matched` was compacted meanwhile: only a snapshot helps."""
        if progress.state is not Following.SNAPSHOT:
            progress.probe(LogIndex(progress.matched + 1))
            self._replicate_due = True

    def _member_moved(self, progress: Progress) -> None:
        self._active_at = self._now
        self._advance_commit()
        if progress.member == self._transfer_to:
            self._push_transfer()

    def _on_append_refusal(self, sender: Member, refusal: AppendRefusal) -> None:
        progress = self._hear_member(sender)
        if progress is None or progress.is_stale_refusal(refusal.prev_index):
            return
        if progress.state is Following.REPLICATE:
            # One gap in a pipeline is refused once for every append behind it, and late answers
            # look like new ones. Were each to begin another probe, and each probe's answer to fill
            # the pipeline anew, messages would multiply; `_ask_again` helps if this was too strict.
            if progress.probed_at == self._now:
                return
            progress.probed_at = self._now
        progress.probe(self._back_off(refusal))
        self._replicate_due = True

    def _back_off(self, refusal: AppendRefusal) -> LogIndex:
        """Where to try next: skip a whole term per round trip (end of Raft §5.3).

        The member has nothing of a term above hint_term up to the hint, so the logs cannot agree
        on any entry of ours that has a higher one.
        """
        agree = self.log.last_with_term_at_most(refusal.hint_term, refusal.hint_index)
        return LogIndex(min(agree + 1, refusal.prev_index))

    # -- commit -----------------------------------------------------------------------------------

    def _disk_work_done(self) -> None:
        super()._disk_work_done()
        if self.role is Role.LEADER and self.durable_index > self.commit_index:
            self._advance_commit()

    def _held_by_voters(self) -> list[LogIndex]:
        """Per voter, the last index on its disk; the own one counts by the own fsync (A1)."""
        held = [progress.matched for progress in self._voter_progress]
        if self._is_voter:
            held.append(self._held_by_me())
        return held

    def _held_by_me(self) -> LogIndex:
        return self.durable_index

    def _may_commit(self, index: LogIndex) -> bool:
        """Only entries of the own term are counted; earlier ones commit with them (§5.4.2)."""
        return index >= self._term_start

    def _advance_commit(self) -> bool:
        """Commit what a majority of voters holds on disk; return whether the index moved."""
        candidate = LogIndex(majority_value(self._held_by_voters()))
        if candidate <= self.commit_index or not self._may_commit(candidate):
            return False
        self._commit(candidate)
        self._committed()
        return True

    def _committed(self) -> None:
        """The commit index moved: act on a membership that is final now."""
        if not self._is_voter and self.membership_index <= self.commit_index:
            self._leave_group()

    def _leave_group(self) -> None:
        """A leader that removed itself stops when that is committed (thesis §4.2.2)."""
        for progress in self._voter_progress:
            self._say_heartbeat(progress, is_quiet=False)
        self._hand_over()
        self._become_follower(self.term, None)

    def _hand_over(self) -> None:
        """Name a successor without waiting; at worst its election fails and another follows."""
        successor = self.best_successor()
        if successor is not None:
            self._say(successor, TimeoutNow(self.term))

    def best_successor(self) -> Member | None:
        """The other voter that holds most, among those that can be reached and take entries."""
        best = self._best_progress()
        return None if best is None else best.member

    @property
    def successor_index(self) -> LogIndex:
        """Up to where the best successor is known to hold this leader's log; 0 without one."""
        best = self._best_progress()
        return NO_INDEX if best is None else best.matched

    def _best_progress(self) -> Progress | None:
        reachable = [each for each in self._voter_progress if not (each.link_lost or each.held)]
        return max(reachable, key=lambda each: each.matched, default=None)

    def _push_transfer(self) -> None:
        """The successor's log grew; the chapter on hand-over acts on it."""

    def mark_damaged(self) -> None:
        """A leader that finds its own log damaged hands over first."""
        if self.role is Role.LEADER:
            self._hand_over()
        super().mark_damaged()

    # -- ticks ------------------------------------------------------------------------------------

    def _tick_leader(self) -> None:
        if self._now >= self._quorum_due and not self._check_quorum():
            self._become_follower(self.term, None)
            return
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed >= self.config.heartbeat_ticks:
            self._beat()
        elif self._commit_told < self.commit_index:
            self._tell_commit()

    def _check_quorum(self) -> bool:
        """Whether a majority was heard within quorum_ticks (thesis §6.2)."""
        heard = [progress.heard_at for progress in self._voter_progress]
        if self._is_voter:
            heard.append(self._now)
        self._quorum_due = majority_value(heard) + self.config.quorum_ticks
        return self._now < self._quorum_due

    def _beat(self) -> None:
        self._heartbeat_elapsed = 0
        is_quiet = self._may_be_quiet()
        for progress in self.progress.values():
            self._say_heartbeat(progress, is_quiet=is_quiet)
            if self._is_stalled(progress):
                self._ask_again(progress)
        self._commit_told = self.commit_index
        if is_quiet and not self.progress:
            self.quiet = True

    def _tell_commit(self) -> None:
        """Between heartbeats: nothing else went out that would have told it."""
        self._commit_told = self.commit_index
        for progress in self.progress.values():
            if progress.commit_known < self.commit_index:
                self._say_heartbeat(progress, is_quiet=False)

    def _say_heartbeat(self, progress: Progress, *, is_quiet: bool) -> None:
        commit_index = min(self.commit_index, progress.matched)
        beat = Heartbeat(self.term, commit_index, self._newest_read_round(), is_quiet)
        if not is_quiet:
            progress.is_quiet = False
        self._send.append(Envelope(progress.member, beat))

    def _newest_read_round(self) -> int:
        """The chapter on reads knows it."""
        return 0

    def _is_stalled(self, progress: Progress) -> bool:
        """Whether an answer is overdue: a message was lost, or the member's disk is slow."""
        return (
            progress.owes_answer()
            and progress.state is not Following.SNAPSHOT
            and self._now - progress.sent_at >= self.config.resend_ticks
        )

    def _ask_again(self, progress: Progress) -> None:
        """Repeat the one append; of a pipeline, only ask where the member stands."""
        prev_index = LogIndex(progress.next_index - 1)
        if progress.state is Following.REPLICATE and self.log.can_follow(prev_index):
            self._request_append(progress, prev_index)
            progress.sent_at = self._now
            return
        if progress.state is Following.REPLICATE:
            progress.probe(progress.next_index)  # the log was cut beyond what it holds
        progress.waiting = False
        self._replicate(progress)

    def _on_heartbeat_reply(self, sender: Member, reply: HeartbeatReply) -> None:
        progress = self._hear_member(sender)
        if progress is None:
            return
        progress.commit_known = max(progress.commit_known, reply.commit_index)
        progress.is_quiet = reply.quiet
        if reply.quiet and self._may_be_quiet():
            self.quiet = all(each.is_quiet for each in self._linked())
        if reply.read_round > progress.read_round:
            progress.read_round = reply.read_round
            self._read_round_heard()

    def _read_round_heard(self) -> None:
        """The chapter on reads counts the answers."""

    # -- quiet ------------------------------------------------------------------------------------

    def _may_be_quiet(self) -> bool:
        """Whether all that can be reached have everything and know it, and nothing happened for a
        while. Who cannot be reached is heard of through its link: while a node is down, thousands
        of groups would talk on. But without a majority this leader must find out that it is none.
        """
        last_index = self.log.last_index
        return (
            0 < self.config.quiet_ticks <= self._now - self._active_at
            and self.commit_index == self.durable_index == last_index
            and self._links_to_majority()
            and all(
                progress.matched == progress.commit_known == last_index
                for progress in self._linked()
            )
        )

    def _linked(self) -> list[Progress]:
        return [progress for progress in self.progress.values() if not progress.link_lost]

    def _links_to_majority(self) -> bool:
        linked = sum(not progress.link_lost for progress in self._voter_progress)
        return linked + self._is_voter >= self._quorum

    def _wake(self) -> None:
        """Something happened: count time again, with the patience of a new beginning."""
        self.quiet = False
        self._elapsed = 0
        if self.role is Role.LEADER:
            self._active_at = self._now
            self._heartbeat_elapsed = self.config.heartbeat_ticks  # at the next tick
            self._quorum_due = self._now + self.config.quorum_ticks
            for progress in self.progress.values():
                progress.heard_at = self._now
                progress.is_quiet = False
