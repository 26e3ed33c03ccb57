"""Asks the cluster for what the explanations are made from; two looks where a trend counts.

The rule it protects: nothing here waits for what is broken. Partitions are known from what each
shard says of itself (`aegis cluster status`), a coordinator has a few seconds to answer, and what
was not heard is told as not heard.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.admin import cluster_status
from aegis_cluster.client.coordinator import describe_group, positions_of
from aegis_cluster.client.transactions import describe as describe_transaction
from aegis_cluster.errors import (
    AegisError,
    GroupNotFound,
    Misuse,
    NoOpenTransaction,
    SubscriptionNotFound,
)
from aegis_cluster.explain.findings import Explanation, explanation
from aegis_cluster.explain.groups import GroupFacts, MemberFacts, PlaceFacts, explain_group
from aegis_cluster.explain.partitions import PartitionFacts, ReplicaFacts, explain_partition
from aegis_cluster.explain.subscriptions import (
    ConsumerFacts,
    SubscriptionFacts,
    explain_subscription,
)
from aegis_cluster.explain.transactions import PartFacts, TransactionFacts, explain_transaction
from aegis_cluster.ids import (
    GROUPS_TOPIC,
    SUBSCRIPTIONS_TOPIC,
    TRANSACTIONS_TOPIC,
    TopicPartition,
)
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.client.coordinator import GroupPosition, GroupState
    from aegis_cluster.client.transactions import TransactionState
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.keys import LinkKeys
    from aegis_cluster.persistent import SubscriptionDescription

ANSWER_S: Final = 4.0
"""As long as a coordinator has to answer."""
WATCH_S: Final = 2.0
"""Between the two looks."""

Partitions = dict[TopicPartition, PartitionFacts]


class Looker:
    """Where to ask, and with which keys."""

    def __init__(
        self, bootstrap: str, timeout: float, *, keys: LinkKeys | None, insecure: bool
    ) -> None:
        self._bootstrap = bootstrap
        self._timeout = timeout
        self._keys = keys
        self._insecure = insecure

    async def partitions(self) -> Partitions:
        """Every partition of the cluster as its nodes see it. Raises `Unavailable`."""
        status = await cluster_status(
            self._bootstrap, self._timeout, keys=self._keys, insecure=self._insecure
        )
        return partitions_of(status)


def partitions_of(status: Mapping[str, Any]) -> Partitions:
    """From a status in the shape of `aegis cluster status --json`."""
    alive: dict[str, bool] = {}
    disks: dict[str, str] = {}
    damages: dict[tuple[str, int], str] = {}
    for node in status["nodes"]:
        alive[node["name"]] = node["alive"]
        for shard in node["shards"]:
            for one in shard.get("damaged") or ():
                if one["topic"]:
                    damages[node["name"], one["group"]] = one["why"]
                else:
                    disks[node["name"]] = one["why"]
    found: Partitions = {}
    for topic in status["topics"]:
        for one in topic["partitions"]:
            replicas = tuple(
                ReplicaFacts(
                    node=name or "a node that is not registered any more",
                    alive=alive.get(name, False),
                    in_sync=name in one["in_sync"],
                    damage=damages.get((name, one["group"])),
                    disk=disks.get(name),
                )
                for name in one["replicas"]
            )
            place = TopicPartition(topic["name"], one["partition"])
            found[place] = PartitionFacts(
                place.topic,
                place.partition,
                replicas,
                one["leader"],
                one["log_start"],
                one["high_watermark"],
                one["last_stable"],
            )
    return found


# Partitions


async def partition(looker: Looker, name: str) -> Explanation:
    """name: a topic (all of its partitions) or topic/partition. Raises `Misuse`, `Unavailable`."""
    found = await looker.partitions()
    topic, _, number = name.rpartition("/")
    places = [one for one in found if one.topic == name]
    if topic and number.isdecimal():
        places = [one for one in found if one == TopicPartition(topic, int(number))]
    if not places:
        raise Misuse(
            f"There is no partition {name!r}, as far as the nodes that answer know; write it like"
            f" orders/0. Topics: {', '.join(sorted({one.topic for one in found})) or 'none'}."
        )
    findings = [finding for place in sorted(places) for finding in explain_partition(found[place])]
    return explanation("partition", name, findings)


# Groups


async def group(engine: StreamingEngine, looker: Looker, name: str, watch: float) -> Explanation:
    """Raises `GroupNotFound`, `Unavailable`. watch: seconds between two looks."""
    before = await looker.partitions()
    coordinator = _coordinator(before, GROUPS_TOPIC, name.encode())
    try:
        first = await _look(engine, name)
        begun = time.monotonic()
        await asyncio.sleep(watch)
        after = await looker.partitions()
        second = await _look(engine, name)
    except GroupNotFound:
        raise
    except AegisError:
        found = explain_group(GroupFacts(name, coordinator, known=False))
        return explanation("group", name, found)
    watched_ms = max(1, round((time.monotonic() - begun) * 1000))
    facts = group_facts(name, coordinator, (before, after), (first, second), watched_ms)
    return explanation("group", name, explain_group(facts))


Look = tuple["GroupState", "dict[TopicPartition, GroupPosition]"]


async def _look(engine: StreamingEngine, name: str) -> Look:
    deadline = engine.deadline(ANSWER_S)
    state = await describe_group(engine.cluster, name, deadline)
    return state, await positions_of(engine.cluster, name, None, deadline)


def group_facts(
    name: str,
    coordinator: PartitionFacts | None,
    partitions: tuple[Partitions, Partitions],
    looks: tuple[Look, Look],
    watched_ms: int,
) -> GroupFacts:
    """Put two looks together."""
    (earlier, old), (state, new) = looks
    heard = {one.name: one.ms_left for one in earlier.members}
    members = tuple(
        MemberFacts(
            name=one.name,
            client=one.client,
            topics=one.topics,
            assigned=one.assigned,
            revoking=one.revoking,
            target=one.target,
            ms_left=one.ms_left,
            connected=one.connected,
            silent=one.ms_left <= heard.get(one.name, 0) - watched_ms // 2,
        )
        for one in state.members
    )
    held = {place for one in members for place in one.assigned | one.revoking | one.target}
    places = tuple(
        _place(place, partitions, old.get(place), new.get(place))
        for place in sorted(held | set(new))
    )
    topics: dict[str, int] = {}
    for place in partitions[1]:
        topics[place.topic] = topics.get(place.topic, 0) + 1
    return GroupFacts(name, coordinator, True, watched_ms, members, places, topics)


def _place(
    place: TopicPartition,
    partitions: tuple[Partitions, Partitions],
    old: GroupPosition | None,
    new: GroupPosition | None,
) -> PlaceFacts:
    before, after = (one.get(place) for one in partitions)
    position = new.offset if new is not None and new.offset >= 0 else None
    earlier = old.offset if old is not None and old.offset >= 0 else None
    ends = [one.high_watermark for one in (before, after) if one is not None]
    grew = ends[1] - ends[0] if len(ends) == 2 and None not in ends else 0  # type: ignore[operator]
    moved = 0 if position is None else position - (position if earlier is None else earlier)
    if earlier is None and position is not None and old is not new:
        moved = 1  # its first commit came meanwhile
    age = None
    if new is not None and position is not None and new.time_ms:
        age = max(0, time.time_ns() // 1_000_000 - new.time_ms)
    return PlaceFacts(place, after, position, age, moved, grew)


def _coordinator(found: Partitions, topic: str, key: bytes) -> PartitionFacts | None:
    count = sum(one.topic == topic for one in found)
    return found.get(TopicPartition(topic, partition_for(key, count))) if count else None


# Persistent subscriptions


async def subscription(
    engine: StreamingEngine, looker: Looker, name: str, watch: float
) -> Explanation:
    """name: topic/name, or a name that no other topic has. Raises `SubscriptionNotFound`, `Misuse`,
    `Unavailable`."""
    found = await looker.partitions()
    topic, short = await _subscription(engine, name)
    coordinator = _coordinator(found, SUBSCRIPTIONS_TOPIC, f"{topic}\0{short}".encode())
    partitions = tuple(found[one] for one in sorted(found) if one.topic == topic)
    one = engine.persistent_subscription(topic, short)
    try:
        first = await one.describe(timeout=ANSWER_S)
        await asyncio.sleep(watch)
        second = await one.describe(timeout=ANSWER_S)
    except SubscriptionNotFound:
        raise
    except AegisError:
        facts = SubscriptionFacts(topic, short, coordinator, partitions, known=False)
    else:
        facts = _subscription_facts(coordinator, partitions, first, second)
    return explanation("subscription", name, explain_subscription(facts))


async def _subscription(engine: StreamingEngine, name: str) -> tuple[str, str]:
    topic, slash, short = name.partition("/")
    if slash:
        return topic, short
    listings = await engine.list_subscriptions(timeout=ANSWER_S)
    topics = [one.topic for one in listings if one.name == name]
    if not topics:
        raise SubscriptionNotFound(f"There is no persistent subscription {name!r}.", name=name)
    if len(topics) > 1:
        raise Misuse(
            f"Several topics have a subscription {name!r}; say which:"
            f" {', '.join(f'{topic}/{name}' for topic in topics)}."
        )
    return topics[0], name


def _subscription_facts(
    coordinator: PartitionFacts | None,
    partitions: tuple[PartitionFacts, ...],
    first: SubscriptionDescription,
    second: SubscriptionDescription,
) -> SubscriptionFacts:
    done = sum(max(0, end - first.positions.get(at, end)) for at, end in second.positions.items())
    return SubscriptionFacts(
        second.topic,
        second.name,
        coordinator,
        partitions,
        ack_timeout_ms=second.config.ack_timeout_ms,
        lag=sum(second.lag.values()),
        ready=second.ready,
        held=second.held,
        delayed=second.delayed,
        to_bury=second.to_bury,
        parked=second.parked,
        settled=max(done, sum(first.lag.values()) - sum(second.lag.values())),
        consumers=tuple(
            ConsumerFacts(one.name, one.client, one.holds, one.silent_ms)
            for one in second.consumers
        ),
    )


# Transactions


async def transaction(engine: StreamingEngine, looker: Looker, name: str) -> Explanation:
    """name: a transactional id. Raises `NoOpenTransaction` for one that nobody knows,
    `Unavailable`."""
    found = await looker.partitions()
    coordinator = _coordinator(found, TRANSACTIONS_TOPIC, name.encode())
    try:
        state = await describe_transaction(engine.cluster, name, engine.deadline(ANSWER_S))
    except NoOpenTransaction:
        raise
    except AegisError:
        facts = TransactionFacts(name, coordinator, known=False)
    else:
        facts = transaction_facts(name, coordinator, found, state)
    return explanation("txn", name, explain_transaction(facts))


def transaction_facts(
    name: str,
    coordinator: PartitionFacts | None,
    partitions: Partitions,
    state: TransactionState,
) -> TransactionFacts:
    """Put the coordinator's words and the partitions together."""
    last = ""
    if state.past:
        past = state.past[-1]
        why = f": {past.reason}" if past.reason else ""
        last = f"The last one was {'committed' if past.committed else 'aborted'}{why}."
    return TransactionFacts(
        name,
        coordinator,
        phase=state.phase.name.lower(),
        client=state.client,
        age_ms=state.age_ms,
        timeout_ms=state.timeout_ms,
        parts=tuple(
            PartFacts(str(part.place), partitions.get(part.place), part.ended)
            for part in state.parts
        ),
        last=last,
    )
