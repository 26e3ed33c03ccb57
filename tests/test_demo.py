"""The demo's judgement: it must be able to say no."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


demo = load_demo()

ROWS: list[tuple[str | None, str]] = [
    ("N1", "first"),
    ("N2", "second"),
    ("N1", "third"),
    (None, "fourth"),
    (None, "fifth"),
]


def ledger(rows: list[tuple[str | None, str]]) -> Any:
    found = demo.Ledger()
    for key, value in rows:
        found.add(key, {"value": value})
    return found


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [ROWS[1], ROWS[0], ROWS[2], ROWS[4], ROWS[3]],
        [*ROWS[3:], *ROWS[:3]],
    ],
    ids=["as it was", "other keys between", "rows without a key anywhere"],
)
def test_the_same_rows_in_the_order_of_their_keys(
    rows: list[tuple[str | None, str]],
) -> None:
    demo.compare(ledger(ROWS), ledger(rows))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (ROWS[:-1], "1 rows of the file are missing and 0"),
        (ROWS[1:], "1 rows of the file are missing and 0"),
        ([*ROWS, ROWS[0]], "0 rows of the file are missing and 1 rows are there too often"),
        ([*ROWS, ROWS[3]], "1 rows are there too often"),
        ([*ROWS[:4], ("N1", "other")], "1 rows of the file are missing and 1"),
        ([ROWS[2], *ROWS[:2], *ROWS[3:]], "the rows of 1 aircraft are not in the order"),
        ([("N2", "first"), *ROWS[1:]], "the rows of 2 aircraft are not in the order"),
        ([(None, "first"), *ROWS[1:]], "not in the order"),
        ([*ROWS[:4], ("N3", "fifth")], "rows came back under other keys"),
    ],
)
def test_every_difference_is_found(rows: list[tuple[str | None, str]], says: str) -> None:
    with pytest.raises(demo.ComparisonFailed, match=says):
        demo.compare(ledger(ROWS), ledger(rows))


def test_the_sample_is_what_its_readme_says() -> None:
    found = demo.ledger_of(demo.SAMPLE)
    assert found.rows == 25_000
    assert found.without_key.total() == 107
    assert len(found.by_key) > 2_000
    assert max(found.all_rows().values()) == 1


def test_ports_that_are_chosen_are_free() -> None:
    base = demo.free_base_port(3)
    assert base in demo.BASE_PORTS
    assert demo.can_bind(base + 101)
