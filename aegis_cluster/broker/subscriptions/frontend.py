"""Requests about persistent subscriptions, as they reach a shard.

First fields: topic and the subscription's name; the partition of `__subscriptions` follows from
both by murmur2, and the leader of that answers.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import Coordinators, read
from aegis_cluster.broker.subscriptions.commands import (
    STRATEGIES,
    Bury,
    Create,
    Key,
    Letter,
    Rules,
    Run,
)
from aegis_cluster.broker.subscriptions.subscription_coordinator import (
    SETTLE_KINDS,
    Mark,
    Poll,
    SubscriptionCoordinator,
)
from aegis_cluster.broker.subscriptions.subscription_stm import SubscriptionFold
from aegis_cluster.errors import NotLeader, PeerViolation, Refused, SubscriptionNotFound
from aegis_cluster.ids import SUBSCRIPTIONS_TOPIC, GroupId, ProducerId
from aegis_cluster.limits import (
    ACK_TIMEOUT_MS_MAX,
    ACK_TIMEOUT_MS_MIN,
    GROUP_NAME_CHARS_MAX,
    SUBSCRIPTION_BURIALS_MAX,
    SUBSCRIPTION_IN_FLIGHT_MAX,
    SUBSCRIPTION_REPORT_OFFSETS_MAX,
    TOPIC_NAME_CHARS_MAX,
)
from aegis_cluster.wire.protocol import (
    Api,
    is_none,
    take_bool,
    take_bytes,
    take_int,
    take_list,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.subscriptions.subscription_table import Subscription

SUBSCRIPTION_APIS: Final = frozenset(
    {
        Api.SUBSCRIPTION_OPEN,
        Api.SUBSCRIPTION_POLL,
        Api.SUBSCRIPTION_REPORT,
        Api.SUBSCRIPTION_SETTLE,
        Api.SUBSCRIPTION_BURY,
        Api.SUBSCRIPTION_LEAVE,
        Api.SUBSCRIPTION_DESCRIBE,
        Api.SUBSCRIPTION_LIST,
        Api.SUBSCRIPTION_PARKED,
        Api.SUBSCRIPTION_REPLAY,
        Api.SUBSCRIPTION_RESET,
        Api.SUBSCRIPTION_DELETE,
    }
)
KEY_BYTES: Final = 4
NO_KEY: Final = 0xFFFFFFFF
"""In a report's keys; the hashes of keys have 31 bits."""
PARKED_ROWS_MAX: Final = 1_000
REASON_CHARS_MAX: Final = 500
DELAY_MS_MAX: Final = 30 * 24 * 3_600_000


