"""Histories written by hand: each anomaly is seen where it is, and nowhere else."""

from __future__ import annotations

import pytest

from aegis_cluster.testing.transactions.anomalies import (
    Anomaly,
    Appended,
    ListTransaction,
    Observed,
    Status,
    find_anomalies,
)

OK, ABORTED, UNKNOWN = Status.COMMITTED, Status.ABORTED, Status.UNKNOWN


def tx(name: str, *ops: str, status: Status = OK) -> ListTransaction:
    """x+1 appends 1 to x; x=1,2 has read x as [1, 2]; x= has read it as empty."""
    made: list[Appended | Observed] = []
    for op in ops:
        key, sign, rest = op[0], op[1], op[2:]
        if sign == "+":
            made.append(Appended(key, rest))
        else:
            made.append(Observed(key, tuple(rest.split(",")) if rest else ()))
    return ListTransaction(name, status, tuple(made))


def kinds(*transactions: ListTransaction, ordered: bool = True) -> list[str]:
    return [a.kind for a in find_anomalies(transactions, writers_are_ordered=ordered)]


def test_a_serial_history() -> None:
    found = kinds(
        tx("a", "x+1", "y+1"),
        tx("b", "x=1", "y=1", "x+2"),
        tx("c", "x=1,2", "y=1", "y+2"),
        tx("d", "x=1,2", "y=1,2"),
    )
    assert found == []


def test_an_old_read_is_no_anomaly_of_these() -> None:
    """Read committed lets a transaction read less than there is; even skew is allowed."""
    assert kinds(tx("a", "x+1"), tx("b", "x=", "y+1"), tx("c", "y=", "x+2"), tx("d", "x=1,2")) == []


def test_nothing_at_all() -> None:
    assert kinds() == []
    assert kinds(tx("a"), tx("b", "x=")) == []


def test_g0_over_two_lists() -> None:
    history = (tx("a", "x+1", "y+1"), tx("b", "x+2", "y+2"), tx("c", "x=1,2", "y=2,1"))
    assert kinds(*history) == ["G0"]
    (found,) = find_anomalies(history)
    assert found.text.count("ww") == 2
    assert kinds(*history, ordered=False) == []


def test_g0_within_one_list() -> None:
    assert kinds(tx("a", "x+1", "x+3"), tx("b", "x+2"), tx("c", "x=1,2,3")) == ["G0"]


def test_g0_from_the_lists_as_they_are_in_the_end() -> None:
    history = [tx("a", "x+1", "y+1"), tx("b", "x+2", "y+2")]
    orders = {"x": ["1", "2"], "y": ["2", "1"]}
    assert [a.kind for a in find_anomalies(history, orders)] == ["G0"]
    assert find_anomalies(history, {"x": ["1", "2"], "y": ["1", "2"]}) == []


def test_g0_of_three() -> None:
    found = kinds(
        tx("a", "x+1", "z+2"),
        tx("b", "x+2", "y+1"),
        tx("c", "y+2", "z+1"),
        tx("d", "x=1,2", "y=1,2", "z=1,2"),
    )
    assert found == ["G0"]


def test_g1a() -> None:
    assert kinds(tx("a", "x+1", status=ABORTED), tx("b", "x=1")) == ["G1a"]
    assert kinds(tx("a", "x+1", status=ABORTED), tx("b", "x=")) == []
    assert kinds(tx("a", "x+1", status=ABORTED), tx("b", "x=1", status=ABORTED)) == ["G1a"]


def test_g1a_its_own_append_is_no_aborted_read() -> None:
    assert kinds(tx("a", "x+1", "x=1", status=ABORTED)) == []


def test_g1a_what_nobody_wrote() -> None:
    (found,) = find_anomalies([tx("b", "x=7")])
    assert found == Anomaly("G1a", "b has read what nobody wrote: '7' in 'x'")


def test_unknown_counts_as_committed_once_it_was_read() -> None:
    assert kinds(tx("a", "x+1", status=UNKNOWN), tx("b", "x=1")) == []
    assert kinds(tx("a", "x+1", "x+2", status=UNKNOWN), tx("b", "x=1"), tx("c", "x=1,2")) == ["G1b"]


def test_g1b() -> None:
    assert kinds(tx("a", "x+1", "x+2"), tx("b", "x=1"), tx("c", "x=1,2")) == ["G1b"]
    assert kinds(tx("a", "x+1", "x+2"), tx("c", "x=1,2")) == []
    assert kinds(tx("a", "x+1", "x=1", "x+2"), tx("c", "x=1,2")) == []


def test_g1b_one_list_of_two_is_not_a_part_of_a_list() -> None:
    assert kinds(tx("a", "x+1", "y+1"), tx("b", "x=1", "y=")) == []


def test_g1c_two_have_read_each_other() -> None:
    history = (tx("a", "x+1", "y=1"), tx("b", "y+1", "x=1"))
    assert kinds(*history) == ["G1c"]
    assert kinds(*history, ordered=False) == ["G1c"]


def test_g1c_through_a_write() -> None:
    """a is before b in x, and has read of b."""
    history = (tx("a", "x+1", "y=1"), tx("b", "x+2", "y+1"), tx("c", "x=1,2"))
    assert kinds(*history) == ["G1c"]
    assert kinds(*history, ordered=False) == []


def test_g1c_of_reads_far_back_in_a_list() -> None:
    """Where writers are not ordered, every value that was read is an edge of its own."""
    history = (tx("a", "x+1", "y=1"), tx("b", "y+1", "x=1,2"), tx("c", "x+2"))
    assert kinds(*history, ordered=False) == ["G1c"]
    assert kinds(*history) == ["G1c"]


def test_reads_of_an_aborted_transaction_close_no_cycle() -> None:
    assert kinds(tx("a", "x+1", "y=1", status=ABORTED), tx("b", "y+1")) == []


def test_an_order_that_two_reads_deny() -> None:
    found = kinds(tx("a", "x+1"), tx("b", "x+2"), tx("c", "x=1,2"), tx("d", "x=2"))
    assert found == ["incompatible-order"]


def test_all_at_once() -> None:
    found = kinds(
        tx("a", "x+1", "y+1"),
        tx("b", "x+2", "y+2"),
        tx("r", "x=1,2", "y=2,1"),
        tx("z", "w+1", status=ABORTED),
        tx("s", "w=1"),
    )
    assert sorted(found) == ["G0", "G1a"]


def test_a_value_appended_twice_is_no_history() -> None:
    with pytest.raises(ValueError, match="twice"):
        find_anomalies([tx("a", "x+1"), tx("b", "x+1")])


def test_a_long_history_is_judged_in_no_time() -> None:
    history = [tx(f"t{n}", f"x+{n}", f"y+{n}") for n in range(3_000)]
    order = [str(n) for n in range(3_000)]
    assert find_anomalies(history, {"x": order, "y": order}) == []
    assert find_anomalies(history, {"x": order, "y": order[::-1]})[0].kind == "G0"
