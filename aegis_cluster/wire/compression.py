"""Compression of the records of a batch, as Kafka's clients write it.

The rule it protects: nothing that arrives can make a process use more memory than the limit here,
however well it is compressed. So output goes into a buffer of ours that grows in steps up to the
limit, and what does not fit is corrupt.

Formats: gzip; snappy in xerial's blocks (raw blocks are read too, librdkafka writes them); lz4
frames with independent blocks (KIP-57); zstd (KIP-110).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final

import cramjam

from aegis_cluster import limits
from aegis_cluster.errors import ConfigError, CorruptRecord, invariant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DECOMPRESSED_BYTES_MAX: Final = 4 * limits.BATCH_BYTES_MAX
"""Clients fill a batch by its compressed size, so records may take some times that."""

CODEC_OF_NAME: Final = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
CODEC_NONE: Final = 0
CODEC_NUMBERS: Final = frozenset(CODEC_OF_NAME.values())

_GZIP_LEVEL: Final = 6
_GZIP_WINDOW: Final = 31  # zlib's way to ask for a gzip header
_LZ4_LEVEL: Final = 1  # the fast one: level 9 takes 9 times as long for a tenth fewer bytes
_ZSTD_LEVEL: Final = 3
_GUESS_BYTES_MIN: Final = 16 * limits.KIB
_USUAL_BYTES_MAX: Final = 2 * limits.BATCH_BYTES_DEFAULT
_GROWTH: Final = 8

invariant(2 * limits.BATCH_BYTES_MAX <= DECOMPRESSED_BYTES_MAX, "the first guess has a limit")

_XERIAL_MAGIC: Final = b"\x82SNAPPY\x00"
_XERIAL_HEADER: Final = _XERIAL_MAGIC + b"\x00\x00\x00\x01\x00\x00\x00\x01"
_XERIAL_BLOCK_BYTES: Final = 32 * limits.KIB


def codec_number(name: str) -> int:
    """The number of a codec in the attributes of a batch."""
    number = CODEC_OF_NAME.get(name)
    if number is None:
        allowed = ", ".join(map(repr, CODEC_OF_NAME))
        raise ConfigError(
            f"compression = {name!r}; allowed: {allowed}.", have=name, want=sorted(CODEC_OF_NAME)
        )
    return number


def compress(codec: int, data: bytes) -> bytes:
    """`data` compressed with a codec other than none."""
    return _COMPRESSORS[codec](data)


def decompress(codec: int, data: bytes, *, before: int, after: int) -> memoryview:
    """Decompress into a buffer with `before` free bytes in front and `after` zero bytes behind."""
    try:
        if codec == CODEC_OF_NAME["snappy"]:
            return _unsnappy(data, before, after)
        return _decompress_growing(_DECOMPRESSORS[codec], data, before, after)
    except (cramjam.DecompressionError, KeyError) as cause:
        raise CorruptRecord("records do not decompress", codec=codec, cause=str(cause)) from cause


def _decompress_growing(
    into: Callable[[bytes, memoryview], int], data: bytes, before: int, after: int
) -> memoryview:
    """Guess the size and grow until it fits or is over the limit (few formats tell the size)."""
    room = _first_guess(len(data))
    while True:
        output = bytearray(before + room + after)
        try:
            with memoryview(output) as view, view[before : before + room] as target:
                size = int(into(data, target))
            return _cut(output, before + size, after)
        except cramjam.DecompressionError:
            # Garbage and a full buffer raise the same, so garbage costs the few steps up, too.
            if room == DECOMPRESSED_BYTES_MAX:
                raise
            room = min(room * _GROWTH, DECOMPRESSED_BYTES_MAX)


def _first_guess(size: int) -> int:
    """Room for what a producer's batch usually holds; a large buffer costs time to clear."""
    return max(2 * size, min(32 * size, _USUAL_BYTES_MAX), _GUESS_BYTES_MIN)


def _cut(output: bytearray, end: int, after: int) -> memoryview:
    """The part in use. A view, because shrinking a bytearray copies it (15 µs become 260)."""
    output[end : end + after] = bytes(after)  # a decoder may have used the room as scratch
    return memoryview(output)[: end + after]


def _unsnappy(data: bytes, before: int, after: int) -> memoryview:
    """Every snappy block says its size, so the sum is known before anything is written."""
    sizes = map(cramjam.snappy.decompress_raw_len, _snappy_blocks(data))
    total = int(sum(sizes))
    if total > DECOMPRESSED_BYTES_MAX:
        raise CorruptRecord("records are too large", have=total, at_most=DECOMPRESSED_BYTES_MAX)
    output = bytearray(before + total + after)
    position = before
    with memoryview(output) as view:
        for block in _snappy_blocks(data):
            with view[position : before + total] as target:
                position += int(cramjam.snappy.decompress_raw_into(block, target))
    return _cut(output, position, after)


def _snappy_blocks(data: bytes) -> Iterator[bytes]:
    """The blocks of xerial's framing, or the whole where there is none."""
    if not data.startswith(_XERIAL_MAGIC):
        yield data
        return
    position = len(_XERIAL_HEADER)
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "big")
        if start >= position or position > len(data):
            raise CorruptRecord("a snappy block does not fit", have=len(data), want=position)
        yield data[start:position]


def _gzip(data: bytes) -> bytes:
    return zlib.compress(data, _GZIP_LEVEL, _GZIP_WINDOW)


def _snappy(data: bytes) -> bytes:
    parts: list[bytes] = [_XERIAL_HEADER]
    for start in range(0, len(data), _XERIAL_BLOCK_BYTES):
        block = bytes(cramjam.snappy.compress_raw(data[start : start + _XERIAL_BLOCK_BYTES]))
        parts += (len(block).to_bytes(4, "big"), block)
    return b"".join(parts)


def _lz4(data: bytes) -> bytes:
    compressor: Any = cramjam.lz4.Compressor(
        level=_LZ4_LEVEL, content_checksum=False, block_linked=False
    )
    compressor.compress(data)
    return bytes(compressor.finish())


def _zstd(data: bytes) -> bytes:
    return bytes(cramjam.zstd.compress(data, level=_ZSTD_LEVEL))


_COMPRESSORS: Final[dict[int, Callable[[bytes], bytes]]] = {1: _gzip, 2: _snappy, 3: _lz4, 4: _zstd}
_DECOMPRESSORS: Final[dict[int, Callable[[bytes, memoryview], int]]] = {
    1: cramjam.gzip.decompress_into,
    3: cramjam.lz4.decompress_into,
    4: cramjam.zstd.decompress_into,
}
