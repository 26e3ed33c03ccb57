"""Events as records of a topic, so that every reader of topics can read them too.

Key: the stream's name. Value: the data, as payloads are, or sealed with the key of its subject.
Headers: `event-type`, `event-id` (16 bytes), and where there is any `event-metadata` (JSON) and
`event-subject`. The version is the leader's to choose, so it
stands beside the batch.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import CorruptRecord, Misuse, UnsupportedPayload
from aegis_cluster.event.model import Event
from aegis_cluster.event.subjects import ERASED
from aegis_cluster.wire.event_frames import EVENT_ID_BYTES, decode_annotation
from aegis_cluster.wire.payload import PAYLOAD_HEADER, decode_payload, encode_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.event.subjects import SubjectKeys
    from aegis_cluster.wire.batch import Row
    from aegis_cluster.wire.records import Headers, Record, RecordColumns

TYPE_HEADER: Final = "event-type"
ID_HEADER: Final = "event-id"
METADATA_HEADER: Final = "event-metadata"
SUBJECT_HEADER: Final = "event-subject"
SEALED_HEADER: Final = "event-sealed"
"""In place of the header that tells how to read a payload: to those who cannot unseal the data, it
is bytes."""
_new_event: Final = Event.__new__


def to_rows(stream: str, events: Sequence[Event], keys: SubjectKeys | None = None) -> list[Row]:
    """The records of one append to one stream. Raises `UnsupportedPayload`, `MessageTooLarge`,
    `SubjectErased`, `Misuse`."""
    key, now_ms = stream.encode(), int(time.time() * 1000)
    return [(now_ms, key, *_encoded(event, keys)) for event in events]


def _encoded(
    event: Event, keys: SubjectKeys | None
) -> tuple[bytes | None, list[tuple[str, bytes | None]]]:
    value, headers = encode_payload(event.data)
    if event.subject is not None:
        if keys is None:
            raise Misuse(
                "An event with a subject needs EventStore(…, subject_keys=SubjectKeys(…))."
            )
        value = keys.encrypt(event.subject, event.event_id, value or b"")
        headers = [
            *((SEALED_HEADER, marker) for _, marker in headers),
            (SUBJECT_HEADER, event.subject.encode()),
        ]
    headers = [
        *headers,
        (TYPE_HEADER, event.event_type.encode()),
        (ID_HEADER, event.id_bytes),
    ]
    if event.metadata:
        metadata, marker = encode_payload(event.metadata)
        if not marker:
            raise UnsupportedPayload("An event's metadata is a JSON-like mapping.")
        headers.append((METADATA_HEADER, metadata))
    return value, headers


def from_record(
    stream: str,
    version: int,
    partition: int,
    record: Record,
    keys: SubjectKeys | None = None,
) -> Event:
    """The event that a record holds. Raises `CorruptRecord`."""
    offset, time_ms, _, value, headers = record
    return _made(stream, version, partition, offset, time_ms, value, headers, keys)


def _made(
    stream: str,
    version: int,
    partition: int,
    offset: int,
    time_ms: int,
    value: bytes | None,
    headers: Headers,
    keys: SubjectKeys | None,
) -> Event:
    event = _new_event(Event)
    event.version = version
    event.aggregate_id = stream
    event.partition = partition
    event.offset = offset
    event._time_ms = time_ms
    try:
        if len(headers) == 3:
            (mark, _), (kind, event_type), (identity, event_id) = headers
            if mark == PAYLOAD_HEADER and kind == TYPE_HEADER and identity == ID_HEADER:
                # As nearly all of them are, and a million have to be made in seconds.
                event.event_type = event_type.decode()  # type: ignore[union-attr]
                event._id = _sixteen(event_id)
                event.metadata = {}
                event.subject = None
                event.data = decode_payload(value, headers)
                return event
        _take_headers(event, dict(headers))
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise CorruptRecord(
            f"Version {version} of stream {stream!r} is no event: {error!r}.",
            partition=partition,
            offset=offset,
        ) from error
    event.data = _data(event, value, headers, keys)
    return event


def _take_headers(event: Event, headers: dict[str, bytes | None]) -> None:
    event.event_type = headers[TYPE_HEADER].decode()  # type: ignore[union-attr]
    event._id = _sixteen(headers[ID_HEADER])
    metadata = headers.get(METADATA_HEADER)
    event.metadata = {} if metadata is None else _json(metadata)
    subject = headers.get(SUBJECT_HEADER)
    event.subject = None if subject is None else subject.decode()


def _sixteen(event_id: bytes | None) -> bytes:
    if event_id is None or len(event_id) != EVENT_ID_BYTES:
        raise ValueError(event_id)
    return event_id


def _data(event: Event, value: bytes | None, headers: Headers, keys: SubjectKeys | None) -> Any:
    if event.subject is not None:
        value = None if keys is None else keys.decrypt(event.subject, event.event_id, value or b"")
        if value is None:
            return ERASED
        sealed = [(PAYLOAD_HEADER, mark) for name, mark in headers if name == SEALED_HEADER]
        return decode_payload(value, sealed)
    return decode_payload(value, headers)


def events_of(
    partition: int,
    batch: RecordColumns,
    wanted: Callable[[str], bool] | None = None,
    keys: SubjectKeys | None = None,
) -> list[Event]:
    """The events of one batch as a reader of logs gets it, with the versions that stand beside it;
    wanted: whether those of a stream are. Raises `CorruptRecord`."""
    events: list[Event] = []
    placed = decode_annotation(batch.annotation)
    offsets, times, values, headers = batch.offsets, batch.timestamps, batch.values, batch.headers
    offset = batch.base_offset
    for one in placed:
        count = one.count
        if wanted is None or wanted(one.stream):
            # A reader may have begun in the middle.
            row = bisect_left(offsets, offset)
            stream, first = one.stream, one.first - offset
            while row < len(offsets) and (at := offsets[row]) < offset + count:
                events.append(
                    _made(
                        stream, first + at, partition, at, times[row], values[row], headers[row],
                        keys,
                    )
                )  # fmt: skip
                row += 1
        offset += count
    return events


def _json(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise TypeError("its metadata is no mapping")
    return found
