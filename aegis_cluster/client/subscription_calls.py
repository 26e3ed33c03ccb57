"""Calls to a persistent subscription's coordinator.

That is whoever leads the subscription's partition of `__subscriptions`. Every call is harmless to
repeat: a poll and a settling request carry numbers, a report says where it begins, and dead letters
are settled by a transaction.
"""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.coordinator import ask_partition, internal_topic
from aegis_cluster.ids import SUBSCRIPTIONS_TOPIC, GroupId, TopicPartition
from aegis_cluster.wire.partitioner import key_hash, partition_for
from aegis_cluster.wire.protocol import (
    Api,
    Reply,
    take_bool,
    take_int,
    take_list,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.client.cluster import ClusterClient

ASK_S: Final = 3.0
NO_KEY: Final = 0xFFFFFFFF
PARKED_ROWS: Final = 1_000


class Rules(NamedTuple):
    """What all consumers of a subscription share; max_deliveries 0: without end."""

    ack_timeout_ms: int
    max_deliveries: int
    dead_letter: str
    strategy: str
    ordered: bool

    @property
    def keyed(self) -> bool:
        """Whether the coordinator needs to know of keys."""
        return self.ordered or self.strategy != "round_robin"


class Opened(NamedTuple):
    """token: tells the subscription from an earlier one of its name."""

    token: str
    rules: Rules


class Progress(NamedTuple):
    """One partition. position: all below is settled; ahead: how many are settled above it."""

    partition: int
    position: int
    ahead: int
    unsettled: int
    parked: int


class ConsumerState(NamedTuple):
    name: str
    client: str
    holds: int
    scouts: tuple[int, ...]
    silent_ms: int


class SubscriptionState(NamedTuple):
    rules: Rules
    coordinator: int
    progress: tuple[Progress, ...]
    consumers: tuple[ConsumerState, ...]
    ready: int
    held: int
    delayed: int
    to_bury: int


class Parked(NamedTuple):
    """partition: -1 where the topic that held it is no more."""

    partition: int
    log: GroupId
    offset: int
    count: int  # type: ignore[assignment] # hides tuple.count
    reason: str
    time_ms: int


class Listed(NamedTuple):
    topic: str
    name: str
    consumers: int
    unsettled: int
    parked: int


class SubscriptionCalls:
    """To the coordinator of one subscription, whoever that is at the time."""

    def __init__(self, cluster: ClusterClient, topic: str, name: str) -> None:
        self.cluster = cluster
        self.topic = topic
        self.name = name

    async def ask(
        self, api: Api, fields: Sequence[Any], deadline: float, *, ask_s: float = ASK_S
    ) -> Reply:
        """Ask until somebody answers. Raises the coordinator's refusal; `RequestTimeout` when
        nothing was sent in time, `OutcomeUnknown` when something was."""
        place = await self.place(deadline)
        return await ask_partition(
            self.cluster,
            place.partition,
            api,
            [self.topic, self.name, *fields],
            deadline,
            ask_s=ask_s,
            topic=SUBSCRIPTIONS_TOPIC,
        )

    async def place(self, deadline: float) -> TopicPartition:
        """The log that holds the subscription. Raises `RequestTimeout`."""
        info = await internal_topic(self.cluster, deadline, SUBSCRIPTIONS_TOPIC)
        number = partition_for(f"{self.topic}\0{self.name}".encode(), len(info.partitions))
        return TopicPartition(SUBSCRIPTIONS_TOPIC, number)

    async def look(self, deadline: float) -> Opened:
        """Raise `SubscriptionNotFound`."""
        fields: list[Any] = ["look", "", None, [], False]
        return _opened(await self.ask(Api.SUBSCRIPTION_OPEN, fields, deadline))

    async def have(
        self,
        rules: Rules,
        starts: Iterable[tuple[GroupId, int]],
        deadline: float,
        *,
        given: bool,
    ) -> Opened:
        """The subscription, made if it is not there. given: refuse one with other rules.

        Raises `ConfigError`.
        """
        token = uuid.uuid4().hex
        rows = [list(start) for start in starts]
        fields = ["have", token, list(rules), rows, given]
        return _opened(await self.ask(Api.SUBSCRIPTION_OPEN, fields, deadline))

    async def update(self, rules: Rules, deadline: float) -> Opened:
        """Give it other rules. Raises `SubscriptionNotFound`."""
        fields = ["update", "", list(rules), [], True]
        return _opened(await self.ask(Api.SUBSCRIPTION_OPEN, fields, deadline))

    async def describe(self, deadline: float) -> SubscriptionState:
        """As of now (read index). Raises `SubscriptionNotFound`."""
        reply = await self.ask(Api.SUBSCRIPTION_DESCRIBE, [], deadline)
        rows = take_list(reply.fields, 3, "progress")
        people = take_list(reply.fields, 4, "consumers")
        counts = take_list(reply.fields, 5, "counts")
        return SubscriptionState(
            _rules_from(take_list(reply.fields, 1, "rules")),
            take_int(reply.fields, 2, "coordinator"),
            tuple(_progress_from(take_list(rows, slot, "row")) for slot in range(len(rows))),
            tuple(_consumer_from(take_list(people, slot, "row")) for slot in range(len(people))),
            *(take_int(counts, slot, "count") for slot in range(4)),
        )

    async def parked(self, deadline: float, *, at_most: int | None = None) -> list[Parked]:
        """All that is parked, or the first of them, by partition and offset."""
        found: list[Parked] = []
        log, offset = 0, -1
        while at_most is None or len(found) < at_most:
            left = PARKED_ROWS if at_most is None else min(PARKED_ROWS, at_most - len(found))
            reply = await self.ask(Api.SUBSCRIPTION_PARKED, [log, offset, left], deadline)
            rows = take_list(reply.fields, 0, "parked")
            found += [_parked_from(take_list(rows, slot, "row")) for slot in range(len(rows))]
            if len(rows) < left:
                break
            log, offset = found[-1].log, found[-1].offset
        return found

    async def replay(self, messages: Iterable[tuple[int, int]] | None, deadline: float) -> int:
        """messages: (log, offset) of parked ones; None: all. Returns how many are replayed."""
        rows = None if messages is None else [list(one) for one in messages]
        reply = await self.ask(Api.SUBSCRIPTION_REPLAY, [rows], deadline)
        return take_int(reply.fields, 0, "count")

    async def reset(self, starts: Iterable[tuple[GroupId, int]], deadline: float) -> None:
        """Begin anew at these offsets. Raises `SubscriptionNotFound`, `SubscriptionInUse`."""
        rows = [list(start) for start in starts]
        await self.ask(Api.SUBSCRIPTION_RESET, [uuid.uuid4().hex, rows], deadline)

    async def delete(self, deadline: float) -> None:
        """Raise `SubscriptionNotFound`."""
        await self.ask(Api.SUBSCRIPTION_DELETE, [], deadline)


async def list_subscriptions(cluster: ClusterClient, deadline: float) -> list[Listed]:
    """All of the cluster, by topic and name."""
    info = await internal_topic(cluster, deadline, SUBSCRIPTIONS_TOPIC)
    found = []
    for number in range(len(info.partitions)):
        reply = await ask_partition(
            cluster,
            number,
            Api.SUBSCRIPTION_LIST,
            [number],
            deadline,
            topic=SUBSCRIPTIONS_TOPIC,
        )
        rows = take_list(reply.fields, 0, "subscriptions")
        for slot in range(len(rows)):
            row = take_list(rows, slot, "row")
            topic, name = take_str(row, 0, "topic"), take_str(row, 1, "name")
            found.append(Listed(topic, name, *(take_int(row, n, "count") for n in (2, 3, 4))))
    return sorted(found)


def pack_keys(keys: Iterable[bytes | None]) -> bytes:
    """A hash of each key, as a report carries them."""
    hashes = [NO_KEY if key is None else key_hash(key) for key in keys]
    return struct.pack(f"<{len(hashes)}I", *hashes)


def _opened(reply: Reply) -> Opened:
    return Opened(
        take_str(reply.fields, 0, "token"), _rules_from(take_list(reply.fields, 1, "rules"))
    )


def _rules_from(values: Sequence[Any]) -> Rules:
    return Rules(
        take_int(values, 0, "ack_timeout_ms"),
        take_int(values, 1, "max_deliveries"),
        take_str(values, 2, "dead_letter"),
        take_str(values, 3, "strategy"),
        take_bool(values, 4, "ordered"),
    )


def _progress_from(row: Sequence[Any]) -> Progress:
    return Progress(*(take_int(row, slot, "progress") for slot in range(5)))


def _consumer_from(row: Sequence[Any]) -> ConsumerState:
    scouts = take_list(row, 3, "scouts")
    return ConsumerState(
        take_str(row, 0, "name"),
        take_str(row, 1, "client"),
        take_int(row, 2, "holds"),
        tuple(take_int(scouts, slot, "partition") for slot in range(len(scouts))),
        take_int(row, 4, "silent_ms"),
    )


def _parked_from(row: Sequence[Any]) -> Parked:
    return Parked(
        take_int(row, 0, "partition", low=-1),
        GroupId(take_int(row, 1, "log")),
        take_int(row, 2, "offset"),
        take_int(row, 3, "count"),
        take_str(row, 4, "reason"),
        take_int(row, 5, "time_ms"),
    )
