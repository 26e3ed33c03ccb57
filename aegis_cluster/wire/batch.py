"""Record batches: what a client packs and unpacks, and what the broker checks and stamps.

The idea: the batch is Kafka's record batch v2, the same bytes from producer to consumer. The
broker reads its header and checks its CRC; only clients look at records.
The rule it protects: a broker never believes what a client may not claim (`check_client_batch`),
and a client never hands out records of a batch that fails its CRC (`decode_batch`).
"""

from __future__ import annotations

import struct
from collections import deque
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Final, TypeAlias

from aegis_cluster import limits
from aegis_cluster.errors import CorruptRecord, InvalidBatch, MessageTooLarge, Misuse, invariant
from aegis_cluster.wire.compression import (
    CODEC_NONE,
    CODEC_NUMBERS,
    DECOMPRESSED_BYTES_MAX,
    codec_number,
    compress,
    decompress,
)
from aegis_cluster.wire.crc import crc32c
from aegis_cluster.wire.layout import (
    BATCH_HEADER_BYTES,
    BATCH_LENGTH_END,
    BATCH_STRUCT,
    BATCH_UNCOVERED_BYTES,
    CODEC_MASK,
    MAGIC,
    TRANSACTIONAL_BIT,
    BatchHeader,
    Bytes,
    batch_header,
)
from aegis_cluster.wire.records import (
    PADDING_BYTES,
    Record,
    RecordCodec,
    RecordColumns,
    record_codec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "BATCH_HEADER_BYTES",
    "BatchBuilder",
    "BatchHeader",
    "Bytes",
    "Record",
    "Row",
    "batch_header",
    "check_client_batch",
    "check_row",
    "decode_batch",
    "decode_columns",
    "encode_batch",
    "stamp",
]

Row: TypeAlias = "tuple[int, bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]"
"""A record to be packed: timestamp_ms, key, value, headers."""

_EPOCH_MAX: Final = 2**31 - 1
_UNCOVERED: Final = struct.Struct(">qiibI")
_COVERED: Final = struct.Struct(">hiqqqhii")
_BASE_OFFSET: Final = struct.Struct(">q")
_LEADER_EPOCH: Final = struct.Struct(">i")
_PRODUCER: Final = struct.Struct(">qhi")
_CRC: Final = struct.Struct(">I")
_TIMESTAMP_MAX: Final = 2**62
"""Deltas between two timestamps fit 64 bits; far beyond any year that `datetime` knows."""
_OFFSET_MAX: Final = 2**63 - 1
_PADDING: Final = bytes(PADDING_BYTES)


# --- the broker's side -------------------------------------------------------------------------


def check_client_batch(batch: Bytes) -> BatchHeader:
    """Everything that the broker trusts about a batch from a client (DESIGN §4), or a refusal."""
    size = len(batch)
    if size > limits.BATCH_BYTES_MAX:
        raise MessageTooLarge(
            f"A batch has {size} bytes; at most {limits.BATCH_BYTES_MAX} are possible.",
            have=size,
            at_most=limits.BATCH_BYTES_MAX,
        )
    if size < BATCH_HEADER_BYTES:
        raise InvalidBatch(
            f"{size} bytes are too short for a batch.", have=size, want=BATCH_HEADER_BYTES
        )
    header = batch_header(batch)
    if header.magic != MAGIC:
        raise InvalidBatch(
            f"A batch is of version {header.magic}; only {MAGIC} is taken.",
            have=header.magic,
            want=MAGIC,
        )
    if header.size != size:
        raise InvalidBatch(
            f"A batch says that it has {header.size} bytes; it has {size}.",
            have=header.size,
            want=size,
        )
    _check_claims(header)
    crc = crc32c(bytes(batch[BATCH_UNCOVERED_BYTES:]))
    if crc != header.crc:
        raise InvalidBatch(
            "A batch fails its checksum: it was damaged on its way.", have=crc, want=header.crc
        )
    return header


def _check_claims(header: BatchHeader) -> None:
    if not 0 < header.count <= limits.BATCH_RECORDS_MAX:
        raise InvalidBatch(
            f"A batch has {header.count} records; 1 to {limits.BATCH_RECORDS_MAX} are possible.",
            have=header.count,
        )
    if header.last_offset_delta != header.count - 1:
        raise InvalidBatch(
            "A client's batch has gaps between its offsets.",
            have=header.last_offset_delta,
            want=header.count - 1,
        )
    # Append time and control records are the leader's to write.
    allowed = CODEC_MASK | TRANSACTIONAL_BIT
    if header.attributes & ~allowed or header.codec not in CODEC_NUMBERS:
        raise InvalidBatch(
            f"A batch has the attributes {header.attributes:#x}, which a client may not set.",
            have=header.attributes,
        )
    if header.is_transactional and header.producer_id < 0:
        raise InvalidBatch("A batch of a transaction needs a producer id.", have=header.producer_id)
    if header.producer_id < 0:
        plain = (header.producer_id, header.producer_epoch, header.base_sequence) == (-1, -1, -1)
    else:
        plain = header.producer_epoch >= 0 and header.base_sequence >= 0
    if not plain:
        raise InvalidBatch(
            "A batch's producer id, epoch and sequence do not belong together.",
            have=[header.producer_id, header.producer_epoch, header.base_sequence],
        )


