"""Which partition a key belongs to: murmur2, as in Kafka's Java client.

The rule it protects: the same key lands in the same partition for ever, from every process and
from every Kafka client (`hash()` differs from process to process). So the function never changes,
and golden vectors hold it.

Pure-Python murmur2 costs more than a microsecond, so hashes of short keys are remembered, in a
cache bounded by count and, through the length of the keys that it takes, in bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from aegis_cluster.errors import Misuse

CACHED_KEYS_MAX: Final = 16_384
CACHED_KEY_BYTES_MAX: Final = 128

_SEED: Final = 0x9747B28C
_MULTIPLIER: Final = 0x5BD1E995
_MASK: Final = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """32-bit murmur2 with Kafka's seed, unsigned (Java shows the same bits signed)."""
    length = len(data)
    whole = length & ~3
    h = _SEED ^ length
    for position in range(0, whole, 4):
        k = int.from_bytes(data[position : position + 4], "little") * _MULTIPLIER & _MASK
        k = (k ^ k >> 24) * _MULTIPLIER & _MASK
        h = h * _MULTIPLIER & _MASK ^ k
    if length != whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * _MULTIPLIER & _MASK
    h = (h ^ h >> 13) * _MULTIPLIER & _MASK
    return h ^ h >> 15


_remembered: Final = lru_cache(maxsize=CACHED_KEYS_MAX)(murmur2)


def key_hash(key: bytes) -> int:
    """31 bits of the hash that decides about a key's partition."""
    hashed = _remembered(key) if len(key) <= CACHED_KEY_BYTES_MAX else murmur2(key)
    return hashed & 0x7FFFFFFF


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of `key` among `partitions`, as Kafka's default partitioner has it."""
    if partitions < 1:
        raise Misuse("a topic has at least one partition", have=partitions)
    return key_hash(key) % partitions
