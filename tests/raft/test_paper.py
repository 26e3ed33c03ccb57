"""Clause by clause: the Raft paper (extended version) and Ongaro's thesis.

The section is in each name: `test_5_2_...` is Raft §5.2, `test_thesis_9_6_...` the thesis.
"""

from __future__ import annotations

import pytest

from aegis_cluster.errors import InvariantBroken, NotLeader, PeerViolation
from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft import (
    KIND_NOOP,
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Effects,
    HardState,
    Heartbeat,
    HeartbeatReply,
    Message,
    PreVoteReply,
    PreVoteRequest,
    Replica,
    Role,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.raft.harness import DATA, Cluster, Host, log_of, member, membership, prepare, role_of

ONE, TWO, THREE = member(1), member(2), member(3)


def host_on(*terms: int, term: int = 1, vote: int | None = None, me: int = 1) -> Host:
    """A voter of three, restarted on a disk with this log."""
    host = Host(member(me), membership(1, 2, 3))
    prepare(host, term=term, vote=vote, log=log_of(*terms))
    return host


def append(term: int, prev: tuple[int, int], *terms: int, commit: int = 0) -> AppendRequest:
    """An append of entries with these terms after `prev` = (index, term)."""
    entries = tuple(
        entry._replace(index=LogIndex(prev[0] + at))
        for at, entry in enumerate(log_of(*terms), start=1)
    )
    last = LogIndex(prev[0] + len(entries))
    return AppendRequest(
        Term(term),
        LogIndex(prev[0]),
        Term(prev[1]),
        LogIndex(commit),
        LogIndex(0),
        last,
        entries,
    )


def answers(host: Host) -> list[Message]:
    """What a host says, in order."""
    return [letter.message for letter in host.run()]


def become_leader(host: Host) -> Replica:
    """Let a host of three win an election with the vote of node 2."""
    replica = host.replica
    replica.campaign()
    host.run()
    replica.receive(TWO, PreVoteReply(replica.term, Term(replica.term + 1), granted=True))
    host.run()
    replica.receive(TWO, VoteReply(replica.term, granted=True))
    assert role_of(replica) is Role.LEADER
    return replica


# -- §5.1 terms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
@pytest.mark.parametrize(
    "message",
    [
        append(9, (0, 0)),
        AppendReply(Term(9), LogIndex(0), LogIndex(0)),
        VoteReply(Term(9), granted=False),
        Heartbeat(Term(9), LogIndex(0), 0, quiet=False),
    ],
)
def test_5_1_a_larger_term_is_adopted_and_makes_a_follower(role: Role, message: Message) -> None:
    host = host_on(1)
    replica = host.replica
    if role is Role.LEADER:
        become_leader(host)
    elif role is Role.CANDIDATE:
        replica.campaign()
        replica.receive(TWO, PreVoteReply(replica.term, Term(2), granted=True))
    assert role_of(replica) is role
    replica.receive(THREE, message)
    assert (replica.role, replica.term, replica.vote) == (Role.FOLLOWER, 9, None)


def test_5_1_a_request_with_an_old_term_is_refused_and_told_the_new_one() -> None:
    host = host_on(1, term=5)
    for message in (append(4, (1, 1), 4), VoteRequest(Term(4), LogIndex(9), Term(4), False)):
        host.replica.receive(TWO, message)
        (answer,) = answers(host)
        assert answer.term == 5
        assert isinstance(answer, HeartbeatReply) or not answer.granted  # type: ignore[union-attr]
    assert host.entries() == [(1, 1)]


def test_5_1_term_and_vote_are_on_disk_before_the_answer_leaves() -> None:
    host = host_on(1)
    host.replica.receive(TWO, VoteRequest(Term(2), LogIndex(1), Term(1), transfer=False))
    assert host.take() == []  # nothing leaves at once
    assert host.disk.hard_state == HardState(Term(1), None)
    (letter,) = host.sync_one()
    assert letter.message == VoteReply(Term(2), granted=True)
    assert host.disk.hard_state == HardState(Term(2), TWO)


def test_5_1_even_a_heartbeat_reply_waits_for_a_term_that_is_not_durable() -> None:
    host = host_on(1)
    host.replica.receive(TWO, Heartbeat(Term(2), LogIndex(0), 0, quiet=False))
    assert host.take() == []
    host.replica.receive(TWO, Heartbeat(Term(2), LogIndex(0), 0, quiet=False))
    assert host.take() == []
    assert len(host.sync_one()) == 1
    host.replica.receive(TWO, Heartbeat(Term(2), LogIndex(0), 0, quiet=False))
    assert len(host.take()) == 1  # durable by now: at once


# -- §5.2 elections -------------------------------------------------------------------------------


def test_5_2_all_start_as_followers() -> None:
    assert host_on(1, 1).replica.role is Role.FOLLOWER


def test_5_2_a_follower_that_hears_nobody_campaigns_within_its_time_out() -> None:
    replica = host_on(1).replica
    config = replica.config
    ticks = 0
    while replica.role is Role.FOLLOWER:
        replica.tick()
        ticks += 1
    assert config.election_ticks_min <= ticks <= config.election_ticks_max


def test_5_2_time_outs_are_drawn_anew_and_differ() -> None:
    drawn = set()
    for seed in range(40):
        host = Host(ONE, membership(1, 2, 3), seed=str(seed))
        drawn.add(host.replica._timeout)
    assert len(drawn) > 5


def test_5_2_heartbeats_keep_a_follower_a_follower() -> None:
    replica = host_on(1).replica
    for _ in range(100):
        replica.receive(TWO, Heartbeat(Term(1), LogIndex(0), 0, quiet=False))
        for _ in range(replica.config.election_ticks_min - 1):
            replica.tick()
    assert role_of(replica) is Role.FOLLOWER


def test_5_2_a_candidate_raises_its_term_votes_for_itself_and_asks_all() -> None:
    host = host_on(1)
    host.replica.campaign()
    host.run()
    host.replica.receive(TWO, PreVoteReply(Term(1), Term(2), granted=True))
    letters = host.run()
    assert (host.replica.term, host.replica.vote) == (2, ONE)
    request = VoteRequest(Term(2), LogIndex(1), Term(1), transfer=False)
    assert [(letter.to, letter.message) for letter in letters] == [(TWO, request), (THREE, request)]


def test_5_2_the_own_vote_counts_only_when_durable() -> None:
    host = Host(ONE, membership(1))
    host.replica.campaign()
    host.take()
    assert role_of(host.replica) is Role.CANDIDATE
    host.sync_one()
    assert role_of(host.replica) is Role.LEADER


@pytest.mark.parametrize(
    ("voters", "yes", "no", "role"),
    [
        (1, 0, 0, Role.LEADER),
        (3, 0, 0, Role.CANDIDATE),
        (3, 1, 0, Role.LEADER),
        (3, 1, 1, Role.LEADER),
        (3, 0, 1, Role.CANDIDATE),
        (3, 0, 2, Role.FOLLOWER),
        (5, 1, 2, Role.CANDIDATE),
        (5, 2, 0, Role.LEADER),
        (5, 1, 3, Role.FOLLOWER),
    ],
)
def test_5_2_a_majority_of_votes_wins(voters: int, yes: int, no: int, role: Role) -> None:
    host = Host(ONE, membership(*range(1, voters + 1)))
    replica = host.replica
    replica.campaign()
    for node in range(2, voters + 1):
        replica.receive(member(node), PreVoteReply(Term(0), Term(1), granted=True))
    host.run()
    for node in range(2, 2 + yes):
        replica.receive(member(node), VoteReply(Term(1), granted=True))
    for node in range(2 + yes, 2 + yes + no):
        replica.receive(member(node), VoteReply(Term(1), granted=False))
    assert role_of(replica) is role


def test_5_2_a_repeated_vote_counts_once() -> None:
    host = Host(ONE, membership(1, 2, 3, 4, 5))
    replica = host.replica
    replica.campaign()
    for _ in range(3):
        replica.receive(TWO, PreVoteReply(Term(0), Term(1), granted=True))
    assert role_of(replica) is Role.PRE_CANDIDATE


@pytest.mark.parametrize(("vote", "granted"), [(None, True), (2, True), (3, False)])
def test_5_2_one_vote_per_term_first_come_first_served(vote: int | None, granted: bool) -> None:
    host = host_on(1, term=2, vote=vote)
    host.replica.receive(TWO, VoteRequest(Term(2), LogIndex(1), Term(1), transfer=False))
    assert answers(host) == [VoteReply(Term(2), granted)]


def test_5_2_a_candidate_that_hears_the_leader_of_its_term_follows_it() -> None:
    host = host_on(1)
    replica = host.replica
    replica.campaign()
    replica.receive(TWO, PreVoteReply(Term(1), Term(2), granted=True))
    assert role_of(replica) is Role.CANDIDATE
    replica.receive(THREE, append(2, (1, 1)))
    assert (replica.role, replica.leader, replica.term) == (Role.FOLLOWER, THREE, 2)


def test_5_2_a_split_vote_ends_in_another_round_soon() -> None:
    host = host_on(1)
    replica = host.replica
    replica.campaign()
    replica.receive(TWO, PreVoteReply(Term(1), Term(2), granted=True))
    host.run()
    replica.receive(TWO, VoteReply(Term(2), granted=False))
    for _ in range(replica.config.election_ticks_min):
        replica.tick()
    assert any(isinstance(message, PreVoteRequest) for message in answers(host))


def test_5_2_two_leaders_in_one_term_end_the_process() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(2, (1, 1)))
    with pytest.raises(InvariantBroken):
        host.replica.receive(THREE, append(2, (1, 1)))


