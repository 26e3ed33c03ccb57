"""A leader's view of its followers: pipeline, flow control, catching up, snapshots."""

from __future__ import annotations

import pytest

from aegis_cluster.errors import InvariantBroken, Misuse, NotLeader, NotReady, Throttled
from aegis_cluster.ids import LogIndex, Member, Term
from aegis_cluster.raft import (
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftConfig,
    Replica,
    Role,
    TimeoutNow,
)
from aegis_cluster.raft import log as raft_log
from aegis_cluster.raft.progress import Following
from tests.raft.harness import DATA, Cluster, Host, log_of, member, membership, prepare

TWO, THREE = member(2), member(3)


def established(config: RaftConfig | None = None) -> Replica:
    """A leader of three whose followers have everything and whose messages go nowhere."""
    cluster = Cluster(1, 2, 3, config=config)
    leader = cluster.elect(1)
    cluster.tick()
    return leader


def appends(replica: Replica, to: Member = TWO) -> list[tuple[int, int]]:
    """The ranges (first, last) that one round sends to a member."""
    effects = replica.take_effects()
    replica.effects_done(effects)
    return [
        (message.prev_index + 1, message.last_index)
        for receiver, message in effects.send
        if receiver == to and isinstance(message, AppendRequest)
    ]


def acknowledge(replica: Replica, index: int, sender: Member = TWO) -> None:
    """A follower holds everything up to `index`."""
    replica.receive(sender, AppendReply(replica.term, LogIndex(index), LogIndex(0)))


def test_proposals_of_one_round_travel_together() -> None:
    leader = established()
    for _ in range(5):
        leader.propose(DATA, 100)
    assert appends(leader) == [(2, 6)]


def test_the_next_append_does_not_wait_for_the_last_answer() -> None:
    leader = established()
    leader.propose(DATA, 100)
    assert appends(leader) == [(2, 2)]
    leader.propose(DATA, 100)
    assert appends(leader) == [(3, 3)]


def test_an_append_is_cut_at_its_byte_limit() -> None:
    leader = established(RaftConfig(append_bytes_max=250))
    for size in (100, 100, 100, 400, 10):
        leader.propose(DATA, size)
    assert appends(leader) == [(2, 3), (4, 4), (5, 5), (6, 6)]


def test_in_flight_appends_are_bounded() -> None:
    leader = established(RaftConfig(in_flight_appends_max=2))
    for _ in range(4):
        leader.propose(DATA, 100)
        leader.effects_done(leader.take_effects())
    assert leader.progress[TWO].next_index == 4
    acknowledge(leader, 2)
    assert appends(leader) == [(4, 5)]


def test_in_flight_bytes_are_bounded_but_one_append_always_goes() -> None:
    leader = established(RaftConfig(append_bytes_max=300, in_flight_bytes_max=300))
    for size in (1_000, 100):
        leader.propose(DATA, size)
    assert appends(leader) == [(2, 2)]
    acknowledge(leader, 2)
    assert appends(leader) == [(3, 3)]


def test_uncommitted_proposals_are_bounded_in_count() -> None:
    leader = established(RaftConfig(uncommitted_entries_max=2))
    leader.propose(DATA, 1)
    leader.propose(DATA, 1)
    with pytest.raises(Throttled):
        leader.propose(DATA, 1)
    acknowledge(leader, 3)
    acknowledge(leader, 3, THREE)
    leader.propose(DATA, 1)


def test_uncommitted_proposals_are_bounded_in_bytes_but_one_always_goes() -> None:
    leader = established(RaftConfig(uncommitted_bytes_max=1_000))
    leader.propose(DATA, 5_000)
    with pytest.raises(Throttled):
        leader.propose(DATA, 1)


