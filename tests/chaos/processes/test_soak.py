"""What `tools/soak` makes of its options and of verdicts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.testing.simulation import Verdict as Outcome
from chaos import __main__ as entry
from chaos.processes import soak
from chaos.processes.checks import CHECKS, Judgement, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = [check.__name__ for check in CHECKS]


def judged(**verdicts: Verdict) -> list[Judgement]:
    return [Judgement(name, verdicts.get(name, Verdict.VALID)) for name in NAMES]


def test_exit_codes_tell_what_was_broken() -> None:
    bad, unknown = Verdict.INVALID, Verdict.UNKNOWN
    assert soak.outcome(judged()) is Outcome.OK
    assert soak.outcome(judged(progress=bad)) is Outcome.LIVENESS
    assert soak.outcome(judged(progress=bad, lost_write=unknown)) is Outcome.LIVENESS
    assert soak.outcome(judged(progress=bad, lost_write=bad)) is Outcome.SAFETY
    assert soak.outcome(judged(crash=bad)) is Outcome.CRASH
    assert soak.outcome(judged(lost_write=unknown)) is Outcome.CRASH
    assert soak.outcome(judged(transactions_progress=bad)) is Outcome.LIVENESS
    late = {"progress", "unseen", "group_unseen", "transactions_progress"}
    promises = set(NAMES) - late - {"crash"}
    assert all(soak.outcome(judged(**{name: bad})) is Outcome.SAFETY for name in promises)


def test_a_kept_history_is_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = [
        {"kind": "topic", "partitions": 1},
        {"kind": "send", "id": "1", "producer": "p", "partition": 0, "value": "a"},
        {"kind": "sent", "id": "1", "outcome": "ok", "offset": 0},
        {"kind": "final", "partition": 0, "records": []},
    ]
    lines = [json.dumps({"t": number, **note}) + "\n" for number, note in enumerate(notes)]
    (tmp_path / "history-run.jsonl").write_text("".join(lines))
    assert soak.main(["--recheck", str(tmp_path)]) == Outcome.SAFETY
    assert "invalid  lost_write" in capsys.readouterr().out


def test_a_directory_without_a_history_has_no_verdict(tmp_path: Path) -> None:
    assert soak.main(["--recheck", str(tmp_path)]) == Outcome.CRASH


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("--minutes 5", "processes"),
        ("--processes --seed 7", "processes"),
        ("--recheck DIR", "processes"),
        ("--seed 7", "simulator"),
        ("--seeds 100", "simulator"),
        ("--minutes 5 --jobs 2", "simulator"),
        ("--simulator --minutes=5", "simulator"),
        ("", "simulator"),
    ],
)
def test_options_choose_the_kind(options: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def remember(name: str) -> Callable[[], int]:
        def main() -> int:
            called.append(name)
            return 0

        return main

    monkeypatch.setattr(sys, "argv", ["soak", *options.split()])
    monkeypatch.setattr("chaos.soak.main", remember("simulator"))
    monkeypatch.setattr("chaos.processes.soak.main", remember("processes"))
    assert entry.main() == 0
    assert called == [kind]
    assert "--simulator" not in sys.argv