# -- §5.3 replication -----------------------------------------------------------------------------


def test_5_3_a_leader_sends_its_appends_without_waiting_for_its_disk_thesis_10_2_1() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    leader.propose(DATA, 100)
    effects = leader.take_effects()
    assert [type(each.message) for each in effects.send] == [AppendRequest, AppendRequest]
    assert len(effects.append) == 1
    assert effects.reply == ()


def test_5_3_an_entry_is_committed_when_a_majority_holds_it() -> None:
    cluster = Cluster(1, 2, 3, 4, 5)
    leader = cluster.elect(1)
    entry = leader.propose(DATA, 100)
    leader.effects_done(leader.take_effects())
    leader.receive(TWO, AppendReply(leader.term, entry.index, LogIndex(0)))
    assert leader.commit_index == entry.index - 1
    leader.receive(THREE, AppendReply(leader.term, entry.index, LogIndex(0)))
    assert leader.commit_index == entry.index


def test_5_3_a_leader_counts_itself_only_after_its_own_sync() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    entry = leader.propose(DATA, 100)
    effects = leader.take_effects()
    leader.receive(TWO, AppendReply(leader.term, entry.index, LogIndex(0)))
    assert leader.commit_index == entry.index - 1
    leader.effects_done(effects)
    assert leader.commit_index == entry.index


