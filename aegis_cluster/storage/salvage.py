"""What can still be read of one replica, in order, and what cannot.

The idea: a list of every frame that proves itself is made first, from the segments, from the
shard's journal and from what recovery of a damaged log has put aside; where two claim one index,
the newer term counts, as in recovery. Then the batches come out by index, and between them every
hole is told. Nothing is written.

The rule it protects: what comes out was once appended here, byte for byte, and what is missing
between two batches is said, in offsets.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import Corruption
from aegis_cluster.storage.frame_walk import Good, walk
from aegis_cluster.storage.segment_report import DISK, SeenFrame, frames_of, read_segment
from aegis_cluster.wire.frame import FrameHeader, FrameKind, check_frame, frame_payload
from aegis_cluster.wire.layout import batch_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.replica_report import Replica

_SALVAGE_PREFIX: Final = "salvage-"
_SALVAGE_SUFFIX: Final = ".frames"


class SalvagedBatch(NamedTuple):
    """One record batch as it was appended."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    batch: bytes


class Loss(NamedTuple):
    """Frames that cannot be read. Indexes inclusive; offsets start inclusive, end exclusive.

    None: not known, because nothing readable stands behind them.
    """

    first_index: int
    last_index: int | None
    start_offset: int | None
    end_offset: int | None


class _Place(NamedTuple):
    term: int
    path: str
    """Empty: `data` is the frame itself."""
    position: int
    size: int
    data: bytes = b""


def salvage(replica: Replica) -> Iterator[SalvagedBatch | Loss]:
    """Batches of a replica in the order of the log, and the holes between them."""
    places = _newest(_all_places(replica))
    expected = _first_index(replica)
    offset: int | None = 0 if expected == 1 else None
    hole: Loss | None = None
    for index, place in places.items():
        if index > expected:
            start = hole.start_offset if hole else offset
            first = hole.first_index if hole else expected
            hole = Loss(first, index - 1, start, None)
        expected = index + 1
        payload = _payload(replica.entry.group, place)
        if payload is None:
            continue
        header = batch_header(payload)
        if hole is not None:
            yield hole._replace(end_offset=header.base_offset)
            hole = None
        offset = header.base_offset + header.last_offset_delta + 1
        yield SalvagedBatch(index, payload)
    tail = _lost_tail(replica, hole, expected, offset)
    if tail is not None:
        yield tail


def _lost_tail(
    replica: Replica, hole: Loss | None, expected: int, offset: int | None
) -> Loss | None:
    """Frames that were synced here once and stand behind every batch that can be read."""
    state = replica.state if replica.journal.reset is None else None
    claims = [replica.journal.durable]
    if state is not None:
        claims += [state.durable.index, state.watermark]
    durable = max(claims)
    if durable >= expected:  # nothing readable follows
        start, first = (hole.start_offset, hole.first_index) if hole else (offset, expected)
        hole = Loss(first, durable, start, None)
    if hole is None or state is None:
        return hole
    is_known = hole.last_index is not None and state.durable.index >= hole.last_index
    return hole._replace(end_offset=state.durable.offset) if is_known else hole


def _first_index(replica: Replica) -> int:
    if replica.journal.reset is not None:
        return replica.journal.reset.index + 1
    return 1 if replica.state is None else replica.state.first_index


def _newest(places: dict[int, _Place]) -> dict[int, _Place]:
    """By index, without what an older leader left behind: terms never fall along a log."""
    kept: dict[int, _Place] = {}
    term = 0
    for index in sorted(places):
        if places[index].term >= term:
            kept[index] = places[index]
            term = places[index].term
    return kept


def _all_places(replica: Replica) -> dict[int, _Place]:
    places: dict[int, _Place] = {}
    group = replica.entry.group
    for path in replica.segment_paths():
        for seen in frames_of(read_segment(path, group)):
            if isinstance(seen, SeenFrame):
                _note(places, seen.header, path, seen.position)
    journal = replica.journal
    if journal.open_cut is not None:
        places = {index: place for index, place in places.items() if index < journal.open_cut}
    for index, frame in journal.frames.items():
        data = bytes(frame)
        header = _proved(group, data)
        if header is not None:
            places[index] = _Place(header.term, "", 0, header.size, data)
    for path in _put_aside(replica):
        file = DISK.open(path)
        for found in walk(group, file.pread(file.size(), 0), 0, None):
            if isinstance(found, Good):
                _note(places, found.header, path, found.position)
    return places


def _note(places: dict[int, _Place], header: FrameHeader, path: str, position: int) -> None:
    known = places.get(header.index)
    if known is None or known.term < header.term:
        places[header.index] = _Place(header.term, path, position, header.size)


def _put_aside(replica: Replica) -> list[str]:
    """Frames of the journal that recovery has kept for a damaged log."""
    if not os.path.isdir(replica.directory):
        return []
    return [
        f"{replica.directory}/{name}"
        for name in DISK.list_dir(replica.directory)
        if name.startswith(_SALVAGE_PREFIX) and name.endswith(_SALVAGE_SUFFIX)
    ]


def _proved(group: GroupId, frame: bytes) -> FrameHeader | None:
    try:
        return check_frame(group, frame, previous_chain=None)
    except Corruption:
        return None


def _payload(group: GroupId, place: _Place) -> bytes | None:
    """The batch of a data frame; None for other kinds."""
    data = place.data or DISK.open(place.path).pread(place.size, place.position)
    header = check_frame(group, data, previous_chain=None)
    return bytes(frame_payload(data, header)) if header.kind is FrameKind.DATA else None
