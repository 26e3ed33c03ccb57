"""Reading what is there, up to the end of this moment, and no further.

The rule it protects: every message that was acknowledged, or whose transaction was committed,
before the call is among those that the partitions hold below their last stable offsets (read
index), so it is found unless it is left out by count or time, or held back by a transaction that is
still open.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import RequestTimeout
from aegis_cluster.ids import TopicPartition
from aegis_cluster.message import ReceivedMessage, from_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.wire.descriptions import TopicInfo


class History:
    """Messages of the past: `await` it for a list, or step through it with `async for`, which
    holds few of them in memory at a time. Each use reads anew."""

    def __init__(self, read: Callable[[], AsyncIterator[ReceivedMessage]]) -> None:
        self._read = read

    def __aiter__(self) -> AsyncIterator[ReceivedMessage]:
        return self._read()

    def __await__(self) -> Generator[Any, None, list[ReceivedMessage]]:
        return self._all().__await__()

    async def _all(self) -> list[ReceivedMessage]:
        return [message async for message in self]


async def last_messages(
    cluster: ClusterClient, topic: str, count: int, deadline: float
) -> AsyncIterator[ReceivedMessage]:
    """The newest `count` of a topic by their timestamps, oldest first.

    Reads little more than `count` messages of each partition: the newest of all are among those, as
    far as timestamps rise within partitions. Offsets that hold no message (of markers, or aborted)
    make it look further back.
    """
    info = await cluster.topic(topic, deadline)
    offsets = await list_offsets(cluster, topic, deadline)
    messages: list[ReceivedMessage] = []
    back = dict.fromkeys(offsets, count)
    while back:
        ranges = {}
        for partition, width in back.items():
            found = offsets[partition]
            ranges[partition] = (
                max(found.log_start, found.last_stable_offset - width),
                found.last_stable_offset,
            )
        got = [message async for message in _read(cluster, info, ranges, deadline)]
        sizes = Counter(message.partition for message in got)
        back = {
            partition: 2 * back[partition]
            for partition, (first, _) in ranges.items()
            if sizes[partition] < count and first > offsets[partition].log_start
        }
        messages += [message for message in got if message.partition not in back]
    messages.sort(key=attrgetter("timestamp", "partition", "offset"))
    for message in messages[-count:]:
        yield message


async def messages_after(
    cluster: ClusterClient, topic: str, time_ms: int, deadline: float
) -> AsyncIterator[ReceivedMessage]:
    """Every message of that time or later, partition by partition as they come."""
    info = await cluster.topic(topic, deadline)
    offsets = await list_offsets(cluster, topic, deadline, time_ms=time_ms)
    ranges = {
        partition: (found.at_time, found.last_stable_offset)
        for partition, found in offsets.items()
        if found.at_time is not None
    }
    async for message in _read(cluster, info, ranges, deadline, not_before_ms=time_ms):
        yield message


async def _read(
    cluster: ClusterClient,
    info: TopicInfo,
    ranges: dict[int, tuple[int, int]],
    deadline: float,
    *,
    not_before_ms: int = 0,
) -> AsyncIterator[ReceivedMessage]:
    """Messages of offset ranges [first, end), by partition.

    Raises `RequestTimeout` when the deadline passes before the ends are reached.
    """
    left = {
        TopicPartition(info.name, partition): end
        for partition, (first, end) in ranges.items()
        if first < end
    }
    fetcher = Fetcher(cluster, required=[info.name])
    try:
        fetcher.add(info, {place.partition: ranges[place.partition][0] for place in left})
        while left:
            found = await fetcher.next_batches(deadline)
            if found is None or cluster.now() > deadline:
                raise RequestTimeout(
                    f"Reading {info.name} up to its present end took longer than the deadline;"
                    " give it more time, or subscribe to read on bit by bit."
                )
            place, batches = found
            end = left.get(place, 0)
            for record in chain.from_iterable(batch.records() for batch in batches):
                if record.offset < end and record.timestamp_ms >= not_before_ms:
                    yield from_record(place.topic, place.partition, record)
            if place in left and fetcher.positions[place] >= end:
                del left[place]
                fetcher.hold(place, held=True)
    finally:
        await fetcher.close()