def test_a_refusal_leads_to_a_probe_and_back_to_the_pipeline() -> None:
    leader = established()
    for _ in range(3):
        leader.propose(DATA, 100)
        leader.effects_done(leader.take_effects())
    progress = leader.progress[TWO]
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(3), LogIndex(2), leader.term))
    assert progress.state is Following.PROBE
    assert appends(leader) == [(3, 4)]
    acknowledge(leader, 4)
    assert leader.progress[TWO].state is Following.REPLICATE
    assert appends(leader) == []


def test_a_late_refusal_is_not_taken_for_a_new_one() -> None:
    leader = established()
    leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    acknowledge(leader, 2)
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(1), LogIndex(0), Term(0)))
    assert leader.progress[TWO].state is Following.REPLICATE


def test_the_refusals_of_one_pipeline_begin_one_probe_a_tick() -> None:
    """Seed 1337: every refusal began another probe and every probe's answer filled the pipeline
    anew, until messages filled the memory."""
    leader = established(RaftConfig(append_bytes_max=100, probe_bytes_max=100))
    for _ in range(6):
        leader.propose(DATA, 100)
        leader.effects_done(leader.take_effects())
    refusals = [
        AppendRefusal(leader.term, LogIndex(before), LogIndex(2), leader.term)
        for before in (3, 4, 5, 6)
    ]
    leader.receive(TWO, refusals[0])
    assert appends(leader) == [(3, 3)]
    acknowledge(leader, 3)
    assert appends(leader) == [(4, 4), (5, 5), (6, 6), (7, 7)]
    for refusal in refusals[1:]:
        leader.receive(TWO, refusal)
        assert appends(leader) == []
    assert leader.progress[TWO].state is Following.REPLICATE

    leader.tick()
    leader.receive(TWO, refusals[-1])
    assert leader.progress[TWO].state is Following.PROBE


def test_an_overdue_answer_is_asked_for_without_sending_the_data_again() -> None:
    leader = established()
    leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    ranges = []
    for _ in range(leader.config.resend_ticks + leader.config.heartbeat_ticks):
        leader.tick()
        ranges += appends(leader)
    assert ranges == [(3, 2)]  # an empty one: where are you?


def test_asking_again_and_again_does_not_grow_anything() -> None:
    leader = established(RaftConfig(quorum_ticks=9))
    leader.propose(DATA, 100)
    for _ in range(300):
        leader.tick()
        leader.receive(THREE, HeartbeatReply(leader.term, 0, LogIndex(1), quiet=False))
        leader.effects_done(leader.take_effects())
    assert len(leader.progress[TWO].in_flight) == 1


def test_a_follower_far_behind_gets_one_append_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raft_log, "TAIL_ENTRIES_MIN", 4)
    leader = established()
    for _ in range(40):
        leader.propose(DATA, 100)
        acknowledge(leader, leader.log.last_index - 1, THREE)
        leader.effects_done(leader.take_effects())
    leader.link_lost(TWO)
    leader.link_up(TWO)
    appends(leader)
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(41), LogIndex(5), leader.term))
    assert appends(leader) == [(6, 5)]  # a probe, without data that may be in vain
    acknowledge(leader, 5)
    assert leader.progress[TWO].state is Following.CATCH_UP
    assert appends(leader) == [(6, 41)]
    acknowledge(leader, 20)  # the shell cut the range
    assert appends(leader) == [(21, 41)]
    acknowledge(leader, 41)
    assert leader.progress[TWO].state is Following.REPLICATE


def test_a_lost_link_stops_appends_and_a_fresh_one_asks_where_the_member_is() -> None:
    leader = established()
    leader.link_lost(TWO)
    leader.propose(DATA, 100)
    assert appends(leader) == []
    leader.link_up(TWO)
    assert appends(leader) == [(3, 2)]


def test_a_member_that_answers_has_a_link_whatever_was_said() -> None:
    leader = established()
    leader.link_lost(TWO)
    leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    leader.receive(TWO, HeartbeatReply(leader.term, 0, LogIndex(0), quiet=False))
    assert appends(leader) == [(3, 2)]


