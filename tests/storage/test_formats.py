"""Bytes on disk: golden files still read, and no flipped bit is taken for something else.

`python -m tests.storage.test_formats --rewrite` writes the files anew; the diff is reviewed. A new
version of a format gets new files beside the old ones, which must read for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.checked_file import decode_checked, encode_checked, read_checked
from aegis_cluster.storage.checked_file import write_checked as write_file
from aegis_cluster.storage.checkpoint import (
    CheckpointState,
    GroupState,
    decode_checkpoint,
    encode_checkpoint,
)
from aegis_cluster.storage.journal import (
    SECTOR_BYTES,
    Claim,
    FoundRound,
    ItemType,
    RoundBuilder,
    item_hard_state,
    item_reset,
    round_claims,
    round_items,
    scan_journal,
)
from aegis_cluster.storage.manifest import ManifestEntry, read_manifest, write_manifest
from aegis_cluster.storage.marker import Marker, marker_path, read_marker, write_marker
from aegis_cluster.storage.segment import (
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
)
from aegis_cluster.storage.snapshot import SNAPSHOT_NAME, read_snapshot, slices_of, write_snapshot
from aegis_cluster.storage.sparse_index import IndexEntry, SparseIndex, load_index
from aegis_cluster.storage.types import LOG_BEGIN, NO_TIME, Damage, HardState, LogPoint, Snapshot
from aegis_cluster.testing.disk import SimulatedDisk
from tests.storage.support import NODE, data_frame

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "storage"
GROUP = GroupId(7)
POINT = LogPoint(LogIndex(41), Term(3), b"chain..3", RecordOffset(120))
ENTRY = ManifestEntry(GROUP, "orders", 2, (Member(NodeId(1), "one"), Member(NodeId(2), "two")))
ENTRIES = [
    IndexEntry(LogIndex(42), RecordOffset(120), NO_TIME, 64, Term(3), b"chain..3"),
    IndexEntry(LogIndex(50), RecordOffset(140), 1_700_000_000_000, 70_000, Term(4), b"chain.50"),
    IndexEntry(LogIndex(60), RecordOffset(160), 1_700_000_000_500, 90_000, Term(4), b"end....6", 1),
]
CHECKPOINT = CheckpointState(
    9,
    1,
    2,
    5,
    77,
    (
        GroupState(
            GROUP,
            HardState(Term(4), Member(NodeId(2), "two")),
            POINT,
            LogIndex(12),
            LogIndex(40),
            ((LogIndex(20), RecordOffset(30)),),
            LogIndex(41),
            LogIndex(12),
            4_096,
        ),
        GroupState(
            GroupId(9),
            HardState(Term(0), None),
            LOG_BEGIN,
            LogIndex(1),
            LogIndex(0),
            watermark=LogIndex(5),
            damage=Damage(GroupId(9), LogIndex(3), "a.log", 99, "frame checksum"),
        ),
    ),
)
MARKER = Marker(12, {GROUP: LogIndex(41)}, "fsync failed")


def segment() -> bytes:
    return encode_segment_header(SegmentHeader(GROUP, POINT)) + data_frame(GROUP, POINT, term=3)


def index() -> bytes:
    disk = SimulatedDisk()
    built = SparseIndex(GROUP, LogIndex(42))
    for entry in ENTRIES:
        built.add(entry)
    built.save(lambda: disk.open("/index", create=True))
    return disk.files()["/index"]


def journal() -> bytes:
    """Two rounds of one generation."""
    first = RoundBuilder([Claim(GROUP, LogIndex(41))])
    first.add_frames(GROUP, LogIndex(42), [data_frame(GROUP, POINT, term=3)])
    first.add_truncate(GROUP, LogIndex(40))
    second = RoundBuilder()
    second.add_hard_state(GROUP, HardState(Term(4), Member(NodeId(2), "two")))
    second.add_hard_state(GroupId(8), HardState(Term(1), None))
    second.add_reset(GroupId(8), POINT)
    parts = first.encode(generation=5, number=78, synced_up_to=77)
    parts += second.encode(generation=5, number=79, synced_up_to=78)
    return b"".join(parts)


def from_disk(path: str, write: Callable[[SimulatedDisk], None]) -> bytes:
    disk = SimulatedDisk()
    for name in (NODE, f"{NODE}/manifest", f"{NODE}/log"):
        disk.make_dir(name)
    write(disk)
    return disk.files()[path]


def manifest() -> bytes:
    return from_disk(f"{NODE}/manifest/{7:020}", lambda disk: write_manifest(disk, NODE, ENTRY))


SLICED = Snapshot(
    POINT, {"open": [1, 2]}, installed=True, slices=slices_of(GROUP, [b"one", b"another"])
)


def snapshot() -> bytes:
    return from_disk(
        f"{NODE}/log/{SNAPSHOT_NAME}",
        lambda disk: write_snapshot(disk, f"{NODE}/log", GROUP, SLICED),
    )


def marker() -> bytes:
    return from_disk(marker_path(NODE), lambda disk: write_marker(disk, NODE, MARKER))


FILES: dict[str, Callable[[], bytes]] = {
    "segment-v1.log": segment,
    "sparse-index-v1.index": index,
    "journal-v1": journal,
    "checkpoint-v1": lambda: encode_checkpoint(CHECKPOINT),
    "checked-file-v1": lambda: encode_checked(kind="example", version=3, body=["a", 1, b"\0"]),
    "manifest-v1": manifest,
    "snapshot-v2": snapshot,
    "damage-marker-v1": marker,
}


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def on_disk(path: str, name: str) -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_dir(NODE)
    disk.open(path, create=True).pwrite(golden(name), 0)
    return disk


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_today_is_the_golden_file(name: str) -> None:
    assert FILES[name]() == golden(name)


def test_golden_segment() -> None:
    data = golden("segment-v1.log")
    assert decode_segment_header(data) == SegmentHeader(GROUP, POINT)
    assert data[64:] == data_frame(GROUP, POINT, term=3)


def test_golden_index() -> None:
    found = load_index(GROUP, LogIndex(42), golden("sparse-index-v1.index"))
    assert [found[place] for place in range(len(found))] == ENTRIES
    assert found.sealed


def test_golden_journal() -> None:
    first, second = scan_journal(golden("journal-v1"), file="journal-b", generation_min=5)
    assert (first.header.number, first.header.synced_up_to, first.position) == (78, 77, 0)
    assert second.position % SECTOR_BYTES == 0
    assert round_claims(first) == [(7, 41)]
    frames, cut = round_items(first)
    assert (frames.type, frames.group, frames.number) == (ItemType.FRAMES, 7, 42)
    assert bytes(frames.data) == data_frame(GROUP, POINT, term=3)
    assert (cut.type, cut.number) == (ItemType.TRUNCATE, 40)
    vote, none, reset = round_items(second)
    assert item_hard_state(vote) == HardState(Term(4), Member(NodeId(2), "two"))
    assert item_hard_state(none) == HardState(Term(1), None)
    assert item_reset(reset) == POINT


def test_golden_checkpoint() -> None:
    assert decode_checkpoint(golden("checkpoint-v1")) == CHECKPOINT
    assert decode_checkpoint(golden("checkpoint-v1") + b"left over") == CHECKPOINT


def test_golden_checked_files() -> None:
    found = decode_checked(golden("checked-file-v1"), kind="example")
    assert found == (3, ["a", 1, b"\0"])
    with pytest.raises(CorruptLog):
        decode_checked(golden("checked-file-v1"), kind="other")
    assert read_manifest(on_disk(f"{NODE}/m", "manifest-v1"), f"{NODE}/m") == ENTRY
    disk = on_disk(f"{NODE}/{SNAPSHOT_NAME}", "snapshot-v1")
    assert read_snapshot(disk, NODE, GROUP) == Snapshot(POINT, {"open": [1, 2]}, installed=True)
    disk = on_disk(f"{NODE}/{SNAPSHOT_NAME}", "snapshot-v2")
    assert read_snapshot(disk, NODE, GROUP) == SLICED
    assert read_marker(on_disk(marker_path(NODE), "damage-marker-v1"), NODE) == MARKER


def flipped(data: bytes) -> list[bytes]:
    """The data with one bit of each byte turned."""
    wrong = []
    for place in range(len(data)):
        one = bytearray(data)
        one[place] ^= 1 << (place % 8)
        wrong.append(bytes(one))
    return wrong


def test_no_flipped_bit_is_taken_for_a_file() -> None:
    for wrong in flipped(golden("checked-file-v1")):
        with pytest.raises(CorruptLog):
            decode_checked(wrong, kind="example")
    for wrong in flipped(golden("checkpoint-v1")):
        with pytest.raises(CorruptLog):
            decode_checkpoint(wrong)
    for wrong in flipped(golden("segment-v1.log")[:64]):
        with pytest.raises(CorruptLog):
            decode_segment_header(wrong)


def test_no_flipped_bit_is_taken_for_a_round_or_an_entry() -> None:
    data = golden("journal-v1")
    whole = {one.header.number: bytes(one.body or b"") for one in scan(data)}
    for wrong in flipped(data):
        for one in scan(wrong):
            assert one.body is None or bytes(one.body) == whole[one.header.number]
    data = golden("sparse-index-v1.index")
    for wrong in flipped(data):
        found = load_index(GROUP, LogIndex(42), wrong)
        assert [found[place] for place in range(len(found))] == ENTRIES[: len(found)]
        assert len(found) < len(ENTRIES)


def scan(data: bytes) -> list[FoundRound]:
    return scan_journal(data, file="", generation_min=5)


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.9, 0.99])
def test_a_short_file_is_no_file(share: float) -> None:
    for name in ("checked-file-v1", "checkpoint-v1"):
        short = golden(name)[: int(len(golden(name)) * share)]
        with pytest.raises(CorruptLog):
            decode_checked(short, kind="example")
        with pytest.raises(CorruptLog):
            decode_checkpoint(short)
    with pytest.raises(CorruptLog):
        decode_segment_header(golden("segment-v1.log")[: int(64 * share)])


def test_a_checked_file_is_the_old_or_the_new_one() -> None:
    disk = SimulatedDisk()
    write_file(disk, "/f", kind="example", version=1, body="old")
    disk.fail_next("sync", "/f")
    with pytest.raises(OSError, match="Input/output"):
        write_file(disk, "/f", kind="example", version=2, body="new")
    assert read_checked(disk, "/f", kind="example") == (1, "old")
    write_file(disk, "/f", kind="example", version=2, body="new")
    assert read_checked(disk, "/f", kind="example") == (2, "new")
    with pytest.raises(FileNotFoundError):
        read_checked(disk, "/missing", kind="example")


def rewrite() -> None:
    """Write every golden file anew."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, build in FILES.items():
        (GOLDEN / name).write_bytes(build())


if __name__ == "__main__" and "--rewrite" in sys.argv:
    rewrite()
