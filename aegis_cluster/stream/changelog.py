"""The changelog of tasks, from which the state of any can be rebuilt anywhere.

It is a compacted topic with one partition for each task. A record's key is the state's key, as
Latin-1 text (so that batches are encoded at once); a null value is a deletion. There is one writer
at a time, and each commit writes the task's progress too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.limits import STREAM_RESTORE_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.stream.sqlite_store import SqliteStore

ENCODING = "latin-1"
WAIT_S = 0.5


class Progress(NamedTuple):
    """Of a task that is being restored: offsets of its changelog."""

    done: int
    total: int


def record_key(key: bytes) -> bytes:
    """A key of bytes as a record's key, which is text."""
    return key.decode(ENCODING).encode()


def to_bytes(key: bytes | None) -> bytes:
    """The key that a record's key stands for."""
    return (key or b"").decode().encode(ENCODING)


async def restore(
    cluster: ClusterClient,
    place: TopicPartition,
    store: SqliteStore,
    on_progress: Callable[[Progress], None],
    timeout_s: float,
) -> None:
    """Bring a store up to the end of its changelog's partition `place`, as it is now, and commit.

    Raises `TopicNotFound`, `RequestTimeout`, `StorageFailed`.
    """
    deadline = cluster.deadline(timeout_s)
    found = (await list_offsets(cluster, place.topic, deadline))[place.partition]
    end = found.high_watermark
    begin = max(store.checkpoint, found.log_start)
    if begin >= end:
        return
    info = await cluster.topic(place.topic, deadline)
    fetcher = Fetcher(cluster, required=[place.topic])
    rows: dict[bytes, bytes | None] = {}
    loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loading.set_result(None)
    try:
        fetcher.add(info, {place.partition: begin})
        # What is aborted, or still open, ends at the last stable offset: it is waited for.
        while (at := fetcher.positions[place]) < end:
            on_progress(Progress(at - begin, end - begin))
            batches = await fetcher.next_batches(cluster.now() + WAIT_S)
            for columns in batches[1] if batches is not None else ():
                rows.update(zip(map(to_bytes, columns.keys), columns.values, strict=True))
            if len(rows) >= STREAM_RESTORE_ROWS:
                await loading  # one part is written while the next one is read
                position = fetcher.positions[place]
                loading = asyncio.ensure_future(asyncio.to_thread(store.load, rows, position))
                rows = {}
    finally:
        await asyncio.gather(loading, return_exceptions=True)
        await fetcher.close()
    await loading
    await asyncio.to_thread(store.load, rows, end)
    on_progress(Progress(end - begin, end - begin))
