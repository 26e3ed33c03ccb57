"""Persistent subscriptions: single messages for competing consumers, kept on the server.

The rule it protects: what `ack()` has returned for is never handed out again, whoever dies; and
what was not acknowledged is handed out until it is, or has used up its tries.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from aegis_cluster import arguments
from aegis_cluster.client.burials import bury
from aegis_cluster.client.moments import offsets_at
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.client.subscription_calls import (
    Rules,
    SubscriptionCalls,
    list_subscriptions,
)
from aegis_cluster.client.subscription_session import Lease, SubscriptionSession
from aegis_cluster.config import parse_duration
from aegis_cluster.errors import AegisError, ConfigError, Misuse, TopicExists
from aegis_cluster.group import resolved
from aegis_cluster.ids import NodeId, TopicPartition
from aegis_cluster.limits import (
    ACK_TIMEOUT_MS_MAX,
    ACK_TIMEOUT_MS_MIN,
    GROUP_NAME_CHARS_MAX,
    SUBSCRIPTION_IN_FLIGHT_MAX,
)
from aegis_cluster.message import (
    Offset,
    ReceivedMessage,
    from_ms,
    from_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.subscription_calls import Opened, Parked
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.wire.records import Record

REASON_CHARS_MAX = 500


class Strategy(StrEnum):
    """Which consumer gets a message.

    ROUND_ROBIN: whoever has room, in turn. PINNED: all messages of one key go to one consumer as
    long as the consumers stay the same; messages without a key to anybody.
    """

    ROUND_ROBIN = "round_robin"
    PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class PersistentConfig:
    """How a persistent subscription hands out.

    Of this consumer alone:
    max_in_flight: messages that it may hold, handed to it and not settled; what it has fetched
    ahead counts. lost: what to do when retention has removed messages that the subscription had not
    handed out: `"raise"` (`OffsetOutOfRange`), or `"skip"` them.

    Kept with the subscription, the same for all of its consumers:
    ack_timeout: a message that is not settled within so long is handed out again.
    max_deliveries: tries of one message; None: without end. dead_letter: a topic for messages that
    used up their tries (made if it is not there); None: they are parked.
    strategy: see `Strategy`. ordered: messages of one key are handed out one after the other, each
    once the one before is settled; keys without anything to do with each other do not wait.
    start: where a new subscription begins. Raises `ConfigError`.
    """

    max_in_flight: int = 1_000
    ack_timeout: str = "30s"
    max_deliveries: int | None = 5
    dead_letter: str | None = None
    strategy: Strategy | str = Strategy.ROUND_ROBIN
    ordered: bool = False
    start: Offset = Offset.EARLIEST
    lost: str = "raise"

    def __post_init__(self) -> None:
        self.ack_timeout_ms  # noqa: B018 - refuses a bad one where it was written
        arguments.setting(self.max_in_flight, (int,), "max_in_flight", "a whole number")
        arguments.setting(self.max_deliveries, (int,), "max_deliveries", "1 or more")
        arguments.setting(self.dead_letter, (str,), "dead_letter", "the name of a topic")
        if not isinstance(self.start, Offset):
            _check("start", self.start, False, "an Offset, such as Offset.EARLIEST")
        _check(
            "max_in_flight",
            self.max_in_flight,
            1 <= self.max_in_flight <= SUBSCRIPTION_IN_FLIGHT_MAX,
            f"1 to {SUBSCRIPTION_IN_FLIGHT_MAX}",
        )
        deliveries = self.max_deliveries
        _check("max_deliveries", deliveries, deliveries is None or deliveries >= 1, "1 or more")
        _check("lost", self.lost, self.lost in ("raise", "skip"), "'raise', 'skip'")
        allowed = ", ".join(repr(one.value) for one in Strategy)
        _check("strategy", self.strategy, self.strategy in list(Strategy), allowed)
        name = self.dead_letter
        _check("dead_letter", name, name is None or bool(name), "the name of a topic")

    @property
    def ack_timeout_ms(self) -> int:
        """In milliseconds."""
        try:
            found = parse_duration(self.ack_timeout)
        except (TypeError, ValueError):
            found = 0
        allowed = f'a duration such as "30s", {ACK_TIMEOUT_MS_MIN} ms to 12 h'
        is_allowed = ACK_TIMEOUT_MS_MIN <= found <= ACK_TIMEOUT_MS_MAX
        _check("ack_timeout", self.ack_timeout, is_allowed, allowed)
        return found

    @property
    def rules(self) -> Rules:
        """What is kept with the subscription."""
        return Rules(
            self.ack_timeout_ms,
            self.max_deliveries or 0,
            self.dead_letter or "",
            str(self.strategy),
            self.ordered,
        )


def _check(key: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{key} = {value!r}; allowed: {allowed}.", key=key)


class LeasedMessage(ReceivedMessage):
    """A message that this consumer may handle until its lock ends.

    Every way to settle it returns once that is durable, and raises `LockLost`, with nothing
    changed, when the lock is gone: `ack_timeout` has passed, or it was settled before.
    """

    __slots__ = ("_lease", "_subscription")

    def __init__(
        self,
        record: ReceivedMessage,
        lease: Lease,
        subscription: PersistentSubscription,
    ) -> None:
        super().__init__(
            record._key,
            record._payload,
            record._headers,
            None,
            record._topic,
            record._partition,
            record._offset,
            None,
            record._time_ms,
        )
        self._lease = lease
        self._subscription = subscription

    @property
    def delivery_count(self) -> int:
        """How often it was handed out, this time included; it survives every failure."""
        return self._lease.count

    async def ack(self, *, timeout: float | None = None) -> None:
        """It is handled, and never handed out again."""
        await self._subscription._settled("ack", [self._lease], timeout)

    async def nack(self, delay: float | None = None, *, timeout: float | None = None) -> None:
        """It was not handled: hand it out again, not before `delay` seconds. Where no try is left,
        it becomes a dead letter, or is parked."""
        await self._subscription.nack(self, delay, timeout=timeout)

    async def park(self, reason: str = "", *, timeout: float | None = None) -> None:
        """Put it aside, for a person to look at; `replay_parked` brings it back."""
        await self._subscription.park(self, reason, timeout=timeout)

    async def extend(self, *, timeout: float | None = None) -> None:
        """Keep it for another `ack_timeout` from now on."""
        await self._subscription.extend(self, timeout=timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain messages, which nobody can settle."""
        return super().__reduce__()


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """A message that was put aside. message: None when it is no longer kept by its topic."""

    partition: int
    offset: int
    delivery_count: int
    reason: str
    parked_at: datetime
    message: ReceivedMessage | None
    log: int


