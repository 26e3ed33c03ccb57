"""Verdicts over a history of transactions; they know nothing of how the cluster works.

Each promise is one short function over plain data. It returns sentences, one a violation; none
means that it holds. What Kafka's model lets happen is not asked for: two transactions may write to
the same partitions in different orders (G0) unless something outside orders them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.transactions.anomalies import (
    Appended,
    ListTransaction,
    Observed,
    Status,
    find_anomalies,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.testing.transactions.history import (
        Append,
        Position,
        Takeover,
        Transaction,
        TransactionHistory,
    )

FINAL: Final = "the last read"


def check_transactions(history: TransactionHistory) -> list[str]:
    """Everything that a client can tell was broken."""
    return [f"{check.__name__}: {found}" for check in CHECKS for found in check(history)]


def _observed(history: TransactionHistory) -> Iterator[tuple[TopicPartition, bytes, str]]:
    """(place, value, who says so), wherever somebody has seen a value as committed."""
    for one in history.seen:
        yield one.place, one.value, f"reader {one.reader}"
    for transaction in history.transactions:
        for poll in transaction.polls:
            for value in poll.values:
                yield poll.place, value, _name(transaction)
    for place, rows in history.final.items():
        for _, _, value in rows:
            yield place, value, FINAL


def _name(transaction: Transaction) -> str:
    return f"transaction {transaction.number} of {transaction.name!r}"


def aborted_read(history: TransactionHistory) -> Iterator[str]:
    """What was aborted is never seen (G1a), nor what nobody wrote."""
    known = history.by_value()
    told = set()
    for place, value, who in _observed(history):
        if value in told:
            continue
        if value not in known or known[value][1].place != place:
            told.add(value)
            yield f"{value!r} in {place} was never written there, says {who}"
        elif known[value][0].outcome is Outcome.REFUSED:
            told.add(value)
            yield f"{value!r} in {place} is of {_name(known[value][0])}, aborted; seen by {who}"


def torn_transaction(history: TransactionHistory) -> Iterator[str]:
    """Whoever has passed several records of one transaction has seen all of them, or none."""
    seen: defaultdict[int, set[bytes]] = defaultdict(set)
    for one in history.seen:
        seen[one.reader].add(one.value)
    for reader, positions in history.last_positions().items():
        for transaction in history.transactions:
            passed = [
                one
                for one in transaction.appends
                if 0 <= one.offset < positions.get(one.place, 0)
                and one.place not in history.compacted
            ]
            there = [one for one in passed if one.value in seen[reader]]
            if 0 < len(there) < len(passed):
                yield _torn(transaction, f"reader {reader}", there, passed)
    if not history.final:
        return
    final = {value for rows in history.final.values() for _, _, value in rows}
    for transaction in history.transactions:
        mine = [one for one in transaction.appends if one.place not in history.compacted]
        there = [one for one in mine if one.value in final]
        if 0 < len(there) < len(mine):
            yield _torn(transaction, FINAL, there, mine)


def _torn(
    transaction: Transaction, who: str, there: Sequence[Append], mine: Sequence[Append]
) -> str:
    lacking = next(one for one in mine if one not in there)
    return (
        f"{who} has {len(there)} of {len(mine)} records of {_name(transaction)}; not"
        f" {lacking.value!r} at {lacking.place}@{lacking.offset}"
    )


def lost_transaction(history: TransactionHistory) -> Iterator[str]:
    """What was committed for sure is there in the end, where it was acknowledged to be."""
    for place, rows in history.final.items():
        if place in history.compacted:
            continue
        there = {value: offset for offset, _, value in rows}
        for transaction in history.transactions:
            if transaction.outcome is not Outcome.OK:
                continue
            for one in transaction.appends:
                if one.place == place and there.get(one.value) != one.offset:
                    yield f"{one.value!r} of {_name(transaction)} is not at {place}@{one.offset}"


def duplicate(history: TransactionHistory) -> Iterator[str]:
    """No value stands twice."""
    counts = Counter(value for rows in history.final.values() for _, _, value in rows)
    for value, count in counts.items():
        if count > 1:
            yield f"{value!r} stands {count} times"


def processed_once(history: TransactionHistory) -> Iterator[str]:
    """The histogram is all ones: each record of the input has one result that is committed."""
    if not history.final:
        return
    known = history.by_value()
    counts: Counter[bytes] = Counter()
    for rows in history.final.values():
        for _, _, value in rows:
            if value in known and known[value][1].order is not None:
                counts[known[value][1].order or b""] += 1
    inputs = {order for rows in history.inputs.values() for _, _, order in rows}
    for order, count in counts.items():
        if count > 1:
            yield f"{order!r} was handled {count} times"
        if order not in inputs:
            yield f"{order!r} was handled, and nobody has sent it"
    for place, rows in history.inputs.items():
        behind = max((one.offset for one in history.positions if one.place == place), default=0)
        for offset, _, order in rows:
            if offset < behind and order not in counts:
                yield f"{order!r} at {place}@{offset} is behind the group, and was never handled"


def position_goes_back(history: TransactionHistory) -> Iterator[str]:
    """A group's position is never below one that was known before the question."""
    by_place: defaultdict[TopicPartition, list[Position]] = defaultdict(list)
    for one in history.positions:
        by_place[one.place].append(one)
    for place, positions in by_place.items():
        for one in positions:
            before = max((known.offset for known in positions if _binds(known, one)), default=0)
            if one.offset < before:
                yield f"{place} was said to be at {one.offset}, and was at {before} before"


