"""Every check says valid to a history that keeps its promise, and invalid to one that breaks it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chaos.processes.checks import CHECKS, Judgement, Verdict, judge, overall
from chaos.processes.recording import Recorded, load
from chaos.processes.run import recheck

if TYPE_CHECKING:
    from pathlib import Path

Note = dict[str, Any]


def send(name: str, producer: str, value: str, partition: int = 0) -> Note:
    return {
        "kind": "send",
        "id": name,
        "producer": producer,
        "partition": partition,
        "value": value,
    }


def sent(name: str, outcome: str, offset: int = -1) -> Note:
    return {"kind": "sent", "id": name, "outcome": outcome, "offset": offset}


def polled(reader: str, *records: tuple[int, int, str]) -> Note:
    return {"kind": "polled", "reader": reader, "records": list(records)}


def handled(member: str, *offsets: int) -> Note:
    return {"kind": "handled", "member": member, "places": [[0, offset] for offset in offsets]}


def final(*values: str, partition: int = 0) -> Note:
    return {"kind": "final", "partition": partition, "records": list(enumerate(values))}


def good() -> list[Note]:
    """Two producers, two readers, one refusal, one write whose outcome nobody knows."""
    return [
        {"kind": "topic", "partitions": 1},
        send("1", "p", "a"),
        send("2", "p", "b"),
        sent("1", "ok", 0),
        sent("2", "ok", 1),
        polled("r", (0, 0, "a"), (0, 1, "b")),
        send("3", "q", "c"),
        sent("3", "refused"),
        send("4", "q", "d"),
        sent("4", "unknown"),
        send("5", "q", "e"),
        sent("5", "ok", 3),
        {"kind": "offsets", "asked": 1_105, "ends": {"0": 4}},
        polled("s", (0, 0, "a")),
        polled("s", (0, 1, "b"), (0, 2, "d"), (0, 3, "e")),
        send("6", "u", "never answered"),
        final("a", "b", "d", "e"),
    ]


def recorded(directory: Path, notes: list[Note]) -> Recorded:
    """As two processes would have written it, a microsecond or more apart."""
    timed = [{"t": 1_000 + 10 * number, **note} for number, note in enumerate(notes)]
    for party in (0, 1):
        lines = [json.dumps(note) + "\n" for note in timed[party::2]]
        (directory / f"history-{party}.jsonl").write_text("".join(lines))
    return load(directory)


def verdicts(directory: Path, notes: list[Note]) -> dict[str, Verdict]:
    return {one.check: one.verdict for one in judge(recorded(directory, notes))}


def invalid(directory: Path, notes: list[Note]) -> set[str]:
    found = verdicts(directory, notes)
    return {name for name, verdict in found.items() if verdict is Verdict.INVALID}


def without(kind: str) -> list[Note]:
    return [note for note in good() if note["kind"] != kind]


def test_a_good_history_is_valid(tmp_path: Path) -> None:
    assert set(verdicts(tmp_path, good()).values()) == {Verdict.VALID}


def test_unknown_may_or_may_not_have_happened(tmp_path: Path) -> None:
    notes = [note for note in good() if note["kind"] not in ("polled", "offsets", "final")]
    notes = [*notes, final("a", "b", "never answered", "e")]
    assert invalid(tmp_path, notes) == set()


def test_a_group_may_handle_again_what_was_not_committed(tmp_path: Path) -> None:
    notes = [*good(), handled("m", 0, 1), handled("n", 1, 2), handled("m", 2, 3)]
    assert set(verdicts(tmp_path, notes).values()) == {Verdict.VALID}


BROKEN: list[tuple[str, list[Note], set[str]]] = [
    (
        "an acknowledged value is gone",
        [*without("final"), final("a", "b", "d")],
        {"lost_write", "read_above_commit"},
    ),
    (
        "it is gone, and nobody had read it",
        [
            *[note for note in without("final") if note["kind"] not in ("polled", "offsets")],
            final("a", "b", "d"),
        ],
        {"lost_write"},
    ),
    (
        "a value stands twice",
        [*without("final"), final("a", "b", "d", "e", "a")],
        {"duplicate", "nonmonotonic_send"},
    ),
    (
        "two values at one offset, for two readers",
        [*good(), polled("t", (0, 0, "a"), (0, 1, "d"))],
        {"inconsistent_offsets", "duplicate", "lost_write", "read_above_commit"},
    ),
    (
        "a later value stands before an earlier one",
        [
            *[note for note in without("final") if note["kind"] not in ("polled", "offsets")],
            send("7", "q", "f"),
            sent("7", "ok", 2),
            final("a", "b", "f", "e", "d"),
        ],
        {"nonmonotonic_send"},
    ),
    ("a reader jumps", [*good(), polled("t", (0, 0, "a"), (0, 2, "d"))], {"poll_skip"}),
    ("a reader begins late", [*good(), polled("t", (0, 1, "b"))], {"poll_skip"}),
    ("a reader goes back", [*good(), polled("r", (0, 0, "a"))], {"nonmonotonic_poll"}),
    ("a reader gets one twice", [*good(), polled("r", (0, 1, "b"))], {"nonmonotonic_poll"}),
    (
        "a refused value is there",
        [*without("final"), final("a", "b", "d", "e", "c")],
        {"aborted_read", "nonmonotonic_send"},
    ),
    (
        "nobody wrote it",
        [*without("final"), final("a", "b", "d", "e", "x")],
        {"aborted_read"},
    ),
    (
        "what a reader got vanished, and nobody had been promised it",
        [*without("offsets")[:-1], polled("s", (0, 4, "never answered")), good()[-1]],
        {"read_above_commit", "lost_write"},
    ),
    (
        "an end is older than what was known when it was asked for",
        [*good(), {"kind": "offsets", "asked": 1_161, "ends": {"0": 3}}],
        {"stale_read"},
    ),
    (
        "a place that exists is denied",
        [*good(), {"kind": "denied", "what": "no such offset"}],
        {"denied_read"},
    ),
    (
        "offsets have a hole",
        [
            *without("final"),
            {**final(), "records": [[0, "a"], [1, "b"], [2, "d"], [3, "e"], [5, "never answered"]]},
        ],
        {"hole"},
    ),
    (
        "a reader never gets to the end",
        [*good(), {"kind": "unfinished", "reader": "s", "positions": {"0": 3}}],
        {"unseen"},
    ),
    (
        "a member begins behind what anybody had handled",
        [*good(), handled("m", 0, 1), handled("n", 3), handled("m", 2)],
        {"group_skip"},
    ),
    (
        "the group never gets to the end",
        [*good(), handled("m", 0, 1), handled("n", 1, 2)],
        {"group_unseen"},
    ),
    (
        "the cluster does not work after healing",
        [*good(), {"kind": "not_healed", "what": "chaos/0 has no leader"}],
        {"progress"},
    ),
    ("something crashed", [*good(), {"kind": "error", "who": "node-1", "what": "boom"}], {"crash"}),
]


@pytest.mark.parametrize(
    ("notes", "expected"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_what_is_broken_is_invalid(tmp_path: Path, notes: list[Note], expected: set[str]) -> None:
    assert invalid(tmp_path, notes) == expected


def test_every_check_has_an_invalid_history() -> None:
    """Those of transactions have theirs in `tests/testing/transactions`."""
    names = {check.__name__ for check in CHECKS}
    mine = {name for name in names if not name.startswith("transactions_")}
    assert set.union(*(row[2] for row in BROKEN)) == mine


def row(topic: str, value: str, *, amount: int = 0, order: str | None = None) -> Note:
    return {"topic": topic, "partition": 0, "value": value, "amount": amount, "order": order}


def transactional(outcome: str = "ok") -> list[Note]:
    """One order, handled in one transaction; a reader has seen it all."""
    rows = [
        row("accounts", "from", amount=-5),
        row("accounts", "to", amount=5),
        row("results", "result", order="a"),
    ]
    seen = [[0, 0, "from"], [0, 1, "to"]]
    return [
        *good(),
        {"kind": "tx", "id": "t", "name": "w", "client": "c", "rows": rows},
        {"kind": "tx_stored", "id": "t", "offsets": [0, 1, 0]},
        {"kind": "tx_commit", "id": "t"},
        {"kind": "tx_end", "id": "t", "outcome": outcome, "reason": ""},
        {"kind": "position", "asked": -1, "places": [[0, 1]]},
        {"kind": "seen", "reader": "audit", "topic": "accounts", "rows": seen},
        {"kind": "round", "reader": "audit", "topic": "accounts", "at": {"0": 2}},
        {"kind": "committed", "topic": "accounts", "partitions": [0], "rows": seen},
        {"kind": "committed", "topic": "results", "partitions": [0], "rows": [[0, 0, "result"]]},
    ]


def test_a_history_of_transactions(tmp_path: Path) -> None:
    assert invalid(tmp_path, transactional()) == set()
    assert invalid(tmp_path, transactional("unknown")) == {"transactions_progress"}
    aborted = invalid(tmp_path, transactional("refused"))
    assert {"transactions_aborted_read", "transactions_progress"} <= aborted


def test_an_order_that_was_not_handled(tmp_path: Path) -> None:
    notes = [*transactional(), {"kind": "position", "asked": -1, "places": [[0, 2]]}]
    assert invalid(tmp_path, notes) == {"transactions_processed_once"}


def test_without_a_last_read_transactions_are_not_judged(tmp_path: Path) -> None:
    notes = [note for note in transactional() if note["kind"] != "committed"]
    found = verdicts(tmp_path, notes)
    assert found["transactions_balance"] is Verdict.UNKNOWN


def test_without_a_last_read_nothing_is_known_to_be_kept(tmp_path: Path) -> None:
    found = verdicts(tmp_path, without("final"))
    unknown = {name for name, verdict in found.items() if verdict is Verdict.UNKNOWN}
    assert unknown == {"lost_write", "nonmonotonic_send", "read_above_commit", "hole", "unseen"}
    assert overall(judge(load(tmp_path))) is Verdict.UNKNOWN


def test_a_partition_that_was_not_read_is_unknown_too(tmp_path: Path) -> None:
    notes = [{"kind": "topic", "partitions": 2}, *good()[1:]]
    assert verdicts(tmp_path, notes)["lost_write"] is Verdict.UNKNOWN


def test_a_history_without_a_write_proves_nothing(tmp_path: Path) -> None:
    found = verdicts(tmp_path, [{"kind": "topic", "partitions": 1}, final()])
    assert found["progress"] is Verdict.UNKNOWN


def test_a_check_that_raises_is_unknown(tmp_path: Path) -> None:
    def raises(_: Recorded) -> list[str]:
        raise RuntimeError("the check is wrong")

    (found,) = judge(recorded(tmp_path, good()), [raises])
    assert found.verdict is Verdict.UNKNOWN
    assert "the check is wrong" in found.found[0]


def test_the_worst_verdict_counts() -> None:
    valid, bad, unknown = (
        Judgement("x", verdict) for verdict in (Verdict.VALID, Verdict.INVALID, Verdict.UNKNOWN)
    )
    assert overall([valid, unknown, bad]) is Verdict.INVALID
    assert overall([valid, unknown]) is Verdict.UNKNOWN
    assert overall([valid]) is Verdict.VALID
    assert overall([]) is Verdict.UNKNOWN


def test_half_a_line_of_a_killed_client_is_left_out(tmp_path: Path) -> None:
    recorded(tmp_path, good())
    with (tmp_path / "history-1.jsonl").open("a") as file:
        file.write('{"t": 2000, "kind": "se')
    assert overall(judge(load(tmp_path))) is Verdict.VALID


def test_a_kept_history_is_judged_again(tmp_path: Path) -> None:
    recorded(tmp_path, [*without("final"), final("a", "b")])
    assert overall(recheck(tmp_path)) is Verdict.INVALID
    assert "lost_write" in (tmp_path / "verdicts.txt").read_text()