def stamp(batch: Bytes, base_offset: int, leader_epoch: int) -> bytes:
    """The batch with its place in the log; both fields lie outside its CRC."""
    invariant(base_offset >= 0, "offsets are not negative", base_offset=base_offset)
    invariant(0 <= leader_epoch <= _EPOCH_MAX, "an epoch has 31 bits", leader_epoch=leader_epoch)
    view = memoryview(batch)
    return b"".join(
        (
            _BASE_OFFSET.pack(base_offset),
            view[8:BATCH_LENGTH_END],
            _LEADER_EPOCH.pack(leader_epoch),
            view[16:],
        )
    )


def with_producer(
    batch: bytes, *, producer_id: int, producer_epoch: int, base_sequence: int
) -> bytes:
    """The same records under another producer epoch and sequence (KIP-360), with a new CRC."""
    producer = _PRODUCER.pack(producer_id, producer_epoch, base_sequence)
    covered = b"".join((batch[21:43], producer, memoryview(batch)[57:]))
    return b"".join((batch[:17], _CRC.pack(crc32c(covered)), covered))


# --- the client's side -------------------------------------------------------------------------


class BatchBuilder:
    """Packs records into one batch, one at a time, so that a producer can watch its size."""

    def __init__(self, *, compression: str = "none", codec: RecordCodec | None = None) -> None:
        self._compression = codec_number(compression)
        self._writer = (codec or record_codec()).writer()
        self._append = self._writer.append
        self.count = 0

    def append(
        self,
        timestamp_ms: int,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Add a record; a refused one leaves the batch as it was."""
        count = self.count
        check_row(count, timestamp_ms, headers)
        listed = headers if type(headers) is list else list(headers)
        self._append(count, timestamp_ms, key, value, listed)
        self.count = count + 1

    def append_columns(
        self,
        timestamps: int | Sequence[int],
        keys: Iterable[bytes | None],
        values: Sequence[bytes | None],
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Add records that share headers, without a line of Python for each of them: a third of
        what one `append` each costs. timestamps: one for all, or one for each."""
        count, more = self.count, len(values)
        if not more:
            return
        last = count + more - 1
        if isinstance(timestamps, int):
            check_row(last, timestamps, headers)
            times: Iterable[int] = repeat(timestamps)
        else:
            check_row(last, min(timestamps), headers)
            check_row(last, max(timestamps), headers)
            times = timestamps
        places = range(count, count + more)
        adding = map(self._append, places, times, keys, values, repeat(list(headers)))
        deque(adding, maxlen=0)  # runs it to its end, and keeps nothing
        self.count = count + more

    def append_rows(self, rows: Sequence[Row]) -> None:
        """Add records that were looked at before (`check_row`) and whose headers are lists, as
        `append_columns` does."""
        count, more = self.count, len(rows)
        if not more:
            return
        check_row(count + more - 1, 0, ())
        times, keys, values, headers = zip(*rows, strict=True)
        adding = map(self._append, range(count, count + more), times, keys, values, headers)
        deque(adding, maxlen=0)  # runs it to its end, and keeps nothing
        self.count = count + more

    def extend(self, records: Iterable[Row]) -> None:
        """Add many records; those before a refused one are in."""
        append, count = self._append, self.count
        try:
            for timestamp_ms, key, value, headers in records:
                check_row(count, timestamp_ms, headers)
                append(count, timestamp_ms, key, value, list(headers))
                count += 1
        finally:
            self.count = count

    @property
    def size_bytes(self) -> int:
        """Bytes so far, header included, before compression."""
        return self._writer.size()

    def build(
        self,
        producer_id: int = -1,
        producer_epoch: int = -1,
        base_sequence: int = -1,
        *,
        attributes: int = 0,
    ) -> bytes:
        """The finished batch; the builder is used up. attributes: bits beside the codec's."""
        return _finish(
            self._writer.build(),
            self.count,
            self._compression,
            (producer_id, producer_epoch, base_sequence),
            attributes,
        )


def check_row(count: int, timestamp_ms: int, headers: Sequence[tuple[str, bytes | None]]) -> None:
    """Refuse what may not follow `count` others in a batch: `MessageTooLarge`, `Misuse`."""
    if 0 <= timestamp_ms <= _TIMESTAMP_MAX and count < limits.BATCH_RECORDS_MAX:
        if len(headers) <= limits.RECORD_HEADERS_MAX:
            return
        raise MessageTooLarge(
            f"A message has {len(headers)} headers; {limits.RECORD_HEADERS_MAX} are possible.",
            have=len(headers),
            at_most=limits.RECORD_HEADERS_MAX,
        )
    raise Misuse(
        "A message's time is before 1970 or beyond reason, or its batch is full.",
        timestamp_ms=timestamp_ms,
        count=count,
        at_most=limits.BATCH_RECORDS_MAX,
    )


def encode_batch(
    records: Iterable[Row],
    *,
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
    compression: str = "none",
    codec: RecordCodec | None = None,
    attributes: int = 0,
) -> bytes:
    """One batch of `(timestamp_ms, key, value, headers)` tuples."""
    builder = BatchBuilder(compression=compression, codec=codec)
    builder.extend(records)
    return builder.build(producer_id, producer_epoch, base_sequence, attributes=attributes)


def _finish(
    built: bytearray,
    count: int,
    compression: int,
    producer: tuple[int, int, int],
    attributes: int,
) -> bytes:
    """Compress if that helps, and write the header that we vouch for."""
    if not count:
        raise Misuse("A batch holds at least one record.")
    with memoryview(built) as view:
        compression, body = compressed(compression, view[BATCH_HEADER_BYTES:])
        length = BATCH_HEADER_BYTES - BATCH_LENGTH_END + len(body)
        if length + BATCH_LENGTH_END > limits.BATCH_BYTES_MAX:
            raise MessageTooLarge(
                "a batch is too large",
                have=length + BATCH_LENGTH_END,
                at_most=limits.BATCH_BYTES_MAX,
            )
        times = batch_header(built)
        fields = (compression | attributes, count - 1, times.first_timestamp, times.max_timestamp)
        covered = _COVERED.pack(*fields, *producer, count) + body
    return _UNCOVERED.pack(0, length, -1, MAGIC, crc32c(covered)) + covered


def compressed(compression: int, body: memoryview) -> tuple[int, Bytes]:
    """The codec really used, and the bytes: records that do not shrink are stored as they are."""
    if len(body) > DECOMPRESSED_BYTES_MAX:
        raise MessageTooLarge(
            "a batch's records are too large", have=len(body), at_most=DECOMPRESSED_BYTES_MAX
        )
    if compression != CODEC_NONE:
        smaller = compress(compression, bytes(body))
        if len(smaller) < len(body):
            return compression, smaller
    return CODEC_NONE, body


def decode_batch(batch: Bytes, *, codec: RecordCodec | None = None) -> list[Record]:
    """Every record of a stored batch; CorruptRecord unless all of it is right, CRC included."""
    return decode_columns(batch, codec=codec).records()


def decode_columns(batch: Bytes, *, codec: RecordCodec | None = None) -> RecordColumns:
    """As `decode_batch`, for those who need a column or two."""
    header = batch_header(batch)
    _check_stored(header, batch)
    padded = _uncompressed(header, batch)
    with memoryview(padded) as whole, whole[:-PADDING_BYTES] as view:
        records = (codec or record_codec()).read(header, view)
    _check_offsets(header, records.offsets)
    return records


def _check_stored(header: BatchHeader, batch: Bytes) -> None:
    if header.magic != MAGIC or header.size != len(batch):
        raise CorruptRecord(
            "not one whole record batch v2", magic=header.magic, have=len(batch), want=header.size
        )
    crc = crc32c(bytes(batch[BATCH_UNCOVERED_BYTES:]))
    if crc != header.crc:
        raise CorruptRecord(
            "batch checksum", base_offset=header.base_offset, have=crc, want=header.crc
        )
    possible = 0 <= header.count <= limits.BATCH_RECORDS_MAX and header.last_offset_delta >= 0
    if not possible or not 0 <= header.base_offset <= _OFFSET_MAX - header.last_offset_delta:
        raise CorruptRecord(
            "impossible batch header", base_offset=header.base_offset, count=header.count
        )


def _uncompressed(header: BatchHeader, batch: Bytes) -> Bytes:
    """The batch without compression and with padding behind, as record codecs want it."""
    if header.codec == CODEC_NONE:
        return b"".join((batch, _PADDING))
    data = bytes(batch[BATCH_HEADER_BYTES:])
    padded = decompress(header.codec, data, before=BATCH_HEADER_BYTES, after=PADDING_BYTES)
    plain = header._replace(attributes=header.attributes & ~CODEC_MASK)
    BATCH_STRUCT.pack_into(padded, 0, *plain)
    return padded


def _check_offsets(header: BatchHeader, offsets: list[int]) -> None:
    """Offsets rise and stay within what the batch claims (gaps come with compaction)."""
    first, last = header.base_offset, header.base_offset + header.last_offset_delta
    if len(offsets) == header.last_offset_delta + 1 and offsets == list(range(first, last + 1)):
        return
    bounded = not offsets or (first <= offsets[0] and offsets[-1] <= last)
    if not bounded or any(a >= b for a, b in pairwise(offsets)):
        raise CorruptRecord("a batch's records are out of order", base_offset=first)