def test_a_deposed_leader_sends_no_range_that_may_be_replaced() -> None:
    leader = established()
    leader.propose(DATA, 100)
    leader.tick()
    leader.receive(THREE, HeartbeatReply(Term(9), 0, LogIndex(0), quiet=False))
    assert appends(leader) == []


def test_a_heartbeat_never_commits_what_the_member_has_not_acknowledged() -> None:
    leader = established()
    leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    acknowledge(leader, 2, THREE)
    assert leader.commit_index == 2
    leader.tick()
    beats = {
        to: message.commit_index
        for to, message in leader.take_effects().send
        if isinstance(message, Heartbeat)
    }
    assert beats == {TWO: 1, THREE: 2}


# -- snapshots and compaction ---------------------------------------------------------------------


def needs_snapshot() -> Replica:
    """A leader whose follower 2 stands before the start of the log."""
    leader = established()
    for _ in range(3):
        leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    acknowledge(leader, 4, THREE)
    leader.compact(LogIndex(3))
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(1), LogIndex(0), Term(0)))
    leader.link_lost(TWO)
    leader.link_up(TWO)
    leader.effects_done(leader.take_effects())
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(4), LogIndex(1), Term(1)))
    return leader


def test_a_follower_before_the_logs_start_needs_a_snapshot_once() -> None:
    leader = needs_snapshot()
    effects = leader.take_effects()
    assert [(need.to, need.first_index) for need in effects.snapshots] == [(TWO, 4)]
    leader.effects_done(effects)
    leader.propose(DATA, 100)
    assert leader.take_effects().snapshots == ()


def test_a_failed_snapshot_is_needed_again() -> None:
    leader = needs_snapshot()
    leader.effects_done(leader.take_effects())
    leader.snapshot_failed(TWO)
    leader.effects_done(leader.take_effects())
    leader.receive(TWO, AppendRefusal(leader.term, LogIndex(4), LogIndex(1), Term(1)))
    assert [need.to for need in leader.take_effects().snapshots] == [TWO]


def test_after_a_snapshot_replication_goes_on_behind_it() -> None:
    leader = needs_snapshot()
    leader.effects_done(leader.take_effects())
    acknowledge(leader, 3)
    assert appends(leader) == [(4, 4)]


def test_a_snapshot_replaces_the_log_before_anything_is_acknowledged() -> None:
    host = Host(member(1), membership(1, 2, 3))
    prepare(host, term=1, log=log_of(1, 1, 1, 1))
    group = membership(1, 2, 3, 4)
    snapshot = InstallSnapshot(Term(5), LogIndex(3), Term(4), group)
    host.replica.receive(TWO, snapshot)
    effects = host.replica.take_effects()
    assert effects.install is not None
    assert (effects.install.index, effects.install.membership) == (3, group)
    assert effects.send == ()
    assert [each.message for each in effects.reply] == [
        AppendReply(Term(5), LogIndex(3), LogIndex(3))
    ]
    assert host.replica.durable_index == 0
    host.replica.effects_done(effects)
    assert host.replica.durable_index == 3
    assert (host.replica.log.first_index, host.replica.log.last_index) == (4, 3)
    assert host.replica.membership == group


def test_only_what_is_committed_and_durable_is_compacted() -> None:
    host = Host(member(1), membership(1, 2, 3))
    prepare(host, term=1, log=log_of(1, 1))
    with pytest.raises(InvariantBroken):
        host.replica.compact(LogIndex(1))


def test_the_hint_for_the_next_start_is_never_ahead_of_the_disk() -> None:
    """Else a crash could leave entries of an older term under a commit index that covers them."""
    host = Host(member(1), membership(1, 2, 3))
    prepare(host, term=1, log=log_of(1, 1, 1))
    replica = host.replica
    entries = (log_of(2)[0]._replace(index=LogIndex(2)),)
    request = AppendRequest(
        Term(2), LogIndex(1), Term(1), LogIndex(2), LogIndex(0), LogIndex(2), entries
    )
    replica.receive(TWO, request)
    assert (replica.commit_index, replica.commit_hint) == (2, 1)
    replica.effects_done(replica.take_effects())
    assert replica.commit_hint == 2


