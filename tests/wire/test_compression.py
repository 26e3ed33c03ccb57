"""Compression: bounded, whatever arrives."""

from __future__ import annotations

import random

import cramjam
import pytest

from aegis_cluster.errors import ConfigError, CorruptRecord
from aegis_cluster.wire import compression
from aegis_cluster.wire.compression import CODEC_OF_NAME, codec_number, compress, decompress
from tests.wire.samples import COMPRESSIONS

REAL = [number for number in CODEC_OF_NAME.values() if number]
TEXT = b"the same words again and again, " * 3_000


def plain(codec: int, data: bytes) -> bytes:
    return bytes(decompress(codec, data, before=0, after=0))


@pytest.mark.parametrize("codec", REAL)
@pytest.mark.parametrize("data", [b"x", TEXT, random.Random(1).randbytes(5_000), bytes(600_000)])
def test_data_comes_back_with_room_around_it(codec: int, data: bytes) -> None:
    output = decompress(codec, compress(codec, data), before=61, after=64)
    assert output[:61] == bytes(61)
    assert output[61:-64] == data
    assert output[-64:] == bytes(64)


@pytest.mark.parametrize("codec", REAL)
def test_a_bomb_is_refused_at_the_limit(codec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "DECOMPRESSED_BYTES_MAX", 100_000)
    assert len(plain(codec, compress(codec, bytes(100_000)))) == 100_000
    with pytest.raises(CorruptRecord):
        plain(codec, compress(codec, bytes(100_001)))


def test_a_snappy_block_that_announces_gigabytes_allocates_nothing() -> None:
    with pytest.raises(CorruptRecord, match="too large"):
        plain(2, b"\xff\xff\xff\xff\x0f")


@pytest.mark.parametrize("seed", [7_001])  # so that a failure's name carries it
@pytest.mark.parametrize("codec", REAL)
def test_garbage_and_cuts_are_corrupt_or_readable_and_nothing_else(
    codec: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "DECOMPRESSED_BYTES_MAX", 100_000)
    rng = random.Random(seed)
    for _ in range(60):
        data = bytearray(compress(codec, TEXT[: rng.randrange(1, 2_000)]))
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            plain(codec, bytes(data))
        except CorruptRecord:
            continue


@pytest.mark.parametrize("codec", [0, 5, 6, 7])
def test_a_codec_that_does_not_exist_is_corrupt(codec: int) -> None:
    with pytest.raises(CorruptRecord):
        plain(codec, b"data")


def test_raw_snappy_is_read_too() -> None:
    assert plain(2, bytes(cramjam.snappy.compress_raw(TEXT))) == TEXT


@pytest.mark.parametrize("name", COMPRESSIONS[1:])
def test_aiokafka_reads_what_we_write_and_writes_what_we_read(name: str) -> None:
    from aiokafka import codec as reference

    number = CODEC_OF_NAME[name]
    assert getattr(reference, f"{name}_decode")(compress(number, TEXT)) == TEXT
    assert plain(number, getattr(reference, f"{name}_encode")(TEXT)) == TEXT


def test_an_unknown_name_lists_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        codec_number("lzma")
    assert caught.value.details["want"] == sorted(COMPRESSIONS)
