"""One partition of `__transactions` while this shard leads it: requests, time, and markers.

The shell around `decisions`: it appends what is decided, answers once that is committed, and brings
what is committed to its end: markers to all logs that take part, again and again until each has
confirmed its own, also after a change of coordinator.

The rules it protects: no answer leaves that rests on something uncommitted; no marker leaves before
the decision that it carries is committed.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import answer, refuse
from aegis_cluster.broker.transactions import decisions
from aegis_cluster.broker.transactions.commands import Finish, Identity, encode_command
from aegis_cluster.broker.transactions.decisions import Unfinished
from aegis_cluster.broker.transactions.markers import Errand
from aegis_cluster.broker.transactions.transaction_table import Phase
from aegis_cluster.errors import (
    AegisError,
    NoOpenTransaction,
    NotReady,
    Refused,
)
from aegis_cluster.wire.batch import batch_header, encode_batch
from aegis_cluster.wire.markers import Marker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.transactions.commands import Participant, TransactionCommand
    from aegis_cluster.broker.transactions.markers import MarkerSender
    from aegis_cluster.broker.transactions.transaction_stm import TransactionFold
    from aegis_cluster.ids import GroupId, LogIndex, ProducerId

    Verified = Callable[[AegisError | None], None]

EXPIRE_EVERY_MS: Final = 100
FORGET_EVERY_MS: Final = 60_000
RETRY_MS: Final = 100
"""A marker that did not get through is sent again after so long."""
PATIENCE_MS: Final = 2_000
"""Whoever ends a transaction hears of the decision after so long, even if some log is without a
leader and lacks its marker: it is decided all the same."""


class _Decided:
    """Begins to send markers once the decision is committed; a later leader does it otherwise."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done

    def committed(self) -> None:
        self._done()

    def lost(self, error: AegisError) -> None:
        """A later leader's log says whether it was decided."""


class _Read:
    """Answers once this replica is known to have led after the question."""

    def __init__(self, answer: Callable[[], None], done: Verified) -> None:
        self._answer = answer
        self._done = done

    def committed(self) -> None:
        self._answer()

    def lost(self, error: AegisError) -> None:
        self._done(error)


@dataclass(slots=True)
class _Ending:
    """A decided transaction on its way to the end."""

    identity: Identity
    left: set[Participant]
    under_way: set[Participant] = field(default_factory=set)
    retry_ms: int = 0


@dataclass(slots=True)
class _Waiting:
    """A request that goes on when the transaction before has ended."""

    exchange: Exchange
    deadline_ms: int
    again: Callable[[], None]


