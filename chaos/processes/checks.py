"""Verdicts over a recorded history: valid, invalid or unknown, one for each promise.

The idea: most promises are the simulator's, so its checkers are used (`aegis_cluster.testing`);
those here are about what only a real run has. A checker that raises, or that lacks what it needs,
is unknown and never a pass: a history without a last read says nothing about lost writes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing import checkers
from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.transactions import checks as transaction_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aegis_cluster.testing.history import Read
    from aegis_cluster.testing.transactions.history import TransactionHistory
    from chaos.processes.recording import Recorded

    Check = Callable[[Recorded], Iterable[str]]

SHOWN_MAX: Final = 20
"""Sentences kept of one check; the history has the rest."""


class Verdict(Enum):
    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one check says of one history."""

    check: str
    verdict: Verdict
    found: tuple[str, ...] = ()
    """The first violations, or why there is no verdict."""


class NotKnown(Exception):
    """The history lacks what a check needs."""


# ---- checks: a promise each; a sentence for each violation


def lost_write(recorded: Recorded) -> Iterable[str]:
    """What was acknowledged, or read by anybody, is there in the end."""
    _require_last_read(recorded)
    return checkers.lost_write(recorded.history)


def duplicate(recorded: Recorded) -> Iterable[str]:
    """No value stands at two offsets."""
    return checkers.duplicate(recorded.history)


def inconsistent_offsets(recorded: Recorded) -> Iterable[str]:
    """One value at one offset, whoever says so and whenever."""
    return checkers.inconsistent_offsets(recorded.history)


def nonmonotonic_send(recorded: Recorded) -> Iterable[str]:
    """A producer's records stand in the order in which it sent them."""
    _require_last_read(recorded)
    return checkers.nonmonotonic_send(recorded.history)


def poll_skip(recorded: Recorded) -> Iterator[str]:
    """A reader, which begins at offset 0, jumps over nothing."""
    for read, wanted in _with_next(recorded):
        if read.offset > wanted:
            yield f"reader {read.reader} got {read.partition}@{read.offset}, not @{wanted}"


def nonmonotonic_poll(recorded: Recorded) -> Iterator[str]:
    """A reader never goes back."""
    for read, wanted in _with_next(recorded):
        if read.offset < wanted:
            yield f"reader {read.reader} got {read.partition}@{read.offset} after @{wanted - 1}"


def aborted_read(recorded: Recorded) -> Iterable[str]:
    """What was refused never appears, nor does what nobody wrote (G1a)."""
    return checkers.aborted_read(recorded.history)


def read_above_commit(recorded: Recorded) -> Iterator[str]:
    """What a reader got is there for good: it was committed when it was handed out."""
    _require_last_read(recorded)
    there = {partition: dict(found) for partition, found in recorded.history.final.items()}
    for read in recorded.history.reads:
        if there[read.partition].get(read.offset) != read.value:
            yield (
                f"reader {read.reader} got {read.value!r} at {read.partition}@{read.offset}, and"
                f" in the end there is {there[read.partition].get(read.offset)!r}"
            )


def stale_read(recorded: Recorded) -> Iterable[str]:
    """An end that was asked for covers all that was known before the question."""
    return checkers.stale_read(recorded.history)


def denied_read(recorded: Recorded) -> Iterable[str]:
    """Nobody is told that a place which exists does not."""
    return checkers.denied_read(recorded.history)


def hole(recorded: Recorded) -> Iterable[str]:
    """Offsets are dense."""
    _require_last_read(recorded)
    return checkers.hole(recorded.history)


def unseen(recorded: Recorded) -> Iterator[str]:
    """After healing, every reader that is left reaches the end."""
    _require_last_read(recorded)
    ends = {partition: len(found) for partition, found in recorded.history.final.items()}
    for reader, positions in recorded.unfinished.items():
        missing = sum(max(0, end - positions.get(p, 0)) for p, end in ends.items())
        yield f"reader {reader} never got {missing} records after all was healed: {positions}"


