"""The pure decisions of this room, as tables."""

from __future__ import annotations

import pytest

from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.storage.checkpoint import CheckpointState, GroupState
from aegis_cluster.storage.journal import Claim, FoundRound, RoundBuilder, scan_journal
from aegis_cluster.storage.replay import JournalFindings, choose_rounds, replay
from aegis_cluster.storage.sync_plan import GroupWork, sync_plan
from aegis_cluster.storage.types import LOG_BEGIN, HardState, LogPoint, StoreLimits
from tests.storage.support import VOTERS, after, data_frame

GROUP = GroupId(3)
LIMITS = StoreLimits(direct_group_bytes=100, direct_groups=2)


@pytest.mark.parametrize(
    ("work", "direct"),
    [
        ([], set()),
        ([(1, 99, False)], set()),
        ([(1, 100, False)], {1}),
        ([(1, 100, True)], set()),  # its log was cut: only the journal can tell
        ([(1, 100, False), (2, 10, False)], {1}),
        ([(1, 100, False), (2, 300, False), (3, 200, False)], {2, 3}),
        ([(2, 100, False), (1, 100, False), (3, 100, False)], {1, 2}),
    ],
)
def test_sync_plan(work: list[tuple[int, int, bool]], direct: set[int]) -> None:
    plan = sync_plan([GroupWork(GroupId(one), size, forced) for one, size, forced in work], LIMITS)
    assert plan == direct


def checkpoint(last_round: int = 10, *, durable: LogPoint = LOG_BEGIN) -> CheckpointState:
    state = GroupState(GROUP, HardState(Term(1), None), durable, LogIndex(1), LogIndex(0))
    return CheckpointState(1, 0, 1, 5, last_round, (state,))


def found(number: int, claim: int, *, generation: int = 5, bad: bool = False) -> FoundRound:
    parts = RoundBuilder().encode(generation=generation, number=number, synced_up_to=claim)
    one = scan_journal(b"".join(parts), file=f"file-{generation}", generation_min=0)[0]
    return one._replace(body=None) if bad else one


@pytest.mark.parametrize(
    ("rounds", "replayed", "damaged"),
    [
        ([], [], None),
        ([(11, 10)], [11], None),
        ([(11, 10), (12, 11), (13, 12)], [11, 12, 13], None),
        ([(11, 10), (12, 11, "bad")], [11], None),  # a torn tail
        ([(11, 10), (12, 10, "bad"), (13, 10)], [11], None),  # whatever follows it
        ([(11, 10), (13, 11)], [11], None),
        ([(11, 10), (12, 11, "bad"), (13, 12)], [11], 12),  # 13 says that 12 was durable
        ([(11, 10), (13, 12)], [11], 12),
        ([(11, 10, "bad"), (12, 11, "bad")], [], 11),  # a claim counts though its round is torn
        ([(12, 11)], [], 11),
        ([(9, 8), (10, 9), (11, 10)], [11], None),  # the checkpoint covers 9 and 10
    ],
)
def test_which_rounds_are_replayed(
    rounds: list[tuple[int, int] | tuple[int, int, str]],
    replayed: list[int],
    damaged: int | None,
) -> None:
    given = [found(one[0], one[1], bad=len(one) > 2) for one in rounds]
    findings = choose_rounds(reversed(given), checkpoint())
    assert [one.header.number for one in findings.rounds] == replayed
    assert (findings.damage.round if findings.damage else None) == damaged


def test_rounds_go_on_in_the_next_generation() -> None:
    findings = choose_rounds([found(12, 11, generation=6), found(11, 10)], checkpoint())
    assert [one.header.number for one in findings.rounds] == [11, 12]
    assert (findings.generation_max, findings.round_max) == (6, 12)


def test_after_a_failed_sync_later_rounds_are_not_believed() -> None:
    given = [found(11, 10), found(12, 11), found(13, 11)]
    findings = choose_rounds(given, checkpoint(), trusted=12)
    assert [one.header.number for one in findings.rounds] == [11, 12]
    assert findings.damage is None
    assert findings.round_max == 13


def fold(*builders: RoundBuilder, synced: int = 0) -> JournalFindings:
    rounds = []
    for number, builder in enumerate(builders, start=11):
        parts = builder.encode(generation=5, number=number, synced_up_to=number - 1)
        rounds += scan_journal(b"".join(parts), file="", generation_min=5)
    return JournalFindings(tuple(rounds), synced, None, 5, 11)


def frames(count: int, *, term: int = 1, start: LogPoint = LOG_BEGIN) -> list[bytes]:
    point, made = start, []
    for _ in range(count):
        made.append(data_frame(GROUP, point, term=term))
        point = after(point, made[-1])
    return made


def test_a_truncation_takes_frames_and_watermark_back() -> None:
    first, second, third = RoundBuilder(), RoundBuilder(), RoundBuilder()
    made = frames(4)
    first.add_frames(GROUP, LogIndex(1), made)
    second.add_truncate(GROUP, LogIndex(3))
    group = replay(fold(first, second, synced=12), checkpoint())[GROUP]
    assert sorted(group.frames) == [1, 2]
    assert (group.durable, group.lowest_cut, group.open_cut) == (2, 3, 3)
    replaced = frames(1, term=2, start=after(after(LOG_BEGIN, made[0]), made[1]))
    third.add_frames(GROUP, LogIndex(3), replaced)
    group = replay(fold(first, second, third, synced=12), checkpoint())[GROUP]
    assert bytes(group.frames[3]) == replaced[0]
    assert (group.durable, group.lowest_cut, group.open_cut) == (2, 3, None)


def test_only_synced_rounds_raise_the_watermark() -> None:
    first, second = RoundBuilder(), RoundBuilder([Claim(GROUP, LogIndex(9))])
    first.add_frames(GROUP, LogIndex(1), frames(4))
    assert replay(fold(first, synced=10), checkpoint())[GROUP].durable == 0
    assert replay(fold(first, synced=11), checkpoint())[GROUP].durable == 4
    assert replay(fold(first, second, synced=11), checkpoint())[GROUP].durable == 9


def test_hard_state_never_goes_back() -> None:
    first, second = RoundBuilder(), RoundBuilder()
    first.add_hard_state(GROUP, HardState(Term(4), VOTERS[0]))
    second.add_hard_state(GROUP, HardState(Term(3), VOTERS[1]))
    assert replay(fold(first, second), checkpoint())[GROUP].hard_state == (4, VOTERS[0])


def test_a_reset_forgets_what_was_before() -> None:
    first, second = RoundBuilder(), RoundBuilder()
    begin = LogPoint(LogIndex(50), Term(3), b"chain.50", RecordOffset(80))
    first.add_frames(GROUP, LogIndex(1), frames(4))
    first.add_truncate(GROUP, LogIndex(2))
    second.add_reset(GROUP, begin)
    group = replay(fold(first, second, synced=12), checkpoint())[GROUP]
    assert (group.reset, group.durable) == (begin, 50)
    assert (group.frames, group.lowest_cut, group.open_cut) == ({}, None, None)