def test_5_3_two_followers_make_a_majority_without_the_leaders_disk() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    entry = leader.propose(DATA, 100)
    leader.take_effects()
    for follower in (TWO, THREE):
        leader.receive(follower, AppendReply(leader.term, entry.index, LogIndex(0)))
    assert leader.commit_index == entry.index


def test_5_3_a_single_voter_commits_by_its_own_sync() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    leader.propose(DATA, 100)
    effects = leader.take_effects()
    assert leader.commit_index == 1
    leader.effects_done(effects)
    assert leader.commit_index == 2


def test_5_3_a_follower_acknowledges_only_after_its_sync() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1), 1))
    assert host.take() == []
    assert host.disk.last_index == 1
    (letter,) = host.sync_one()
    assert letter.message == AppendReply(Term(1), LogIndex(2), LogIndex(0))
    assert host.disk.last_index == 2


def test_5_3_an_acknowledgement_waits_for_earlier_rounds_too() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1), 1))
    host.take()
    host.replica.receive(TWO, append(1, (1, 1), 1))  # again: nothing to write
    assert host.take() == []
    assert len(host.unsynced) == 2
    assert len(host.sync_one()) == 1
    assert len(host.sync_one()) == 1


def test_5_3_effects_are_finished_in_order() -> None:
    replica = host_on(1).replica
    taken: list[Effects] = []
    for index in (1, 2):
        replica.receive(TWO, append(1, (index, 1), 1))
        taken.append(replica.take_effects())
    with pytest.raises(InvariantBroken):
        replica.effects_done(taken[1])