def group_skip(recorded: Recorded) -> Iterator[str]:
    """A member gets a message only after all before it, in its partition, were handled by some."""
    frontier: defaultdict[int, int] = defaultdict(int)
    for member, partition, offset in recorded.handled:
        if offset > frontier[partition]:
            yield (
                f"member {member} got {partition}@{offset}, and nobody had handled"
                f" {partition}@{frontier[partition]}"
            )
        frontier[partition] = max(frontier[partition], offset + 1)


def group_unseen(recorded: Recorded) -> Iterator[str]:
    """After healing, the group handles everything."""
    if not recorded.handled:
        return
    _require_last_read(recorded)
    seen = {(partition, offset) for _, partition, offset in recorded.handled}
    for partition, found in recorded.history.final.items():
        missing = [offset for offset, _ in found if (partition, offset) not in seen]
        if missing:
            yield f"the group never got {len(missing)} records from {partition}@{missing[0]} on"


def progress(recorded: Recorded) -> Iterator[str]:
    """A healed cluster works; and one in which nothing was ever written proves nothing."""
    yield from recorded.not_healed
    if not any(write.outcome is Outcome.OK for write in recorded.history.writes):
        raise NotKnown("no write was acknowledged")


def crash(recorded: Recorded) -> Iterable[str]:
    """Nothing ends, and no call fails, in a way that is not written down."""
    return recorded.errors


def _transactional(
    check: Callable[[TransactionHistory], Iterator[str]],
) -> Check:
    """One of the simulator's checks of transactions, where a run has any."""

    def judge_transactions(recorded: Recorded) -> Iterable[str]:
        history = recorded.transactions
        if not history.transactions:
            return ()
        if not history.final:
            raise NotKnown("what is committed was not read to the end")
        return check(history)

    judge_transactions.__name__ = f"transactions_{check.__name__}"
    return judge_transactions


def transactions_progress(recorded: Recorded) -> Iterator[str]:
    """Where there are transactions, some are committed."""
    history = recorded.transactions
    if history.transactions and not any(one.outcome is Outcome.OK for one in history.transactions):
        yield f"none of {len(history.transactions)} transactions was committed"


CHECKS: Final[tuple[Check, ...]] = (
    lost_write,
    duplicate,
    inconsistent_offsets,
    nonmonotonic_send,
    poll_skip,
    nonmonotonic_poll,
    aborted_read,
    read_above_commit,
    stale_read,
    denied_read,
    hole,
    unseen,
    group_skip,
    group_unseen,
    *map(_transactional, transaction_checks.CHECKS),
    transactions_progress,
    progress,
    crash,
)


def _require_last_read(recorded: Recorded) -> None:
    final = recorded.history.final
    missing = [p for p in range(recorded.partitions) if p not in final]
    if missing or not recorded.partitions:
        raise NotKnown(f"partitions {missing or 'of unknown number'} were not read to the end")


def _with_next(recorded: Recorded) -> Iterator[tuple[Read, int]]:
    """Each read, and the offset that its reader was to get."""
    following: dict[tuple[int, int], int] = {}
    for read in recorded.history.reads:
        key = (read.reader, read.partition)
        yield read, following.get(key, 0)
        following[key] = read.offset + 1


# ---- verdicts


def judge(recorded: Recorded, checks: Iterable[Check] = CHECKS) -> list[Judgement]:
    """Every check's verdict, in order."""
    return [_judge(check, recorded) for check in checks]


def _judge(check: Check, recorded: Recorded) -> Judgement:
    name = check.__name__
    try:
        found = tuple(islice(check(recorded), SHOWN_MAX))
    except NotKnown as reason:
        return Judgement(name, Verdict.UNKNOWN, (str(reason),))
    except Exception as error:  # noqa: BLE001 - a checker that raises has seen nothing
        return Judgement(name, Verdict.UNKNOWN, (f"the check itself failed: {error!r}",))
    return Judgement(name, Verdict.INVALID if found else Verdict.VALID, found)


def overall(judgements: Iterable[Judgement]) -> Verdict:
    """Invalid if anything is, else unknown if anything is."""
    verdicts = {judgement.verdict for judgement in judgements}
    for worst in (Verdict.INVALID, Verdict.UNKNOWN):
        if worst in verdicts:
            return worst
    return Verdict.VALID if verdicts else Verdict.UNKNOWN
