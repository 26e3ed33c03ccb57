"""The frame: what Raft stores and sends, one per log index.

The idea: a frame says where it belongs (group, index, term) and proves it, whatever it carries.
Layout, little endian, then the annotation, then the payload:

    bytes  0..3   size             whole frame, this header included
    bytes  4..7   crc              CRC-32C, see `_covered`
    byte   8      version          1
    byte   9      kind             FrameKind
    bytes 10..11  annotation_size
    bytes 12..15  flags            1: rewritten by compaction, see `rewrite_frame`
    bytes 16..23  term
    bytes 24..31  index
    bytes 32..39  time_ms          the leader's clock when it appended
    bytes 40..47  chain            blake2b of the previous chain, this CRC and the batch's CRC

The rules it protects: bytes that were moved to another place (group, index) or brought back from
an older time fail the check (C4 and C5 are such faults of disks); a byte of a batch is checksummed
once, by the batch's own CRC, and the frame's CRC covers the 21 bytes that it leaves out; a frame
that compaction has rewritten keeps its index, its offsets and its place in the chain.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster import limits
from aegis_cluster.errors import CorruptRecord, invariant
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.layout import BATCH_HEADER_BYTES, BATCH_UNCOVERED_BYTES, Bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term

FRAME_VERSION: Final = 1
FRAME_HEADER_BYTES: Final = 48
CHAIN_BYTES: Final = 8
CHAIN_START: Final = bytes(CHAIN_BYTES)
"""The chain before the first frame of a group."""

_HEADER: Final = struct.Struct("<IIBBHIQQq8s")
_COVERED: Final = struct.Struct("<QIBBHIQQq")
"""Group, then the header without its CRC and chain."""
_CRC: Final = struct.Struct("<I")
_ORIGIN: Final = struct.Struct("<I4s")
REWRITTEN: Final = 1
"""Flag of a frame whose batch lost records to compaction."""
_NO_BATCH_CRC: Final = bytes(4)
_STAMP_OFFSET: Final = struct.Struct(">q")
_STAMP_EPOCH: Final = struct.Struct(">i")
_NUMBER_MAX: Final = 2**63 - 1
TERM_MAX: Final = 2**31 - 1
"""What fits the leader epoch of a batch; at an election a second, 68 years."""


class FrameKind(IntEnum):
    """What a frame carries; only DATA (and, later, markers) takes offsets."""

    DATA = 1
    NOOP = 2
    MEMBERSHIP = 3
    LOG_START = 4
    POSITION = 5
    """Moves a feed's fence or position without a record."""


_KINDS: Final = {kind.value: kind for kind in FrameKind}


class FrameHeader(NamedTuple):
    """The fixed part of a frame."""

    size: int
    """Bytes of the whole frame."""
    crc: int
    kind: FrameKind
    annotation_size: int
    term: Term
    index: LogIndex  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    time_ms: int
    """The leader's clock at append, which never falls within a partition."""
    chain: bytes
    flags: int = 0

    @property
    def is_rewritten(self) -> bool:
        """Compaction took records out of its batch."""
        return bool(self.flags & REWRITTEN)


def encode_frame(
    *,
    group: GroupId,
    index: LogIndex,
    term: Term,
    kind: FrameKind,
    time_ms: int,
    previous_chain: bytes,
    payload: Bytes,
    annotation: bytes = b"",
) -> bytes:
    """Build one frame; a DATA payload is one stamped batch, whose CRC is taken as it stands."""
    is_data = kind is FrameKind.DATA
    head = bytes(payload[:BATCH_UNCOVERED_BYTES]) if is_data else bytes(payload)
    header = _encode_header(
        group, index, term, kind, time_ms, previous_chain, len(payload), annotation, head
    )
    return b"".join((header, annotation, payload))


def encode_data_frame(
    *,
    group: GroupId,
    index: LogIndex,
    term: Term,
    time_ms: int,
    previous_chain: bytes,
    batch: Bytes,
    base_offset: RecordOffset,
    annotation: bytes = b"",
) -> bytes:
    """Stamp a checked client batch and frame it, with one copy of its bytes instead of two."""
    head = b"".join(
        (
            _STAMP_OFFSET.pack(base_offset),
            batch[8:12],
            _STAMP_EPOCH.pack(term),
            batch[16:BATCH_UNCOVERED_BYTES],
        )
    )
    header = _encode_header(
        group, index, term, FrameKind.DATA, time_ms, previous_chain, len(batch), annotation, head
    )
    return b"".join((header, annotation, head, memoryview(batch)[BATCH_UNCOVERED_BYTES:]))


