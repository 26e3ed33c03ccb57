"""Transaction markers: the control batches that end a transaction in one partition (KIP-98).

A marker is a batch of one control record and takes an offset, as in Kafka. Its producer epoch is
the one *after* the transaction that it ends (KIP-890), so whatever else of that transaction comes
late is fenced by the marker itself.

    key    int16 version (0), int16 kind (0 abort, 1 commit)
    value  int16 version (0), int32 term of the coordinator that wrote it
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.wire.batch import decode_batch, encode_batch
from aegis_cluster.wire.layout import CONTROL_BIT, TRANSACTIONAL_BIT, Bytes, batch_header

_KEY: Final = struct.Struct(">hh")
_VALUE: Final = struct.Struct(">hi")
_ABORT: Final = 0
_COMMIT: Final = 1


class Marker(NamedTuple):
    """producer_epoch: what the producer has from now on; the transaction's was one lower."""

    producer_id: int
    producer_epoch: int
    committed: bool
    coordinator_term: int


def encode_marker(marker: Marker, timestamp_ms: int) -> bytes:
    """The whole batch, to be stamped by the partition's leader."""
    kind = _COMMIT if marker.committed else _ABORT
    value = _VALUE.pack(0, marker.coordinator_term)
    return encode_batch(
        [(timestamp_ms, _KEY.pack(0, kind), value, [])],
        producer_id=marker.producer_id,
        producer_epoch=marker.producer_epoch,
        attributes=CONTROL_BIT | TRANSACTIONAL_BIT,
    )


def decode_marker(batch: Bytes) -> Marker:
    """Raises `CorruptRecord` for a control batch that is no marker of this version."""
    header = batch_header(batch)
    records = decode_batch(batch)
    try:
        _, kind = _KEY.unpack_from(records[0].key or b"")
        _, term = _VALUE.unpack_from(records[0].value or b"")
    except (struct.error, IndexError):
        raise CorruptRecord(
            "A control batch is no transaction marker.", base_offset=header.base_offset
        ) from None
    if kind not in (_ABORT, _COMMIT):
        raise CorruptRecord(
            "A transaction marker of a kind that this version does not know.",
            base_offset=header.base_offset,
            have=kind,
        )
    return Marker(header.producer_id, header.producer_epoch, kind == _COMMIT, term)