@pytest.mark.parametrize(
    ("log", "prev", "terms", "expected"),
    [
        ((1, 1), (2, 1), (1,), (1, 1, 1)),  # continues
        ((1, 1), (0, 0), (1, 1), (1, 1)),  # repeats
        ((1, 1, 1), (1, 1), (1,), (1, 1, 1)),  # repeats a part: the rest stays
        ((1, 1, 1), (1, 1), (2,), (1, 2)),  # contradicts: cut from there
        ((1, 1, 2), (1, 1), (1, 3), (1, 1, 3)),  # agrees at first, then contradicts
        ((1, 1), (3, 1), (1,), (1, 1)),  # a gap: refused
        ((1, 1), (2, 2), (3,), (1, 1)),  # another past: refused
    ],
)
def test_5_3_receiver_of_appends_figure_2(
    log: tuple[int, ...],
    prev: tuple[int, int],
    terms: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    host = host_on(*log, term=3)
    host.replica.receive(TWO, append(3, prev, *terms))
    host.run()
    assert [term for _, term in host.entries()] == list(expected)
    assert host.disk.entries == host.staged.entries


def test_5_3_commit_index_is_at_most_the_last_entry_known_to_match() -> None:
    host = host_on(1, 1, 1, term=3)
    host.replica.receive(TWO, append(3, (1, 1), 1, commit=3))
    assert host.replica.commit_index == 2


@pytest.mark.parametrize(
    ("log", "prev", "hint"),
    [
        ((1, 1), (9, 3), (2, 1)),  # too short
        ((1, 1, 2, 2, 2), (4, 1), (2, 1)),  # all of term 2 is skipped
        ((2, 2, 2), (2, 1), (0, 0)),  # nothing can agree
        ((1, 3, 3), (3, 4), (3, 3)),  # older than asked: the leader looks at its own
    ],
)
def test_5_3_a_refusal_skips_a_whole_term(
    log: tuple[int, ...], prev: tuple[int, int], hint: tuple[int, int]
) -> None:
    host = host_on(*log, term=5)
    host.replica.receive(TWO, append(5, prev))
    (answer,) = answers(host)
    assert answer == AppendRefusal(Term(5), LogIndex(prev[0]), LogIndex(hint[0]), Term(hint[1]))


def test_5_3_impossible_entries_are_the_other_sides_fault() -> None:
    replica = host_on(1, term=3).replica
    gap = append(3, (1, 1), 1)
    gap = gap._replace(entries=(gap.entries[0]._replace(index=LogIndex(5)),))
    falling, future = append(3, (1, 1), 3, 2), append(3, (1, 1), 4)
    for request in (gap, falling, future):
        with pytest.raises(PeerViolation):
            replica.receive(TWO, request)


def test_5_3_a_committed_entry_is_never_cut() -> None:
    host = host_on(1, 1, term=1)
    host.replica.receive(TWO, append(1, (2, 1), commit=2))
    assert host.replica.commit_index == 2
    with pytest.raises(InvariantBroken):
        host.replica._truncate_log(LogIndex(2))


def test_5_3_what_was_under_way_to_the_disk_does_not_count_after_a_cut() -> None:
    host = host_on(1, term=1)
    replica = host.replica
    replica.receive(TWO, append(1, (1, 1), 1, 1))
    first = replica.take_effects()
    replica.receive(THREE, append(2, (1, 1), 2))
    second = replica.take_effects()
    assert second.truncate_from == 2
    replica.effects_done(first)
    assert replica.durable_index == 1
    replica.effects_done(second)
    assert replica.durable_index == 2


# -- §5.4 safety ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "last", "granted"),
    [
        ((1, 1, 1), (3, 1), True),
        ((1, 1, 1), (4, 1), True),
        ((1, 1, 1), (2, 1), False),
        ((1, 1, 1), (1, 2), True),
        ((1, 2), (9, 1), False),
    ],
)
def test_5_4_1_a_vote_only_for_a_log_at_least_as_new(
    mine: tuple[int, ...], last: tuple[int, int], granted: bool
) -> None:
    host = host_on(*mine, term=3)
    host.replica.receive(
        TWO, VoteRequest(Term(4), LogIndex(last[0]), Term(last[1]), transfer=False)
    )
    assert VoteReply(Term(4), granted) in answers(host)


