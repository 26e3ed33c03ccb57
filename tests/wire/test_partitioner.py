"""murmur2 as in Kafka's Java client."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.errors import Misuse
from aegis_cluster.wire.partitioner import (
    CACHED_KEY_BYTES_MAX,
    CACHED_KEYS_MAX,
    _remembered,
    murmur2,
    partition_for,
)
from tests.wire.golden import GOLDEN
from tests.wire.samples import FIXED

# org.apache.kafka.common.utils.UtilsTest#testMurmur2, signed as Java shows them.
KAFKA_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("key", "signed"), KAFKA_VECTORS.items())
def test_vectors_of_kafkas_own_test(key: bytes, signed: int) -> None:
    assert murmur2(key) == signed % 2**32


def test_golden_partitions_of_keys() -> None:
    vectors = json.loads((GOLDEN / "partitioner-v1.json").read_text())
    for vector in vectors:
        key = bytes.fromhex(vector["key"])
        assert murmur2(key) == vector["murmur2"]
        for partitions, partition in vector["partitions"].items():
            assert partition_for(key, int(partitions)) == partition


@FIXED
@given(st.binary(max_size=300), st.integers(min_value=1, max_value=10_000))
def test_the_partition_is_kafkas_positive_hash_modulo(key: bytes, partitions: int) -> None:
    from aiokafka.partitioner import murmur2 as reference

    want = (reference(key) & 0x7FFFFFFF) % partitions
    assert partition_for(key, partitions) == want
    assert partition_for(key, partitions) == want, "the remembered answer is the same"


def test_the_cache_is_bounded_in_count_and_takes_no_long_keys() -> None:
    _remembered.cache_clear()
    partition_for(b"x" * (CACHED_KEY_BYTES_MAX + 1), 4)
    assert _remembered.cache_info().currsize == 0
    partition_for(b"x" * CACHED_KEY_BYTES_MAX, 4)
    assert _remembered.cache_info().currsize == 1
    assert _remembered.cache_info().maxsize == CACHED_KEYS_MAX


def test_a_topic_without_partitions_is_misuse() -> None:
    with pytest.raises(Misuse):
        partition_for(b"key", 0)
