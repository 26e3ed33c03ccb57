"""How far a group has come: nothing unhandled ever lies below the position."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.handled import Handled


def test_the_position_moves_over_handled_neighbours() -> None:
    one = Handled(5)
    for offset in (5, 6, 7):
        one.handed_out(offset)
    one.handled(6)
    assert one.position == 5
    one.handled(5)
    assert one.position == 7
    one.handled(7)
    assert one.position == 8
    assert one.is_idle


def test_a_transaction_handles_all_before_its_position() -> None:
    one = Handled(0)
    for offset in range(5):
        one.handed_out(offset)
    one.all_before(3)
    assert (one.position, one.is_idle) == (3, False)
    one.all_before(8)
    assert (one.position, one.is_idle) == (8, True)


def test_what_a_filter_leaves_out_is_passed_over() -> None:
    one = Handled(0)
    one.passed(0)
    assert one.position == 1
    one.handed_out(1)
    one.passed(2)
    assert one.position == 1
    one.handled(1)
    assert one.position == 3


@given(st.lists(st.tuples(st.sampled_from(["out", "handled", "again"]), st.integers(0, 30))))
def test_like_a_set_of_open_offsets(steps: list[tuple[str, int]]) -> None:
    one, end, unhandled = Handled(0), 0, set[int]()
    for what, number in steps:
        if what == "out":
            one.handed_out(end)
            unhandled.add(end)
            end += 1
        elif what == "handled":
            one.handled(number)
            unhandled.discard(number)
        elif number < end:
            one.handed_out(number)  # after a nack it is still the same message
        assert one.position == min(unhandled, default=end)
        assert one.is_idle == (not unhandled)
