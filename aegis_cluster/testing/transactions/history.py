"""What transactional clients did and saw: all that the checks look at.

The idea: every value is written by one transaction only, so whoever sees a value knows whose it is.
Times are microseconds. An outcome is `ok` (committed for sure), `refused` (aborted for sure),
`unknown`, or `open` where nobody has asked any more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.testing.history import Outcome

if TYPE_CHECKING:
    from aegis_cluster.ids import TopicPartition


@dataclass(slots=True, eq=False)
class Append:
    """One record that a transaction has written, or tried to.

    offset: as acknowledged; -1: it was not. amount: of money, where it moves some. order: the
    record of the input that it stands for, where it is a result.
    """

    place: TopicPartition
    value: bytes
    key: bytes | None = None
    offset: int = -1
    amount: int = 0
    order: bytes | None = None


class Poll(NamedTuple):
    """A list as a transaction has read it: everything from the beginning to its end then."""

    place: TopicPartition
    values: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class Transaction:
    """One transaction of one producer. name: the transactional id; client: the process."""

    number: int
    name: str
    client: int
    begun_us: int
    appends: list[Append] = field(default_factory=list)
    polls: list[Poll] = field(default_factory=list)
    outcome: Outcome = Outcome.OPEN
    commit_us: int = -1
    """When its commit was asked for first; -1: it was not."""
    ended_us: int = -1
    reason: str = ""


class Seen(NamedTuple):
    """One record as a reader of committed ones got it."""

    reader: int
    place: TopicPartition
    offset: int
    key: bytes | None
    value: bytes


class Round(NamedTuple):
    """How far a reader had come at some moment: the next offset of each place."""

    reader: int
    positions: dict[TopicPartition, int]


class Position(NamedTuple):
    """A group's committed position: what was said when it was asked for, or when it was moved by
    a transaction whose commit was acknowledged at `at_us` (`asked_us` is -1 then).

    stable: asked for with transactions waited for that may still move it (KIP-447). Another answer
    may lack one that is committed, and acknowledged, while its marker is on its way.
    """

    place: TopicPartition
    offset: int
    asked_us: int
    at_us: int
    stable: bool = True


class Takeover(NamedTuple):
    """A process was told that it has the transactional id now, and all before it are fenced."""

    name: str
    client: int
    asked_us: int
    at_us: int


Rows = list[tuple[int, bytes | None, bytes]]
"""(offset, key, value), by offset."""


@dataclass(slots=True)
class TransactionHistory:
    """Everything, in the order in which it happened."""

    transactions: list[Transaction] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    takeovers: list[Takeover] = field(default_factory=list)
    inputs: dict[TopicPartition, Rows] = field(default_factory=dict)
    """What was to be handled: every record of the input, read after all was healed."""
    final: dict[TopicPartition, Rows] = field(default_factory=dict)
    """What is committed, read after all was healed."""
    compacted: set[TopicPartition] = field(default_factory=set)
    """Here only the latest record of each key has to be there; asked for membership only."""
    lists: set[TopicPartition] = field(default_factory=set)
    """What transactions poll; asked for membership only."""
    one_writer_at_a_time: bool = False
    """Whether something outside (a group with one partition) orders all transactions."""

    def by_value(self) -> dict[bytes, tuple[Transaction, Append]]:
        """Who wrote what."""
        return {
            one.value: (transaction, one)
            for transaction in self.transactions
            for one in transaction.appends
        }

    def last_positions(self) -> dict[int, dict[TopicPartition, int]]:
        """Where each reader stood last."""
        found: defaultdict[int, dict[TopicPartition, int]] = defaultdict(dict)
        for one in self.rounds:
            found[one.reader].update(one.positions)
        return found
