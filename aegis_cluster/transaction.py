"""Transactions: messages to several partitions, and positions of a group, all of them or none.

The idea (KIP-98, KIP-890): the coordinator knows every partition before anything is sent there, and
decides once, durably; then all partitions hear of it. Every transaction has an epoch of its own, so
nothing of an earlier one, however late it comes, can become a part of a later one.

The rule it protects: what a transaction handled is handed out again unless it is committed, and a
commit ends in one of three ways that the caller can tell: committed, aborted, or unknown, and then
`outcome` settles which.
"""

from __future__ import annotations

import asyncio
import os
import socket
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster import arguments
from aegis_cluster.client import coordinator, transactions
from aegis_cluster.client.producer import InTransaction
from aegis_cluster.client.producer import Producer as Lanes
from aegis_cluster.errors import (
    AegisError,
    Misuse,
    OutcomeUnknown,
    ProducerFenced,
    RequestTimeout,
    TransactionAborted,
)
from aegis_cluster.message import now_ms, to_row
from aegis_cluster.publishing import Publication, partition_in, partition_of
from aegis_cluster.subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.producer import Columns, ProducerOptions
    from aegis_cluster.client.stored import StoredFuture
    from aegis_cluster.client.transactions import Ended, Identity
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.message import Message
    from aegis_cluster.producer import Pending

ABORT_S: Final = 5.0
"""How long leaving a block with an exception may take; what is open longer ends by its time-out."""


class TransactionOutcome(Enum):
    """What was decided."""

    COMMITTED = "committed"
    ABORTED = "aborted"


class TransactionalProducer:
    """What a producer with a transactional id keeps from one transaction to the next."""

    def __init__(
        self,
        engine: StreamingEngine,
        options: ProducerOptions,
        *,
        name: str,
        timeout_ms: int,
        request_timeout: float,
    ) -> None:
        self.engine = engine
        self.options = options
        self.name = name
        self.request_timeout = request_timeout
        self.identity: Identity | None = None
        """For the next transaction; None: it has to be asked for, which ends what is open."""
        self.sticky: dict[str, int] = {}
        self.usual: set[TopicPartition] = set()
        """Logs of the groups that the last transaction moved: this one will too, most likely."""
        self._last: Identity | None = None
        """Of the last transaction whose end we have not seen."""
        self._timeout_ms = timeout_ms
        self._open: Transaction | None = None
        self._fenced: ProducerFenced | None = None

    @property
    def cluster(self) -> ClusterClient:
        return self.engine.cluster

    async def ready(self, deadline: float) -> None:
        """Own the transactional id. Raises `ProducerFenced` once another producer does."""
        if self._fenced is not None:
            raise self._fenced
        if self.identity is not None:
            return
        try:
            self.identity = await transactions.begin_producer(
                self.cluster,
                self.name,
                timeout_ms=self._timeout_ms,
                client=f"{socket.gethostname()}:{os.getpid()}"[:255],
                deadline=deadline,
                known=self._last,
            )
        except ProducerFenced as error:
            self._fenced = error
            raise

    def transaction(self, subscribers: tuple[Subscriber, ...]) -> Transaction:
        return Transaction(self, subscribers)

    def begun(self, one: Transaction) -> None:
        if self._open is not None:
            raise Misuse(
                f"The producer {self.name!r} is in a transaction already; end that one first."
            )
        self._open = one

    def ended(self, identity: Identity | None, last: Identity | None) -> None:
        """The open transaction is over for us; identity: for the next one, None: not known. last:
        its own."""
        self._open = None
        self.identity, self._last = identity, last or self._last

    def fenced(self, error: ProducerFenced) -> None:
        """Another producer has the transactional id; this one would only take it back."""
        self._fenced = error

    @property
    def buffered_bytes(self) -> int:
        return 0 if self._open is None else self._open.buffered_bytes

    async def close(self) -> None:
        if self._open is not None:
            await self._open.drop()


