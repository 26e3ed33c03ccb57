"""The judge of captured feeds, on feeds written by hand: it sees what is lost, twice or wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aegis_cluster.cdc import ChangeSource, Delete, Insert, Position, Truncate, Update
from chaos.cdc.fold import Fold, difference, row_text

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def common(position: int, key: Any = None, **more: Any) -> dict[str, Any]:
    found = {"source": ChangeSource("shop", "", "t"), "position": Position(position, 0)}
    return {**found, "timestamp": NOW, "key": key, **more}


def folded(*changes: Any, once: frozenset[str] = frozenset()) -> Fold:
    fold = Fold(once)
    for change in changes:
        fold.add(change)
    return fold


ROW, OTHER = {"id": 1, "x": 1}, {"id": 1, "x": 2}
INSERT = Insert(new_row=ROW, **common(1, {"id": 1}))
UPDATE = Update(new_row=OTHER, **common(2, {"id": 1}))


def test_rows_are_folded_by_key_and_without_key_counted() -> None:
    assert folded(INSERT, UPDATE).tables() == {"t": {row_text(OTHER): 1}}
    assert folded(INSERT, Delete(**common(2, {"id": 1}))).tables() == {}
    assert folded(INSERT, Truncate(**common(2))).tables() == {}
    twice = folded(*(Insert(new_row=ROW, **common(n)) for n in (1, 2)))
    assert twice.tables() == {"t": {row_text(ROW): 2}}
    twice.add(Delete(old_row=ROW, **common(3)))
    assert twice.tables() == {"t": {row_text(ROW): 1}}


def test_a_lost_change_is_a_difference() -> None:
    database = folded(INSERT, UPDATE).tables()
    assert difference(database, database) == []
    (said,) = difference(folded(INSERT).tables(), database)
    assert said.startswith("t: 1 rows too many and 1 missing")
    assert difference({}, database)


def test_one_and_one_point_zero_are_two_values() -> None:
    assert row_text({"x": 1}) != row_text({"x": 1.0}) != row_text({"x": True})


def test_a_change_that_stands_twice_is_a_problem() -> None:
    assert not folded(INSERT, UPDATE).problems
    assert folded(INSERT, INSERT).problems
    assert folded(UPDATE, INSERT).problems
    by = [Update(new_row=ROW, **common(n, {"id": 1}, transaction_id="7")) for n in (1, 2)]
    assert folded(*by, once=frozenset({"t"})).problems
