"""Transactional ids of a cluster, to look at and to help along: what `aegis txn` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.client import transactions
from aegis_cluster.message import from_ms

if TYPE_CHECKING:
    from datetime import datetime

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.ids import TopicPartition


@dataclass(frozen=True, slots=True)
class TransactionListing:
    """One transactional id in a list.

    state: `"idle"`, `"open"`, or, once decided, `"committing"` or `"aborting"` until every
    partition knows. open_seconds: since the transaction began. partitions: how many it has.
    client: host and process of its producer.
    """

    transactional_id: str
    state: str
    open_seconds: float
    partitions: int
    client: str


@dataclass(frozen=True, slots=True)
class PastOutcome:
    """One transaction that has ended. reason: why it was aborted, `""` where it was not."""

    committed: bool
    reason: str
    decided_at: datetime
    producer_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class TransactionDescription:
    """One transactional id.

    partitions: of the transaction that is open or being ended, those of groups included; waiting:
    those of them that do not know of the decision yet. timeout_seconds: after so long the
    coordinator aborts what is open. outcomes: of the last transactions, the newest last.
    coordinator: number of the node.
    """

    transactional_id: str
    state: str
    producer_id: int
    epoch: int
    timeout_seconds: float
    open_seconds: float
    client: str
    partitions: tuple[TopicPartition, ...]
    waiting: tuple[TopicPartition, ...]
    outcomes: tuple[PastOutcome, ...]
    coordinator: int


async def list_ids(cluster: ClusterClient, deadline: float) -> list[TransactionListing]:
    """All of the cluster, by name. Raises `RequestTimeout`."""
    return [
        TransactionListing(
            one.name, one.phase.name.lower(), one.age_ms / 1000, one.parts, one.client
        )
        for one in await transactions.list_all(cluster, deadline)
    ]


async def describe_id(cluster: ClusterClient, name: str, deadline: float) -> TransactionDescription:
    """Raises `NoOpenTransaction` for an id that nobody knows, `RequestTimeout`."""
    found = await transactions.describe(cluster, name, deadline)
    is_decided = found.phase in (transactions.Phase.COMMITTING, transactions.Phase.ABORTING)
    return TransactionDescription(
        transactional_id=name,
        state=found.phase.name.lower(),
        producer_id=found.identity.producer,
        epoch=found.identity.epoch,
        timeout_seconds=found.timeout_ms / 1000,
        open_seconds=found.age_ms / 1000,
        client=found.client,
        partitions=tuple(part.place for part in found.parts),
        waiting=tuple(part.place for part in found.parts if is_decided and not part.ended),
        outcomes=tuple(
            PastOutcome(
                past.committed,
                past.reason,
                from_ms(past.time_ms),
                past.identity.producer,
                past.identity.epoch,
            )
            for past in found.past
        ),
        coordinator=found.coordinator,
    )