class Transaction:
    """Made by `producer.transaction()`: a block that commits at its end, and aborts when it is left
    with an exception. Belongs to one event loop.

    Leaving it raises `TransactionAborted` when it was not committed for sure (a message could not
    be stored, or it was open for longer than its time-out), `ProducerFenced` when another producer
    has taken the transactional id over, and `OutcomeUnknown` when the coordinator did not say by
    the deadline whether it is committed: `outcome` settles it.
    """

    def __init__(self, owner: TransactionalProducer, subscribers: tuple[Subscriber, ...]) -> None:
        self._owner = owner
        self._subscribers = subscribers
        self._identity: Identity | None = None
        self._lanes: Lanes | None = None
        self._joined = False
        """The coordinator may know of something in it."""
        self._places: set[TopicPartition] = set()
        """What the coordinator is known to know of."""
        self._under_way: set[StoredFuture] = set()
        self._failure: BaseException | None = None
        self._positions: list[tuple[Subscriber, dict[TopicPartition, int]]] = []
        self._over = False

    async def __aenter__(self) -> Self:
        owner = self._owner
        if self._identity is not None:
            raise Misuse("A transaction is used once; ask the producer for another one.")
        owner.begun(self)
        try:
            for subscriber in self._subscribers:
                subscriber.is_committed_by(owner)
            deadline = owner.cluster.deadline(owner.request_timeout)
            await owner.ready(deadline)
            assert owner.identity is not None
            self._identity = owner.identity
            within = InTransaction(owner.name, *owner.identity, self._join, owner.sticky)
            self._lanes = Lanes(owner.cluster, owner.options, on_batch=self._began, within=within)
            await self._lanes.start(deadline)
        except BaseException:
            owner.ended(owner.identity, None)
            self._rewind()  # what was to be handled in it
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                await self._commit()
            except BaseException:
                if not self._over:  # cancelled while messages were still under way
                    await self._abort()
                raise
        else:
            ended = await self._abort()
            if isinstance(error, ProducerFenced) and ended is not None and ended.follower:
                # Partitions cannot tell a producer that was replaced from one that was too slow.
                raise self._not_committed(ended) from error

    # ---- what it consists of

    async def send(self, topic: str, message: Message, *, timeout: float | None = None) -> Pending:
        """Add one message; returns once it is buffered. The end of the block waits for all.

        Raises `TopicNotFound`, `MessageTooLarge`, `UnsupportedPayload`, `RequestTimeout` when
        there was no room in time, and what has already failed: `ProducerFenced`,
        `TransactionAborted`.
        """
        lanes, deadline = self._lanes_now(), self._deadline(timeout)
        cluster = self._owner.cluster
        info = cluster.metadata.topics.get(topic)
        if info is None:
            info = await cluster.topic(topic, deadline)
        row = to_row(message, now_ms())
        partition = partition_of(lanes, info, row[1])
        added = lanes.try_add(info, partition, row, deadline)
        if added is None:
            added = await lanes.add(info, partition, row, deadline)
        elif lanes.batch_filled:
            lanes.batch_filled = False
            await asyncio.sleep(0)
        from aegis_cluster.producer import Pending  # which makes transactions

        batch, place = added
        return Pending(topic, batch, place)

    async def send_many(
        self,
        topic: str,
        messages: Iterable[Any],
        keys: Iterable[str | bytes | None] | None = None,
        *,
        partition: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Add many messages, or bare payloads with optional `keys` beside them, as fast as
        `publish_many`; returns once they are buffered.

        partition: where all of them go, whatever their keys; None: by the keys. Raises as `send`.
        """
        lanes, deadline = self._lanes_now(), self._deadline(timeout)
        info = await self._owner.cluster.topic(topic, deadline)
        publication = Publication(lanes, info, deadline, partition_in(info, partition))
        await publication.add(messages, keys)
        for refused in publication.outcomes.refused.values():
            raise refused

    async def send_encoded(
        self, topic: str, columns: Columns, *, partition: int | None = None
    ) -> None:
        """Add records whose keys and values are bytes already, in our encoding; for speed. Else as
        `send_many`."""
        lanes, deadline = self._lanes_now(), self._deadline(None)
        info = await self._owner.cluster.topic(topic, deadline)
        publication = Publication(lanes, info, deadline, partition_in(info, partition))
        await publication.add_encoded(columns)
        for refused in publication.outcomes.refused.values():
            raise refused

    async def send_offsets(
        self, subscriber: Subscriber, *, unmoved: bool = False, timeout: float | None = None
    ) -> None:
        """Make the group's positions a part of the transaction: everything that the subscriber has
        handed out so far counts as handled if it is committed, and is handed out again if not.

        unmoved: send positions that have not moved too: so a transaction that depends on nothing
        that was read, but on being the member that reads it, is refused once it is that no more.

        Raises `MemberFenced` when the group has given some of it to another member meanwhile, and
        what has already failed: `ProducerFenced`, `TransactionAborted`; `Misuse` for a subscriber
        that is not in a group with `DeliveryMode.EXACTLY_ONCE`.
        """
        hint = "give what engine.subscribe() returned"
        arguments.instance(subscriber, Subscriber, "subscriber", hint)
        lanes, deadline = self._lanes_now(), self._deadline(timeout)
        subscriber.is_committed_by(self._owner)
        positions = subscriber.positions_in_hand(unmoved=unmoved)
        if not positions:
            return
        lanes.close_batches()  # they travel meanwhile
        place = await coordinator.place_of_group(self._owner.cluster, subscriber.group_id, deadline)
        if place not in self._places:
            await self._join([place])
        self._owner.usual.add(place)
        assert self._identity is not None
        await subscriber.commit_within(self._identity, positions, deadline)
        self._positions.append((subscriber, positions))

    @property
    def buffered_bytes(self) -> int:
        """Of messages sent and not answered."""
        return 0 if self._lanes is None else self._lanes.buffered_bytes

    def _lanes_now(self) -> Lanes:
        if self._lanes is None:
            raise Misuse("Use a transaction in a block: 'async with producer.transaction() as tx'.")
        if self._over:
            raise Misuse("This transaction has ended; ask the producer for another one.")
        if isinstance(self._failure, ProducerFenced | TransactionAborted):
            raise self._failure
        return self._lanes

    def _deadline(self, timeout: float | None) -> float:
        owner = self._owner
        return owner.cluster.deadline(owner.request_timeout if timeout is None else timeout)

    async def _join(self, places: list[TopicPartition]) -> None:
        assert self._identity is not None
        self._joined = True
        owner = self._owner
        wanted = {*places, *owner.usual} - self._places
        deadline = owner.cluster.deadline(owner.request_timeout)
        await transactions.join(owner.cluster, owner.name, self._identity, wanted, deadline)
        self._places |= wanted

    def _began(self, batch: StoredFuture) -> None:
        self._under_way.add(batch)
        batch.add_done_callback(self._batch_ended)

    def _batch_ended(self, batch: StoredFuture) -> None:
        self._under_way.discard(batch)
        error = None if batch.cancelled() else batch.exception()
        self._failure = self._failure or error

    # ---- its end

    async def _commit(self) -> None:
        lanes = self._lanes_now() if self._failure is None else self._lanes
        assert lanes is not None
        lanes.close_batches()
        while self._under_way:
            await asyncio.wait(set(self._under_way))
        if self._failure is not None:
            await self._abort_after(self._failure)
        if not self._joined:
            await self._drop(self._identity)
            return
        await self._end_committed()

    async def _end_committed(self) -> None:
        try:
            ended = await self._end(committed=True, deadline=self._deadline(None))
        except ProducerFenced as error:
            self._owner.fenced(error)
            self._rewind()
            raise
        except (OutcomeUnknown, RequestTimeout) as error:
            self._rewind()
            raise OutcomeUnknown(
                f"It is not known whether the transaction of {self._owner.name!r} is committed:"
                f" {error} Ask `outcome()` of the transaction, which settles it.",
                transactional_id=self._owner.name,
            ) from error
        except BaseException:
            self._rewind()
            raise
        if not ended.committed:
            self._rewind()
            raise self._not_committed(ended)
        if ended.follower is None:
            self._owner.fenced(self._replaced("this one was committed before"))
        if not self._positions:
            self._owner.usual.clear()
        for subscriber, positions in self._positions:
            subscriber.committed_within(positions)

    async def _abort_after(self, failure: BaseException) -> None:
        """Something of it could not be stored: abort, and raise why."""
        ended = await self._abort()
        if ended is not None and ended.committed is False and ended.reason:
            told = self._not_committed(ended)
            if isinstance(told, ProducerFenced) or isinstance(failure, ProducerFenced):
                raise told from failure
        if isinstance(failure, Exception) and not isinstance(failure, OutcomeUnknown):
            raise failure
        raise TransactionAborted(
            f"A message of the transaction of {self._owner.name!r} could not be stored in time, so"
            f" it is aborted: {failure}",
            transactional_id=self._owner.name,
        ) from failure

    async def _abort(self) -> Ended | None:
        """Give everything up; what the coordinator said, if it could be asked. Raises nothing but
        what cancels the caller: the reason to abort counts more."""
        self._rewind()
        if not self._joined:
            await self._drop(self._identity)
            return None
        try:
            deadline = self._owner.cluster.now() + ABORT_S
            ended = await self._end(committed=False, deadline=deadline)
        except ProducerFenced as error:
            self._owner.fenced(error)
        except AegisError:
            return None  # it ends with the next transaction, or by its time-out
        else:
            if ended.follower is None:
                self._not_committed(ended)
            return ended
        return None

    async def _end(self, *, committed: bool, deadline: float) -> Ended:
        """Whatever comes of it, this transaction is over for us."""
        owner, identity = self._owner, self._identity
        assert identity is not None
        follower: Identity | None = None
        if not committed and self._lanes is not None:
            await self._lanes.close()
        try:
            ended = await transactions.end(
                owner.cluster, owner.name, identity, committed=committed, deadline=deadline
            )
            follower = ended.follower
        finally:
            await self._drop(follower)
        return ended

    def _not_committed(self, ended: Ended) -> ProducerFenced | TransactionAborted:
        name = self._owner.name
        if ended.follower is None:
            error = self._replaced("this transaction is aborted")
            self._owner.fenced(error)
            return error
        return TransactionAborted(
            f"The transaction of {name!r} was aborted: {ended.reason}.", transactional_id=name
        )

    def _replaced(self, what: str) -> ProducerFenced:
        name = self._owner.name
        return ProducerFenced(
            f"Another producer has taken the transactional id {name!r} over; {what}.",
            transactional_id=name,
        )

    async def drop(self) -> None:
        """Stop sending; what is open at the coordinator ends with the next one, or by its time."""
        await self._drop(None)

    async def _drop(self, follower: Identity | None) -> None:
        """follower: the identity for the next transaction; None: not known."""
        if not self._over:
            self._over = True
            self._owner.ended(follower, self._identity)
        if self._lanes is not None:
            await self._lanes.close()

    def _rewind(self) -> None:
        """What was handed out and is not committed is handed out again."""
        self._owner.engine.go_back(self._owner)

    async def outcome(self, *, timeout: float | None = None) -> TransactionOutcome:
        """What was decided; if nothing was, it is aborted now. To be asked after `OutcomeUnknown`.

        Raises `Misuse` before the block has ended; `ProducerFenced` when it is not known any more,
        because another producer has the transactional id and has used it for long;
        `RequestTimeout`, `OutcomeUnknown` when no coordinator answers in time.
        """
        owner, identity = self._owner, self._identity
        if not self._over or identity is None:
            raise Misuse("Ask for the outcome after the transaction's block.")
        if not self._joined:
            return TransactionOutcome.COMMITTED
        ended = await transactions.end(
            owner.cluster, owner.name, identity, committed=False, deadline=self._deadline(timeout)
        )
        return TransactionOutcome.COMMITTED if ended.committed else TransactionOutcome.ABORTED