class SubscriptionFrontend:
    """One per shard."""

    def __init__(self, shard: Shard, wall_ms: Callable[[], int]) -> None:
        self._shard = shard
        self._wall_ms = wall_ms
        self._coordinators = Coordinators(shard, SUBSCRIPTIONS_TOPIC, self._make)

    # ---- inputs

    def handle(
        self, api: Api, fields: Sequence[Any], exchange: Exchange, *, origin: object, ms_left: int
    ) -> None:
        """One request. Raises its refusal, `PeerViolation`, or answers through `exchange`."""
        if api is Api.SUBSCRIPTION_LIST:
            self._list(fields, exchange)
            return
        key = Key(
            take_str(fields, 0, "topic", chars_max=TOPIC_NAME_CHARS_MAX),
            take_str(fields, 1, "name", chars_max=GROUP_NAME_CHARS_MAX),
        )
        coordinator = self._coordinators.of(f"{key.topic}\0{key.name}")
        coordinator.at(self._shard.now_ms)
        match api:
            case Api.SUBSCRIPTION_OPEN:
                self._open(coordinator, key, fields, exchange)
            case Api.SUBSCRIPTION_POLL:
                coordinator.poll(
                    exchange,
                    key,
                    take_str(fields, 2, "token"),
                    _poll_from(fields),
                    origin=origin,
                    wait_ms=ms_left // 2,
                )
            case Api.SUBSCRIPTION_REPORT:
                self._report(coordinator, key, fields, exchange)
            case Api.SUBSCRIPTION_SETTLE:
                coordinator.settle(
                    exchange,
                    key,
                    take_str(fields, 2, "token"),
                    session=take_str(fields, 3, "consumer", chars_max=GROUP_NAME_CHARS_MAX),
                    number=take_int(fields, 4, "number"),
                    marks=_marks_from(fields),
                )
            case Api.SUBSCRIPTION_BURY:
                self._bury(coordinator, key, fields, exchange)
            case Api.SUBSCRIPTION_LEAVE:
                token, consumer = take_str(fields, 2, "token"), take_str(fields, 3, "consumer")
                coordinator.leave(exchange, key, token, consumer)
            case Api.SUBSCRIPTION_DESCRIBE:
                self._describe(coordinator, key, exchange)
            case Api.SUBSCRIPTION_PARKED:
                self._parked(coordinator, key, fields, exchange)
            case Api.SUBSCRIPTION_REPLAY:
                messages = None if is_none(fields, 2, "messages") else _places_from(fields, 2)
                coordinator.replay(exchange, key, messages)
            case Api.SUBSCRIPTION_RESET:
                token = take_str(fields, 2, "token", chars_max=64)
                coordinator.reset(exchange, key, token, _places_from(fields, 3))
            case Api.SUBSCRIPTION_DELETE:
                coordinator.drop(exchange, key)
            case _:
                raise PeerViolation(f"Api {api.name} is not about subscriptions.")

    def tick(self) -> None:
        """Begin and end coordinators with the leaderships here, and let their locks age."""
        self._coordinators.tick()

    def client_gone(self, origin: object) -> None:
        """A client's connection has closed."""
        for coordinator in self._coordinators:
            coordinator.client_gone(origin)

    # ---- coordinators

    def _make(self, partition: Partition) -> SubscriptionCoordinator:
        fold = partition.state.fold
        if not isinstance(fold, SubscriptionFold):
            raise NotLeader(f"{partition.name} holds no subscriptions.")
        return SubscriptionCoordinator(
            partition,
            fold,
            wall_ms=self._wall_ms,
            logs_of=self._logs_of,
            now_ms=self._shard.now_ms,
        )

    def _logs_of(self, topic: str) -> dict[GroupId, int]:
        """The logs of a topic and their partition numbers, as far as this shard knows."""
        info = self._shard.table.topics.get(topic)
        return {} if info is None else {one.group: one.partition for one in info.partitions}

    # ---- requests

    def _open(
        self,
        coordinator: SubscriptionCoordinator,
        key: Key,
        fields: Sequence[Any],
        exchange: Exchange,
    ) -> None:
        """[topic, name, mode, token, rules or None, [[log, offset], ...], given] -> [token, rules]

        mode: "look": it must be there; "have": make it if it is not; "update": change its rules.
        """
        mode = take_str(fields, 2, "mode")
        token = take_str(fields, 3, "token", chars_max=64)
        rules = None if is_none(fields, 4, "rules") else _rules_from(take_list(fields, 4, "rules"))
        match mode, rules:
            case "look", _:
                coordinator.look(exchange, key)
            case "have", Rules():
                starts = tuple(_places_from(fields, 5))
                command = Create(key, token, rules, starts)
                given = take_bool(fields, 6, "given")
                coordinator.create(exchange, command, given=given)
            case "update", Rules():
                coordinator.configure(exchange, key, rules)
            case _:
                raise PeerViolation("A subscription is opened to look, to have or to update.")

    def _report(
        self,
        coordinator: SubscriptionCoordinator,
        key: Key,
        fields: Sequence[Any],
        exchange: Exchange,
    ) -> None:
        """[topic, name, token, consumer, log, first, end, [[first, end], ...], keys or None]

        keys: a hash of 4 bytes of each message's key, `NO_KEY` where it has none.
        """
        first, end = take_int(fields, 5, "first"), take_int(fields, 6, "end")
        runs: list[tuple[int, int]] = []
        place, count = first, 0
        for row in take_list(fields, 7, "runs"):
            values = row if isinstance(row, list) else []
            start = take_int(values, 0, "first", low=place)
            place = take_int(values, 1, "end", low=start + 1, high=end)
            count += place - start
            runs.append((start, place))
        if count > SUBSCRIPTION_REPORT_OFFSETS_MAX:
            raise PeerViolation("A report tells of too many messages.", have=count)
        keys = None
        if not is_none(fields, 8, "keys"):
            keys = _keys_from(take_bytes(fields, 8, "keys"), count)
        coordinator.report(
            exchange,
            key,
            take_str(fields, 2, "token"),
            take_str(fields, 3, "consumer"),
            log=GroupId(take_int(fields, 4, "log")),
            first=first,
            end=end,
            runs=runs,
            keys=keys,
        )

    def _bury(
        self,
        coordinator: SubscriptionCoordinator,
        key: Key,
        fields: Sequence[Any],
        exchange: Exchange,
    ) -> None:
        """[topic, name, token, consumer, producer id, its epoch, [[log, offset, count], ...]]"""
        rows = take_list(fields, 6, "letters", items_max=SUBSCRIPTION_BURIALS_MAX)
        letters = tuple(_letter_from(row if isinstance(row, list) else []) for row in rows)
        producer = ProducerId(take_int(fields, 4, "producer_id"))
        epoch = take_int(fields, 5, "producer_epoch", high=2**15 - 1)
        token, consumer = take_str(fields, 2, "token"), take_str(fields, 3, "consumer")
        coordinator.bury(exchange, Bury(key, producer, epoch, letters), token, consumer)

    # ---- looking

    def _describe(self, coordinator: SubscriptionCoordinator, key: Key, exchange: Exchange) -> None:
        """[topic, name] -> [token, rules, coordinator's node, [[partition, position, settled ahead,
        unsettled, parked], ...], consumers, counts]; see `SubscriptionCoordinator.described`."""

        def answer() -> None:
            try:
                state, consumers, counts = coordinator.described(key)
            except Refused as error:
                exchange.refuse(error)
                return
            node = self._shard.context.me.node
            rows = self._progress(state)
            exchange.reply([state.token, list(state.rules), node, rows, consumers, counts])

        read(coordinator.partition, exchange, answer)

    def _progress(self, state: Subscription) -> list[list[int]]:
        rows = []
        for log, partition in self._logs_of(state.key.topic).items():
            found = state.progress.get(log)
            if found is None:
                rows.append([partition, 0, 0, 0, 0])
                continue
            parts = found.position, found.ahead.count, len(found.open), len(found.parked)
            rows.append([partition, *parts])
        return sorted(rows)

    def _parked(
        self,
        coordinator: SubscriptionCoordinator,
        key: Key,
        fields: Sequence[Any],
        exchange: Exchange,
    ) -> None:
        """[topic, name, after log, after offset, count] -> [[[partition, log, offset, count,
        reason, time], ...]]: the next ones in the order of log and offset; partition -1: of a topic
        that is no more."""
        after = take_int(fields, 2, "log"), take_int(fields, 3, "offset", low=-1)
        count = take_int(fields, 4, "count", low=1, high=PARKED_ROWS_MAX)

        def answer() -> None:
            state = coordinator.fold.table.subscriptions.get(key)
            if state is None:
                exchange.refuse(SubscriptionNotFound(f"There is no subscription {key}."))
                return
            logs = self._logs_of(key.topic)
            found = sorted(
                (log, offset, parked)
                for log, progress in state.progress.items()
                for offset, parked in progress.parked.items()
                if (log, offset) > after
            )
            rows = [
                [logs.get(log, -1), log, offset, one.count, one.reason, one.time_ms]
                for log, offset, one in found[:count]
            ]
            exchange.reply([rows])

        read(coordinator.partition, exchange, answer)

    def _list(self, fields: Sequence[Any], exchange: Exchange) -> None:
        """[partition of `__subscriptions`] ->
        [[[topic, name, consumers, unsettled, parked], ...]]"""
        coordinator = self._coordinators.at(take_int(fields, 0, "partition"))

        def answer() -> None:
            found = sorted(coordinator.fold.table.subscriptions.items())
            exchange.reply(
                [
                    [
                        [*key, coordinator.consumers_of(key), one.unsettled, one.parked]
                        for key, one in found
                    ]
                ]
            )

        read(coordinator.partition, exchange, answer)


