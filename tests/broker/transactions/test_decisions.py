"""What requests and time lead to, and what the log of it folds to."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker.groups.commands import CommitOffsets, DropGroup, PendOffsets
from aegis_cluster.broker.groups.commands import decode_command as decode_group_command
from aegis_cluster.broker.groups.commands import encode_command as encode_group_command
from aegis_cluster.broker.groups.group_table import GroupTable
from aegis_cluster.broker.transactions import decisions
from aegis_cluster.broker.transactions.commands import (
    Begin,
    Finish,
    Identity,
    Participant,
    decode_command,
    encode_command,
)
from aegis_cluster.broker.transactions.transaction_table import (
    OUTCOMES_KEPT,
    Phase,
    Transaction,
    TransactionTable,
)
from aegis_cluster.errors import NoOpenTransaction, ProducerFenced, TransactionAborted
from aegis_cluster.ids import GroupId, ProducerId, RecordOffset, TopicPartition
from aegis_cluster.limits import TRANSACTIONAL_ID_EXPIRY_MS

if TYPE_CHECKING:
    from aegis_cluster.broker.transactions.commands import TransactionCommand
    from aegis_cluster.broker.transactions.transaction_table import Outcome

ONE = Participant(TopicPartition("t", 0), GroupId(5))
TWO = Participant(TopicPartition("t", 1), GroupId(6))
TIMEOUT_MS = 10_000
NOBODY = Identity(ProducerId(0), 0)


class Coordinator:
    """Decisions applied at once, through their bytes."""

    def __init__(self) -> None:
        self.table = TransactionTable()
        self.now_ms = 1_000
        self._ids = itertools.count(100)
        self._tokens = itertools.count()

    @property
    def one(self) -> Transaction:
        return self.table.transactions["x"]

    def phase(self) -> Phase:
        return self.one.phase

    def fresh_id(self) -> ProducerId:
        return ProducerId(next(self._ids))

    def _apply(self, commands: list[TransactionCommand]) -> None:
        for command in commands:
            assert decode_command(encode_command(command)) == command
            self.table.apply(command, self.now_ms)

    def begin(self, token: str = "", known: Identity | None = None) -> Identity:
        token = token or f"token-{next(self._tokens)}"
        while True:
            one = self.table.transactions.get("x")
            try:
                commands = decisions.begin(
                    "x", one, TIMEOUT_MS, "here", token, known, self.fresh_id
                )
            except decisions.Unfinished:
                self.finish()
                continue
            self._apply(commands)
            if not commands or isinstance(commands[-1], Begin):
                return self.one.identity

    def join(self, identity: Identity, *participants: Participant) -> None:
        one = self.table.transactions.get("x")
        self._apply(decisions.join("x", one, identity, participants))

    def end(self, identity: Identity, *, committed: bool = True) -> Outcome:
        one = self.table.transactions.get("x")
        commands, outcome = decisions.end("x", one, identity, self.fresh_id, committed=committed)
        self._apply(commands)
        found = outcome or self.one.outcome_of(identity)
        assert found is not None
        return found

    def finish(self) -> None:
        self._apply([Finish("x", self.one.identity)])

    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self._apply(decisions.time_passed(self.one, self.now_ms, self.fresh_id))


def test_every_transaction_has_an_epoch_of_its_own() -> None:
    it = Coordinator()
    identity = it.begin()
    for number in range(3):
        assert identity == (100, number)
        it.join(identity, ONE)
        it.join(identity, ONE, TWO)
        assert set(it.one.participants) == {ONE, TWO}
        assert it.end(identity).committed
        assert it.phase() is Phase.COMMITTING
        it.finish()
        assert not it.one.participants
        identity = it.one.identity


def test_what_was_decided_stands_whatever_is_asked_later() -> None:
    it = Coordinator()
    identity = it.begin()
    it.join(identity, ONE)
    assert it.end(identity, committed=True).committed
    assert it.end(identity, committed=False).committed
    it.finish()
    assert it.end(identity, committed=False).committed
    second = it.begin()
    assert it.end(identity, committed=False).committed, "also to one that was replaced"
    it.join(second, ONE)
    assert not it.end(second, committed=False).committed
    assert not it.end(second, committed=True).committed


def test_a_successor_aborts_and_fences() -> None:
    it = Coordinator()
    old = it.begin()
    it.join(old, ONE)
    new = it.begin()
    assert new.epoch > old.epoch + 1, "not even the marker's epoch is its own"
    assert it.end(old).reason == decisions.BY_SUCCESSOR
    for identity in (old, Identity(old.producer, old.epoch + 1)):
        with pytest.raises(ProducerFenced):
            it.join(identity, ONE)
    with pytest.raises(ProducerFenced):
        it.end(Identity(old.producer, old.epoch + 1))
    it.join(new, ONE)


def test_a_take_over_that_comes_again_takes_nothing_over() -> None:
    it = Coordinator()
    first = it.begin("one")
    assert it.begin("one") == first
    it.join(first, ONE)
    with pytest.raises(ProducerFenced):
        it.begin("one")
    assert it.phase() is Phase.OPEN
    second = it.begin("two")
    with pytest.raises(ProducerFenced):
        it.begin("one")
    it.join(second, ONE)


def test_one_that_goes_on_takes_nothing_back_from_its_successor() -> None:
    it = Coordinator()
    first = it.begin()
    it.join(first, ONE)
    second = it.begin(known=first)
    assert it.end(first).reason == decisions.BY_PRODUCER
    it.join(second, ONE)
    it.end(second)
    third = it.begin(known=second)
    it.begin()
    for lost in (first, second, third):
        with pytest.raises(ProducerFenced):
            it.begin(known=lost)


def test_time_aborts_what_is_open_and_nothing_else() -> None:
    it = Coordinator()
    identity = it.begin()
    it.wait(TIMEOUT_MS)
    assert it.phase() is Phase.IDLE
    it.join(identity, ONE)
    it.wait(TIMEOUT_MS - 1)
    it.join(identity, TWO)
    assert it.phase() is Phase.OPEN
    it.wait(1)
    assert it.phase() is Phase.ABORTING
    with pytest.raises(TransactionAborted):
        it.join(identity, ONE)
    outcome = it.end(identity)
    assert (outcome.committed, outcome.reason) == (False, decisions.BY_TIME)
    it.finish()
    it.wait(TRANSACTIONAL_ID_EXPIRY_MS)
    assert it.table.transactions == {}
    with pytest.raises(ProducerFenced):
        it.join(identity, ONE)


def test_an_operator_ends_only_what_is_open() -> None:
    it = Coordinator()
    with pytest.raises(NoOpenTransaction):
        decisions.abort(None, "x", NOBODY, it.fresh_id)
    identity = it.begin()
    with pytest.raises(NoOpenTransaction):
        decisions.abort(it.one, "x", identity, it.fresh_id)
    it.join(identity, ONE)
    with pytest.raises(NoOpenTransaction):
        decisions.abort(it.one, "x", NOBODY, it.fresh_id)
    assert len(decisions.abort(it.one, "x", identity, it.fresh_id)) == 1


def test_an_end_of_nothing_also_uses_up_the_epoch() -> None:
    it = Coordinator()
    identity = it.begin()
    assert not it.end(identity, committed=False).committed
    assert it.phase() is Phase.IDLE
    with pytest.raises(TransactionAborted):
        it.join(identity, ONE)  # a late one: it opens nothing


def test_the_last_epoch_makes_way_for_another_id() -> None:
    it = Coordinator()
    near = Identity(it.fresh_id(), decisions.LAST_EPOCH - OUTCOMES_KEPT)
    it.table.apply(Begin("x", near, TIMEOUT_MS, "here", "token"), it.now_ms)
    for _ in range(OUTCOMES_KEPT):
        it.end(it.one.identity)
    last = it.one.identity
    assert last == (100, decisions.LAST_EPOCH)
    it.join(last, ONE)
    it.end(last)
    it.finish()
    assert it.one.identity == (101, 0)
    assert len(it.one.outcomes) == OUTCOMES_KEPT


def test_a_snapshot_holds_all_of_it() -> None:
    it = Coordinator()
    identity = it.begin()
    it.end(identity, committed=False)
    it.join(it.one.identity, ONE, TWO)
    it.end(it.one.identity)
    copy = TransactionTable()
    for piece in it.table.slices():
        copy.add(piece)
    assert copy.transactions == it.table.transactions


# --- positions of a group within transactions ---------------------------------------------------

PLACE = TopicPartition("t", 0)


def pend(offset: int, *, epoch: int = 3, number: int = 1, group: str = "g") -> PendOffsets:
    positions = ((PLACE, GroupId(5), RecordOffset(offset)),)
    return PendOffsets(group, "s", number, ProducerId(7), epoch, positions)


def table_with(*commands: PendOffsets | CommitOffsets) -> GroupTable:
    table = GroupTable()
    for command in commands:
        assert decode_group_command(encode_group_command(command)) == command
        table.apply(command, 1)
    copy = GroupTable()
    for piece in table.slices():
        copy.add(piece)
    assert copy.pending == table.pending
    for name in table.groups:
        assert copy.positions(name) == table.positions(name)
    return copy


@pytest.mark.parametrize("committed", [True, False])
def test_positions_wait_for_the_marker(committed: bool) -> None:
    before = CommitOffsets("g", "", 0, ((PLACE, GroupId(5), RecordOffset(2)),))
    table = table_with(before, pend(9, number=2), pend(4, number=1))
    assert table.positions("g")[PLACE].offset == 2
    assert table.pending_places("g") == {PLACE}
    table.end_transaction(ProducerId(8), 3, 2, committed=committed)
    assert table.pending_places("g") == {PLACE}, "another producer's marker"
    table.end_transaction(ProducerId(7), 3, 2, committed=committed)
    assert table.pending_places("g") == frozenset()
    assert table.positions("g")[PLACE].offset == (9 if committed else 2)


def test_an_older_transaction_moves_nothing_and_harms_nobody() -> None:
    """A client that breaks the protocol must not end the replicas of the log."""
    table = table_with(pend(9), pend(4, epoch=2, number=9))
    table.end_transaction(ProducerId(7), 3, 2, committed=True)
    assert table.positions("g")[PLACE].offset == 9


def test_a_group_that_goes_takes_what_is_pending_along() -> None:
    table = table_with(pend(9), pend(5, group="h"))
    table.apply(DropGroup("g"), 1)
    table.end_transaction(ProducerId(7), 3, 2, committed=True)
    assert [name for name in "gh" if table.positions(name)] == ["h"]
