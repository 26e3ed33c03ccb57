"""The history: one JSON object a line, written before and after whatever a client does.

The idea: several processes write a file each; their times come from one clock of the machine, so
reading them back is a merge. What was invoked and has no end is `unknown`: its client was killed.

The rule it protects: a line is with the kernel before the operation starts, so that a killed client
has told of everything it may have done.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.ids import TopicPartition
from aegis_cluster.testing.history import History, Outcome, Read, Watermark, Write
from aegis_cluster.testing.transactions.history import (
    Append,
    Position,
    Round,
    Seen,
    Transaction,
    TransactionHistory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREFIX: Final = "history-"
TOPIC: Final = "chaos"
"""What is written to by everybody, and read by groups."""


def now_us() -> int:
    """Microseconds of the clock that all processes of this machine share."""
    return time.monotonic_ns() // 1_000


class Recorder:
    """Appends what happens in one process to a file of its own."""

    def __init__(self, directory: Path, party: str) -> None:
        self._file = (directory / f"{PREFIX}{party}.jsonl").open("a", buffering=1)
        self._count = 0

    def note(self, kind: str, **fields: Any) -> None:
        """One line, with the time."""
        self._file.write(json.dumps({"t": now_us(), "kind": kind, **fields}) + "\n")

    def send(self, producer: str, partition: int, value: str) -> str:
        """A write is about to begin; returns its name in the history."""
        self._count += 1
        name = f"{producer}#{self._count}"
        self.note("send", id=name, producer=producer, partition=partition, value=value)
        return name

    def close(self) -> None:
        """End the file."""
        self._file.close()


@dataclass(slots=True)
class Recorded:
    """A history as checkers want it, and what else was written down."""

    history: History = field(default_factory=History)
    partitions: int = 0
    """That the topic has; 0: nobody wrote it down."""
    handled: list[tuple[str, int, int]] = field(default_factory=list)
    """(member of the group, partition, offset), in the order in which messages were handled."""
    unfinished: dict[str, dict[int, int]] = field(default_factory=dict)
    """Reader -> partition -> next offset, of readers that never reached the end after healing."""
    errors: list[str] = field(default_factory=list)
    """What ended a client or a node without anybody's having asked for it."""
    not_healed: list[str] = field(default_factory=list)
    """What did not work again in time after all was healed."""
    faults: list[str] = field(default_factory=list)
    transactions: TransactionHistory = field(default_factory=TransactionHistory)


def load(directory: Path) -> Recorded:
    """The merged history of a directory. Raises ValueError on a line that is no part of one."""
    notes: list[dict[str, Any]] = []
    for file in sorted(directory.glob(f"{PREFIX}*.jsonl")):
        notes += _notes(file)
    notes.sort(key=lambda note: int(note["t"]))
    return _Reader().read(notes)


