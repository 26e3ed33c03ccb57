"""Writing dead letters: in one transaction with the acknowledgement of the messages they are about.

The idea: the consumer that was told to write some takes the subscription's transactional id, which
ends whatever an earlier one has left open; tells the subscription's coordinator which messages the
transaction settles; writes the letters; commits. So a message is the subscription's, or its letter
stands, and never both or neither, whoever dies at which moment.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.client import transactions
from aegis_cluster.client.producer import InTransaction, Producer, ProducerOptions
from aegis_cluster.errors import AegisError, TopicNotFound
from aegis_cluster.ids import TopicPartition
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.client.producer import Row
    from aegis_cluster.client.subscription_calls import SubscriptionCalls
    from aegis_cluster.client.subscription_session import Burial, SubscriptionSession
    from aegis_cluster.client.transactions import Identity
    from aegis_cluster.wire.descriptions import TopicInfo

BURY_S: Final = 20.0
ABORT_S: Final = 5.0
NAME_CHARS: Final = 100
TOPIC_HEADER: Final = "aegis-dead-letter-topic"
PARTITION_HEADER: Final = "aegis-dead-letter-partition"
OFFSET_HEADER: Final = "aegis-dead-letter-offset"
SUBSCRIPTION_HEADER: Final = "aegis-dead-letter-subscription"
DELIVERIES_HEADER: Final = "aegis-dead-letter-deliveries"
LOST_HEADER: Final = "aegis-dead-letter-lost"
"""The message was no longer kept when its letter was written: only where it stood is known."""


class _Letter(NamedTuple):
    burial: Burial
    row: Row
    partition: int


async def bury(session: SubscriptionSession, burials: Sequence[Burial]) -> None:
    """Write these messages to the dead letter topic, and settle them. What does not work out is
    tried again by whoever is told next."""
    deadline = session.calls.cluster.now() + BURY_S
    try:
        info = await session.calls.cluster.topic(session.opened.rules.dead_letter, deadline)
    except TopicNotFound as error:
        leases = [one.lease for one in burials]
        session.settle_soon("park", leases, reason=str(error), counted=False)
        return
    letters = _letters(session, burials, info)
    if not letters:
        return
    try:
        await _bury(session, letters, info, deadline)
    except AegisError:
        session.settle_soon("release", [one.burial.lease for one in letters], counted=False)


def _letters(
    session: SubscriptionSession, burials: Sequence[Burial], info: TopicInfo
) -> list[_Letter]:
    """What can never be a letter is parked instead."""
    letters = []
    for burial in burials:
        letter = _letter(session, burial, info)
        reason = _unfit(letter, info)
        if reason:
            session.settle_soon("park", [burial.lease], reason=reason, counted=False)
        else:
            letters.append(letter)
    return letters


def _letter(session: SubscriptionSession, burial: Burial, info: TopicInfo) -> _Letter:
    """The message as it was, with where it stood in its headers."""
    lease, record = burial
    where: list[tuple[str, bytes | None]] = [
        (TOPIC_HEADER, session.calls.topic.encode()),
        (PARTITION_HEADER, str(session.partition_of(lease.log)).encode()),
        (OFFSET_HEADER, str(lease.offset).encode()),
        (SUBSCRIPTION_HEADER, session.calls.name.encode()),
        (DELIVERIES_HEADER, str(lease.count).encode()),
    ]
    count = len(info.partitions)
    if record is None:
        row: Row = (0, None, None, [*where, (LOST_HEADER, b"1")])
        return _Letter(burial, row, lease.offset % count)
    row = (record.timestamp_ms, record.key, record.value, [*record.headers, *where])
    keyless = lease.offset % count
    return _Letter(burial, row, keyless if record.key is None else partition_for(record.key, count))


def _unfit(letter: _Letter, info: TopicInfo) -> str:
    """Why the topic will never take it; "" when it may."""
    size = len(encode_batch([letter.row]))
    if size > info.settings.max_message_bytes:
        return f"{size} bytes are too large for the dead letter topic {info.name!r}"
    if letter.row[1] is None and info.settings.compacts:
        return f"the dead letter topic {info.name!r} is compacted, and the message has no key"
    return ""


async def _bury(
    session: SubscriptionSession, letters: Sequence[_Letter], info: TopicInfo, deadline: float
) -> None:
    """One transaction. Raises what ended it; then it is aborted, at once or by its time-out."""
    calls = session.calls
    name = transactional_id(calls, session.opened.token)
    client, timeout_ms = session.client, round(BURY_S * 1000)
    identity = await transactions.begin_producer(
        calls.cluster, name, timeout_ms=timeout_ms, client=client, deadline=deadline
    )
    places = {TopicPartition(info.name, one.partition) for one in letters}
    places.add(await calls.place(deadline))
    await transactions.join(calls.cluster, name, identity, places, deadline)

    async def end(until: float, *, committed: bool) -> None:
        await transactions.end(calls.cluster, name, identity, committed=committed, deadline=until)

    try:
        mine = await _settle_within(session, letters, identity, deadline)
        await _write(session, mine, info, name, identity, deadline)
    except AegisError:
        with suppress(AegisError):  # the next one that takes the id, or time, ends it
            await end(calls.cluster.now() + ABORT_S, committed=False)
        raise
    await end(deadline, committed=bool(mine))


def transactional_id(calls: SubscriptionCalls, token: str) -> str:
    """The one in whose transactions a subscription's dead letters are written."""
    return f"dead-letters/{calls.topic[:NAME_CHARS]}/{calls.name[:NAME_CHARS]}/{token}"


async def _settle_within(
    session: SubscriptionSession,
    letters: Sequence[_Letter],
    identity: Identity,
    deadline: float,
) -> list[_Letter]:
    """Have the transaction settle the messages; returns those that are still ours to bury."""
    rows = [list(one.burial.lease) for one in letters]
    fields = [session.opened.token, session.name, *identity, rows]
    reply = await session.calls.ask(Api.SUBSCRIPTION_BURY, fields, deadline)
    mine = take_list(reply.fields, 0, "letters")
    found = set()
    for slot in range(len(mine)):
        row = take_list(mine, slot, "letter")
        found.add((take_int(row, 0, "log"), take_int(row, 1, "offset")))
    return [one for one in letters if one.burial.lease[:2] in found]


async def _write(
    session: SubscriptionSession,
    letters: Sequence[_Letter],
    info: TopicInfo,
    name: str,
    identity: Identity,
    deadline: float,
) -> None:
    async def join(places: list[TopicPartition]) -> None:
        """All of them were named before."""

    within = InTransaction(name, *identity, join, {})
    lanes = Producer(session.calls.cluster, ProducerOptions(), within=within)
    try:
        await lanes.start(deadline)
        stored = {
            (await lanes.add(info, one.partition, one.row, deadline))[0]: None for one in letters
        }
        lanes.close_batches()
        await asyncio.gather(*stored)
    finally:
        await lanes.close()