def _poll_from(fields: Sequence[Any]) -> Poll:
    """[topic, name, token, consumer, client, number, want, [partition, ...]]"""
    scouting = take_list(fields, 7, "scouting")
    return Poll(
        take_str(fields, 3, "consumer", chars_max=GROUP_NAME_CHARS_MAX),
        take_str(fields, 4, "client", chars_max=GROUP_NAME_CHARS_MAX),
        take_int(fields, 5, "number"),
        take_int(fields, 6, "want", high=SUBSCRIPTION_IN_FLIGHT_MAX),
        tuple(sorted(take_int(scouting, place, "partition") for place in range(len(scouting)))),
    )


def _marks_from(fields: Sequence[Any]) -> list[Mark]:
    marks = [_mark_from(row) for row in take_list(fields, 5, "marks")]
    count = sum(mark.run.end - mark.run.first for mark in marks)
    if count > SUBSCRIPTION_IN_FLIGHT_MAX:
        raise PeerViolation("a request settles too many messages", have=count)
    return marks


def _mark_from(row: Any) -> Mark:
    """[kind, log, first, end, count, delay in ms, reason]"""
    values = row if isinstance(row, list) else []
    kind = take_str(values, 0, "kind")
    if kind not in SETTLE_KINDS:
        raise PeerViolation("a way to settle a message is unknown", have=kind[:40])
    first = take_int(values, 2, "first")
    high = first + SUBSCRIPTION_IN_FLIGHT_MAX
    return Mark(
        kind,
        Run(
            GroupId(take_int(values, 1, "log")),
            first,
            take_int(values, 3, "end", low=first, high=high),
        ),
        take_int(values, 4, "count"),
        take_int(values, 5, "delay_ms", high=DELAY_MS_MAX),
        take_str(values, 6, "reason", chars_max=REASON_CHARS_MAX),
    )