def _notes(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    # A killed process may leave half a line, at the very end only.
    yield from (json.loads(line) for line in lines[:-1])


def _append_from(row: dict[str, Any]) -> Append:
    return Append(
        TopicPartition(row["topic"], row["partition"]),
        row["value"].encode(),
        amount=row["amount"],
        order=None if row["order"] is None else row["order"].encode(),
    )


class _Reader:
    """Turns notes into a history, in their order."""

    def __init__(self) -> None:
        self._recorded = Recorded()
        self._open: dict[str, Write] = {}
        self._numbers: dict[str, int] = {}
        self._transactions: dict[str, Transaction] = {}

    def read(self, notes: list[dict[str, Any]]) -> Recorded:
        for note in notes:
            self._take(note)
        for write in self._open.values():
            write.outcome = Outcome.UNKNOWN
        if self._recorded.transactions.transactions:
            self._recorded.transactions.inputs = {
                TopicPartition(TOPIC, partition): [(offset, None, value) for offset, value in rows]
                for partition, rows in self._recorded.history.final.items()
            }
        return self._recorded

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def _take(self, note: dict[str, Any]) -> None:
        recorded, history = self._recorded, self._recorded.history
        match note:
            case {"kind": "topic"}:
                recorded.partitions = note["partitions"]
            case {"kind": "send"}:
                write = Write(
                    self._number(note["producer"]),
                    note["partition"],
                    (note["value"].encode(),),
                    note["t"],
                )
                self._open[note["id"]] = write
                history.writes.append(write)
            case {"kind": "sent"}:
                self._end(self._open.pop(note["id"]), note)
            case {"kind": "polled"}:
                reader = self._number(note["reader"])
                history.reads += [
                    Read(reader, partition, offset, value.encode(), note["t"])
                    for partition, offset, value in note["records"]
                ]
            case {"kind": "handled"}:
                member = note["member"]
                recorded.handled += [(member, *place) for place in note["places"]]
            case {"kind": "offsets"}:
                history.watermarks += [
                    Watermark(0, int(key), end, note["asked"], note["t"], linearizable=True)
                    for key, end in note["ends"].items()
                ]
            case {"kind": "denied"}:
                history.denied.append(note["what"])
            case {"kind": "final"}:
                records = [(offset, value.encode()) for offset, value in note["records"]]
                history.final.setdefault(note["partition"], []).extend(records)
            case {"kind": "unfinished"}:
                recorded.unfinished[note["reader"]] = {
                    int(key): offset for key, offset in note["positions"].items()
                }
            case {"kind": "error"}:
                recorded.errors.append(f"{note['who']}: {note['what']}")
            case {"kind": "not_healed"}:
                recorded.not_healed.append(note["what"])
            case {"kind": "fault"}:
                recorded.faults.append(note["what"])
            case _:
                self._take_transactional(note)

    def _take_transactional(self, note: dict[str, Any]) -> None:
        history = self._recorded.transactions
        match note:
            case {"kind": "tx"}:
                made = Transaction(
                    len(history.transactions),
                    note["name"],
                    self._number(note["client"]),
                    note["t"],
                    appends=[_append_from(row) for row in note["rows"]],
                    outcome=Outcome.UNKNOWN,
                )
                if note["id"] in self._transactions:
                    raise ValueError(f"two transactions are called {note['id']}")
                self._transactions[note["id"]] = made
                history.transactions.append(made)
            case {"kind": "tx_stored"}:
                made = self._transactions[note["id"]]
                for one, offset in zip(made.appends, note["offsets"], strict=True):
                    one.offset = offset
            case {"kind": "tx_commit"}:
                self._transactions[note["id"]].commit_us = note["t"]
            case {"kind": "tx_end"}:
                made = self._transactions[note["id"]]
                made.outcome, made.ended_us = Outcome(note["outcome"]), note["t"]
                made.reason = note["reason"]
            case {"kind": "seen"}:
                reader = self._number(note["reader"])
                history.seen += [
                    Seen(reader, TopicPartition(note["topic"], p), offset, None, value.encode())
                    for p, offset, value in note["rows"]
                ]
            case {"kind": "round"}:
                at = {TopicPartition(note["topic"], int(p)): o for p, o in note["at"].items()}
                history.rounds.append(Round(self._number(note["reader"]), at))
            case {"kind": "position"}:
                history.positions += [
                    Position(TopicPartition(TOPIC, p), offset, note["asked"], note["t"])
                    for p, offset in note["places"]
                ]
            case {"kind": "committed"}:
                for number in note["partitions"]:
                    history.final[TopicPartition(note["topic"], number)] = [
                        (offset, None, value.encode())
                        for p, offset, value in note["rows"]
                        if p == number
                    ]
            case _:
                raise ValueError(f"{note} is no part of a history")

    def _end(self, write: Write, note: dict[str, Any]) -> None:
        write.outcome = Outcome(note["outcome"])
        write.base_offset = note.get("offset", -1)
        write.ended_us = note["t"]
        write.reason = note.get("reason", "")
