"""The coordinator's decisions: a transactional id and what happened go in, commands come out.

Pure. Called on the transactional id as it will be once everything under way has committed. Who asks
is looked at before what is asked (B8 of other systems' outages): a producer that was replaced hears
that it is fenced, whatever state its transaction was in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.transactions.commands import (
    Begin,
    Decide,
    Finish,
    Forget,
    Identity,
    Join,
)
from aegis_cluster.broker.transactions.transaction_table import Outcome, Phase, Transaction
from aegis_cluster.errors import (
    NoOpenTransaction,
    ProducerFenced,
    Throttled,
    TransactionAborted,
)
from aegis_cluster.ids import ProducerId
from aegis_cluster.limits import TRANSACTION_PARTICIPANTS_MAX, TRANSACTIONAL_ID_EXPIRY_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aegis_cluster.broker.transactions.commands import Participant, TransactionCommand

    FreshId = Callable[[], ProducerId]

LAST_EPOCH: Final = 32_765
"""Epochs are int16, and the marker of a transaction carries one more than it."""
NO_IDENTITY: Final = Identity(ProducerId(0), -1)
"""In an answer to a producer that has been replaced."""
BY_PRODUCER: Final = "by its producer"
BY_TIME: Final = "it was open for longer than its time-out"
BY_SUCCESSOR: Final = "another producer has taken its transactional id over"
BY_OPERATOR: Final = "by an operator"


class Unfinished(Exception):
    """Never leaves the coordinator: the request waits until the transaction before has ended."""


def begin(
    name: str,
    one: Transaction | None,
    timeout_ms: int,
    client: str,
    token: str,
    known: Identity | None,
    fresh_id: FreshId,
) -> list[TransactionCommand]:
    """A producer takes the transactional id over. Raises `Unfinished`; commands that end what its
    predecessor left open may come first, and then `Unfinished` at the next call.

    A request that comes again, however late, takes nothing over: raises `ProducerFenced` once its
    producer was replaced, or has used what the first one gave it. Nor does a producer that goes on
    (known: as whom) take the name back from its successor.
    """
    if one is None:
        return [Begin(name, Identity(fresh_id(), 0), timeout_ms, client, token)]
    if token in one.tokens:
        if token == one.tokens[-1] and one.phase is Phase.IDLE:
            return []
        raise _fenced(name, one, one.identity)
    if known is not None and not _is_still(one, known):
        raise _fenced(name, one, known)
    if one.phase is Phase.OPEN:
        reason = BY_SUCCESSOR if known is None else BY_PRODUCER
        return [_decide(one, fresh_id, committed=False, reason=reason)]
    if one.is_decided:
        raise Unfinished("Its last transaction is being ended.")
    return [Begin(name, _after(one.identity, fresh_id), timeout_ms, client, token)]


def join(
    name: str, one: Transaction | None, identity: Identity, wanted: Iterable[Participant]
) -> list[TransactionCommand]:
    """Logs take part in the producer's transaction.

    Raises `ProducerFenced`, `TransactionAborted`, `NoOpenTransaction`, `Throttled`, `Unfinished`.
    """
    if one is not None and one.is_decided and identity == one.follower:
        raise Unfinished("Its last transaction is being ended.")
    one = check_owner(name, one, identity)
    new = tuple(sorted(set(wanted) - set(one.participants)))
    if len(one.participants) + len(new) > TRANSACTION_PARTICIPANTS_MAX:
        raise Throttled(
            f"A transaction of {name!r} has {TRANSACTION_PARTICIPANTS_MAX} partitions, the most it"
            " may have."
        )
    return [Join(name, identity, new)] if new else []


def end(
    name: str,
    one: Transaction | None,
    identity: Identity,
    fresh_id: FreshId,
    *,
    committed: bool,
) -> tuple[list[TransactionCommand], Outcome | None]:
    """The producer ends its transaction, or asks what became of it, which is the same: whatever was
    decided first stands. Raises `ProducerFenced`.
    """
    if one is not None:
        decided = one.outcome_of(identity)
        if decided is not None:
            return [], decided
    one = check_owner(name, one, identity)
    reason = "" if committed else BY_PRODUCER
    decision = _decide(one, fresh_id, committed=committed, reason=reason)
    if one.phase is Phase.IDLE:  # nothing takes part, so there is nothing to wait for
        return [decision, Finish(name, identity)], None
    return [decision], None


def abort(
    one: Transaction | None, name: str, identity: Identity, fresh_id: FreshId
) -> list[TransactionCommand]:
    """An operator ends the transaction that was seen open. Raises `NoOpenTransaction`."""
    if one is None or one.phase is not Phase.OPEN or one.identity != identity:
        state = "is not known" if one is None else f"is {one.phase.name.lower()}"
        raise NoOpenTransaction(
            f"The transactional id {name!r} {state}: it has no open transaction to abort.",
            transactional_id=name,
        )
    return [_decide(one, fresh_id, committed=False, reason=BY_OPERATOR)]


def time_passed(one: Transaction, now_ms: int, fresh_id: FreshId) -> list[TransactionCommand]:
    """now_ms: on the log's own clock, as frames are stamped with it."""
    if one.phase is Phase.OPEN and now_ms >= one.since_ms + one.timeout_ms:
        return [_decide(one, fresh_id, committed=False, reason=BY_TIME)]
    if one.phase is Phase.IDLE and now_ms >= one.touched_ms + TRANSACTIONAL_ID_EXPIRY_MS:
        return [Forget(one.name)]
    return []


