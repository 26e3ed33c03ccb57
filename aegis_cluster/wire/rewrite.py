"""Record batches that lose records: what compaction keeps of a batch, and what marks its place.

The idea: a batch keeps its whole header (offsets, producer, sequences, attributes) whatever becomes
of its records, so that a reader walks over gaps by offsets alone and whoever folds the log sees the
same producers. A batch without records is legal (Kafka's brokers make such ones, too).

The rule it protects: a record that stays is the same in every bit that a reader can see; where that
cannot be had, the batch stays as it is.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import CorruptRecord, invariant
from aegis_cluster.wire.batch import compressed, decode_batch
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.layout import (
    BATCH_HEADER_BYTES,
    BATCH_LENGTH_END,
    CODEC_MASK,
    MAGIC,
    batch_header,
)
from aegis_cluster.wire.records import NO_TIMESTAMP, Record, record_codec

if TYPE_CHECKING:
    from collections.abc import Sequence

_UNCOVERED: Final = struct.Struct(">qiibI")
_COVERED: Final = struct.Struct(">hiqqqhii")


def with_records(batch: bytes, kept: Sequence[Record]) -> bytes | None:
    """The batch with these of its records and no others; None where that does not work out.

    Its largest timestamp becomes that of what is kept (-1: none), for look-ups by time.
    """
    header = batch_header(batch)
    codec, body, times = 0, b"", (NO_TIMESTAMP, NO_TIMESTAMP)
    if kept:
        writer = record_codec().writer()
        for record in kept:
            if record.timestamp_ms < 0:
                return None  # writers take no such record for one without a time
            delta = record.offset - header.base_offset
            writer.append(delta, *record[1:4], list(record.headers))
        built = writer.build()
        first = batch_header(built)
        times = (first.first_timestamp, first.max_timestamp)
        with memoryview(built) as view:
            codec, packed = compressed(header.codec, view[BATCH_HEADER_BYTES:])
            body = bytes(packed)
    attributes = (header.attributes & ~CODEC_MASK) | codec
    producer = (header.producer_id, header.producer_epoch, header.base_sequence)
    covered = (
        _COVERED.pack(attributes, header.last_offset_delta, *times, *producer, len(kept)) + body
    )
    length = BATCH_HEADER_BYTES - BATCH_LENGTH_END + len(body)
    head = _UNCOVERED.pack(header.base_offset, length, header.leader_epoch, MAGIC, crc32c(covered))
    rewritten = head + covered
    return rewritten if _holds(rewritten, kept) else None


def _holds(batch: bytes, kept: Sequence[Record]) -> bool:
    """Checked by reading it back: what replaces stored records is not believed unseen."""
    try:
        found = decode_batch(batch)
    except CorruptRecord:
        return False
    return found == list(kept)


def check_kept(before: bytes, after: bytes) -> None:
    """What may never change, whatever was taken out."""
    old, new = batch_header(before), batch_header(after)
    same = (
        old.base_offset == new.base_offset
        and old.last_offset_delta == new.last_offset_delta
        and old.leader_epoch == new.leader_epoch
        and old.attributes & ~CODEC_MASK == new.attributes & ~CODEC_MASK
        and old.producer_id == new.producer_id
        and old.producer_epoch == new.producer_epoch
        and old.base_sequence == new.base_sequence
    )
    invariant(same, "a compacted batch keeps its place and its producer", offset=old.base_offset)
