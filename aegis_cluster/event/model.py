"""What users append and what they get back."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from aegis_cluster.errors import Misuse
from aegis_cluster.message import from_ms
from aegis_cluster.wire.event_frames import ANY, EXISTS, NO_STREAM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

CORRELATION_ID = "correlation_id"
CAUSATION_ID = "causation_id"


class ExpectedVersion(IntEnum):
    """What an append may expect of its stream instead of a version number."""

    ANY = ANY
    """Nothing."""
    NO_STREAM = NO_STREAM
    """It has no events, or was deleted."""
    EXISTS = EXISTS
    """It has events."""


class Event:
    """Something that happened: what it is called, and what is to be known of it.

    event_type: its name. data: a JSON-like value, text or bytes; it comes back equal.
    metadata: a JSON-like mapping beside it. event_id: by which a repeat is known; made when it is
    not given.

    An event that was read also has `version`, `aggregate_id` (its stream's name), `timestamp`,
    and where it stands: `partition` and `offset`. Those of an event that was not are None.
    """

    __slots__ = (
        "_id", "_time_ms", "aggregate_id", "data", "event_type", "metadata", "offset", "partition",
        "subject", "version",
    )  # fmt: skip

    def __init__(
        self,
        event_type: str,
        data: Any = None,
        metadata: Mapping[str, Any] | None = None,
        event_id: uuid.UUID | str | None = None,
        *,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        subject: str | None = None,
    ) -> None:
        """Raise `Misuse` for a type without a name, metadata that is no mapping, or a bad id.

        correlation_id, causation_id: kept in the metadata; see `caused_by`. subject: the person
        that the data is about; it is encrypted with that person's key (`SubjectKeys`), so that it
        can be erased. Type, metadata and the stream's name are not encrypted.
        """
        if not isinstance(event_type, str) or not event_type:
            raise Misuse(
                f"An event's type is a text with at least one character, not {event_type!r}."
            )
        if metadata is not None and not hasattr(metadata, "keys"):
            raise Misuse(f"An event's metadata is a mapping of names to values, not {metadata!r}.")
        if subject is not None and (not isinstance(subject, str) or not subject):
            raise Misuse(f"An event's subject is the name of a person, not {subject!r}.")
        self.event_type = event_type
        self.data: Any = {} if data is None else data
        self.metadata: dict[str, Any] = dict(metadata or {})
        if correlation_id is not None:
            self.metadata[CORRELATION_ID] = correlation_id
        if causation_id is not None:
            self.metadata[CAUSATION_ID] = causation_id
        self._id: uuid.UUID | bytes = _new_id() if event_id is None else _id_from(event_id)
        self.subject = subject
        self.version: int | None = None
        self.aggregate_id: str | None = None
        self.partition: int | None = None
        self.offset: int | None = None
        self._time_ms: int | None = None

    @property
    def event_id(self) -> uuid.UUID:
        """By which a repeat is known."""
        found = self._id
        if type(found) is bytes:  # few look at it
            found = self._id = uuid.UUID(bytes=found)
        return found  # type: ignore[return-value]  # narrowed by its type above

    @property
    def id_bytes(self) -> bytes:
        """The sixteen bytes of `event_id`."""
        found = self._id
        return found if isinstance(found, bytes) else found.bytes

    @property
    def timestamp(self) -> datetime | None:
        """When it was made by the program that appended it."""
        return None if self._time_ms is None else from_ms(self._time_ms)

    @property
    def correlation_id(self) -> str | None:
        """Shared by everything that followed from one cause."""
        return self.metadata.get(CORRELATION_ID)

    @property
    def causation_id(self) -> str | None:
        """What this event followed from."""
        return self.metadata.get(CAUSATION_ID)

    def caused_by(self, cause: Event) -> Event:
        """This event, noted as one that followed from another."""
        self.metadata[CAUSATION_ID] = str(cause.event_id)
        self.metadata[CORRELATION_ID] = cause.correlation_id or str(cause.event_id)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]  # its data may change

    def _values(self) -> tuple[Any, ...]:
        return (
            self.event_id, self.event_type, self.data, self.metadata, self.version,
            self.aggregate_id,
        )  # fmt: skip

    def __repr__(self) -> str:
        place = "" if self.version is None else f", {self.aggregate_id!r} version {self.version}"
        return f"Event({self.event_type!r}, {self.data!r}{place})"


def _new_id() -> bytes:
    """Of a random UUID (RFC 9562, version 4), without an object for it."""
    made = bytearray(os.urandom(16))
    made[6] = made[6] & 0x0F | 0x40
    made[8] = made[8] & 0x3F | 0x80
    return bytes(made)


def _id_from(value: uuid.UUID | str) -> uuid.UUID:
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise Misuse(f"An event's id is a UUID, not {value!r}.") from None


@dataclass(frozen=True, slots=True)
class Appended:
    """Where events were stored: versions `first_version` to `version` of `stream`.

    It may be given as the `expected_version` of the next append.
    """

    stream: str
    first_version: int
    version: int
    partition: int
    offset: int

    def __index__(self) -> int:
        return self.version


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """version: of the newest event, -1: none. first_version: of the oldest that `load` gives (where
    `max_age` does not hide it). deleted: until the next append; tombstone: for ever."""

    stream: str
    version: int
    first_version: int
    deleted: bool
    tombstone: bool

    @property
    def exists(self) -> bool:
        """Whether it shows any event."""
        return self.version >= 0 and not self.deleted and not self.tombstone
