"""A simulated producer with a transactional id, by the rules of `aegis_cluster.transaction`.

Every partition joins before anything is sent there; what could not be stored for sure aborts; and
where the end was not answered, asking to abort settles what was decided.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError, OutcomeUnknown, ProducerFenced, RequestTimeout
from aegis_cluster.ids import TRANSACTIONS_TOPIC
from aegis_cluster.testing.history import Outcome
from aegis_cluster.testing.scheduler import MS, SECOND
from aegis_cluster.testing.transactions.client import Client
from aegis_cluster.testing.transactions.history import (
    Append,
    Poll,
    Takeover,
    Transaction,
)
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.protocol import Acks, Api

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.testing.transactions.client import Work
    from aegis_cluster.testing.transactions.history import TransactionHistory

WRITE_US: Final = 4 * SECOND
END_US: Final = 6 * SECOND


class TransactionalClient(Client):
    """One process that has, or had, a transactional id."""

    def __init__(
        self,
        *,
        name: str,
        timeout_ms: int,
        record: TransactionHistory,
        numbers: Iterator[int],
        **rest: Any,
    ) -> None:
        """numbers: of transactions, shared by all clients of a run."""
        super().__init__(**rest)
        self.name = name
        self.stopping = False
        self._timeout_ms = timeout_ms
        self._record = record
        self._numbers = numbers
        self._tokens = itertools.count()
        self._identity: tuple[int, int] | None = None
        self._last: tuple[int, int] | None = None
        self._sequences: dict[TopicPartition, int] = {}
        self._lists: dict[TopicPartition, list[bytes]] = {}
        self._list_ends: dict[TopicPartition, int] = {}

    @property
    def _coordinator(self) -> TopicPartition:
        return self.home_of(TRANSACTIONS_TOPIC, self.name)

    def take_over(self) -> Work[AegisError | None]:
        """Own the transactional id; all that had it before are fenced."""
        if self._identity is not None:
            return None
        token = f"{self.number}-{next(self._tokens)}"
        fields = [self.name, self._timeout_ms, "simulated", token, self._last]
        asked_us = self.now_us
        result = yield from self.ask(
            self._coordinator, Api.TRANSACTION_INIT, fields, within_us=30 * SECOND
        )
        if isinstance(result, AegisError):
            return result
        self._identity = (result.fields[0], result.fields[1])
        self._sequences = {}
        if self._last is None:
            self._record.takeovers.append(Takeover(self.name, self.number, asked_us, self.now_us))
        return None

    def new_transaction(self) -> Transaction:
        made = Transaction(next(self._numbers), self.name, self.number, self.now_us)
        self._record.transactions.append(made)
        return made

    def join(self, places: Iterable[TopicPartition]) -> Work[bool]:
        """Have these logs take part."""
        assert self._identity is not None, "a transaction has an identity"
        rows = [list(place) for place in sorted(set(places))]
        fields = [self.name, *self._identity, rows, 0]
        result = yield from self.ask(
            self._coordinator, Api.TRANSACTION_JOIN, fields, within_us=WRITE_US
        )
        return not isinstance(result, AegisError)

    def write(
        self, transaction: Transaction, place: TopicPartition, appends: list[Append]
    ) -> Work[bool]:
        """One batch of records; whether it is stored for sure."""
        assert self._identity is not None, "a transaction has an identity"
        transaction.appends += appends
        sequence = self._sequences.get(place, 0)
        self._sequences[place] = sequence + len(appends)
        producer, epoch = self._identity
        batch = encode_batch(
            [(self.now_us // MS, one.key, one.value, []) for one in appends],
            producer_id=producer,
            producer_epoch=epoch,
            base_sequence=sequence,
            attributes=TRANSACTIONAL_BIT,
        )
        group = self.topics[place.topic].groups[place.partition]
        fields = [[[group, place.topic, place.partition]], Acks.QUORUM, self.name]
        result = yield from self.ask(
            place, Api.PRODUCE, fields, parts=[batch], within_us=WRITE_US, wait_us=2 * SECOND
        )
        if isinstance(result, AegisError):
            transaction.reason = transaction.reason or f"{type(result).__name__}: {result}"
            return False
        for number, one in enumerate(appends):
            one.offset = result.fields[0][0][1] + number
        return True

    def poll(self, transaction: Transaction, place: TopicPartition) -> Work[None]:
        """Read a list up to where it ends now; it goes into the history as a whole."""
        known = self._lists.setdefault(place, [])
        found = yield from self.fetch(place, self._list_ends.get(place, 0))
        if isinstance(found, AegisError):
            return
        end = found.end
        while True:
            known += [value for _, _, value in found.rows]
            self._list_ends[place] = found.position
            if found.position >= end:
                break
            found = yield from self.fetch(place, found.position)
            if isinstance(found, AegisError):
                return
        transaction.polls.append(Poll(place, tuple(known)))

    def end(self, transaction: Transaction, *, committed: bool) -> Work[None]:
        """Commit or abort; where no answer comes, settle what was decided by asking to abort."""
        assert self._identity is not None, "a transaction has an identity"
        identity, self._last = self._identity, self._identity
        self._identity = None
        unanswered = False
        if committed:
            transaction.commit_us = self.now_us
        result = yield from self._ask_end(identity, committed=committed)
        if isinstance(result, OutcomeUnknown | RequestTimeout):
            result = yield from self._ask_end(identity, committed=False)
            unanswered = True
        transaction.ended_us = self.now_us
        if isinstance(result, AegisError):
            unanswered = unanswered or result.details.get("unanswered", False)
            is_known = isinstance(result, ProducerFenced) and not (committed and unanswered)
            transaction.outcome = Outcome.REFUSED if is_known else Outcome.UNKNOWN
            transaction.reason = str(result)
            return
        was_committed, reason, producer, epoch = result.fields
        transaction.outcome = Outcome.OK if was_committed else Outcome.REFUSED
        transaction.reason = transaction.reason or reason
        if epoch >= 0:
            self._identity = (producer, epoch)
            self._sequences = {}

    def _ask_end(self, identity: tuple[int, int], *, committed: bool) -> Work[Any]:
        fields = [self.name, *identity, committed]
        return (
            yield from self.ask(
                self._coordinator,
                Api.TRANSACTION_END,
                fields,
                within_us=END_US,
                wait_us=3 * SECOND,
            )
        )