def _binds(known: Position, later: Position) -> bool:
    """`later` was asked for when `known` was known, and may not be below it."""
    is_commit = known.asked_us < 0
    return known.at_us < later.asked_us and (later.stable or not is_commit)


def fenced(history: TransactionHistory) -> Iterator[str]:
    """A process commits nothing that it asked for after another one took its transactional id."""
    for transaction in history.transactions:
        if transaction.outcome is not Outcome.OK:
            continue
        own, others = _takeovers(history, transaction)
        for one in others:
            if own < one.asked_us and one.at_us < transaction.commit_us:
                yield (
                    f"{_name(transaction)} of client {transaction.client} was committed after"
                    f" client {one.client} had taken over"
                )


def _takeovers(history: TransactionHistory, transaction: Transaction) -> tuple[int, list[Takeover]]:
    """When its own process took the transactional id over, and those of others."""
    same = [one for one in history.takeovers if one.name == transaction.name]
    own = max((one.at_us for one in same if one.client == transaction.client), default=0)
    return own, [one for one in same if one.client != transaction.client]


def balance(history: TransactionHistory) -> Iterator[str]:
    """Money is moved, never made: at the end, and for every reader at any moment.

    A reader reads each partition on its own, so it may have passed one side of a transfer and not
    yet the other; such transfers do not count.
    """
    known = history.by_value()
    if history.final:
        amounts = [
            known[value][1].amount
            for rows in history.final.values()
            for _, _, value in rows
            if value in known
        ]
        if sum(amounts):
            yield f"in the end accounts have {sum(amounts)} in all, not 0"
    seen: defaultdict[int, set[bytes]] = defaultdict(set)
    for one in history.seen:
        seen[one.reader].add(one.value)
    told = set()
    for moment in history.rounds:
        if moment.reader in told:
            continue
        total = sum(
            _passed(transaction, moment.positions, seen[moment.reader])
            for transaction in history.transactions
        )
        if total:
            told.add(moment.reader)
            yield f"reader {moment.reader} has seen {total} in all, not 0"


def _passed(
    transaction: Transaction, positions: dict[TopicPartition, int], seen: set[bytes]
) -> int:
    """What a reader has seen of a transfer, if it has passed all of it."""
    sides = [one for one in transaction.appends if one.amount]
    if any(not 0 <= one.offset < positions.get(one.place, 0) for one in sides):
        return 0
    return sum(one.amount for one in sides if one.value in seen)


def latest_of_key(history: TransactionHistory) -> Iterator[str]:
    """A compacted partition still has the latest committed record of each key."""
    latest: dict[tuple[TopicPartition, bytes | None], Append] = {}
    for transaction in history.transactions:
        if transaction.outcome is Outcome.OK:
            for one in transaction.appends:
                key = (one.place, one.key)
                if one.place in history.compacted and (
                    key not in latest or latest[key].offset < one.offset
                ):
                    latest[key] = one
    for (place, name), one in latest.items():
        if place in history.final:
            rows = [row for row in history.final[place] if row[1] == name]
            # A later one may be of a transaction whose outcome is not known.
            if not any(offset >= one.offset for offset, _, _ in rows):
                yield f"{place} has lost {one.value!r}, the latest of key {name!r}"


def isolation(history: TransactionHistory) -> Iterator[str]:
    """What transactions have read of lists is free of Adya's G1a, G1b and G1c, and of G0 where one
    writes at a time."""
    orders: dict[Hashable, list[Hashable]] = {
        place: [value for _, _, value in rows]
        for place, rows in history.final.items()
        if place in history.lists
    }
    try:
        found = find_anomalies(
            [_as_lists(one, history) for one in history.transactions],
            orders,
            writers_are_ordered=history.one_writer_at_a_time,
        )
    except ValueError as error:  # an order that stands twice in the input
        yield str(error)
    else:
        yield from map(str, found)


_STATUS: Final = {Outcome.OK: Status.COMMITTED, Outcome.REFUSED: Status.ABORTED}


def _as_lists(transaction: Transaction, history: TransactionHistory) -> ListTransaction:
    reads = [Observed(poll.place, poll.values) for poll in transaction.polls]
    writes = [
        Appended(one.place, one.value) for one in transaction.appends if one.place in history.lists
    ]
    status = _STATUS.get(transaction.outcome, Status.UNKNOWN)
    return ListTransaction(f"T{transaction.number}", status, (*reads, *writes))


CHECKS: Final[tuple[Callable[[TransactionHistory], Iterator[str]], ...]] = (
    aborted_read,
    torn_transaction,
    lost_transaction,
    duplicate,
    processed_once,
    position_goes_back,
    fenced,
    balance,
    latest_of_key,
    isolation,
)
