"""Sources that are no plain topics: a database's feed of changes, and streams of an event store.

users = processor.source(changes("shop", "users"))
accounts = processor.source(events("account-*"))
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from aegis_cluster.message import ReceivedMessage, to_ms
from aegis_cluster.stream.topology import Read, SpecialTopic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.event import EventStore
    from aegis_cluster.subscriber import MessageBatch


def changes(feed: str, *tables: str) -> SpecialTopic:
    """Changes of a database, as `CDCEngine` puts them into its feed.

    feed: the feed's topic. tables: names or patterns, with or without the schema; none: all. The
    key is the row's, as JSON text; a value is a dict with `table`, `op` (`"insert"`, `"update"`,
    `"delete"` or `"truncate"`), `before` and `after` (rows, or None); event time is the change's.
    """
    from aegis_cluster.cdc.envelope import change_from  # a database's room, for those who use it

    def read(batch: MessageBatch) -> Iterator[Read]:
        rows = zip(batch.offsets, batch.keys, batch.values, batch.timestamps, strict=True)
        for offset, key, value, time_ms in rows:
            message = ReceivedMessage(
                key,
                value,
                topic=batch.topic,
                partition=batch.partition,
                offset=offset,
                time_ms=time_ms,
            )
            change = change_from(message)
            if change is not None and (not tables or _names(tables, change.source)):
                row = {
                    "table": change.source.table,
                    "op": change.operation.name.lower(),
                    "before": getattr(change, "old_row", None),
                    "after": getattr(change, "new_row", None),
                }
                yield Read(offset, key, row, to_ms(change.timestamp))

    return SpecialTopic(feed, read)


def _names(tables: tuple[str, ...], source: Any) -> bool:
    return any(
        fnmatchcase(source.table, name) or fnmatchcase(source.full_name, name) for name in tables
    )


def events(pattern: str = "*", *, store: EventStore | None = None) -> SpecialTopic:
    """Events of an event store's streams.

    pattern: a stream's name, or the beginning of names and a `*`. store: where it is not the one
    in the topic `events`, or has data that is kept under keys. The key is the stream; a value is a
    dict with `stream`, `version`, `event_type`, `event_id`, `data` and `metadata`; event time is
    the event's. Raises `Misuse`.
    """
    from aegis_cluster.event.codec import events_of
    from aegis_cluster.event.store import TOPIC
    from aegis_cluster.event.subscription import Filter

    wanted = Filter.of(pattern, None).wants_stream
    decode_all = events_of if store is None else store.decode_all

    def read(batch: MessageBatch) -> Iterator[Read]:
        for event in decode_all(batch.partition, batch.columns, wanted):
            value = {
                "stream": event.aggregate_id,
                "version": event.version,
                "event_type": event.event_type,
                "event_id": str(event.event_id),
                "data": event.data,
                "metadata": dict(event.metadata),
            }
            assert event.offset is not None  # of one that was read
            assert event.timestamp is not None
            yield Read(event.offset, event.aggregate_id, value, to_ms(event.timestamp))

    return SpecialTopic(TOPIC if store is None else store.topic, read)
