"""The state that a partition of `__transactions` folds to: one transactional id after the other.

Phases of one (KIP-98), and the commands that lead from one to the next:

    IDLE ──join──► OPEN ──decide──► COMMITTING ──finish──► IDLE
      ▲ begin       │ └──decide──► ABORTING ────finish──► IDLE
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.transactions.commands import (
    Begin,
    Decide,
    Finish,
    Forget,
    Identity,
    Join,
    Participant,
    TransactionCommand,
    participants_from_fields,
    participants_to_fields,
)
from aegis_cluster.errors import invariant
from aegis_cluster.ids import ProducerId

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTCOMES_KEPT: Final = 16
"""Of each transactional id: how long a producer may ask what became of one."""
TOKENS_KEPT: Final = 16
"""Of each transactional id: how many take-overs back one that comes again is known."""
SLICE_ROWS: Final = 100


class Phase(IntEnum):
    """Numbers keep their meaning for ever: snapshots hold them."""

    IDLE = 0
    OPEN = 1
    COMMITTING = 2
    """Decided; some log may lack its marker yet."""
    ABORTING = 3


class Outcome(NamedTuple):
    """What became of the transaction of one identity; time_ms: of the decision."""

    identity: Identity
    committed: bool
    reason: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transactional id.

    identity: of its producer now; while decided, of the transaction that is being ended.
    follower: what the producer has afterwards. since_ms: append time of what opened it, 0 while
    none is open. touched_ms: append time of the last command. tokens: of the requests by which the
    last producers took it over, the newest last.
    """

    name: str
    identity: Identity
    timeout_ms: int
    client: str
    phase: Phase = Phase.IDLE
    participants: tuple[Participant, ...] = ()
    follower: Identity | None = None
    outcomes: tuple[Outcome, ...] = ()
    since_ms: int = 0
    touched_ms: int = 0
    tokens: tuple[str, ...] = ()

    @property
    def is_decided(self) -> bool:
        return self.phase in (Phase.COMMITTING, Phase.ABORTING)

    def outcome_of(self, identity: Identity) -> Outcome | None:
        """None: it is open, or was never decided, or that was too long ago."""
        for outcome in reversed(self.outcomes):
            if outcome.identity == identity:
                return outcome
        return None


def moved(
    before: Transaction | None, command: TransactionCommand, time_ms: int
) -> Transaction | None:
    """A transactional id after one command; time_ms: append time of its frame."""
    if isinstance(command, Forget):
        return None
    if isinstance(command, Begin):
        outcomes = () if before is None else before.outcomes
        tokens = () if before is None else before.tokens
        invariant(before is None or before.phase is Phase.IDLE, "taken over while one is open")
        return Transaction(
            command.name,
            command.identity,
            command.timeout_ms,
            command.client,
            outcomes=outcomes,
            touched_ms=time_ms,
            tokens=(*tokens, command.token)[-TOKENS_KEPT:],
        )
    known = before is not None and before.identity == command.identity
    invariant(known, "a command of another producer", at=command.name, got=command.identity)
    assert before is not None
    after = replace(before, touched_ms=time_ms)
    match command:
        case Join(_, _, participants):
            return _joined(after, participants, time_ms)
        case Decide():
            return _decided(after, command, time_ms)
        case Finish():
            return _finished(after)


def _joined(one: Transaction, participants: tuple[Participant, ...], time_ms: int) -> Transaction:
    invariant(not one.is_decided, "a decided transaction takes nobody in", at=one.name)
    together = tuple(sorted({*one.participants, *participants}))
    since_ms = one.since_ms if one.phase is Phase.OPEN else time_ms
    return replace(one, phase=Phase.OPEN, participants=together, since_ms=since_ms)


def _decided(one: Transaction, command: Decide, time_ms: int) -> Transaction:
    invariant(not one.is_decided, "a transaction is decided once", at=one.name)
    outcome = Outcome(one.identity, command.committed, command.reason, time_ms)
    return replace(
        one,
        phase=Phase.COMMITTING if command.committed else Phase.ABORTING,
        follower=command.follower,
        outcomes=(*one.outcomes, outcome)[-OUTCOMES_KEPT:],
    )


def _finished(one: Transaction) -> Transaction:
    invariant(one.is_decided and one.follower is not None, "only what is decided can end")
    assert one.follower is not None
    return replace(
        one, identity=one.follower, phase=Phase.IDLE, participants=(), follower=None, since_ms=0
    )


class TransactionTable:
    """Transactional ids by name."""

    def __init__(self) -> None:
        self.transactions: dict[str, Transaction] = {}

    def apply(self, command: TransactionCommand, time_ms: int) -> None:
        """Fold one committed command; time_ms: append time of its frame."""
        after = moved(self.transactions.get(command.name), command, time_ms)
        if after is None:
            self.transactions.pop(command.name, None)
        else:
            self.transactions[command.name] = after

    # ---- snapshots

    def slices(self) -> Iterator[list[Any]]:
        """The table as it is at the call, in pieces for `add`."""
        return _slices([one for _, one in sorted(self.transactions.items())])

    def add(self, piece: list[Any]) -> None:
        """Take in one piece of a table's `slices`."""
        for fields in piece:
            one = _from_fields(fields)
            self.transactions[one.name] = one


def _slices(rows: list[Transaction]) -> Iterator[list[Any]]:
    for start in range(0, len(rows), SLICE_ROWS):
        yield [_to_fields(one) for one in rows[start : start + SLICE_ROWS]]


def _to_fields(one: Transaction) -> list[Any]:
    return [
        one.name,
        list(one.identity),
        one.timeout_ms,
        one.client,
        int(one.phase),
        participants_to_fields(one.participants),
        None if one.follower is None else list(one.follower),
        [[*o.identity, o.committed, o.reason, o.time_ms] for o in one.outcomes],
        one.since_ms,
        one.touched_ms,
        list(one.tokens),
    ]


def _from_fields(fields: list[Any]) -> Transaction:
    name, identity, timeout_ms, client, phase, participants, *rest = fields[:11]
    follower, outcomes, since_ms, touched_ms, tokens = rest
    return Transaction(
        name,
        Identity(*identity),
        timeout_ms,
        client,
        Phase(phase),
        participants_from_fields(participants),
        None if follower is None else Identity(*follower),
        tuple(
            Outcome(Identity(ProducerId(number), epoch), committed, reason, time_ms)
            for number, epoch, committed, reason, time_ms in outcomes
        ),
        since_ms,
        touched_ms,
        tuple(tokens),
    )