def _encode_header(
    group: GroupId,
    index: LogIndex,
    term: Term,
    kind: FrameKind,
    time_ms: int,
    previous_chain: bytes,
    payload_size: int,
    annotation: bytes,
    head: bytes,
) -> bytes:
    """The 48 bytes; `head` is the part of the payload that the frame's CRC covers."""
    size = FRAME_HEADER_BYTES + len(annotation) + payload_size
    least = BATCH_HEADER_BYTES if kind is FrameKind.DATA else 0
    possible = (
        least <= payload_size
        and size <= limits.FRAME_BYTES_MAX
        and len(annotation) <= limits.ANNOTATION_BYTES_MAX
        and len(previous_chain) == CHAIN_BYTES
        and 0 < index <= _NUMBER_MAX
        and 0 <= term <= TERM_MAX
    )
    invariant(possible, "a frame within its limits", size=size, index=index, term=term, kind=kind)
    covered = _COVERED.pack(
        group, size, FRAME_VERSION, kind, len(annotation), 0, term, index, time_ms
    )
    crc = crc32c(b"".join((covered, annotation, head)))
    chain = _next_chain(previous_chain, crc, kind, head)
    return _HEADER.pack(
        size, crc, FRAME_VERSION, kind, len(annotation), 0, term, index, time_ms, chain
    )


def rewrite_frame(group: GroupId, frame: bytes, batch: bytes) -> bytes:
    """The same frame around a batch that has lost records.

    The chain goes on through it as before, so nothing that was ever compared with it changes: ahead
    of its annotation it carries the two checksums that the chain was made of. The batch keeps its
    first and last offset.
    """
    header = decode_header(frame)
    invariant(header.kind is FrameKind.DATA, "only batches lose records", index=header.index)
    payload = frame_payload(frame, header)
    if header.is_rewritten:
        origin = frame[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + _ORIGIN.size]
    else:
        origin = _ORIGIN.pack(header.crc, bytes(payload[17:21]))
    annotation = origin + frame_annotation(frame, header)
    invariant(batch[:8] == payload[:8] and batch[23:27] == payload[23:27], "offsets stay")
    size = FRAME_HEADER_BYTES + len(annotation) + len(batch)
    rewritten = header._replace(size=size, annotation_size=len(annotation), flags=REWRITTEN)
    crc = _frame_crc(group, rewritten, annotation + batch[:BATCH_UNCOVERED_BYTES])
    head = _HEADER.pack(
        size,
        crc,
        FRAME_VERSION,
        header.kind,
        len(annotation),
        REWRITTEN,
        header.term,
        header.index,
        header.time_ms,
        header.chain,
    )
    return b"".join((head, annotation, batch))


def _next_chain(previous_chain: bytes, crc: int, kind: FrameKind, head: bytes) -> bytes:
    batch_crc = head[17:21] if kind is FrameKind.DATA else _NO_BATCH_CRC
    return _link(previous_chain, crc, batch_crc)


def _link(previous_chain: bytes, crc: int, batch_crc: bytes) -> bytes:
    return blake2b(previous_chain + _CRC.pack(crc) + batch_crc, digest_size=CHAIN_BYTES).digest()


def decode_header(buffer: Bytes, position: int = 0) -> FrameHeader:
    """Read the fixed part; its fields are possible, nothing is proved yet (see `check_frame`)."""
    try:
        size, crc, version, kind_number, annotation_size, flags, term, index, time_ms, chain = (
            _HEADER.unpack_from(buffer, position)
        )
    except struct.error:
        raise CorruptRecord(
            "the log ends inside a frame header", position=position, have=len(buffer) - position
        ) from None
    kind = _KINDS.get(kind_number)
    if version != FRAME_VERSION or kind is None or flags > REWRITTEN:
        raise CorruptRecord(
            "unknown frame version or kind", position=position, version=version, kind=kind_number
        )
    smallest = FRAME_HEADER_BYTES + annotation_size
    if kind is FrameKind.DATA:
        smallest += BATCH_HEADER_BYTES
    if flags and (kind is not FrameKind.DATA or annotation_size < _ORIGIN.size):
        raise CorruptRecord("no frame that was rewritten", position=position, kind=kind_number)
    if not smallest <= size <= limits.FRAME_BYTES_MAX:
        raise CorruptRecord("impossible frame size", position=position, have=size, least=smallest)
    if not (0 < index <= _NUMBER_MAX and term <= TERM_MAX):
        raise CorruptRecord("impossible index or term", position=position, index=index, term=term)
    return FrameHeader(size, crc, kind, annotation_size, term, index, time_ms, chain, flags)


