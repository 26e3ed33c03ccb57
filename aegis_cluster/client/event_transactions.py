"""Appends to streams of several partitions, all of them or none, by a transaction for each.

The idea: each partition appends its part on the condition of its streams' versions, and *holds* all
of these streams until the transaction has ended, so what was true when it was prepared is true when
it is committed. Partitions are asked one after the other in their order; so whoever waits for a
stream holds only such as come before it, and no two wait for each other.

The rule it protects: only a commit that is not answered leaves the outcome unknown; whatever fails
before is aborted, by us or by the time-out, and certainly not done.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client import transactions
from aegis_cluster.errors import (
    AegisError,
    OutcomeUnknown,
    ProducerFenced,
    Refused,
    RequestTimeout,
    StreamHeld,
    TransactionAborted,
    WrongExpectedVersion,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.events import EventLink, Placed
    from aegis_cluster.client.transactions import Identity
    from aegis_cluster.wire.batch import Row

TIMEOUT_MS: Final = 5_000
"""So long a client that dies in the middle holds its streams."""
ABORT_S: Final = 5.0
WRITERS_MAX: Final = 32
"""Transactions of one store that are under way at a time; others wait for their turn."""


class Part(NamedTuple):
    """What is appended in one partition; rows: see `EventLink.append`. is_condition: its records
    are there only to hold the streams that the others depend on."""

    rows: Sequence[Sequence[Any]]
    records: Sequence[Row]
    is_condition: bool


@dataclass(slots=True, eq=False)
class _Writer:
    """A transactional id, used for one transaction after the other. identity: for the next one,
    None: to be asked for; last: of the last one."""

    name: str
    identity: Identity | None = None
    last: Identity | None = None


class EventTransactions:
    """Those of one topic; belongs to one event loop."""

    def __init__(self, cluster: ClusterClient, topic: str, link: EventLink) -> None:
        self._cluster = cluster
        self._topic = topic
        self._link = link
        self._idle: list[_Writer] = []
        self._turns = asyncio.Semaphore(WRITERS_MAX)

    async def append(self, parts: Mapping[int, Part], deadline: float) -> dict[int, Placed]:
        """Append all parts or none; by partition where they are.

        Raises what an append in one partition raises: `WrongExpectedVersion`, `StreamDeleted`, …,
        and then nothing is appended; `RequestTimeout`: the same; `OutcomeUnknown`.
        """
        async with self._turns:
            while True:
                writer = self._idle.pop() if self._idle else _Writer(f"events-{uuid.uuid4().hex}")
                try:
                    return await self._append_as(writer, parts, deadline)
                except (ProducerFenced, TransactionAborted) as error:
                    # It has waited for longer than its time-out, so it is aborted for certain.
                    writer.identity = None
                    if self._cluster.now() >= deadline:
                        raise _not_done(error) from error
                finally:
                    self._idle.append(writer)

    async def _append_as(
        self, writer: _Writer, parts: Mapping[int, Part], deadline: float
    ) -> dict[int, Placed]:
        identity = await self._identity_of(writer, deadline)
        places = [TopicPartition(self._topic, partition) for partition in sorted(parts)]
        placed: dict[int, Placed] = {}
        try:
            await transactions.join(self._cluster, writer.name, identity, places, deadline)
            for place in places:
                part = parts[place.partition]
                placed[place.partition] = await self._prepare(
                    writer.name, identity, place.partition, part, deadline
                )
            appended = [placed[p].known for p, part in parts.items() if not part.is_condition]
            if any(appended):
                await self._give_up(writer, identity)
                if all(appended):
                    return placed
                raise _partly_known()
        except (OutcomeUnknown, RequestTimeout, StreamHeld) as error:
            await self._give_up(writer, identity)
            raise _not_done(error) from error
        except BaseException:
            await self._give_up(writer, identity)
            raise
        await self._commit(writer, identity, deadline)
        return placed

    async def _identity_of(self, writer: _Writer, deadline: float) -> Identity:
        if writer.identity is None:
            writer.identity = await transactions.begin_producer(
                self._cluster,
                writer.name,
                timeout_ms=TIMEOUT_MS,
                client=f"{socket.gethostname()}:{os.getpid()}"[:255],
                deadline=deadline,
                known=writer.last,
            )
        identity, writer.identity, writer.last = writer.identity, None, writer.identity
        return identity

    async def _prepare(
        self, name: str, identity: Identity, partition: int, part: Part, deadline: float
    ) -> Placed:
        batch = encode_batch(
            part.records,
            producer_id=identity.producer,
            producer_epoch=identity.epoch,
            base_sequence=0,
            attributes=TRANSACTIONAL_BIT,
        )
        return await self._link.append(partition, part.rows, batch, deadline, transactional_id=name)

    async def _commit(self, writer: _Writer, identity: Identity, deadline: float) -> None:
        try:
            ended = await transactions.end(
                self._cluster, writer.name, identity, committed=True, deadline=deadline
            )
        except (OutcomeUnknown, RequestTimeout, ProducerFenced) as error:
            raise OutcomeUnknown(
                f"It is not known whether the append is committed: {error} Append the events again"
                " with the same ids to make sure."
            ) from error
        writer.identity = ended.follower
        if not ended.committed:
            raise TransactionAborted(f"The append was aborted: {ended.reason}.")

    async def _give_up(self, writer: _Writer, identity: Identity) -> None:
        """Abort, so that nobody waits for the time-out; whatever comes of that, it was not done."""
        deadline = self._cluster.now() + ABORT_S
        try:
            ended = await transactions.end(
                self._cluster, writer.name, identity, committed=False, deadline=deadline
            )
        except AegisError:
            return
        writer.identity = ended.follower


def _not_done(error: AegisError) -> Refused:
    return RequestTimeout(f"The append was given up in time, and nothing is appended: {error}")


def _partly_known() -> WrongExpectedVersion:
    return WrongExpectedVersion(
        "Some of these events are stored already, and others are not; nothing was appended. Give"
        " each event an id of its own."
    )
