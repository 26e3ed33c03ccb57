"""Where a moment is in a topic: the first message of that time or later, in each partition.

The idea: a leader knows in which batch it is (`list_offsets`); which message of that batch, its
records say, so they are read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import RequestTimeout

if TYPE_CHECKING:
    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.offsets import FoundOffsets


async def offsets_at(
    cluster: ClusterClient, topic: str, deadline: float, *, time_ms: int | None
) -> dict[int, FoundOffsets]:
    """As `list_offsets`, with `at_time` the offset of the message itself, not of its batch.

    Raises `TopicNotFound`, `RequestTimeout`.
    """
    found = await list_offsets(cluster, topic, deadline, time_ms=time_ms)
    batches = {
        partition: one.at_time
        for partition, one in found.items()
        if one.at_time is not None and one.at_time < one.last_stable_offset
    }
    if time_ms is None or not batches:
        return found
    exact = await _first_offsets(cluster, topic, batches, time_ms, found, deadline)
    return {
        partition: one._replace(at_time=exact.get(partition, one.at_time))
        for partition, one in found.items()
    }


async def _first_offsets(
    cluster: ClusterClient,
    topic: str,
    begin: dict[int, int],
    time_ms: int,
    ends: dict[int, FoundOffsets],
    deadline: float,
) -> dict[int, int]:
    """Read from there on until a message is late enough, or all that was there has been read."""
    exact: dict[int, int] = {}
    fetcher = Fetcher(cluster, required=[topic])
    try:
        fetcher.add(await cluster.topic(topic, deadline), begin, skip_before_ms=time_ms)
        while len(exact) < len(begin):
            found = await fetcher.next_batches(deadline)
            if found is None:
                raise RequestTimeout(f"Finding a moment in {topic} took longer than the deadline.")
            place, batches = found
            late = next((batch.first_offset for batch in batches if len(batch)), None)
            position = fetcher.positions[place]
            if late is not None or position >= ends[place.partition].last_stable_offset:
                exact[place.partition] = position if late is None else late
                fetcher.remove_places([place])
    finally:
        await fetcher.close()
    return exact
