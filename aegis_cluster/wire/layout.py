"""The fixed header of Kafka's record batch v2, and nothing that needs a codec.

What it is for: frames, storage and the broker read these 61 bytes and never a record, so this
module imports neither aiokafka nor cramjam. Layout, big endian (KIP-98):

    bytes  0..7   base_offset       stamped by the leader, outside the CRC
    bytes  8..11  batch_length      bytes that follow this field
    bytes 12..15  leader_epoch      stamped by the leader, outside the CRC
    byte  16      magic             2
    bytes 17..20  crc               CRC-32C of everything from byte 21 on
    bytes 21..22  attributes        codec 0..2, append time 3, transactional 4, control 5
    bytes 23..26  last_offset_delta
    bytes 27..34  first_timestamp
    bytes 35..42  max_timestamp
    bytes 43..50  producer_id       -1: not idempotent
    bytes 51..52  producer_epoch
    bytes 53..56  base_sequence
    bytes 57..60  count
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, TypeAlias

from aegis_cluster.errors import CorruptRecord

Bytes: TypeAlias = bytes | bytearray | memoryview

BATCH_HEADER_BYTES: Final = 61
BATCH_UNCOVERED_BYTES: Final = 21
"""The first bytes of a batch, which its own CRC leaves out."""
BATCH_LENGTH_END: Final = 12
"""`batch_length` counts the bytes from here on."""

MAGIC: Final = 2
CODEC_MASK: Final = 0x07
APPEND_TIME_BIT: Final = 0x08
TRANSACTIONAL_BIT: Final = 0x10
CONTROL_BIT: Final = 0x20

BATCH_STRUCT: Final = struct.Struct(">qiibIhiqqqhii")


class BatchHeader(NamedTuple):
    """The header as it stands; reading it proves nothing."""

    base_offset: int
    batch_length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    first_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return self.batch_length + BATCH_LENGTH_END

    @property
    def codec(self) -> int:
        """Number of the compression codec."""
        return self.attributes & CODEC_MASK

    @property
    def is_transactional(self) -> bool:
        """Part of a transaction: seen by readers once that is committed (KIP-98)."""
        return bool(self.attributes & TRANSACTIONAL_BIT)

    @property
    def is_control(self) -> bool:
        """A transaction marker, not records of users."""
        return bool(self.attributes & CONTROL_BIT)


def batch_header(buffer: Bytes, position: int = 0) -> BatchHeader:
    """Read the header at `position`; CorruptRecord where there is too little of it."""
    try:
        return BatchHeader._make(BATCH_STRUCT.unpack_from(buffer, position))
    except struct.error:
        raise CorruptRecord(
            "too short for a batch", have=len(buffer) - position, want=BATCH_HEADER_BYTES
        ) from None
