"""Events as records of a topic, so that every reader of topics can read them too.

Key: the stream's name. Value: the data, as payloads are. Headers: `event-type`, `event-id` (16
bytes), and `event-metadata` (JSON) where there is any. The version is the leader's to choose, so it
stands beside the batch.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import CorruptRecord, UnsupportedPayload
from aegis_cluster.event.model import Event
from aegis_cluster.wire.event_frames import decode_annotation
from aegis_cluster.wire.payload import decode_payload, encode_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.wire.batch import Row
    from aegis_cluster.wire.records import Record, RecordColumns

TYPE_HEADER: Final = "event-type"
ID_HEADER: Final = "event-id"
METADATA_HEADER: Final = "event-metadata"
_new_event: Final = Event.__new__


def to_rows(stream: str, events: Sequence[Event]) -> list[Row]:
    """The records of one append to one stream. Raises `UnsupportedPayload`, `MessageTooLarge`."""
    key, now_ms = stream.encode(), int(time.time() * 1000)
    return [(now_ms, key, *_encoded(event)) for event in events]


def _encoded(event: Event) -> tuple[bytes | None, list[tuple[str, bytes | None]]]:
    value, headers = encode_payload(event.data)
    headers = [
        *headers,
        (TYPE_HEADER, event.event_type.encode()),
        (ID_HEADER, event.event_id.bytes),
    ]
    if event.metadata:
        metadata, marker = encode_payload(event.metadata)
        if not marker:
            raise UnsupportedPayload("An event's metadata is a JSON-like mapping.")
        headers.append((METADATA_HEADER, metadata))
    return value, headers


def from_record(stream: str, version: int, partition: int, record: Record) -> Event:
    """The event that a record holds. Raises `CorruptRecord`."""
    event = _new_event(Event)
    headers = dict(record.headers)
    try:
        event.event_type = headers[TYPE_HEADER].decode()  # type: ignore[union-attr]
        event.event_id = uuid.UUID(bytes=headers[ID_HEADER])
        metadata = headers.get(METADATA_HEADER)
        event.metadata = {} if metadata is None else _json(metadata)
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise CorruptRecord(
            f"Version {version} of stream {stream!r} is no event: {error!r}.",
            partition=partition,
            offset=record.offset,
        ) from error
    event.data = decode_payload(record.value, record.headers)
    event.version = version
    event.aggregate_id = stream
    event.partition = partition
    event.offset = record.offset
    event._time_ms = record.timestamp_ms
    return event


def events_of(
    partition: int, batch: RecordColumns, wanted: Callable[[str], bool] | None = None
) -> Iterator[Event]:
    """The events of one batch as a reader of logs gets it, with the versions that stand beside it;
    wanted: whether those of a stream are."""
    placed = decode_annotation(batch.annotation)
    if wanted is not None and not any(wanted(one.stream) for one in placed):
        return
    records = {record.offset: record for record in batch.records()}
    offset = batch.last_offset + 1 - sum(one.count for one in placed)
    for one in placed:
        is_wanted = wanted is None or wanted(one.stream)
        for number in range(one.count):
            record = records.get(offset + number)  # a reader may have begun in the middle
            if is_wanted and record is not None:
                yield from_record(one.stream, one.first + number, partition, record)
        offset += one.count


def _json(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise TypeError("its metadata is no mapping")
    return found
