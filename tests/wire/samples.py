"""What the wire's tests are made of: records of every shape, and batches with a mended CRC."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from hypothesis import settings

from aegis_cluster.ids import GroupId, LogIndex, Term
from aegis_cluster.wire import batch as batches
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.frame import CHAIN_START, FrameKind, encode_frame
from aegis_cluster.wire.records import RecordCodec, compiled_codec, pure_codec

if TYPE_CHECKING:
    from collections.abc import Sequence

FIXED = settings(derandomize=True, max_examples=100, deadline=None, database=None)
"""The same examples on every run, so that a failure is one for everybody."""

COMPRESSIONS = ("none", "gzip", "snappy", "lz4", "zstd")
START_MS = 1_700_000_000_000

ROWS: list[batches.Row] = [
    (START_MS, b"key", b"value", []),
    (START_MS + 5, None, b"without a key", [("source", b"web"), ("nothing", None)]),
    (START_MS - 3, b"", b"", [("", b"")]),
    (START_MS + 70_000, b"tombstone", None, []),
    (START_MS + 2**33, "schlüssel".encode(), b"v" * 500, [("umlaut-ä", bytes(range(256)))]),
    *((START_MS + number, b"k%d" % (number % 7), b"text " * 20, []) for number in range(60)),
]


def both_codecs() -> list[RecordCodec]:
    """The compiled codec and its twin; the suite runs where both exist."""
    compiled = compiled_codec()
    assert compiled is not None, "aiokafka came without its compiled part"
    return [compiled, pure_codec()]


def rows_of(records: Sequence[batches.Record]) -> list[tuple[Any, ...]]:
    """Records as the rows that they were packed from."""
    return [tuple(record)[1:] for record in records]


def mended(batch: bytes | bytearray) -> bytes:
    """The batch with length and CRC that fit what it holds now."""
    output = bytearray(batch)
    struct.pack_into(">i", output, 8, len(output) - 12)
    struct.pack_into(">I", output, 17, crc32c(bytes(output[21:])))
    return bytes(output)


def with_field(batch: bytes, position: int, pattern: str, *values: int) -> bytes:
    """The batch with one header field changed, and its CRC right again."""
    output = bytearray(batch)
    struct.pack_into(pattern, output, position, *values)
    struct.pack_into(">I", output, 17, crc32c(bytes(output[21:])))
    return bytes(output)


def with_body(body: bytes, *, count: int = 1, attributes: int = 0) -> bytes:
    """A batch that claims `count` records and holds these bytes, with a CRC that is right."""
    batch = bytearray(batches.encode_batch([(START_MS, None, b"", [])]))[:61]
    batch += body
    struct.pack_into(">h", batch, 21, attributes)
    struct.pack_into(">i", batch, 23, max(count - 1, 0))
    struct.pack_into(">i", batch, 57, count)
    return mended(batch)


def log_of(group: int, kinds: Sequence[FrameKind]) -> list[bytes]:
    """A small log: one chained frame per kind, of terms that rise now and then."""
    frames: list[bytes] = []
    chain = CHAIN_START
    offset = 0
    for position, kind in enumerate(kinds, start=1):
        term = Term(1 + position // 3)
        payload = b"payload %d" % position
        if kind is FrameKind.DATA:
            payload = batches.stamp(batches.encode_batch(ROWS[:2]), offset, term)
            offset += 2
        frame = encode_frame(
            group=GroupId(group),
            index=LogIndex(position),
            term=term,
            kind=kind,
            time_ms=START_MS + position,
            previous_chain=chain,
            payload=payload,
            annotation=b"\x81\xa1a\x01" if position % 2 else b"",
        )
        chain = frame[40:48]
        frames.append(frame)
    return frames
