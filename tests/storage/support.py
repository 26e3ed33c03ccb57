"""Frames, stores and small steps that the tests of this room share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.snapshot import slices_of
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.types import LogPoint, RecoveredGroup, StoreLimits
from aegis_cluster.testing.disk import SimulatedDisk
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.frame import FrameKind, decode_header, encode_data_frame, encode_frame
from aegis_cluster.wire.layout import batch_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.storage.disk import Disk
    from aegis_cluster.storage.log import PartitionLog

NODE = "/node"
VOTERS = (Member(NodeId(1), "one"), Member(NodeId(2), "two"))
SMALL = StoreLimits(
    segment_bytes=8 * 1024,
    journal_bytes=32 * 1024,
    index_interval_bytes=512,
    tail_cache_bytes=16 * 1024,
    reserve_bytes=1024,
    direct_group_bytes=2 * 1024,
    direct_groups=2,
    open_segments=2,
)
_BATCHES: dict[tuple[int, int, int], bytes] = {}


def batch(*, records: int = 1, size: int = 20, time: int = 1_000) -> bytes:
    """A record batch; the same arguments give the same bytes."""
    key = (records, size, time)
    if key not in _BATCHES:
        value = bytes(place % 251 for place in range(size))
        _BATCHES[key] = encode_batch([(time, None, value, []) for _ in range(records)])
    return _BATCHES[key]


def data_frame(
    group: GroupId,
    before: LogPoint,
    *,
    term: int = 1,
    payload: bytes | None = None,
    time_ms: int = 1_000,
    annotation: bytes = b"",
) -> bytes:
    """The data frame that follows `before`."""
    return encode_data_frame(
        group=group,
        index=LogIndex(before.index + 1),
        term=Term(term),
        time_ms=time_ms,
        previous_chain=before.chain,
        batch=payload or batch(),
        base_offset=before.offset,
        annotation=annotation,
    )


def plain_frame(group: GroupId, before: LogPoint, kind: FrameKind, *, term: int = 1) -> bytes:
    """A frame that takes no offset; a LOG_START names the offset before itself."""
    payload = msgpack.packb(before.offset) if kind is FrameKind.LOG_START else b"noop"
    return encode_frame(
        group=group,
        index=LogIndex(before.index + 1),
        term=Term(term),
        kind=kind,
        time_ms=1_000,
        previous_chain=before.chain,
        payload=payload,
    )


def after(before: LogPoint, frame: bytes) -> LogPoint:
    """The state of a log after one more frame."""
    header = decode_header(frame)
    offset = before.offset
    if header.kind is FrameKind.DATA:
        found = batch_header(frame, 48 + header.annotation_size)
        offset = RecordOffset(offset + found.last_offset_delta + 1)
    return LogPoint(header.index, header.term, header.chain, offset)


def frames_after(
    log: PartitionLog, count: int, *, term: int = 1, size: int = 20, time: int = 1_000
) -> list[bytes]:
    """`count` data frames that follow the log's end."""
    point, frames = log.end, []
    for _ in range(count):
        frames.append(data_frame(log.group, point, term=term, payload=batch(size=size, time=time)))
        point = after(point, frames[-1])
    return frames


def new_disk(shards: int = 1) -> SimulatedDisk:
    """A node's directory, laid out."""
    disk = SimulatedDisk()
    disk.make_dir(NODE)
    disk.sync_dir("/")
    prepare_node_dir(disk, NODE, shards, limits=SMALL)
    return disk


def open_store(
    disk: Disk, shard: int = 0, *, limits: StoreLimits = SMALL, node_dir: str = NODE
) -> tuple[ShardStore, dict[GroupId, RecoveredGroup]]:
    """A recovered store and what it found."""
    store = ShardStore(disk, node_dir, shard, clock_ms=lambda: 0, limits=limits)
    return store, {found.group: found for found in store.recover()}


def commit_round(store: ShardStore) -> dict[GroupId, LogIndex]:
    """Write, sync and end one round."""
    current = store.begin_round()
    assert current is not None
    store.sync(current)
    return store.end_round(current)


def run_checkpoint(store: ShardStore) -> None:
    """Begin, sync and end a checkpoint."""
    checkpoint = store.begin_checkpoint()
    store.sync_checkpoint(checkpoint)
    store.end_checkpoint(checkpoint)


def read_all(log: PartitionLog) -> list[bytes]:
    """Every frame of a log, one by one."""
    frames: list[bytes] = []
    index = log.first_index
    while index <= log.last_index:
        found = log.read(index, log.last_index, 4_096)
        frames += split(found.data)
        index = LogIndex(found.last + 1)
    return frames


def split(data: bytes) -> list[bytes]:
    """The frames of a run."""
    frames, position = [], 0
    while position < len(data):
        size = decode_header(data, position).size
        frames.append(data[position : position + size])
        position += size
    return frames


def joined(frames: Sequence[bytes]) -> bytes:
    """A run of frames."""
    return b"".join(frames)


def install(store: ShardStore, group: GroupId, begin: LogPoint, body: Any) -> None:
    """Replace a log by a snapshot of one slice."""
    ticket = store.begin_install(group, begin, body)
    assert store.write_snapshot(ticket, slices_of(group, [b"a slice"]))
    store.install(ticket)