def test_5_4_2_an_older_entry_is_committed_only_with_one_of_the_own_term() -> None:
    host = host_on(1, 1)
    replica = become_leader(host)
    host.run()
    replica.receive(TWO, AppendReply(Term(2), LogIndex(2), LogIndex(0)))
    replica.receive(THREE, AppendReply(Term(2), LogIndex(2), LogIndex(0)))
    assert replica.commit_index == 0
    replica.receive(TWO, AppendReply(Term(2), LogIndex(3), LogIndex(0)))
    assert replica.commit_index == 3


def test_8_a_new_leader_appends_a_no_op() -> None:
    host = host_on(1)
    replica = become_leader(host)
    effects = replica.take_effects()
    assert [(entry.kind, entry.term) for entry in effects.append] == [(KIND_NOOP, 2)]


def test_8_a_leader_serves_once_its_no_op_is_applied() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster[1]
    leader.campaign()
    while role_of(leader) is not Role.LEADER:
        cluster.collect()
        cluster.deliver(cluster.letters.popleft())
    assert not leader.serving
    cluster.settle()
    assert leader.serving
    assert not cluster[2].serving


def test_8_only_a_leader_takes_proposals_and_names_the_one_it_knows() -> None:
    cluster = Cluster(1, 2, 3)
    cluster.elect(1)
    with pytest.raises(NotLeader) as caught:
        cluster[2].propose(DATA, 1)
    assert caught.value.details["leader"] == ONE


# -- thesis: pre-vote, stickiness, check-quorum, transfer -----------------------------------------


def test_thesis_9_6_a_pre_vote_changes_nothing_at_the_voter() -> None:
    host = host_on(1)
    host.replica.receive(TWO, PreVoteRequest(Term(1), Term(2), LogIndex(1), Term(1)))
    assert answers(host) == [PreVoteReply(Term(1), Term(2), granted=True)]
    assert (host.replica.term, host.replica.vote) == (1, None)
    assert host.disk.hard_state == HardState(Term(1), None)


def test_thesis_9_6_a_pre_vote_may_be_given_to_several() -> None:
    host = host_on(1)
    for asker in (TWO, THREE):
        host.replica.receive(asker, PreVoteRequest(Term(1), Term(2), LogIndex(1), Term(1)))
    assert all(answer.granted for answer in answers(host))  # type: ignore[union-attr]


