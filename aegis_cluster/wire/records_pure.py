"""The twin: records of a batch in plain Python.

What it is for: platforms without aiokafka's wheel, and a second opinion in tests. It accepts and
refuses exactly what the compiled codec does (KIP-98, "record batch v2"):

    length varint · attributes varint · timestamp delta varint · offset delta varint
    · key length varint, key · value length varint, value · header count varint
    · per header: name length varint, name, value length varint, value

A varint is zigzag-encoded, 7 bits a byte, at most 10 bytes; the length -1 stands for null.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.wire.layout import (
    APPEND_TIME_BIT,
    BATCH_HEADER_BYTES,
    BATCH_STRUCT,
    MAGIC,
    BatchHeader,
)
from aegis_cluster.wire.records import Headers, Record, RecordColumns, RecordWriter

if TYPE_CHECKING:
    from collections.abc import Callable

_TABLE_SIZE: Final = 4_096
_NULL: Final = b"\x01"
_MASK64: Final = 2**64 - 1
_SIGN64: Final = 2**63
_VARINT_BITS_MAX: Final = 63


def encode_varint(number: int) -> bytes:
    """A signed 64-bit number, zigzag."""
    rest = (number << 1 ^ number >> 63) & _MASK64
    if rest < _TABLE_SIZE:
        return _TABLE[rest]
    return _encode_unsigned(rest)


def _encode_unsigned(rest: int) -> bytes:
    output = bytearray()
    while rest > 0x7F:
        output.append(rest & 0x7F | 0x80)
        rest >>= 7
    output.append(rest)
    return bytes(output)


_TABLE: Final = tuple(_encode_unsigned(number) for number in range(_TABLE_SIZE))


def decode_varint(data: bytes, position: int) -> tuple[int, int]:
    """Number and position behind it; IndexError beyond the end, ValueError when over 10 bytes."""
    byte = data[position]
    position += 1
    if byte < 0x80:
        return byte >> 1 ^ -(byte & 1), position
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > _VARINT_BITS_MAX:
            raise ValueError("a varint has at most 10 bytes")
    value &= _MASK64
    return value >> 1 ^ -(value & 1), position


class PureWriter:
    """One batch under construction."""

    def __init__(self) -> None:
        self._buffer = bytearray(BATCH_HEADER_BYTES)
        self._first_timestamp = -1
        self._max_timestamp = -1
        self._count = 0

    def append(
        self,
        offset: int,
        timestamp: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        /,
    ) -> None:
        """Add a record."""
        if not self._count:
            self._first_timestamp = timestamp
        body = b"".join(
            (
                b"\x00",  # attributes, unused
                encode_varint(timestamp - self._first_timestamp),
                encode_varint(offset),
                _NULL if key is None else encode_varint(len(key)) + key,
                _NULL if value is None else encode_varint(len(value)) + value,
                _encode_headers(headers) if headers else b"\x00",
            )
        )
        self._buffer += encode_varint(len(body))
        self._buffer += body
        self._max_timestamp = max(self._max_timestamp, timestamp)
        self._count += 1

    def size(self) -> int:
        """Bytes so far, the batch header included."""
        return len(self._buffer)

    def build(self) -> bytearray:
        """The batch with everything in its header but the CRC and the producer."""
        BATCH_STRUCT.pack_into(
            self._buffer,
            0,
            0,
            len(self._buffer) - 12,
            -1,
            MAGIC,
            0,
            0,
            self._count - 1,
            self._first_timestamp,
            self._max_timestamp,
            -1,
            -1,
            -1,
            self._count,
        )
        return self._buffer


def _encode_headers(headers: Headers) -> bytes:
    parts = [encode_varint(len(headers))]
    for name, value in headers:
        encoded = name.encode()
        parts += (encode_varint(len(encoded)), encoded)
        parts += (_NULL,) if value is None else (encode_varint(len(value)), value)
    return b"".join(parts)


class PureCodec:
    """The twin of the compiled codec."""

    name = "pure"

    def writer(self) -> RecordWriter:
        """A new, empty batch."""
        return PureWriter()

    def read(self, header: BatchHeader, batch: memoryview) -> RecordColumns:
        """All records of the batch; the padding behind it is not needed here."""
        data = bytes(batch[BATCH_HEADER_BYTES:])
        append_time = header.max_timestamp if header.attributes & APPEND_TIME_BIT else None
        records: list[Record] = []
        position = 0
        try:
            for _ in range(header.count):
                record, position = _read_record(data, position, header, append_time)
                records.append(record)
        except (IndexError, ValueError) as cause:
            raise CorruptRecord("a record does not decode", cause=str(cause)) from cause
        if position != len(data):
            raise CorruptRecord("bytes behind the last record", have=len(data), want=position)
        return RecordColumns.of(records)


def _read_record(
    data: bytes,
    position: int,
    header: BatchHeader,
    append_time: int | None,
    varint: Callable[[bytes, int], tuple[int, int]] = decode_varint,
) -> tuple[Record, int]:
    length, position = varint(data, position)
    start = position
    _, position = varint(data, position)  # attributes, unused
    timestamp_delta, position = varint(data, position)
    offset_delta, position = varint(data, position)
    key, position = _read_nullable(data, position)
    value, position = _read_nullable(data, position)
    header_count, position = varint(data, position)
    headers: Headers = []
    if header_count:
        headers, position = _read_headers(data, position, header_count)
    if position - start != length:
        raise ValueError(f"a record of {length} bytes holds {position - start}")
    timestamp = _wrap(header.first_timestamp + timestamp_delta)
    if append_time is not None:
        timestamp = append_time
    return Record(header.base_offset + offset_delta, timestamp, key, value, headers), position


def _read_nullable(data: bytes, position: int) -> tuple[bytes | None, int]:
    length, position = decode_varint(data, position)
    if length < 0:
        return None, position
    end = position + length
    if end > len(data):
        raise IndexError("bytes end beyond the batch")
    return data[position:end], end


def _read_headers(data: bytes, position: int, count: int) -> tuple[Headers, int]:
    if count < 0:
        raise ValueError("a negative number of headers")
    headers: Headers = []
    for _ in range(count):
        name, position = _read_nullable(data, position)
        if name is None:
            raise ValueError("a header without a name")
        value, position = _read_nullable(data, position)
        headers.append((name.decode(), value))
    return headers, position


def _wrap(number: int) -> int:
    """As a signed 64-bit number, which is how the compiled codec adds."""
    if -_SIGN64 <= number < _SIGN64:
        return number
    return (number + _SIGN64 & _MASK64) - _SIGN64
