"""Calls to a transaction's coordinator: whoever leads its partition of `__transactions`.

The idea: every call is harmless to repeat. A producer is known by its identity, which is another
one for every transaction (KIP-890), so what comes late or twice cannot reach a later one; and an
end that was decided before is answered with what was decided.
"""

from __future__ import annotations

import uuid
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.coordinator import ask_partition, internal_topic
from aegis_cluster.ids import TRANSACTIONS_TOPIC, TopicPartition
from aegis_cluster.wire.partitioner import partition_for
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

LIST_ROWS: Final = 1_000
REPLACED: Final = -1
"""In an answer, in the place of an epoch: another producer has the transactional id by now."""


class Phase(IntEnum):
    """As on the wire."""

    IDLE = 0
    OPEN = 1
    COMMITTING = 2
    ABORTING = 3


class Identity(NamedTuple):
    """A producer in one transaction."""

    producer: int
    epoch: int


class Ended(NamedTuple):
    """What was decided, and why if it was aborted. follower: the identity for the next transaction;
    None: another producer has the transactional id."""

    committed: bool
    reason: str
    follower: Identity | None


class PartInTransaction(NamedTuple):
    """One log that takes part. ended: it has its marker, as far as the coordinator knows."""

    place: TopicPartition
    ended: bool


class PastTransaction(NamedTuple):
    """time_ms: of the decision."""

    identity: Identity
    committed: bool
    reason: str
    time_ms: int


class TransactionState(NamedTuple):
    """One transactional id as its coordinator has it. age_ms: since its open transaction began."""

    identity: Identity
    phase: Phase
    timeout_ms: int
    age_ms: int
    client: str
    parts: tuple[PartInTransaction, ...]
    past: tuple[PastTransaction, ...]
    coordinator: int


class ListedTransaction(NamedTuple):
    name: str
    phase: Phase
    age_ms: int
    parts: int
    client: str


async def begin_producer(
    cluster: ClusterClient,
    name: str,
    *,
    timeout_ms: int,
    client: str,
    deadline: float,
    known: Identity | None = None,
) -> Identity:
    """Take a transactional id over: what an earlier producer has open is aborted first, and it is
    fenced. Raises `RequestTimeout`, `OutcomeUnknown`.

    known: what the caller was, if it goes on after it lost sight of its last transaction: what is
    open is aborted then, too, and `ProducerFenced` is raised if another one has the id by now.
    """
    fields = [timeout_ms, client, uuid.uuid4().hex, known]
    reply = await _ask(cluster, name, Api.TRANSACTION_INIT, fields, deadline)
    return Identity(take_int(reply.fields, 0, "producer_id"), take_int(reply.fields, 1, "epoch"))


async def join(
    cluster: ClusterClient,
    name: str,
    identity: Identity,
    places: Iterable[TopicPartition],
    deadline: float,
) -> None:
    """Have these logs take part. Raises `ProducerFenced`, `TransactionAborted`, `TopicNotFound`,
    `Throttled`, `RequestTimeout`, `OutcomeUnknown`."""
    rows = [list(place) for place in sorted(places)]
    fields = [*identity, rows, cluster.metadata.index]
    await _ask(cluster, name, Api.TRANSACTION_JOIN, fields, deadline)


async def end(
    cluster: ClusterClient, name: str, identity: Identity, *, committed: bool, deadline: float
) -> Ended:
    """Commit or abort, or learn what was decided before. Raises `ProducerFenced`,
    `RequestTimeout`, `OutcomeUnknown`."""
    reply = await _ask(cluster, name, Api.TRANSACTION_END, [*identity, committed], deadline)
    producer = take_int(reply.fields, 2, "producer_id")
    epoch = take_int(reply.fields, 3, "epoch", low=REPLACED)
    follower = None if epoch == REPLACED else Identity(producer, epoch)
    return Ended(
        take_bool(reply.fields, 0, "committed"), take_str(reply.fields, 1, "reason"), follower
    )


async def describe(cluster: ClusterClient, name: str, deadline: float) -> TransactionState:
    """Raises `NoOpenTransaction` for an id that nobody knows, `RequestTimeout`."""
    fields = (await _ask(cluster, name, Api.TRANSACTION_DESCRIBE, [], deadline)).fields
    parts, past = take_list(fields, 6, "parts"), take_list(fields, 7, "past")
    return TransactionState(
        Identity(take_int(fields, 0, "producer_id"), take_int(fields, 1, "epoch")),
        _phase_from(take_int(fields, 2, "phase")),
        take_int(fields, 3, "timeout_ms"),
        take_int(fields, 4, "age_ms"),
        take_str(fields, 5, "client"),
        tuple(_part_from(take_list(parts, slot, "part")) for slot in range(len(parts))),
        tuple(_past_from(take_list(past, slot, "past")) for slot in range(len(past))),
        take_int(fields, 8, "coordinator"),
    )


async def list_all(cluster: ClusterClient, deadline: float) -> list[ListedTransaction]:
    """All transactional ids of the cluster, by name. Raises `RequestTimeout`."""
    info = await internal_topic(cluster, deadline, TRANSACTIONS_TOPIC)
    found: list[ListedTransaction] = []
    for number in range(len(info.partitions)):
        after, more = "", True
        while more:
            reply = await ask_partition(
                cluster,
                number,
                Api.TRANSACTION_LIST,
                [number, after, LIST_ROWS],
                deadline,
                topic=TRANSACTIONS_TOPIC,
            )
            rows = take_list(reply.fields, 0, "transactions")
            listed = [_listed_from(take_list(rows, slot, "row")) for slot in range(len(rows))]
            found += listed
            more = take_bool(reply.fields, 1, "more") and bool(listed)
            after = listed[-1].name if listed else ""
    return sorted(found)


async def abort(cluster: ClusterClient, name: str, deadline: float) -> None:
    """Abort what is open now, whoever has begun it. Raises `NoOpenTransaction`, `RequestTimeout`,
    `OutcomeUnknown`."""
    found = await describe(cluster, name, deadline)
    await _ask(cluster, name, Api.TRANSACTION_ABORT, [*found.identity], deadline)


async def _ask(
    cluster: ClusterClient, name: str, api: Api, fields: Sequence[Any], deadline: float
) -> Reply:
    info = await internal_topic(cluster, deadline, TRANSACTIONS_TOPIC)
    number = partition_for(name.encode(), len(info.partitions))
    return await ask_partition(
        cluster, number, api, [name, *fields], deadline, topic=TRANSACTIONS_TOPIC
    )


def _phase_from(number: int) -> Phase:
    return Phase(number) if number in set(Phase) else Phase.OPEN


def _part_from(row: Sequence[Any]) -> PartInTransaction:
    place = TopicPartition(take_str(row, 0, "topic"), take_int(row, 1, "partition"))
    return PartInTransaction(place, take_bool(row, 2, "ended"))


def _past_from(row: Sequence[Any]) -> PastTransaction:
    return PastTransaction(
        Identity(take_int(row, 0, "producer_id"), take_int(row, 1, "epoch")),
        take_bool(row, 2, "committed"),
        take_str(row, 3, "reason"),
        take_int(row, 4, "time_ms"),
    )


def _listed_from(row: Sequence[Any]) -> ListedTransaction:
    return ListedTransaction(
        take_str(row, 0, "name"),
        _phase_from(take_int(row, 1, "phase")),
        take_int(row, 2, "age_ms"),
        take_int(row, 3, "parts"),
        take_str(row, 4, "client"),
    )