def test_thesis_9_6_an_answer_to_an_older_round_does_not_count() -> None:
    replica = host_on(1, term=3).replica
    replica.campaign()
    replica.receive(TWO, PreVoteReply(Term(1), Term(3), granted=True))
    assert role_of(replica) is Role.PRE_CANDIDATE
    replica.receive(TWO, PreVoteReply(Term(1), Term(4), granted=True))
    assert role_of(replica) is Role.CANDIDATE


def test_thesis_4_2_3_a_loyal_voter_ignores_a_vote_request_of_any_term() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1)))
    host.run()
    host.replica.receive(THREE, VoteRequest(Term(9), LogIndex(9), Term(8), transfer=False))
    assert answers(host) == []
    assert host.replica.term == 1


def test_thesis_4_2_3_a_transfer_is_no_disloyalty() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1)))
    host.run()
    host.replica.receive(THREE, VoteRequest(Term(2), LogIndex(1), Term(1), transfer=True))
    assert answers(host) == [VoteReply(Term(2), granted=True)]


def test_thesis_4_2_3_a_lost_link_ends_loyalty() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1)))
    host.run()
    host.replica.link_lost(TWO)
    host.replica.receive(THREE, PreVoteRequest(Term(1), Term(2), LogIndex(1), Term(1)))
    assert answers(host) == [PreVoteReply(Term(1), Term(2), granted=True)]


def test_thesis_4_2_3_a_leader_that_speaks_again_is_followed_again() -> None:
    host = host_on(1)
    replica = host.replica
    replica.receive(TWO, append(1, (1, 1)))
    replica.link_lost(TWO)
    replica.receive(TWO, Heartbeat(Term(1), LogIndex(0), 0, quiet=False))
    host.run()
    replica.receive(THREE, PreVoteRequest(Term(1), Term(2), LogIndex(1), Term(1)))
    assert answers(host) == [PreVoteReply(Term(1), Term(2), granted=False)]


def test_thesis_6_2_a_leader_steps_down_before_others_may_elect() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    cluster.cut(1)
    ticks = 0
    while role_of(leader) is Role.LEADER:
        leader.tick()
        ticks += 1
    assert ticks < leader.config.election_ticks_min


def test_thesis_3_10_timeout_now_needs_no_pre_vote_and_no_patience() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1)))
    host.run()
    host.replica.receive(TWO, TimeoutNow(Term(1)))
    requests = answers(host)
    request = VoteRequest(Term(2), LogIndex(1), Term(1), transfer=True)
    assert requests == [request, request]


def test_thesis_3_10_timeout_now_from_anyone_else_is_ignored() -> None:
    host = host_on(1)
    host.replica.receive(TWO, append(1, (1, 1)))
    host.run()
    host.replica.receive(THREE, TimeoutNow(Term(1)))
    assert answers(host) == []


def test_thesis_4_2_1_a_learner_neither_campaigns_nor_counts() -> None:
    cluster = Cluster(1, 2, 3, learners=(4,))
    cluster[4].campaign()
    assert cluster[4].role is Role.FOLLOWER
    leader = cluster.elect(1)
    cluster.cut(1, 4)
    leader.propose(DATA, 1)
    cluster.settle()
    assert cluster[4].log.last_index == leader.log.last_index > leader.commit_index


def test_thesis_4_2_2_a_leader_does_not_count_itself_while_it_is_leaving() -> None:
    cluster = Cluster(1, 2, 3)
    leader = cluster.elect(1)
    cluster.cut_off.add((3, 1))
    leader.change_membership(leader.membership.without(ONE), 1)
    cluster.settle()
    assert leader.commit_index == 1  # 1 and 2 hold it, but only 2 of {2, 3} counts
    assert role_of(leader) is Role.LEADER
    cluster.heal()
    cluster.tick(8)
    assert role_of(leader) is Role.FOLLOWER
    assert leader.commit_index == 2
