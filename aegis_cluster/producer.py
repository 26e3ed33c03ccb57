"""A producer that a program keeps: it sends without waiting for each receipt.

The idea: `send` puts a message into a buffer of bounded size and waits only while that is full, so
a program that sends faster than the cluster stores is slowed down to its pace. Receipts are
awaited one by one, or all at once by `flush`.

After an unknown outcome the producer takes a new epoch before it sends on (KIP-360): a late copy
of what was given up can then not slip in between newer messages; it was either stored in its
place before them, or never will be.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster import arguments
from aegis_cluster.client.producer import Producer as Lanes
from aegis_cluster.client.producer import ProducerOptions
from aegis_cluster.config import StreamingConfig, parse_duration, parse_size
from aegis_cluster.errors import (
    ConfigError,
    KeyRequired,
    MessageTooLarge,
    Misuse,
    OutcomeUnknown,
)
from aegis_cluster.limits import (
    BATCH_BYTES_DEFAULT,
    BATCH_BYTES_MAX,
    BULK_BATCH_BYTES,
    MESSAGE_BYTES_MAX,
    TRANSACTION_TIMEOUT_MS_DEFAULT,
    TRANSACTION_TIMEOUT_MS_MAX,
    TRANSACTION_TIMEOUT_MS_MIN,
    TRANSACTIONAL_ID_CHARS_MAX,
)
from aegis_cluster.message import BatchReceipt, Message, Receipt, from_ms, now_ms, to_row
from aegis_cluster.publishing import Publication, partition_of
from aegis_cluster.wire.compression import CODEC_OF_NAME
from aegis_cluster.wire.protocol import Acks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.producer import Row
    from aegis_cluster.client.stored import StoredFuture
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.subscriber import Subscriber
    from aegis_cluster.transaction import Transaction, TransactionalProducer
    from aegis_cluster.wire.descriptions import TopicInfo


@dataclass(frozen=True, slots=True)
class ProducerConfig:
    """How a producer sends; None means the configured default (`[streaming.producer]`).

    acks: when a message counts as stored.
      `"quorum"`: when it is synced to disk on a majority of the replicas. It is never lost.
      `"leader"`: when it is synced to the leader's own disk. It is lost if that node dies, or is
      cut off, before another has the message: the next leader goes on without it, and the old one
      drops it when it comes back.
      `"none"`: when it has been handed to the connection; only `flush` waits for answers, and
      receipts have offset -1. It is lost without a word if the program ends before a `flush`, if
      the leader refuses it for good (a topic that is gone), if nobody takes it by its deadline, or
      if the leader dies before it has written and copied it.
      With `"leader"` and `"none"` producers are not idempotent: a message whose answer was lost is
      sent again and may then be stored twice, and retries may change the order.
    linger: how long a message may wait for company, `"5ms"`; only while a request to that leader
    is in flight, so an idle producer sends at once. batch_size: `"256KB"`, before compression;
    where none is set, many at once (`send_many`) fill batches of 1 MB.
    buffer_size: of all that is sent and not answered, `"64MB"`.
    compression: `"lz4"`, `"zstd"`, `"none"`, …; None: the topic's.
    idempotent: a retry is never stored twice; True with `"quorum"`, and possible only there.
    Where it is False, it may be stored twice.
    transactional_id: a name that outlives the process, for `transaction()`: of two producers with
    one name, the newer takes over, and the older is fenced (`ProducerFenced`) and what it has open
    aborted. Give every instance that works at a time a name of its own.
    transaction_timeout: one that is open for longer is aborted, `"60s"`, from `"1s"` to `"15m"`.
    request_timeout: the deadline of every message, `"30s"`.
    """

    acks: str | None = None
    linger: str | None = None
    batch_size: str | int | None = None
    buffer_size: str | int | None = None
    compression: str | None = None
    idempotent: bool | None = None
    transactional_id: str | None = None
    request_timeout: str | None = None
    transaction_timeout: str | None = None

    def options(self, defaults: StreamingConfig) -> ProducerOptions:
        """As numbers. Raises `ConfigError`, naming the key, the value and what is allowed."""
        acks = defaults.producer.acks if self.acks is None else self.acks
        arguments.choice(acks, tuple(_ACKS), "acks")
        arguments.choice(self.compression, tuple(CODEC_OF_NAME), "compression")
        if self.idempotent not in (None, True, False):
            allowed = "True, False, or None where it goes by acks"
            raise ConfigError(
                f"idempotent = {self.idempotent!r}; allowed: {allowed}.", key="idempotent"
            )
        if self.idempotent and acks != "quorum":
            raise ConfigError(
                f"idempotent = True with acks = {acks!r}: a retry can be told from a new message"
                " only where a majority has stored the first one. Use acks = 'quorum', or leave"
                " idempotent out.",
                key="idempotent",
            )
        self._check_transactions(acks)
        linger_ms = _number(parse_duration, "linger", self.linger, (0, 60_000))
        batch = _number(parse_size, "batch_size", self.batch_size, (1, BATCH_BYTES_MAX))
        if batch is None and defaults.producer.batch_bytes != BATCH_BYTES_DEFAULT:
            batch = defaults.producer.batch_bytes
        room = _number(parse_size, "buffer_size", self.buffer_size, (MESSAGE_BYTES_MAX, 2**42))
        return ProducerOptions(
            batch_bytes=BATCH_BYTES_DEFAULT if batch is None else batch,
            bulk_batch_bytes=BULK_BATCH_BYTES if batch is None else batch,
            buffer_bytes=defaults.producer.buffer_bytes if room is None else room,
            linger_s=(defaults.producer.linger_ms if linger_ms is None else linger_ms) / 1000,
            compression=self.compression,
            idempotent=self.idempotent is not False and acks == "quorum",
            acks=_ACKS[acks],
        )

    def _check_transactions(self, acks: str) -> None:
        name = self.transactional_id
        arguments.setting(name, (str,), "transactional_id", "a name, as text")
        if name is None:
            if self.transaction_timeout is not None:
                raise ConfigError(
                    "transaction_timeout means something with a transactional_id only.",
                    key="transaction_timeout",
                )
            return
        if not 1 <= len(name) <= TRANSACTIONAL_ID_CHARS_MAX:
            raise ConfigError(
                f"transactional_id = {name[:300]!r}; allowed: 1 to {TRANSACTIONAL_ID_CHARS_MAX}"
                " characters.",
                key="transactional_id",
            )
        if acks != "quorum" or self.idempotent is False:
            raise ConfigError(
                f"transactional_id = {name!r} with acks = {acks!r} and idempotent ="
                f" {self.idempotent!r}: a transaction needs acks = 'quorum' and idempotence.",
                key="transactional_id",
            )
        self.transaction_timeout_ms()

    def transaction_timeout_ms(self) -> int:
        """Raises `ConfigError`."""
        limits = (TRANSACTION_TIMEOUT_MS_MIN, TRANSACTION_TIMEOUT_MS_MAX)
        found = _number(parse_duration, "transaction_timeout", self.transaction_timeout, limits)
        return TRANSACTION_TIMEOUT_MS_DEFAULT if found is None else found

    def timeout_s(self, default: float) -> float:
        """Seconds; `default` where nothing is said. Raises `ConfigError`."""
        limits = (1, 86_400_000)
        found = _number(parse_duration, "request_timeout", self.request_timeout, limits)
        return default if found is None else found / 1000


_ACKS: Final = {"quorum": Acks.QUORUM, "leader": Acks.LEADER, "none": Acks.NONE}


def _number(
    parse: Callable[[object], int], key: str, value: object, limits: tuple[int, int]
) -> int | None:
    if value is None:
        return None
    low, high = limits
    try:
        number = parse(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}.", key=key, value=value) from None
    if not low <= number <= high:
        unit = "ms" if parse is parse_duration else "bytes"
        raise ConfigError(
            f"{key} = {value!r}; allowed: {low} to {high} {unit}.", key=key, value=value
        )
    return number


class Pending:
    """A message on its way; `await` it for its receipt, or for the reason why there is none.

    Nobody has to: the message is sent all the same, and `flush` tells of failures.
    """

    __slots__ = ("_batch", "_place", "_topic")

    def __init__(self, topic: str, batch: StoredFuture, place: int) -> None:
        self._topic = topic
        self._batch = batch
        self._place = place

    @property
    def done(self) -> bool:
        """Whether its outcome is known; awaiting it then takes no time."""
        return self._batch.done()

    def __await__(self) -> Generator[Any, None, Receipt]:
        return self.receipt().__await__()

    async def receipt(self) -> Receipt:
        """Where it is stored. Raises `Refused` or `OutcomeUnknown`, by its deadline at last."""
        stored = await self._batch.waiter()
        offset = stored.offset_at(self._place)
        return Receipt(self._topic, stored.partition, offset, from_ms(stored.time_ms))


class Producer:
    """Made by `engine.producer(...)`: an async context manager, for one event loop.

    Leaving the block waits for everything sent and raises the first failure; after an exception
    it does not wait.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        options: ProducerOptions,
        request_timeout: float,
        transactional: TransactionalProducer | None = None,
    ) -> None:
        self._transactional = transactional
        self._engine = engine
        self._options = options
        self._request_timeout = arguments.seconds(request_timeout)
        self._lanes: Lanes | None = None
        self._under_way: set[StoredFuture] = set()
        self._failure: BaseException | None = None
        """The first one since the last flush."""
        self._closed = False

    async def __aenter__(self) -> Self:
        """Raises `Unavailable`; with a transactional id it takes that over, and what its last
        owner has left open is aborted first: `RequestTimeout`, `OutcomeUnknown`."""
        deadline = self._deadline(None)
        if self._transactional is not None:
            await self._transactional.ready(deadline)
        else:
            await self._ready(deadline)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                await self.flush()
        finally:
            await self.close()

    async def send(self, topic: str, message: Message, *, timeout: float | None = None) -> Pending:
        """Send one message; waits only for room in the buffer (and once for the topic's place).

        timeout: seconds in which the message must be stored. Raises `TopicNotFound`,
        `MessageTooLarge`, `UnsupportedPayload`, `RequestTimeout` when there was no room in time.
        """
        cluster = self._engine.cluster
        if timeout is None:
            deadline = cluster.deadline_in(self._request_timeout)
        else:
            deadline = cluster.deadline(timeout)
        known = cluster.metadata.topics.get(topic) if type(topic) is str else None
        lanes, info = self._lanes, known
        if lanes is None or info is None or not lanes.is_ready:
            lanes = await self._ready(deadline)
            info = await cluster.topic(topic, deadline)
        row = to_row(message, now_ms())
        partition = partition_of(lanes, info, row[1])
        added = lanes.try_add(info, partition, row, deadline)
        if added is None:
            added = await lanes.add(info, partition, row, deadline)
        elif lanes.batch_filled:
            # Whoever only sends would keep the loop for itself until the buffer is full.
            lanes.batch_filled = False
            await asyncio.sleep(0)
        batch, place = added
        return Pending(topic, batch, place)

    def transaction(self, *subscribers: Subscriber) -> Transaction:
        """A block in which `tx.send` and `tx.send_offsets` take effect together, or not at all.

        subscribers: those whose messages it handles, if it may be aborted before `send_offsets` has
        named them; after an abort they hand out again what was not committed. Raises `Misuse`
        without a `transactional_id`.
        """
        if self._transactional is None:
            raise Misuse(
                "Transactions need a name that outlives the process: make the producer with"
                " ProducerConfig(transactional_id=…)."
            )
        if self._closed:
            raise Misuse("This producer is closed; make another one with engine.producer().")
        return self._transactional.transaction(subscribers)

    async def flush(self, *, timeout: float | None = None) -> None:
        """Wait until everything sent so far is stored, or has failed.

        Raises the first failure since the last flush, whether or not its `Pending` was awaited;
        `OutcomeUnknown` when `timeout` (seconds; default: until every message's own deadline)
        passes first: what is still under way goes on.
        """
        if timeout is not None:
            timeout = max(0.0, arguments.seconds(timeout))
        lanes = self._lanes
        if lanes is None:
            return
        lanes.close_batches()
        waiting: set[asyncio.Future[Any]] = set(self._under_way)
        answers = asyncio.ensure_future(lanes.emptied()) if self._is_hasty else None
        if answers is not None:
            waiting.add(answers)
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=timeout)
            if answers is not None:
                answers.cancel()
            if late:
                raise OutcomeUnknown(f"{len(late)} batches are still under way after {timeout} s.")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Stop sending; what is not answered yet ends as unknown or unsent."""
        self._closed = True
        self._engine.forget(self)
        if self._transactional is not None:
            await self._transactional.close()
        if self._lanes is not None:
            await self._lanes.close()

    # ---- for the engine

    async def publish(self, topic: str, message: Message, deadline: float) -> Receipt:
        """Send and wait for the receipt. Raises what `engine.publish` does: `TopicNotFound`, ….

        deadline: absolute, in the event loop's time.
        """
        lanes = await self._ready(deadline)
        info = await self._cluster.topic(topic, deadline)
        row = to_row(message, now_ms())
        batch, place = await self._add(lanes, info, row, deadline)
        return await Pending(topic, batch, place)

    async def publish_many(
        self, topic: str, messages: Iterable[Any], keys: Iterable[Any] | None, deadline: float
    ) -> list[BatchReceipt]:
        """Send all and wait for all. Raises `PartlyPublished`."""
        lanes = await self._ready(deadline)
        info = await self._cluster.topic(topic, deadline)
        publication = Publication(lanes, info, deadline)
        await publication.add(messages, keys)
        return await publication.outcomes.receipts()

    @property
    def buffered_bytes(self) -> int:
        """Of messages sent and not answered."""
        if self._transactional is not None:
            return self._transactional.buffered_bytes
        return self._lanes.buffered_bytes if self._lanes else 0

    @property
    def _is_hasty(self) -> bool:
        """Messages count as stored before there is an answer."""
        return self._options.acks is Acks.NONE

    @property
    def _cluster(self) -> ClusterClient:
        return self._engine.cluster

    def _deadline(self, timeout: float | None) -> float:
        return self._cluster.deadline(self._request_timeout if timeout is None else timeout)

    async def _ready(self, deadline: float) -> Lanes:
        if self._closed:
            raise Misuse("This producer is closed; make another one with engine.producer().")
        if self._transactional is not None:
            raise Misuse(
                "This producer has a transactional_id, so it sends in transactions only: 'async"
                " with producer.transaction() as tx', and tx.send."
            )
        if self._lanes is None:
            self._lanes = Lanes(self._cluster, self._options, on_batch=self._began)
        await self._lanes.start(deadline)
        return self._lanes

    async def _add(
        self, lanes: Lanes, info: TopicInfo, row: Row, deadline: float
    ) -> tuple[StoredFuture, int]:
        try:
            return await lanes.add(info, partition_of(lanes, info, row[1]), row, deadline)
        except (KeyRequired, MessageTooLarge):
            # The topic may have been altered since we last asked.
            await self._cluster.refresh([info.name], deadline)
            fresh = self._cluster.metadata.topic(info.name)
            if fresh.settings == info.settings:
                raise
            return await lanes.add(fresh, partition_of(lanes, fresh, row[1]), row, deadline)

    def _began(self, batch: StoredFuture) -> None:
        self._under_way.add(batch)
        batch.add_done_callback(self._ended)

    def _ended(self, batch: StoredFuture) -> None:
        self._under_way.discard(batch)
        error = None if batch.cancelled() else batch.exception()
        self._failure = self._failure or error
