"""`may_lose_tail`: a majority may have lost what it acknowledged (`durability = "memory"`)."""

from __future__ import annotations

import random

import pytest

from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft import AppendReply, AppendRequest, Entry, RaftConfig, RaftLog, Replica
from tests.raft.harness import DATA, member, membership

LEADER = member(1)
LOSSY = RaftConfig(may_lose_tail=True)


def follower(config: RaftConfig) -> Replica:
    """Entries 1 to 5 of term 1 on disk, of which 4 are known as committed."""
    return Replica(
        config,
        member(2),
        term=Term(1),
        vote=None,
        log=RaftLog(last_index=LogIndex(5), term_runs=[(LogIndex(1), Term(1))]),
        membership=membership(1, 2, 3),
        commit_index=LogIndex(4),
        rng=random.Random(1),
    )


def append(prev: int, *terms: int, term: int = 2, prev_term: int = 1) -> AppendRequest:
    """What a leader of `term` sends: entries with these terms after `prev`."""
    entries = tuple(
        Entry(LogIndex(at), Term(of), DATA, 10) for at, of in enumerate(terms, prev + 1)
    )
    last = LogIndex(prev + len(entries))
    return AppendRequest(
        Term(term), LogIndex(prev), Term(prev_term), LogIndex(0), LogIndex(0), last, entries
    )


def answer(replica: Replica) -> list[int]:
    """What it acknowledges."""
    effects = replica.take_effects()
    replica.effects_done(effects)
    return [m.matched for _, m in effects.reply if isinstance(m, AppendReply)]


@pytest.mark.parametrize(
    "request_", [append(2, 2), append(3, 2), append(3, prev_term=2), append(1, 1, 1, 2)]
)
def test_a_leader_that_lost_what_is_committed_here_has_this_replica_rebuilt(
    request_: AppendRequest,
) -> None:
    replica = follower(LOSSY)
    replica.receive(LEADER, request_)
    assert replica.damaged
    assert answer(replica) == []


def test_only_what_the_leader_is_known_to_hold_is_acknowledged() -> None:
    replica = follower(LOSSY)
    replica.receive(LEADER, append(2))
    assert (replica.damaged, answer(replica)) == (False, [2])
    replica.receive(LEADER, append(2, 1, 1, 1))
    assert (replica.damaged, answer(replica)) == (False, [4])


def test_what_is_not_committed_gives_way_as_ever() -> None:
    replica = follower(LOSSY)
    replica.receive(LEADER, append(4, 2))
    assert (replica.damaged, answer(replica)) == (False, [5])
    assert replica.log.last_term == 2


def test_otherwise_all_that_is_committed_is_acknowledged() -> None:
    replica = follower(RaftConfig())
    replica.receive(LEADER, append(2))
    assert answer(replica) == [4]