def check_frame(
    group: GroupId, buffer: Bytes, position: int = 0, *, previous_chain: bytes | None
) -> FrameHeader:
    """Prove one whole frame: its CRC for this group, its batch, and its place in the chain.

    previous_chain: chain of the frame before; None where it is not known, which leaves out the
    chain and nothing else.
    """
    header = decode_header(buffer, position)
    payload_start = position + FRAME_HEADER_BYTES + header.annotation_size
    end = position + header.size
    if end > len(buffer):
        raise CorruptRecord("the log ends inside a frame", position=position, want=header.size)
    is_data = header.kind is FrameKind.DATA
    head_end = payload_start + BATCH_UNCOVERED_BYTES if is_data else end
    crc = _frame_crc(group, header, buffer[position + FRAME_HEADER_BYTES : head_end])
    if crc != header.crc:
        raise CorruptRecord(
            "frame checksum", position=position, index=header.index, have=crc, want=header.crc
        )
    if is_data:
        _check_batch(buffer, payload_start, end, header.index)
    if previous_chain is not None:
        origin = buffer[position + FRAME_HEADER_BYTES : payload_start]
        _check_chain(header, previous_chain, origin, buffer[payload_start:head_end])
    return header


def _frame_crc(group: GroupId, header: FrameHeader, annotation_and_head: Bytes) -> int:
    covered = _COVERED.pack(
        group,
        header.size,
        FRAME_VERSION,
        header.kind,
        header.annotation_size,
        header.flags,
        header.term,
        header.index,
        header.time_ms,
    )
    return crc32c(b"".join((covered, annotation_and_head)))


def _check_batch(buffer: Bytes, start: int, end: int, index: LogIndex) -> None:
    """The batch fills the payload and its own CRC holds."""
    length = int.from_bytes(buffer[start + 8 : start + 12], "big", signed=True)
    if length + 12 != end - start:
        raise CorruptRecord(
            "batch length is not its frame's", index=index, have=length + 12, want=end - start
        )
    want = int.from_bytes(buffer[start + 17 : start + 21], "big")
    have = crc32c(bytes(buffer[start + BATCH_UNCOVERED_BYTES : end]))
    if have != want:
        raise CorruptRecord("batch checksum", index=index, have=have, want=want)


def _check_chain(
    header: FrameHeader, previous_chain: bytes, annotation: Bytes, head: Bytes
) -> None:
    if header.is_rewritten:
        chain = _link(previous_chain, *_ORIGIN.unpack_from(annotation))
    else:
        chain = _next_chain(previous_chain, header.crc, header.kind, bytes(head))
    if chain != header.chain:
        raise CorruptRecord(
            "frame does not continue the log", index=header.index, have=header.chain, want=chain
        )


def frame_payload(buffer: Bytes, header: FrameHeader, position: int = 0) -> memoryview:
    """What the frame carries: for DATA exactly one batch."""
    start = position + FRAME_HEADER_BYTES + header.annotation_size
    return memoryview(buffer)[start : position + header.size]


def frame_annotation(buffer: Bytes, header: FrameHeader, position: int = 0) -> memoryview:
    """The small map for the state that folds the log; empty in plain topics."""
    start = position + FRAME_HEADER_BYTES
    skipped = _ORIGIN.size if header.is_rewritten else 0
    return memoryview(buffer)[start + skipped : start + header.annotation_size]


def iter_frames(buffer: Bytes, start: int = 0) -> Iterator[tuple[int, FrameHeader]]:
    """Position and header of every frame in a contiguous run; no CRC is checked.

    start: position of the first one.
    """
    position, end = start, len(buffer)
    while position < end:
        header = decode_header(buffer, position)
        if position + header.size > end:
            raise CorruptRecord("the run ends inside a frame", position=position, want=header.size)
        yield position, header
        position += header.size