@dataclass(frozen=True, slots=True)
class SubscriptionConsumer:
    """One consumer. holds: messages handed to it and not settled; scouts: partitions that it reads
    ahead in for all; silent_ms: since it was last heard."""

    name: str
    client: str
    holds: int
    scouts: tuple[int, ...]
    silent_ms: int


@dataclass(frozen=True, slots=True)
class SubscriptionDescription:
    """positions: below them all is settled. lag: messages that are not settled yet, what is parked
    not counted. unsettled: handed out at least once and not settled; of these, `held` by consumers,
    `delayed` after a `nack`, and `to_bury` as dead letters. ready: known and waiting."""

    topic: str
    name: str
    config: PersistentConfig
    coordinator: str
    positions: Mapping[TopicPartition, int]
    lag: Mapping[TopicPartition, int]
    unsettled: int
    parked: int
    ready: int
    held: int
    delayed: int
    to_bury: int
    consumers: tuple[SubscriptionConsumer, ...]


@dataclass(frozen=True, slots=True)
class SubscriptionListing:
    """One line of `engine.list_subscriptions()`."""

    topic: str
    name: str
    consumers: int
    unsettled: int
    parked: int


class PersistentSubscription:
    """Made by `engine.persistent_subscription`. As an async context manager and iterator it is one
    of the subscription's consumers; `describe`, `parked`, … need no entering."""

    def __init__(
        self, engine: StreamingEngine, topic: str, name: str, config: PersistentConfig | None
    ) -> None:
        if not isinstance(name, str) or not 1 <= len(name) <= GROUP_NAME_CHARS_MAX:
            raise ConfigError(
                f"A subscription's name has 1 to {GROUP_NAME_CHARS_MAX} characters; not {name!r}.",
                key="name",
            )
        if config is not None and config.dead_letter == topic:
            raise ConfigError(
                f"dead_letter = {topic!r}: dead letters would come back to the subscription; name"
                " another topic.",
                key="dead_letter",
            )
        self.topic = topic
        self.name = name
        self._engine = engine
        self._config = config
        self._session: SubscriptionSession | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    # ---- consuming

    async def __aenter__(self) -> Self:
        await self._start(self._engine.deadline(None))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LeasedMessage:
        if self._closed:
            raise StopAsyncIteration  # by another task, while this one handled a message
        found = await self._next(1, None)
        if not found:
            raise StopAsyncIteration
        message: LeasedMessage = found[0]
        return message

    async def poll(
        self, max_records: int = 500, timeout: float | None = 1.0
    ) -> list[LeasedMessage]:
        """The next messages, as many as there are now but no more than `max_records`; waits for
        the first one. An empty list: none came within `timeout` seconds (None: wait for ever)."""
        self._check_open()
        return await self._next(max_records, timeout)

    async def close(self) -> None:
        """End this consumer: others get what it has not settled. The subscription stays."""
        self._closed = True
        session, self._session = self._session, None
        self._engine.forget(self)
        if session is not None:
            await session.close()

    async def _next(self, count: int, timeout: float | None) -> list[LeasedMessage]:
        session = self._session
        if session is None:
            try:
                session = await self._start(self._engine.deadline(None))
            except AegisError:
                if self._closed:  # meanwhile, and the engine with it
                    return []
                raise
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        return await session.next(count, deadline)

    def _check_open(self) -> None:
        if self._closed:
            raise Misuse("The subscription is closed; make another object to consume again.")

    async def _start(self, deadline: float) -> SubscriptionSession:
        async with self._starting:
            self._check_open()
            if self._session is None:
                self._engine.started(self)  # from here on its end is ours too
                try:
                    self._session = await self._begin(deadline)
                except BaseException:
                    self._engine.forget(self)
                    raise
            return self._session

    async def _begin(self, deadline: float) -> SubscriptionSession:
        opened = await self._open(deadline)
        self._check_open()
        config = self._config or PersistentConfig()
        session = SubscriptionSession(
            self._calls,
            opened,
            max_in_flight=config.max_in_flight,
            skip_lost=config.lost == "skip",
            make=self._make,
            bury=bury,
        )
        session.start()
        return session

    async def _open(self, deadline: float) -> Opened:
        """Have the subscription on the server, made when it is not there."""
        cluster = self._engine.cluster
        config = self._config or PersistentConfig()
        info = await cluster.topic(self.topic, deadline)
        found = await offsets_at(cluster, self.topic, deadline, time_ms=config.start.time_ms)
        starts = [
            (
                info.partitions[number].group,
                config.start.resolve(
                    log_start=offsets.log_start,
                    high_watermark=offsets.high_watermark,
                    at_time=offsets.at_time,
                ),
            )
            for number, offsets in found.items()
            if number < len(info.partitions)
        ]
        await self._prepare_dead_letters(config, deadline)
        given = self._config is not None
        return await self._calls.have(config.rules, starts, deadline, given=given)

    async def _prepare_dead_letters(self, config: PersistentConfig, deadline: float) -> None:
        """Their topic is there."""
        if config.dead_letter is None:
            return
        cluster = self._engine.cluster
        await cluster.refresh([config.dead_letter], deadline)
        if config.dead_letter not in cluster.metadata.topics:
            left = deadline - asyncio.get_running_loop().time()
            with contextlib.suppress(TopicExists):  # somebody else was faster
                await self._engine.create_topic(config.dead_letter, timeout=left)

    def _make(self, partition: int, lease: Lease, record: Record) -> LeasedMessage:
        return LeasedMessage(from_record(self.topic, partition, record), lease, self)

    # ---- settling

    async def ack(
        self,
        messages: LeasedMessage | Iterable[LeasedMessage],
        *,
        timeout: float | None = None,
    ) -> None:
        """Messages are handled and never handed out again. Many at a time cost little more than
        one. Raises `LockLost` when the lock of any is gone; the others are acknowledged."""
        await self._settle("ack", messages, timeout)

    async def nack(
        self,
        messages: LeasedMessage | Iterable[LeasedMessage],
        delay: float | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """See `LeasedMessage.nack`."""
        if delay is not None and delay < 0:
            raise Misuse(f"A delay is not negative; {delay} is.")
        await self._settle("nack", messages, timeout, delay_ms=round((delay or 0) * 1000))

    async def park(
        self,
        messages: LeasedMessage | Iterable[LeasedMessage],
        reason: str = "",
        *,
        timeout: float | None = None,
    ) -> None:
        """See `LeasedMessage.park`. Raises `Throttled` when too many are parked."""
        await self._settle("park", messages, timeout, reason=reason[:REASON_CHARS_MAX])

    async def extend(
        self,
        messages: LeasedMessage | Iterable[LeasedMessage],
        *,
        timeout: float | None = None,
    ) -> None:
        """See `LeasedMessage.extend`."""
        await self._settle("extend", messages, timeout)

    async def _settle(
        self,
        kind: str,
        messages: LeasedMessage | Iterable[LeasedMessage],
        timeout: float | None,
        *,
        delay_ms: int = 0,
        reason: str = "",
    ) -> None:
        if isinstance(messages, LeasedMessage):
            leases = [messages._lease]
        else:
            leases = [message._lease for message in messages]
        for start in range(0, len(leases), SUBSCRIPTION_IN_FLIGHT_MAX):
            part = leases[start : start + SUBSCRIPTION_IN_FLIGHT_MAX]
            await self._settled(kind, part, timeout, delay_ms=delay_ms, reason=reason)

    def _settled(
        self,
        kind: str,
        leases: Sequence[Lease],
        timeout: float | None,
        *,
        delay_ms: int = 0,
        reason: str = "",
    ) -> asyncio.Future[None]:
        session = self._session
        if session is None:
            raise Misuse("The subscription is not open (any more), so it settles nothing.")
        deadline = self._engine.deadline(timeout)
        return session.settle(kind, leases, deadline, delay_ms=delay_ms, reason=reason)

    # ---- looking, and what an administrator does

    @property
    def _calls(self) -> SubscriptionCalls:
        return SubscriptionCalls(self._engine.cluster, self.topic, self.name)

    async def describe(self, *, timeout: float | None = None) -> SubscriptionDescription:
        """Its rules, progress, and consumers, as of now. Raises `SubscriptionNotFound`,
        `TopicNotFound`, `RequestTimeout`."""
        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        state = await self._calls.describe(deadline)
        ends = await list_offsets(cluster, self.topic, deadline)
        node = cluster.metadata.nodes.get(NodeId(state.coordinator))
        positions, lag = {}, {}
        for one in state.progress:
            place = TopicPartition(self.topic, one.partition)
            positions[place] = one.position
            if one.partition in ends:
                found = ends[one.partition]
                start = max(one.position, found.log_start)
                lag[place] = max(0, found.high_watermark - start - one.ahead)
        return SubscriptionDescription(
            topic=self.topic,
            name=self.name,
            config=_config_from(state.rules),
            coordinator=node.name if node else f"node {state.coordinator}",
            positions=positions,
            lag=lag,
            unsettled=sum(one.unsettled for one in state.progress),
            parked=sum(one.parked for one in state.progress),
            ready=state.ready,
            held=state.held,
            delayed=state.delayed,
            to_bury=state.to_bury,
            consumers=tuple(SubscriptionConsumer(*one) for one in state.consumers),
        )

    async def lag(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """How many messages of each partition are not settled yet."""
        return dict((await self.describe(timeout=timeout)).lag)

    async def parked(
        self, count: int | None = None, *, timeout: float | None = None
    ) -> list[ParkedMessage]:
        """What is parked, or the first of it, with the messages as far as their topic still keeps
        them. Raises `SubscriptionNotFound`."""
        from aegis_cluster.client.lease_reader import LeaseReader

        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        rows = await self._calls.parked(deadline, at_most=count)
        reader = LeaseReader(cluster, self.topic)
        found = []
        for row in rows:
            message = None
            if row.partition >= 0:
                records = await reader.read(row.log, row.offset, row.offset + 1, deadline)
                if records:
                    message = from_record(self.topic, row.partition, records[0])
            found.append(_parked(row, message))
        return found

    async def replay_parked(
        self,
        messages: Sequence[ParkedMessage] | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Have parked messages handed out again, with all tries before them; returns how many.

        messages: these only; None: all. In ordered mode they come behind what was handed out
        meanwhile. Raises `SubscriptionNotFound`.
        """
        rows = None if messages is None else [(one.log, one.offset) for one in messages]
        return await self._calls.replay(rows, self._engine.deadline(timeout))

    async def update(self, config: PersistentConfig, *, timeout: float | None = None) -> None:
        """Give the subscription other rules; its progress stays, and consumers go on by the new
        rules within a second. Raises `SubscriptionNotFound`."""
        deadline = self._engine.deadline(timeout)
        await self._calls.look(deadline)
        await self._prepare_dead_letters(config, deadline)
        await self._calls.update(config.rules, deadline)
        self._config = config

    async def reset(self, to: Offset, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """Begin anew elsewhere, while it has no consumers; returns the new positions.

        to: EARLIEST, LATEST, `Offset.at(n)` or `Offset.at_time(t)`, in every partition. Delivery
        counts begin anew, and what is parked is forgotten: replay it first, or read it with
        `parked`. Raises `SubscriptionNotFound`, `SubscriptionInUse`, and `OffsetOutOfRange` for an
        offset that a partition does not hold; nothing is changed then.
        """
        hint = "give Offset.EARLIEST, Offset.LATEST, Offset.at(n) or Offset.at_time(t)"
        arguments.instance(to, Offset, "to", hint)
        cluster, deadline = self._engine.cluster, self._engine.deadline(timeout)
        info = await cluster.topic(self.topic, deadline)
        found = await offsets_at(cluster, self.topic, deadline, time_ms=to.time_ms)
        positions = {
            place: resolved(to, place, offsets)
            for number, offsets in found.items()
            if (place := TopicPartition(self.topic, number)).partition < len(info.partitions)
        }
        starts = [(info.partitions[place.partition].group, at) for place, at in positions.items()]
        await self._calls.reset(starts, deadline)
        return positions

    async def delete(self, *, timeout: float | None = None) -> None:
        """Forget the subscription, its progress and what is parked; the topic's messages stay.
        Consumers are told `SubscriptionNotFound`. Raises that when there is none."""
        await self._calls.delete(self._engine.deadline(timeout))


async def listed(
    engine: StreamingEngine, topic: str | None, deadline: float
) -> list[SubscriptionListing]:
    """Persistent subscriptions by topic and name, of all topics or of one."""
    return [
        SubscriptionListing(*one)
        for one in await list_subscriptions(engine.cluster, deadline)
        if topic is None or one.topic == topic
    ]


def _config_from(rules: Rules) -> PersistentConfig:
    config = PersistentConfig(
        max_deliveries=rules.max_deliveries or None,
        dead_letter=rules.dead_letter or None,
        strategy=Strategy(rules.strategy),
        ordered=rules.ordered,
    )
    return replace(config, ack_timeout=f"{rules.ack_timeout_ms}ms")


def _parked(row: Parked, message: ReceivedMessage | None) -> ParkedMessage:
    return ParkedMessage(
        row.partition,
        row.offset,
        row.count,
        row.reason,
        from_ms(row.time_ms),
        message,
        row.log,
    )