def follower_of(one: Transaction, outcome: Outcome) -> Identity:
    """The identity for the next transaction of whoever ended this one, unless it was replaced."""
    if outcome.reason == BY_SUCCESSOR:
        return NO_IDENTITY
    if one.is_decided and one.identity == outcome.identity and one.follower is not None:
        return one.follower
    same = one.identity == (outcome.identity.producer, outcome.identity.epoch + 1)
    renewed = outcome.identity.epoch == LAST_EPOCH and one.identity.epoch == 0
    is_last = one.outcomes[-1] == outcome
    return one.identity if is_last and (same or renewed) else NO_IDENTITY


def _is_still(one: Transaction, known: Identity) -> bool:
    """Nobody else has taken the name over since."""
    outcome = one.outcome_of(known)
    if outcome is None:
        return one.identity == known
    return follower_of(one, outcome) != NO_IDENTITY


def _decide(one: Transaction, fresh_id: FreshId, *, committed: bool, reason: str) -> Decide:
    follower = _after(one.identity, fresh_id)
    return Decide(one.name, one.identity, committed, reason, follower)


def _after(identity: Identity, fresh_id: FreshId) -> Identity:
    """The next epoch, or another id: the old one stays fenced by its last marker (KIP-360)."""
    if identity.epoch < LAST_EPOCH:
        return Identity(identity.producer, identity.epoch + 1)
    return Identity(fresh_id(), 0)


def check_owner(name: str, one: Transaction | None, identity: Identity) -> Transaction:
    """Raise unless this is the producer that has the transactional id, in a transaction that may
    still take something in."""
    if one is None:
        raise ProducerFenced(
            f"The transactional id {name!r} is not known (any more): nobody has used it for long."
            " Make a new producer.",
            transactional_id=name,
        )
    if one.identity == identity and not one.is_decided:
        return one
    outcome = one.outcome_of(identity)
    if outcome is not None and not outcome.committed and outcome.reason != BY_SUCCESSOR:
        raise TransactionAborted(
            f"The transaction of {name!r} was aborted: {outcome.reason}.", transactional_id=name
        )
    if outcome is not None and outcome.committed:
        raise NoOpenTransaction(
            f"The transaction of {name!r} is committed already.", transactional_id=name
        )
    raise _fenced(name, one, identity)


def _fenced(name: str, one: Transaction, identity: Identity) -> ProducerFenced:
    return ProducerFenced(
        f"Another producer has taken the transactional id {name!r} over; this one's epoch"
        f" {identity.epoch} is too late.",
        transactional_id=name,
        have=one.identity.epoch,
        got=identity.epoch,
    )
