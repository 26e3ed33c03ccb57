"""The annotation of an event store's frame: whose events it holds, and their versions.

The leader chooses versions and writes them beside the batch, never into it, so the broker does not
look into a batch and whoever reads a frame knows the version of each of its records: the records of
the first stream come first, then those of the second, and so on.

A frame of a transaction has the same annotation, with streams whose version it depends on (no ids)
too; its versions are those streams' only if a marker commits it, and that marker's annotation says
where it stands. Until then the streams are held, so nobody else is given these versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster.errors import CorruptRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.wire.layout import Bytes

EVENT_ID_BYTES: Final = 16
EVENTS_KEY: Final = "e"
COMMITTED_KEY: Final = "c"
"""Of the annotation's map; other folds may use others."""

ANY: Final = -2
NO_STREAM: Final = -1
EXISTS: Final = -4
"""What an append may expect of a stream instead of a version; the numbers are for ever."""

SYSTEM_PREFIX: Final = "$"
"""Streams of such names are the store's own."""
SETTINGS_PREFIX: Final = "$$"
"""`$$account-1` holds what was decided about the stream `account-1`."""

BEFORE: Final = "before"
DELETED: Final = "deleted"
TOMBSTONE: Final = "tombstone"
MAX_COUNT: Final = "max_count"
MAX_AGE_MS: Final = "max_age_ms"
"""Names in the marks that an append to a `$$` stream carries."""


class StreamEvents(NamedTuple):
    """The events of one stream in one frame: versions `first`, `first` + 1, …

    ids: `EVENT_ID_BYTES` for each event. marks: None but for a `$$` stream.
    """

    stream: str
    first: int
    ids: bytes
    marks: dict[str, Any] | None = None

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count, which nobody needs here
        return len(self.ids) // EVENT_ID_BYTES

    @property
    def last(self) -> int:
        return self.first + self.count - 1


def encode_annotation(placed: Sequence[StreamEvents]) -> bytes:
    """The annotation of a frame that holds these, in the order of its records."""
    rows = [list(one) if one.marks else list(one[:3]) for one in placed]
    return bytes(msgpack.packb({EVENTS_KEY: rows}))


def encode_committed(index: int) -> bytes:
    """The annotation of a marker that commits what the frame `index` holds of its transaction."""
    return bytes(msgpack.packb({COMMITTED_KEY: index}))


def decode_committed(annotation: Bytes) -> int | None:
    """Which frame a marker commits; None: none that has events. Raises `CorruptRecord`."""
    if not len(annotation):
        return None
    found = _map_of(annotation).get(COMMITTED_KEY)
    if found is not None and type(found) is not int:
        raise CorruptRecord("A marker's annotation is none of ours.")
    return found


def decode_annotation(annotation: Bytes) -> list[StreamEvents]:
    """Whose events a frame holds; none where it has no such annotation. Raises `CorruptRecord`."""
    if not len(annotation):
        return []
    try:
        return [StreamEvents(*row) for row in _map_of(annotation).get(EVENTS_KEY, [])]
    except TypeError as error:
        raise CorruptRecord(f"An event store's frame has no annotation of ours: {error}") from error


def _map_of(annotation: Bytes) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(annotation)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CorruptRecord(f"An event store's frame has no annotation of ours: {error}") from error
    if not isinstance(found, dict):
        raise CorruptRecord("An event store's frame has no annotation of ours.")
    return found
