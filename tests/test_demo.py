"""The demo's judgement: it must be able to say no."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@contextmanager
def running_demo(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process, with its temporary directory below `temporary`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "demo.py")],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def left_behind(temporary: Path) -> list[str]:
    """Files, and processes that were started with a path of that directory."""
    files = [str(path) for path in temporary.iterdir()]
    return files + [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if any(str(temporary) in word for word in process.info["cmdline"] or [])
    ]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(120)
class TestRuns:
    def test_from_beginning_to_end(self, tmp_path: Path) -> None:
        with running_demo(tmp_path) as process:
            said, _ = process.communicate(timeout=110)
        assert process.returncode == 0, said
        assert "25,000 rows acknowledged" in said
        assert "kill -9 for node-" in said
        assert "nothing lost, nothing twice" in said
        assert left_behind(tmp_path) == []

    @pytest.mark.parametrize(
        ("number", "after"),
        [
            (signal.SIGINT, "Starting 3 nodes"),
            (signal.SIGTERM, "Publishing"),
            (signal.SIGINT, "is restarted"),
        ],
        ids=["ctrl-c at the start", "sigterm while publishing", "ctrl-c while reading"],
    )
    def test_it_cleans_up_when_it_is_stopped(
        self, tmp_path: Path, number: signal.Signals, after: str
    ) -> None:
        with running_demo(tmp_path) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if after in line:
                    break
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(60) == 130
        assert "Traceback" not in rest
        wait_until(lambda: left_behind(tmp_path) == [], "everything is gone")
