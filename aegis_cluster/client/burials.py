"""Writing dead letters: each exactly once, whoever writes it and however often.

The idea: before a letter is written, the subscription's coordinator decides where it will stand (a
partition of the dead letter topic) and as which sequence of the subscription's own producer. That
decision is durable, so a consumer that takes over after a crash writes the very same batch, and the
partition's leader knows it as a repeat. Only then is the message settled. So a message is either
still the subscription's, or in the dead letter topic once; both at a time only between the two
writes, and then nobody is given it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.client.cluster import Pause
from aegis_cluster.errors import (
    AegisError,
    LockLost,
    NotLeader,
    OutcomeUnknown,
    OutOfOrderSequence,
    ProducerFenced,
    RequestTimeout,
    TopicNotFound,
    UnknownProducer,
)
from aegis_cluster.ids import GroupId
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.subscription_session import Burial, SubscriptionSession
    from aegis_cluster.wire.batch import Row
    from aegis_cluster.wire.descriptions import TopicInfo

BURY_S: Final = 30.0
TRY_S: Final = 5.0
TOPIC_HEADER: Final = "aegis-dead-letter-topic"
PARTITION_HEADER: Final = "aegis-dead-letter-partition"
OFFSET_HEADER: Final = "aegis-dead-letter-offset"
SUBSCRIPTION_HEADER: Final = "aegis-dead-letter-subscription"
DELIVERIES_HEADER: Final = "aegis-dead-letter-deliveries"
LOST_HEADER: Final = "aegis-dead-letter-lost"
"""The message was no longer kept when its letter was written: only where it stood is known."""


class _Place(NamedTuple):
    grave: GroupId
    partition: int
    epoch: int
    sequence: int


class _Letter(NamedTuple):
    burial: Burial
    row: Row
    partition: int


class _NotBound(Exception):
    """The leader does not take the sequence that was decided on: another one is needed."""


async def bury(session: SubscriptionSession, burials: Sequence[Burial]) -> None:
    """Write these messages to the dead letter topic, and settle them. What does not work out is
    tried again by whoever is told next."""
    deadline = session.calls.cluster.now() + BURY_S
    try:
        letters = await _prepared(session, burials, deadline)
        if not letters:
            return
        producer_id, places = await _bind(session, letters, deadline)
        order = sorted(zip(places, letters, strict=True), key=lambda pair: pair[0])
        for place, letter in order:
            await _write(session.calls.cluster, session, letter, place, producer_id, deadline)
        leases = [letter.burial.lease for letter in letters]
        await session.settle("ack", leases, deadline, counted=False)
    except _NotBound:
        first = [burials[0].lease]
        session.settle_soon("unbind", first, counted=False)
    except (LockLost, RequestTimeout, OutcomeUnknown):
        return


async def _prepared(
    session: SubscriptionSession, burials: Sequence[Burial], deadline: float
) -> list[_Letter]:
    """The letters; what can never be one is parked instead."""
    name = session.opened.rules.dead_letter
    cluster = session.calls.cluster
    try:
        info = await cluster.topic(name, deadline)
    except TopicNotFound:
        reason = f"the dead letter topic {name!r} does not exist"
        session.settle_soon("park", [b.lease for b in burials], reason=reason, counted=False)
        return []
    letters = []
    for burial in burials:
        letter = _letter(session, burial, info)
        size = len(encode_batch([letter.row]))
        if size > info.settings.max_message_bytes:
            reason = f"{size} bytes are too large for the dead letter topic {name!r}"
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


async def _bind(
    session: SubscriptionSession, letters: Sequence[_Letter], deadline: float
) -> tuple[int, list[_Place]]:
    rows = [[*letter.burial.lease[:2], letter.partition] for letter in letters]
    fields = [session.opened.token, session.name, rows]
    reply = await session.calls.ask(Api.SUBSCRIPTION_BIND, fields, deadline)
    producer_id = take_int(reply.fields, 0, "producer_id")
    places = take_list(reply.fields, 1, "places")
    found = []
    for slot in range(len(places)):
        row = take_list(places, slot, "place")
        grave, partition, epoch, sequence = (take_int(row, n, "place") for n in range(4))
        found.append(_Place(GroupId(grave), partition, epoch, sequence))
    return producer_id, found


async def _write(
    cluster: ClusterClient,
    session: SubscriptionSession,
    letter: _Letter,
    place: _Place,
    producer_id: int,
    deadline: float,
) -> None:
    """Until the leader has it. Raises `_NotBound`, `RequestTimeout`."""
    name = session.opened.rules.dead_letter
    batch = encode_batch(
        [letter.row],
        producer_id=producer_id,
        producer_epoch=place.epoch,
        base_sequence=place.sequence,
    )
    pause = Pause(deadline)
    failure: AegisError | None = None
    while cluster.now() < deadline:
        info = await cluster.topic(name, deadline)
        if place.partition >= len(info.partitions):
            raise _NotBound
        if info.partitions[place.partition].group != place.grave:
            raise _NotBound  # the topic was deleted and made anew
        try:
            await _try(cluster, info, place, batch, deadline)
            return
        except (OutOfOrderSequence, UnknownProducer, ProducerFenced) as error:
            raise _NotBound from error
        except NotLeader as error:
            cluster.metadata.note_leader(place.grave, error.details.get("leader"))
            failure = error
        except AegisError as error:
            if not error.retriable and not isinstance(error, OutcomeUnknown):
                raise
            cluster.metadata.forget_leader(place.grave)
            failure = error
        await pause.wait()
        await _look_again(cluster, name, deadline)
    raise RequestTimeout(f"A dead letter could not be written to {name}: {failure}")


async def _look_again(cluster: ClusterClient, name: str, deadline: float) -> None:
    try:
        await cluster.refresh([name], min(deadline, cluster.now() + TRY_S))
    except AegisError:
        return


async def _try(
    cluster: ClusterClient, info: TopicInfo, place: _Place, batch: bytes, deadline: float
) -> None:
    address = cluster.metadata.address_of(info, place.partition)
    if address is None:
        raise NotLeader("The nodes are not known yet.")
    until = min(deadline, cluster.now() + TRY_S)
    link = cluster.link(address.endpoint)
    await link.ready(until)
    items: list[Any] = [[[place.grave, info.name, place.partition]]]
    reply = await link.request(Api.PRODUCE, items, [batch], deadline=until)
    result = take_list(take_list(reply.fields, 0, "results"), 0, "result")
    if take_int(result, 0, "code"):
        raise error_from_reply(result[0], result[1:])
