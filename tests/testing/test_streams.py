"""The checker of conditional appends accepts what can be, and names what cannot."""

from __future__ import annotations

import itertools
import random

import pytest

from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.streams import Append, Look, StreamHistory, check_stream
from aegis_cluster.wire.event_frames import ANY, EXISTS, NO_STREAM

OK, REFUSED = Outcome.OK, Outcome.REFUSED


def test_a_race_that_can_be_explained() -> None:
    history = StreamHistory(
        appends=[
            Append(("a",), NO_STREAM, 0, 10, OK, 0),
            Append(("b",), NO_STREAM, 1, 9, REFUSED, 0),
            Append(("c", "d"), 0, 11, 20, OK, 1),
            Append(("e",), ANY, 5),  # never answered, and done long after
            Append(("f",), 2, 12),  # never answered, and not done
            Append(("g",), EXISTS, 30, 40, OK, 4),
        ],
        looks=[
            Look((), 0, 9),
            Look(("a",), 2, 19),
            Look(("a", "c", "d"), 15, 29),
        ],
        final=("a", "c", "d", "e", "g"),
    )
    assert check_stream(history) == []


WRONG = {
    "acknowledged and lost": StreamHistory([Append(("a",), ANY, 0, 1, OK, 0)], [], ()),
    "stands twice": StreamHistory([Append(("a",), ANY, 0, 1, OK, 0)], [], ("a", "a")),
    "refused and there": StreamHistory([Append(("a",), 3, 0, 1, REFUSED, 0)], [], ("a",)),
    "from nowhere": StreamHistory([], [], ("a",)),
    "a condition that was not met": StreamHistory(
        [Append(("a",), ANY, 0, 1, OK, 0), Append(("b",), NO_STREAM, 2, 3, OK, 1)], [], ("a", "b")
    ),
    "the same, of one that was not answered": StreamHistory(
        [Append(("a",), ANY, 0, 1, OK, 0), Append(("b",), 7, 0)], [], ("a", "b")
    ),
    "a conflict that was none": StreamHistory(
        [Append(("a",), ANY, 0, 1, OK, 0), Append(("b",), 0, 2, 3, REFUSED, 0)], [], ("a",)
    ),
    "a conflict with what came later": StreamHistory(
        [Append(("b",), NO_STREAM, 0, 1, REFUSED, 0), Append(("a",), ANY, 2, 3, OK, 0)], [], ("a",)
    ),
    "a conflict with what was over": StreamHistory(
        [
            Append(("a",), ANY, 0, 1, OK, 0),
            Append(("b",), ANY, 2, 3, OK, 1),
            Append(("c",), 7, 4, 5, REFUSED, 0),
        ],
        [],
        ("a", "b"),
    ),
    "a version given before an earlier one": StreamHistory(
        [Append(("a",), ANY, 2, 3, OK, 0), Append(("b",), ANY, 0, 1, OK, 1)], [], ("a", "b")
    ),
    "a read without what was acknowledged": StreamHistory(
        [Append(("a",), ANY, 0, 1, OK, 0)], [Look((), 2, 3)], ("a",)
    ),
    "a read that went back": StreamHistory(
        [Append(("a",), ANY, 0)], [Look(("a",), 1, 2), Look((), 3, 4)], ("a",)
    ),
    "half an append seen": StreamHistory(
        [Append(("a", "b"), ANY, 0, 9, OK, 0)], [Look(("a",), 1, 2)], ("a", "b")
    ),
    "half an append there": StreamHistory([Append(("a", "b"), ANY, 0)], [], ("a",)),
    "other events read": StreamHistory(
        [Append(("a",), ANY, 0), Append(("b",), ANY, 0)], [Look(("b",), 1, 2)], ("a", "b")
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_says_so(name: str) -> None:
    assert check_stream(WRONG[name])


def test_it_agrees_with_a_search_through_all_orders() -> None:
    """Small histories, with answers that may be wrong, against trying every order (Wing, Gong)."""
    seed = random.randrange(2**32)
    print("seed", seed)  # noqa: T201
    rng = random.Random(seed)
    found = {True: 0, False: 0}
    for _ in range(3_000):
        history = _some_history(rng)
        answer = not check_stream(history)
        assert answer == _has_an_order(history), history
        found[answer] += 1
    assert min(found.values()) > 100, found


def _some_history(rng: random.Random) -> StreamHistory:
    """What a right store may have answered; then now and then a moment or an answer is changed."""
    history = StreamHistory()
    done: list[str] = []
    for number in range(rng.randrange(1, 5)):
        at = float(4 * number)
        start, end = at - rng.randrange(8), at + rng.randrange(8)
        if rng.random() < 0.3:
            history.looks.append(Look(tuple(done), start, end))
            continue
        expected = rng.choice([ANY, len(done) - 1, len(done)])
        if expected == len(done):
            outcome, version = REFUSED, len(done) - 1
        else:
            outcome, version = rng.choice([OK, Outcome.UNKNOWN]), len(done)
            done.append(f"e{number}")
        if outcome is Outcome.UNKNOWN:
            history.appends.append(Append((f"e{number}",), expected, start))
        else:
            history.appends.append(Append((f"e{number}",), expected, start, end, outcome, version))
    history.final = tuple(done)
    if rng.random() < 0.6:
        if history.looks and rng.random() < 0.5:
            look = history.looks[0]
            history.looks[0] = look._replace(ids=tuple(done[: rng.randrange(len(done) + 1)]))
        elif history.appends:
            append = history.appends[0]
            shift = rng.randrange(-12, 20)
            history.appends[0] = append._replace(
                invoked=append.invoked + shift, ended=append.ended + shift
            )
    return history


def _has_an_order(history: StreamHistory) -> bool:
    """Whether any order of all calls, each at one moment between its ends, gives all answers."""
    calls: list[Append | Look] = [*history.appends, *history.looks]
    unknown = [a for a in history.appends if a.outcome is Outcome.UNKNOWN]
    for kept in range(len(unknown) + 1):
        for dropped in itertools.combinations(unknown, kept):
            left = [call for call in calls if call not in dropped]
            if any(_explains(order, history.final) for order in itertools.permutations(left)):
                return True
    return False


def _explains(order: tuple[Append | Look, ...], final: tuple[str, ...]) -> bool:
    done: list[str] = []
    latest = float("-inf")
    for call in order:
        latest = max(latest, call.invoked)
        if latest > call.ended:
            return False
        if isinstance(call, Look):
            if call.ids != tuple(done):
                return False
            continue
        is_met = call.expected in (ANY, len(done) - 1)
        if call.outcome is REFUSED:
            if is_met or call.version != len(done) - 1:
                return False
        elif not is_met or (call.outcome is OK and call.version != len(done)):
            return False
        else:
            done += call.ids
    return tuple(done) == final
