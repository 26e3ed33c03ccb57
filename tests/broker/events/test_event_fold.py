"""The fold of an event store's partition, against a slow obvious twin, and its snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_cluster.broker.events.event_stm import Append, EventFold
from aegis_cluster.errors import StreamDeleted, WrongExpectedVersion
from aegis_cluster.ids import LogIndex, RecordOffset, Term
from aegis_cluster.wire.batch import batch_header, encode_batch, stamp
from aegis_cluster.wire.event_frames import (
    ANY,
    EXISTS,
    NO_STREAM,
    StreamEvents,
    decode_annotation,
    encode_annotation,
)
from aegis_cluster.wire.frame import FrameHeader, FrameKind

NAMES = ("account-1", "account-2", "order-1")


def ids(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in numbers)


@dataclass
class Leader:
    """A fold with the little log that its leader would have."""

    fold: EventFold = field(default_factory=EventFold)
    log: list[tuple[int, bytes, int]] = field(default_factory=list)
    """offset, annotation and number of events of each frame."""
    committed: int = 0
    end: int = 0

    def append(self, *appends: Append) -> tuple[StreamEvents, ...] | Exception | str:
        decision = self.fold.decide(appends)
        if decision.error is not None:
            return decision.error
        if decision.known:
            return "known"
        index, offset = len(self.log) + 1, self.end
        self.fold.appended(
            decision.placed, index=LogIndex(index), offset=RecordOffset(offset), time_ms=index
        )
        count = sum(one.count for one in decision.placed)
        self.log.append((offset, encode_annotation(decision.placed), count))
        self.end += count
        return decision.placed

    def commit(self, upto: int | None = None) -> None:
        last = len(self.log) if upto is None else min(upto, len(self.log))
        for index in range(self.committed + 1, last + 1):
            apply(self.fold, index, *self.log[index - 1])
        self.committed = max(self.committed, last)

    def lose_leadership(self) -> None:
        """What is not committed is gone."""
        del self.log[self.committed :]
        self.end = self.log[-1][0] + self.log[-1][2] if self.log else 0
        self.fold.leadership_lost()


def apply(fold: EventFold, index: int, offset: int, annotation: bytes, count: int) -> None:
    data = encode_batch([(1, None, b"x", [])] * count)
    header = FrameHeader(
        0, 0, FrameKind.DATA, len(annotation), Term(1), LogIndex(index), index, b""
    )
    fold.apply(header, batch_header(stamp(data, offset, 1)), memoryview(annotation))


def copy_of(fold: EventFold) -> EventFold:
    other = EventFold()
    loader = other.loader()
    for piece in fold.slices():
        loader.add(piece)
    loader.finish()
    return other


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, object]]:
    one = st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from([ANY, NO_STREAM, EXISTS, 0, 1, 2, 3]),
        st.integers(1, 3),
        st.booleans(),
    )
    step = st.one_of(
        st.tuples(
            st.just("append"), st.lists(one, min_size=1, max_size=2, unique_by=lambda o: o[0])
        ),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.just("lose"), st.none()),
        st.tuples(st.just("snapshot"), st.none()),
    )
    return draw(st.lists(step, max_size=40))


@settings(max_examples=150, deadline=None)
@given(steps())
def test_versions_have_no_gap_and_each_is_won_once(script: list[tuple[str, object]]) -> None:
    leader = Leader()
    number = 0
    for kind, what in script:
        if kind == "append":
            assert isinstance(what, list)
            truth = versions_of(leader.log)
            appends = []
            for name, expected, count, _ in what:
                appends.append(Append(name, expected, ids(*range(number, number + count))))
                number += count
            result = leader.append(*appends)
            may = all(is_met(expected, truth.get(name)) for name, expected, _, _ in what)
            assert isinstance(result, tuple) == may
            if not may:
                assert isinstance(result, WrongExpectedVersion)
                assert result.actual == truth.get(result.stream, -1)
        elif kind == "commit":
            assert isinstance(what, int)
            leader.commit(leader.committed + what)
        elif kind == "lose":
            leader.lose_leadership()
        else:
            leader.lose_leadership()
            leader.fold = copy_of(leader.fold)
        versions_of(leader.log)  # checks that they are gapless
    leader.commit()
    follower = EventFold()
    for index, frame in enumerate(leader.log, 1):
        apply(follower, index, *frame)
    assert list(follower.slices()) == list(leader.fold.slices())


def is_met(expected: int, version: int | None) -> bool:
    match expected:
        case _ if expected == ANY:
            return True
        case _ if expected == NO_STREAM:
            return version is None
        case _ if expected == EXISTS:
            return version is not None
    return version == expected


def versions_of(log: list[tuple[int, bytes, int]]) -> dict[str, int]:
    """The slow twin: what the log itself says."""
    found: dict[str, int] = {}
    for _, annotation, _ in log:
        for one in decode_annotation(annotation):
            assert one.first == found.get(one.stream, -1) + 1
            found[one.stream] = one.last
    return found


def test_of_two_writers_one_wins() -> None:
    leader = Leader()
    assert isinstance(leader.append(Append("a", NO_STREAM, ids(1, 2))), tuple)
    lost = leader.append(Append("a", NO_STREAM, ids(3)))
    assert isinstance(lost, WrongExpectedVersion)
    assert (lost.stream, lost.expected, lost.actual) == ("a", NO_STREAM, 1)


def test_a_refusal_waits_for_what_it_rests_on_and_is_gone_with_it() -> None:
    leader = Leader()
    leader.append(Append("a", ANY, ids(1)))
    assert leader.fold.decide([Append("a", NO_STREAM, ids(2))]).wait_for == 1
    leader.lose_leadership()
    assert isinstance(leader.append(Append("a", NO_STREAM, ids(2))), tuple)


def test_repeats_are_answered_as_before_whatever_was_expected() -> None:
    leader = Leader()
    leader.append(Append("a", NO_STREAM, ids(1, 2)), Append("b", ANY, ids(3)))
    leader.commit()
    leader.append(Append("a", ANY, ids(4)))
    for fold in (leader.fold, copy_of(leader.fold)):
        again = fold.decide([Append("a", NO_STREAM, ids(1, 2)), Append("b", ANY, ids(3))])
        assert [(one.stream, one.first, one.last) for one in again.known] == [
            ("a", 0, 1),
            ("b", 0, 0),
        ]
        assert again.known[1].offset == 2
    across = leader.fold.decide([Append("a", ANY, ids(2, 4))])
    assert [(one.first, one.last) for one in across.known] == [(1, 2)]
    assert across.wait_for == 2
    for other in (ids(2, 9), ids(9, 1), ids(4, 1)):
        assert isinstance(leader.append(Append("a", ANY, other)), WrongExpectedVersion)
    assert isinstance(leader.append(Append("c", ANY, ids(1))), tuple)  # ids are a stream's own


def test_only_the_newest_ids_are_remembered() -> None:
    leader = Leader(EventFold(remembered=3))
    for number in range(5):
        leader.append(Append("a", ANY, ids(number)))
    leader.commit()
    assert leader.append(Append("a", ANY, ids(2))) == "known"
    assert isinstance(leader.append(Append("a", 4, ids(1))), tuple)


def test_conditions_on_streams_that_are_only_looked_at() -> None:
    leader = Leader()
    leader.append(Append("a", ANY, ids(1)))
    assert isinstance(
        leader.append(Append("a", 1, b""), Append("b", ANY, ids(2))), WrongExpectedVersion
    )
    assert isinstance(leader.append(Append("a", 0, b""), Append("b", ANY, ids(2))), tuple)


def test_deleted_streams_begin_anew_above_and_tombstones_never() -> None:
    leader = Leader()
    leader.append(Append("a", ANY, ids(1, 2)))
    leader.append(Append("$$a", ANY, ids(3), {"deleted": True}))
    assert isinstance(leader.append(Append("a", EXISTS, ids(4))), WrongExpectedVersion)
    placed = leader.append(Append("a", NO_STREAM, ids(4)))
    assert isinstance(placed, tuple)
    assert placed[0].first == 2
    leader.commit()
    for fold in (leader.fold, copy_of(leader.fold)):
        assert fold.settings("a").before == 2
        assert not fold.settings("a").deleted
    leader.append(Append("$$a", ANY, ids(5), {"tombstone": True}))
    assert isinstance(leader.append(Append("a", ANY, ids(6))), StreamDeleted)
    assert leader.append(Append("a", ANY, ids(4))) == "known"


MARKS = [
    {"deleted": True},
    {"tombstone": True},
    {"max_count": 2},
    {"max_count": None},
    {"max_age_ms": 500},
    {"max_age_ms": None},
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.one_of(st.integers(1, 3), st.sampled_from(MARKS))),
        max_size=30,
    )
)
def test_what_is_hidden_is_counted(script: list[tuple[str, int | dict[str, object]]]) -> None:
    leader = Leader()
    number = 0
    for name, what in script:
        count = what if isinstance(what, int) else 1
        event_ids = ids(*range(number, number + count))
        number += count
        if isinstance(what, int):
            leader.append(Append(name, ANY, event_ids))
        else:
            leader.append(Append(f"$${name}", ANY, event_ids, what))
        leader.commit()
        for fold in (leader.fold, copy_of(leader.fold)):
            hidden, ages = hidden_in(fold)
            found = fold.hidden(10_000)
            assert (found.below, found.before_ms) == (hidden, ages)
            assert fold.hidden_events == sum(hidden.values())
            assert fold.has_max_ages == bool(ages)


def hidden_in(fold: EventFold) -> tuple[dict[str, int], dict[str, int]]:
    """The slow twin: each stream by itself."""
    hidden, ages = {}, {}
    for name in NAMES:
        state, decided = fold.stream(name), fold.settings(name)
        if state is None:
            continue
        shown = [
            version
            for version in range(state.version + 1)
            if version >= decided.before
            and not decided.deleted
            and not decided.tombstone
            and (decided.max_count is None or version > state.version - decided.max_count)
        ]
        first = min(shown, default=state.version + 1)
        if first:
            hidden[name] = first
        if decided.max_age_ms is not None:
            ages[name] = 10_000 - decided.max_age_ms
    return hidden, ages