def test_a_hint_beyond_the_log_means_damage() -> None:
    host = Host(member(1), membership(1, 2, 3))
    host.disk.entries = list(log_of(1))
    host.disk.commit_hint = LogIndex(2)
    host.start()
    assert host.replica.damaged
    assert host.replica.commit_index == 1


# -- damage ---------------------------------------------------------------------------------------


def test_a_damaged_leader_hands_over_and_falls_silent() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    leader.mark_damaged()
    effects = leader.take_effects()
    assert [type(each.message) for each in effects.send] == [TimeoutNow]
    leader.effects_done(effects)
    cluster.letters.extend(cluster.hosts[1]._letters(effects.send))
    cluster.settle()
    assert cluster.leaders() == [2]


def test_a_damaged_replica_promises_nothing() -> None:
    cluster = Cluster(1, 2, 3)
    cluster[3].mark_damaged()
    cluster.elect(1)
    cluster.tick(3)
    assert cluster[1].progress[THREE].matched == 0
    cluster.cut(2)
    for _ in range(40):
        cluster[3].tick()
    assert not cluster[3].has_effects
    cluster[3].mark_repaired()
    cluster.heal()
    cluster.tick(8)
    assert cluster[3].commit_index == cluster[1].commit_index


def test_a_leader_hears_of_the_later_term_of_a_damaged_replica() -> None:
    """Or it would never be rebuilt: it follows no leader of the past. Found by the simulator, seed
    40055."""
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    cluster.cut(3)
    cluster[3].receive(member(1), TimeoutNow(leader.term))
    cluster.settle()
    later = cluster[3].term
    assert leader.term < later
    cluster[3].mark_damaged()
    cluster.heal()
    cluster.tick(40)
    (leads,) = cluster.leaders()
    assert cluster[leads].term > later
    assert cluster[3].leader == member(leads)


# -- requests at the wrong place ------------------------------------------------------------------


def test_requests_to_a_follower_are_refused() -> None:
    cluster = Cluster(1, 2, 3)
    cluster.elect(1)
    follower = cluster[2]
    for request in (
        lambda: follower.propose(DATA, 1),
        lambda: follower.read_index(1),
        follower.transfer_leadership,
        lambda: follower.change_membership(follower.membership.with_learner(member(9)), 1),
    ):
        with pytest.raises(NotLeader):
            request()


def test_leadership_goes_to_another_voter_only() -> None:
    cluster = Cluster(1, 2, learners=(3,))
    leader = cluster.elect(1)
    for to in (1, 3, 9):
        with pytest.raises(Misuse):
            leader.transfer_leadership(member(to))
    cluster[1].link_lost(TWO)
    with pytest.raises(NotReady):
        leader.transfer_leadership()


def test_the_default_successor_holds_most() -> None:
    leader = established()
    leader.propose(DATA, 1)
    leader.effects_done(leader.take_effects())
    acknowledge(leader, 2, THREE)
    assert leader.transfer_leadership() == THREE


def test_transfer_lets_no_proposal_through_and_ends_in_time() -> None:
    leader = established()
    leader.transfer_leadership(TWO)
    with pytest.raises(NotLeader):
        leader.propose(DATA, 1)
    for _ in range(leader.config.transfer_ticks + leader.config.heartbeat_ticks):
        leader.tick()
        for follower in (TWO, THREE):
            leader.receive(follower, HeartbeatReply(leader.term, 0, LogIndex(1), quiet=False))
    assert not leader.transferring
    assert leader.role is Role.LEADER
    leader.propose(DATA, 1)