def _letter_from(values: Sequence[Any]) -> Letter:
    log = GroupId(take_int(values, 0, "log"))
    return Letter(log, take_int(values, 1, "offset"), take_int(values, 2, "count"))


def _rules_from(values: Sequence[Any]) -> Rules:
    strategy = take_str(values, 3, "strategy")
    if strategy not in STRATEGIES:
        raise PeerViolation("a strategy is unknown", have=strategy[:40])
    return Rules(
        take_int(values, 0, "ack_timeout_ms", low=ACK_TIMEOUT_MS_MIN, high=ACK_TIMEOUT_MS_MAX),
        take_int(values, 1, "max_deliveries", high=2**31),
        take_str(values, 2, "dead_letter", chars_max=TOPIC_NAME_CHARS_MAX),
        strategy,
        take_bool(values, 4, "ordered"),
    )


def _places_from(fields: Sequence[Any], index: int) -> list[tuple[GroupId, int]]:
    """[[log, offset], ...]"""
    found = []
    for row in take_list(fields, index, "places"):
        values = row if isinstance(row, list) else []
        found.append((GroupId(take_int(values, 0, "log")), take_int(values, 1, "offset")))
    return found


def _keys_from(data: bytes, count: int) -> list[int | None]:
    if len(data) != KEY_BYTES * count:
        raise PeerViolation("a report's keys are as many as its messages", have=len(data))
    hashes = struct.unpack(f"<{count}I", data)
    return [None if hashed == NO_KEY else hashed for hashed in hashes]
