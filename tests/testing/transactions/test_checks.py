"""Every check says no to the history that breaks its promise, and only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.ids import TopicPartition
from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.transactions.checks import check_transactions
from aegis_cluster.testing.transactions.history import (
    Append,
    Poll,
    Position,
    Round,
    Seen,
    Takeover,
    Transaction,
    TransactionHistory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = TopicPartition("accounts", 0), TopicPartition("accounts", 1)
RESULTS, LATEST, ORDERS = (TopicPartition(name, 0) for name in ("results", "latest", "orders"))


def moves(number: int, offset: int, outcome: Outcome) -> Transaction:
    """One transfer from A to B, with a result and a new balance."""
    tag = b"%d" % number
    made = Transaction(number, "x", 1, 10 * number, outcome=outcome)
    made.appends = [
        Append(A, tag + b"from", offset=offset, amount=-5),
        Append(B, tag + b"to", offset=offset, amount=5),
        Append(RESULTS, tag + b"result", offset=offset, order=b"order" + tag),
        Append(LATEST, tag + b"balance", key=b"k", offset=offset),
    ]
    made.commit_us, made.ended_us = 10 * number + 5, 10 * number + 9
    return made


def good() -> TransactionHistory:
    """Two committed, one aborted between them; a reader that has come behind the first."""
    history = TransactionHistory(compacted={LATEST}, lists={A, B}, one_writer_at_a_time=True)
    one, two, three = (
        moves(1, 0, Outcome.OK),
        moves(2, 2, Outcome.REFUSED),
        moves(3, 4, Outcome.OK),
    )
    three.polls = [Poll(A, (b"1from",))]
    history.transactions = [one, two, three]
    history.takeovers = [Takeover("x", 1, 0, 5)]
    history.inputs = {ORDERS: [(0, None, b"order1"), (1, None, b"order3"), (2, None, b"order4")]}
    history.positions = [Position(ORDERS, 0, 1, 2), Position(ORDERS, 1, -1, 19)]
    history.positions += [Position(ORDERS, 1, 20, 21), Position(ORDERS, 2, -1, 39)]
    history.seen = [Seen(9, A, 0, None, b"1from"), Seen(9, B, 0, None, b"1to")]
    history.rounds = [Round(9, {A: 1, B: 0}), Round(9, {A: 2, B: 2})]
    history.final = {
        A: [(0, None, b"1from"), (4, None, b"3from")],
        B: [(0, None, b"1to"), (4, None, b"3to")],
        RESULTS: [(0, None, b"1result"), (4, None, b"3result")],
        LATEST: [(4, b"k", b"3balance")],
    }
    return history


def names(change: Callable[[TransactionHistory], object]) -> set[str]:
    history = good()
    change(history)
    return {found.split(":")[0] for found in check_transactions(history)}


def test_a_good_history() -> None:
    assert check_transactions(good()) == []


def test_unknown_may_or_may_not_have_happened() -> None:
    def unsure(history: TransactionHistory) -> None:
        history.transactions[1].outcome = Outcome.UNKNOWN
        history.transactions[2].outcome = Outcome.UNKNOWN

    assert names(unsure) == set()


def test_an_aborted_record_is_seen() -> None:
    seen = Seen(9, A, 2, None, b"2from")
    assert names(lambda history: history.seen.append(seen)) == {"aborted_read"}
    polled = Poll(A, (b"1from", b"2from"))
    found = names(lambda history: history.transactions[2].polls.append(polled))
    assert {"aborted_read", "isolation"} <= found


def test_a_record_that_nobody_wrote() -> None:
    found = names(lambda history: history.final[RESULTS].append((7, None, b"?")))
    assert found == {"aborted_read"}


def test_half_a_transaction_in_the_end() -> None:
    assert "torn_transaction" in names(lambda history: history.final[B].pop())


def test_half_a_transaction_for_a_reader() -> None:
    """It has passed both sides and has seen one."""
    assert names(lambda history: history.seen.pop()) == {"torn_transaction", "balance"}


def test_a_side_that_a_reader_has_not_come_to_is_not_missing() -> None:
    def behind(history: TransactionHistory) -> None:
        history.seen.pop()
        history.rounds = [Round(9, {A: 2, B: 0})]

    assert names(behind) == set()


def test_a_committed_transaction_is_lost() -> None:
    def lose(history: TransactionHistory) -> None:
        for place in (A, B, RESULTS):
            history.final[place].pop()

    assert names(lose) == {"lost_transaction", "processed_once"}


def test_a_record_stands_twice() -> None:
    found = names(lambda history: history.final[A].append((5, None, b"3from")))
    assert {"duplicate", "balance"} <= found


def test_an_order_is_handled_twice() -> None:
    def again(history: TransactionHistory) -> None:
        history.transactions[2].appends[2].order = b"order1"

    assert names(again) == {"processed_once"}


def test_an_order_is_skipped() -> None:
    found = names(lambda history: history.positions.append(Position(ORDERS, 3, 50, 51)))
    assert found == {"processed_once"}


def test_a_position_goes_back() -> None:
    found = names(lambda history: history.positions.append(Position(ORDERS, 1, 50, 51)))
    assert found == {"position_goes_back"}


def test_only_a_stable_position_has_what_was_just_committed() -> None:
    unstable = Position(ORDERS, 1, 50, 51, stable=False)
    assert names(lambda history: history.positions.append(unstable)) == set()

    def told(history: TransactionHistory) -> None:
        history.positions += [Position(ORDERS, 2, 44, 45, stable=False), unstable]

    assert names(told) == {"position_goes_back"}


def test_what_was_asked_before_may_be_older() -> None:
    assert names(lambda history: history.positions.append(Position(ORDERS, 1, 38, 51))) == set()


def test_a_fenced_process_commits() -> None:
    taken = Takeover("x", 2, 30, 33)
    assert names(lambda history: history.takeovers.append(taken)) == {"fenced"}
    later = Takeover("x", 2, 30, 36)
    assert names(lambda history: history.takeovers.append(later)) == set()


def test_who_takes_the_name_back_may_go_on() -> None:
    def back(history: TransactionHistory) -> None:
        history.takeovers += [Takeover("x", 2, 20, 22), Takeover("x", 1, 24, 26)]

    assert names(back) == set()


def test_money_is_made() -> None:
    def more(history: TransactionHistory) -> None:
        history.transactions[0].appends[1].amount = 6

    assert names(more) == {"balance"}


def test_compaction_loses_the_latest() -> None:
    found = names(lambda history: history.final.update({LATEST: [(0, b"k", b"1balance")]}))
    assert found == {"latest_of_key"}


def test_compaction_shows_what_was_aborted() -> None:
    found = names(lambda history: history.final[LATEST].insert(0, (2, b"k", b"2balance")))
    assert found == {"aborted_read"}


def crossed(history: TransactionHistory) -> None:
    history.final[B].reverse()


def test_write_cycles_count_where_one_writes_at_a_time() -> None:
    assert "isolation" in names(crossed)


def test_write_cycles_are_allowed_otherwise() -> None:
    def both(history: TransactionHistory) -> None:
        crossed(history)
        history.one_writer_at_a_time = False

    assert "isolation" not in names(both)
