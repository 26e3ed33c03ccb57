"""Frames: what they prove, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.errors import CorruptRecord, InvariantBroken
from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.wire.batch import encode_batch, stamp
from aegis_cluster.wire.frame import (
    CHAIN_START,
    FRAME_HEADER_BYTES,
    FrameKind,
    check_frame,
    decode_header,
    encode_data_frame,
    encode_frame,
    frame_annotation,
    frame_payload,
    iter_frames,
)
from tests.wire.samples import FIXED, ROWS, START_MS, log_of

GROUP = GroupId(7)
KINDS = [FrameKind.NOOP, FrameKind.DATA, FrameKind.MEMBERSHIP, FrameKind.DATA, FrameKind.LOG_START]
LOG = log_of(GROUP, KINDS)


def test_a_log_checks_frame_by_frame_along_its_chain() -> None:
    chain = CHAIN_START
    for position, (frame, kind) in enumerate(zip(LOG, KINDS, strict=True), start=1):
        header = check_frame(GROUP, frame, previous_chain=chain)
        assert (header.kind, header.index, header.size) == (kind, position, len(frame))
        assert header.time_ms == START_MS + position
        chain = header.chain


def test_payload_and_annotation_come_back() -> None:
    frame = LOG[2]
    header = decode_header(frame)
    assert bytes(frame_payload(frame, header)) == b"payload 3"
    assert bytes(frame_annotation(frame, header)) == b"\x81\xa1a\x01"


def test_frames_are_found_in_the_middle_of_a_buffer_of_any_kind() -> None:
    run = b"".join(LOG)
    for buffer in (run, bytearray(run), memoryview(run)):
        found = list(iter_frames(buffer))
        assert [header.kind for _, header in found] == KINDS
        for (position, header), frame in zip(found, LOG, strict=True):
            assert check_frame(GROUP, buffer, position, previous_chain=None) == header
            payload = frame_payload(buffer, header, position)
            assert bytes(payload) == bytes(frame_payload(frame, header))


@pytest.mark.parametrize("number", range(len(LOG)))
def test_every_changed_bit_is_found(number: int) -> None:
    """C4, C5: whatever a disk does to a frame, its check fails."""
    previous = CHAIN_START if number == 0 else LOG[number - 1][40:48]
    for bit in range(len(LOG[number]) * 8):
        damaged = bytearray(LOG[number])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            check_frame(GROUP, damaged, previous_chain=previous)


def test_a_frame_of_another_group_is_refused() -> None:
    """C5: the group is not stored in the frame and still part of its checksum."""
    with pytest.raises(CorruptRecord, match="frame checksum"):
        check_frame(GroupId(8), LOG[0], previous_chain=CHAIN_START)


def test_a_frame_that_continues_another_past_is_refused() -> None:
    """C4: an older copy of a sector passes every CRC; the chain tells."""
    with pytest.raises(CorruptRecord, match="does not continue"):
        check_frame(GROUP, LOG[1], previous_chain=CHAIN_START)
    check_frame(GROUP, LOG[1], previous_chain=None)


@pytest.mark.parametrize("frame", LOG)
def test_every_cut_is_found(frame: bytes) -> None:
    for size in range(len(frame)):
        with pytest.raises(CorruptRecord):
            check_frame(GROUP, frame[:size], previous_chain=None)


def test_a_run_that_ends_inside_a_frame_is_corrupt_after_its_whole_frames() -> None:
    run = b"".join(LOG)[:-1]
    found = iter_frames(run)
    for _ in LOG[:-1]:
        next(found)
    with pytest.raises(CorruptRecord):
        next(found)


@FIXED
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_corrupt(data: bytes) -> None:
    for read in (decode_header, lambda raw: list(iter_frames(raw))):
        try:
            read(data)
        except CorruptRecord:
            continue
    try:
        check_frame(GROUP, data, previous_chain=None)
    except CorruptRecord:
        return
    pytest.fail("random bytes passed a checksum")


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (8, b"\x02"),  # version
        (9, b"\x00"),  # kind
        (9, b"\x63"),
        (12, b"\x01"),  # reserved
        (0, (FRAME_HEADER_BYTES - 1).to_bytes(4, "little")),  # size
        (0, (limits.FRAME_BYTES_MAX + 1).to_bytes(4, "little")),
        (24, bytes(8)),  # index 0
        (24, b"\xff" * 8),
        (16, b"\xff" * 8),  # term
    ],
)
def test_impossible_header_fields_are_refused_before_any_checksum(
    position: int, value: bytes
) -> None:
    frame = bytearray(LOG[0])
    frame[position : position + len(value)] = value
    with pytest.raises(CorruptRecord):
        decode_header(frame)


def test_a_data_frame_has_room_for_a_batch() -> None:
    frame = bytearray(LOG[0])
    frame[9] = FrameKind.DATA
    with pytest.raises(CorruptRecord, match="impossible frame size"):
        decode_header(frame)


def test_stamping_and_framing_in_one_step_gives_the_same_bytes() -> None:
    batch = encode_batch(ROWS)
    for source in (batch, bytearray(batch), memoryview(batch)):
        one_step = encode_data_frame(
            group=GROUP,
            index=LogIndex(4),
            term=Term(3),
            time_ms=START_MS,
            previous_chain=LOG[2][40:48],
            batch=source,
            base_offset=RecordOffset(90),
            annotation=b"note",
        )
        two_steps = encode_frame(
            group=GROUP,
            index=LogIndex(4),
            term=Term(3),
            kind=FrameKind.DATA,
            time_ms=START_MS,
            previous_chain=LOG[2][40:48],
            payload=stamp(source, 90, 3),
            annotation=b"note",
        )
        assert one_step == two_steps


def test_a_stamp_changed_after_framing_is_found() -> None:
    """The batch's own CRC leaves base offset and leader epoch out; the frame's covers them."""
    frame = bytearray(LOG[1])
    start = FRAME_HEADER_BYTES + decode_header(frame).annotation_size
    frame[start + 7] ^= 1
    with pytest.raises(CorruptRecord, match="frame checksum"):
        check_frame(GROUP, frame, previous_chain=None)


def test_a_batch_that_does_not_fill_its_frame_is_refused() -> None:
    batch = stamp(encode_batch(ROWS[:1]), 0, 1) + b"more"
    frame = encode_frame(
        group=GROUP,
        index=LogIndex(1),
        term=Term(1),
        kind=FrameKind.DATA,
        time_ms=0,
        previous_chain=CHAIN_START,
        payload=batch,
    )
    with pytest.raises(CorruptRecord, match="batch length"):
        check_frame(GROUP, frame, previous_chain=CHAIN_START)


@pytest.mark.parametrize(
    "changed",
    [
        {"payload": bytes(limits.FRAME_BYTES_MAX)},
        {"annotation": bytes(limits.ANNOTATION_BYTES_MAX + 1)},
        {"previous_chain": b"short"},
        {"index": LogIndex(0)},
        {"term": Term(2**31)},
        {"kind": FrameKind.DATA, "payload": b"no batch"},
    ],
)
def test_a_frame_beyond_its_limits_is_never_written(changed: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "group": GROUP,
        "index": LogIndex(1),
        "term": Term(1),
        "kind": FrameKind.NOOP,
        "time_ms": 0,
        "previous_chain": CHAIN_START,
        "payload": b"",
    }
    with pytest.raises(InvariantBroken):
        encode_frame(**(arguments | changed))  # type: ignore[arg-type]  # a table of bad arguments
