"""Whoever moves money: workers, which handle orders exactly once, and tellers, which need none.

A worker reads orders as a member of a group, and in one transaction moves the money, writes a
result and the new balances, and commits the group's position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from aegis_cluster.errors import AegisError, ProducerFenced
from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.testing.transactions.history import Append, Position
from aegis_cluster.testing.transactions.member import GroupMember
from aegis_cluster.testing.transactions.transactional import TransactionalClient
from aegis_cluster.wire.protocol import Api

if TYPE_CHECKING:
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.testing.transactions.client import Work
    from aegis_cluster.testing.transactions.history import Rows, Transaction

ORDERS: Final = "orders"
RESULTS: Final = "results"
ACCOUNTS: Final = "accounts"
BALANCES: Final = "balances"
GROUP: Final = "bank"
ORDERS_MAX: Final = 3
"""Handled in one transaction."""
HURRY_ORDERS_MAX: Final = 20
"""The same, once there is no more trouble."""


class Mover(TransactionalClient):
    """Whoever moves money: what a transfer consists of, and the ways in which transactions end."""

    def __init__(self, *, aborted: float, **rest: Any) -> None:
        """aborted: share of transactions that end by a change of mind."""
        super().__init__(**rest)
        self.hurries = False
        """Its transactions are to end well now, and soon."""
        self._aborted = aborted

    def transfer(
        self, transaction: Transaction, order: bytes
    ) -> dict[TopicPartition, list[Append]]:
        """Both sides of a transfer, by partition: each account is a list of its own."""
        places = self.places(ACCOUNTS)
        drawn = crc32(order)
        here = drawn % len(places)
        there = (here + 1 + drawn // 7 % (len(places) - 1)) % len(places)
        amount = 1 + drawn // 64 % 100
        tag = b"%d.%s" % (transaction.number, order)
        return {
            places[here]: [Append(places[here], tag + b".from", amount=-amount)],
            places[there]: [Append(places[there], tag + b".to", amount=amount)],
        }

    def write_all(
        self, transaction: Transaction, batches: dict[TopicPartition, list[Append]]
    ) -> Work[bool]:
        """Join and write; all at once or one after the other."""
        if self._rng.random() < 0.7:
            if not (yield from self.join(batches)):
                return False
            writes = [self.write(transaction, *one) for one in batches.items()]
            return all((yield from self.together(writes)))
        for place, appends in batches.items():
            if not (yield from self.join([place])):
                return False
            if not (yield from self.write(transaction, place, appends)):
                return False
        return True

    def finish(self, transaction: Transaction, *, stored: bool) -> Work[None]:
        """Commit, or change our mind, or come back when it is too late."""
        drawn = 1.0 if self.hurries else self._rng.random()
        if drawn < 0.04:
            yield from self.sleep(self._timeout_ms * MS * 3 // 2)
        yield from self.end(transaction, committed=stored and drawn >= self._aborted)

    def run(self) -> Work[None]:
        """Work until told to stop, or until another process has the transactional id."""
        while not self.stopping:
            error = yield from self.take_over()
            if isinstance(error, ProducerFenced):
                break
            if error is None:
                yield from self.once()
        self.close()

    def once(self) -> Work[None]:
        """One transaction, or a pause."""
        raise NotImplementedError
        yield


class Worker(Mover):
    """See the module's first lines."""

    def __init__(self, *, think_us: int, balance_bytes: int, **rest: Any) -> None:
        super().__init__(**rest)
        self._think_us = think_us
        self._padding = b"." * balance_bytes
        self.member = GroupMember(self, GROUP, ORDERS, f"member-{self.number}")
        self._positions: dict[tuple[TopicPartition, int], int] = {}
        """By partition and the number of its assignment."""
        self._commits = 0
        self.begin(self.member.run())
        self.begin(self.run())

    def once(self) -> Work[None]:
        held = self.member.held
        if not held:
            yield from self.sleep(40 * MS)
            return
        holding = self._rng.choice(sorted(held.items()))
        rows = yield from self._read(holding)
        if rows:
            yield from self._handle(holding, rows)
        else:
            yield from self.sleep(self._rng.randrange(20 * MS, 80 * MS))

    def _holds(self, holding: tuple[TopicPartition, int]) -> bool:
        """It has been ours without a break since."""
        place, assignment = holding
        return self.member.held.get(place) == assignment

    def _read(self, holding: tuple[TopicPartition, int]) -> Work[Rows]:
        """The next orders; none where the position is not known, or moves just now (KIP-447)."""
        place, _ = holding
        if holding not in self._positions:
            fields = [GROUP, [list(place)], True]
            asked_us = self.now_us
            result = yield from self.ask(
                self.member.home, Api.GROUP_OFFSETS, fields, within_us=2 * SECOND
            )
            if isinstance(result, AegisError):
                return []
            offset = max(0, result.fields[0][0][2])
            self._record.positions.append(Position(place, offset, asked_us, self.now_us))
            self._positions[holding] = offset
        found = yield from self.fetch(place, self._positions[holding])
        if isinstance(found, AegisError):
            return []
        most = HURRY_ORDERS_MAX if self.hurries else self._rng.randint(1, ORDERS_MAX)
        return found.rows[:most]

    def _handle(self, holding: tuple[TopicPartition, int], rows: Rows) -> Work[None]:
        place, _ = holding
        transaction = self.new_transaction()
        if self._rng.random() < 0.7:
            yield from self.poll(transaction, self._rng.choice(self.places(ACCOUNTS)))
        batches = self._batches(transaction, rows)
        behind = rows[-1][0] + 1
        stored = yield from self.write_all(transaction, batches)
        if not self.hurries and self._rng.random() < 0.3:
            yield from self.sleep(self._rng.randrange(self._think_us))
        if stored:
            stored = yield from self._send_position(holding, behind)
        yield from self.finish(transaction, stored=stored)
        if transaction.outcome is Outcome.OK:
            self._positions[holding] = behind
            self._record.positions.append(Position(place, behind, -1, self.now_us))
        else:
            self._positions.pop(holding, None)

    def _batches(self, transaction: Transaction, rows: Rows) -> dict[TopicPartition, list[Append]]:
        batches: dict[TopicPartition, list[Append]] = {}
        results, balances = self.places(RESULTS), self.places(BALANCES)
        for _, _, order in rows:
            parts = self.transfer(transaction, order)
            for account, sides in list(parts.items()):
                key = b"%d" % account.partition
                at = balances[account.partition % len(balances)]
                value = sides[0].value + b".balance" + self._padding
                parts.setdefault(at, []).append(Append(at, value, key))
            at = results[crc32(order) % len(results)]
            value = b"%d.%s.result" % (transaction.number, order)
            parts.setdefault(at, []).append(Append(at, value, order=order))
            for at, appends in parts.items():
                batches.setdefault(at, []).extend(appends)
        return batches

    def _send_position(self, holding: tuple[TopicPartition, int], offset: int) -> Work[bool]:
        """As long as the partition has been ours ever since it was read; once more if only our
        epoch is older than the group's."""
        assert self._identity is not None, "a transaction has an identity"
        member, (place, _) = self.member, holding
        if not (yield from self.join([member.home])):
            return False
        while self._holds(holding):
            self._commits += 1
            epoch = member.epoch
            fields = [
                GROUP,
                member.name,
                member.session,
                epoch,
                self._commits,
                [[*place, offset]],
                *self._identity,
            ]
            result = yield from self.ask(
                member.home, Api.GROUP_COMMIT, fields, within_us=2 * SECOND
            )
            if not isinstance(result, AegisError):
                return True
            if not result.details.get("stale"):
                return False
            while member.epoch == epoch:
                yield from self.sleep(20 * MS)
        return False


class Teller(Mover):
    """Moves money of its own accord, with a transactional id and no group."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self._transfers = 0
        self.begin(self.run())

    def once(self) -> Work[None]:
        transaction = self.new_transaction()
        self._transfers += 1
        if self._rng.random() < 0.5:
            yield from self.poll(transaction, self._rng.choice(self.places(ACCOUNTS)))
        order = b"teller-%d-%d" % (self.number, self._transfers)
        stored = yield from self.write_all(transaction, self.transfer(transaction, order))
        yield from self.finish(transaction, stored=stored)
        yield from self.sleep(self._rng.randrange(20 * MS, 200 * MS))