class TransactionCoordinator:
    """Transactional ids of one partition, for one term of our leadership."""

    def __init__(
        self,
        partition: Partition,
        fold: TransactionFold,
        *,
        sender: MarkerSender,
        fresh_id: Callable[[], ProducerId],
        now_ms: int,
    ) -> None:
        self.partition = partition
        self.fold = fold
        self.term = partition.replica.term
        self._sender = sender
        self._fresh_id = fresh_id
        self._now_ms = now_ms
        self._look_at_ms = now_ms
        self._look_at_all_ms = now_ms + FORGET_EVERY_MS
        self._endings: dict[str, _Ending] = {}
        self._askers: defaultdict[str, list[_Waiting]] = defaultdict(list)
        """Who asked for the end, and hears of it when all markers stand."""
        self._waiting: defaultdict[str, list[_Waiting]] = defaultdict(list)
        for name in sorted(fold.table.transactions):
            self._bring_to_its_end(name)

    # ---- requests: each answers through its exchange, or raises its refusal

    def begin(
        self,
        exchange: Exchange,
        name: str,
        timeout_ms: int,
        client: str,
        token: str,
        known: Identity | None,
        *,
        deadline_ms: int,
    ) -> None:
        """[] -> [producer id, epoch]. Waits until what a predecessor left open has ended.

        known: what the producer was, if it goes on after it lost sight of its last transaction.
        """

        def again() -> None:
            self.begin(exchange, name, timeout_ms, client, token, known, deadline_ms=deadline_ms)

        try:
            one = self.fold.get(name)
            commands = decisions.begin(name, one, timeout_ms, client, token, known, self._fresh_id)
            self._append(name, commands)
            if one is not None and one.phase is Phase.OPEN:
                raise Unfinished("Its predecessor's transaction is being ended.")
        except Unfinished:
            self._waiting[name].append(_Waiting(exchange, deadline_ms, again))
            return
        except Refused as refusal:
            self._refuse(name, exchange, refusal)
            return
        now = self.fold.get(name)
        self._answer(name, exchange, [] if now is None else [*now.identity])

    def join(
        self,
        exchange: Exchange,
        name: str,
        identity: Identity,
        participants: Sequence[Participant],
        *,
        deadline_ms: int,
    ) -> None:
        """[] once all of them are known to take part."""

        def again() -> None:
            self.join(exchange, name, identity, participants, deadline_ms=deadline_ms)

        try:
            commands = decisions.join(name, self.fold.get(name), identity, participants)
            self._append(name, commands)
        except Unfinished:
            self._waiting[name].append(_Waiting(exchange, deadline_ms, again))
        except Refused as refusal:
            self._refuse(name, exchange, refusal)
        else:
            self._answer(name, exchange, [])

    def end(self, exchange: Exchange, name: str, identity: Identity, *, committed: bool) -> None:
        """[committed, reason, producer id, epoch]: what was decided, perhaps long ago and
        otherwise, and the identity for the next transaction (epoch -1: replaced meanwhile)."""
        one = self.fold.get(name)
        try:
            commands, decided = decisions.end(
                name, one, identity, self._fresh_id, committed=committed
            )
            self._append(name, commands)
        except Refused as refusal:
            self._refuse(name, exchange, refusal)
            return
        after = self.fold.get(name)
        outcome = decided or (after.outcome_of(identity) if after is not None else None)
        if after is None or outcome is None:
            raise NotReady("The transaction is not known; ask again.")
        fields = [outcome.committed, outcome.reason, *decisions.follower_of(after, outcome)]
        if not after.is_decided:
            self._answer(name, exchange, fields)
            return

        def reply() -> None:
            self._answer_decided(name, identity, exchange, fields)

        self._askers[name].append(_Waiting(exchange, self._now_ms + PATIENCE_MS, reply))

    def abort(self, exchange: Exchange, name: str, identity: Identity, *, deadline_ms: int) -> None:
        """[] once what was open is aborted, markers and all."""
        try:
            one = self.fold.get(name)
            self._append(name, decisions.abort(one, name, identity, self._fresh_id))
        except Refused as refusal:
            self._refuse(name, exchange, refusal)
            return

        def reply() -> None:
            self._answer(name, exchange, [])

        self._waiting[name].append(_Waiting(exchange, deadline_ms, reply))

    def verify(self, name: str, identity: Identity, log: GroupId, done: Verified) -> None:
        """Whether this transaction is open with this log in it, as far as that is committed; no is
        said only after a round of read index. Raises `NotLeader`."""
        if self._takes_part(name, identity, log):
            done(None)
            return

        def answer() -> None:
            if self._takes_part(name, identity, log):
                done(None)
                return
            try:
                decisions.check_owner(name, self.fold.table.transactions.get(name), identity)
            except Refused as refusal:
                done(refusal)
            else:
                done(
                    NoOpenTransaction(
                        f"The open transaction of {name!r} has not this partition in it; have it"
                        " join first.",
                        transactional_id=name,
                    )
                )

        self.partition.wait_for_read(_Read(answer, done))

    def _takes_part(self, name: str, identity: Identity, log: GroupId) -> bool:
        one = self.fold.table.transactions.get(name)
        if one is None or one.identity != identity or one.phase is not Phase.OPEN:
            return False
        return any(participant.log == log for participant in one.participants)

    def lacking_markers(self, name: str) -> frozenset[Participant]:
        """Of a decided transaction: the logs that have not confirmed their marker to us."""
        ending = self._endings.get(name)
        return frozenset() if ending is None else frozenset(ending.left)

    # ---- time

    def tick(self, now_ms: int) -> None:
        """End what is open for too long; send again what did not get through; let people go."""
        self._now_ms = now_ms
        if now_ms < self._look_at_ms:
            return
        self._look_at_ms = now_ms + EXPIRE_EVERY_MS
        self._let_time_pass(now_ms)
        for name, ending in list(self._endings.items()):
            self._finish_if_done(name, ending)
            if ending.left - ending.under_way and ending.retry_ms <= now_ms:
                self._send(name, ending)
        self._let_go(now_ms)

    def close(self) -> None:
        """Leadership is lost: those who wait are sent to the next coordinator."""
        for waiting in (*self._waiting.values(), *self._askers.values()):
            for one in waiting:
                one.exchange.refuse(self.partition.not_leader())
        # Markers that are confirmed to us late end nothing: we may lead again, by another of these.
        self._endings.clear()

    def _let_time_pass(self, now_ms: int) -> None:
        log_ms = self.partition.now()
        look_at_all = now_ms >= self._look_at_all_ms
        if look_at_all:
            self._look_at_all_ms = now_ms + FORGET_EVERY_MS
        for name, one in list(self.fold.table.transactions.items()):
            if (one.phase is Phase.OPEN or look_at_all) and self.fold.get(name) is one:
                with suppress(Refused):  # a later tick decides again
                    self._append(name, decisions.time_passed(one, log_ms, self._fresh_id))

    def _let_go(self, now_ms: int) -> None:
        for name, waiting in list(self._waiting.items()):
            late = [one for one in waiting if one.deadline_ms <= now_ms]
            self._waiting[name] = [one for one in waiting if one.deadline_ms > now_ms]
            for one in late:
                one.exchange.refuse(NotReady(f"The last transaction of {name!r} has not ended."))
            if not self._waiting[name]:
                del self._waiting[name]
        for name, waiting in list(self._askers.items()):
            late = [one for one in waiting if one.deadline_ms <= now_ms]
            self._askers[name] = [one for one in waiting if one.deadline_ms > now_ms]
            for one in late:
                one.again()
            if not self._askers[name]:
                del self._askers[name]

    # ---- bringing what is decided to its end

    def _bring_to_its_end(self, name: str) -> None:
        """Send the markers of a transaction whose decision is committed."""
        one = self.fold.table.transactions.get(name)
        if one is None or not one.is_decided or name in self._endings:
            return
        ending = self._endings[name] = _Ending(one.identity, set(one.participants))
        self._send(name, ending)

    def _send(self, name: str, ending: _Ending) -> None:
        one = self.fold.table.transactions.get(name)
        if one is None or one.identity != ending.identity or not one.is_decided:
            self._endings.pop(name, None)
            return
        ending.retry_ms = self._now_ms + RETRY_MS
        marker = Marker(
            one.identity.producer,
            one.identity.epoch + 1,
            one.phase is Phase.COMMITTING,
            self.term % 2**31,
        )
        errands = [
            Errand(participant, marker, self._note(name, ending, participant))
            for participant in sorted(ending.left - ending.under_way)
        ]
        ending.under_way.update(errand.participant for errand in errands)
        self._sender.send(errands)
        self._finish_if_done(name, ending)

    def _note(self, name: str, ending: _Ending, participant: Participant) -> Callable[[bool], None]:
        def done(written: bool) -> None:
            ending.under_way.discard(participant)
            if written:
                ending.left.discard(participant)
                self._finish_if_done(name, ending)

        return done

    def _finish_if_done(self, name: str, ending: _Ending) -> None:
        if ending.left or self._endings.get(name) is not ending:
            return
        try:
            self._append(name, [Finish(name, ending.identity)])
        except Refused:
            return  # a later tick, or the next coordinator, finds it done
        del self._endings[name]
        for one in self._askers.pop(name, []):
            one.again()
        for one in self._waiting.pop(name, []):
            try:
                one.again()
            except AegisError as error:
                one.exchange.refuse(error)

    # ---- the log

    def _append(self, name: str, commands: Sequence[TransactionCommand]) -> None:
        if not commands:
            return
        now_ms = self.partition.now()
        batch = encode_batch([(now_ms, None, encode_command(one), []) for one in commands])
        placed = self.partition.append(batch, batch_header(batch))
        self.fold.appended(placed.index, name, commands, placed.time_ms)
        one = self.fold.get(name)
        if one is not None and one.is_decided:
            self._after_commit(placed.index, name)

    def _after_commit(self, index: LogIndex, name: str) -> None:
        decided = _Decided(lambda: self._bring_to_its_end(name))
        self.partition.wait_for(index, decided)

    def _answer(self, name: str, exchange: Exchange, fields: list[Any]) -> None:
        answer(self.partition, self.fold.index_of(name), exchange, fields, own=True)

    def _answer_decided(
        self, name: str, identity: Identity, exchange: Exchange, fields: list[Any]
    ) -> None:
        """The decision is what counts; what has come after it need not be committed."""
        one = self.fold.table.transactions.get(name)
        if one is not None and one.outcome_of(identity) is not None:
            exchange.reply(fields)
        else:
            self._answer(name, exchange, fields)

    def _refuse(self, name: str, exchange: Exchange, error: Refused) -> None:
        refuse(self.partition, self.fold.index_of(name), exchange, error)
