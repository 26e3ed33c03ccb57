"""One group's positions: bytes while nobody asks, rows by partition from then on.

The idea: most groups of many are quiet. What a snapshot holds of them stays as it was read, and is
a part of the next snapshot as it is. So a restart with a million positions takes as long as reading
them, and a snapshot costs what has changed since the last one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster.broker.groups.commands import place_of
from aegis_cluster.ids import GroupId, RecordOffset, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FIELDS: Final = 7
"""Of one position as it is packed: topic's and session's place in their lists included."""


class Committed(NamedTuple):
    """A group's position in one partition.

    log: the partition's Raft group, so that a topic that was deleted and made anew is another.
    session, number: of the commit that set it.
    """

    offset: RecordOffset
    log: GroupId
    time_ms: int
    session: str
    number: int


committed: Final[Callable[[tuple[RecordOffset, GroupId, int, str, int]], Committed]] = partial(
    tuple.__new__, Committed
)
"""Without a line of Python: there may be a million of them to make."""

Rows = dict[TopicPartition, Committed]


class Positions:
    """Of one group."""

    __slots__ = ("_changes", "_packed", "_rows")

    def __init__(self, packed: bytes | None = None) -> None:
        self._packed = packed
        self._rows: Rows | None = {} if packed is None else None
        self._changes = 0

    @property
    def rows(self) -> Mapping[TopicPartition, Committed]:
        """To be looked at."""
        if self._rows is None:
            assert self._packed is not None
            self._rows = unpack(self._packed)
        return self._rows

    def to_change(self) -> Rows:
        """To be changed, at once."""
        rows = self.rows
        self._packed = None
        self._changes += 1
        assert isinstance(rows, dict)
        return rows

    def capture(self) -> Callable[[], bytes]:
        """Packs the positions as they are now, when it is called."""
        if self._packed is not None:
            packed = self._packed
            return lambda: packed
        rows, changes = dict(self.rows), self._changes

        def later() -> bytes:
            packed = pack(rows)
            if changes == self._changes:
                self._packed = packed
            return packed

        return later


def pack(rows: Mapping[TopicPartition, Committed]) -> bytes:
    """[topics, sessions, fields of all positions one after the other], in the order of places."""
    topics: dict[str, int] = {}
    sessions: dict[str, int] = {}
    flat: list[int] = []
    for (topic, partition), (offset, log, time_ms, session, number) in sorted(rows.items()):
        at = topics.setdefault(topic, len(topics)), sessions.setdefault(session, len(sessions))
        flat += (at[0], partition, offset, log, time_ms, at[1], number)
    return bytes(msgpack.packb([list(topics), list(sessions), flat]))


def unpack(packed: bytes) -> Rows:
    """What `pack` made."""
    topics, sessions, flat = msgpack.unpackb(packed)
    fields: Any = zip(*[iter(flat)] * FIELDS, strict=True)
    return {
        place_of(topics[topic], partition): committed(
            (offset, log, time_ms, sessions[session], number)
        )
        for topic, partition, offset, log, time_ms, session, number in fields
    }
