"""Batches: the broker's checks, and both record codecs under the same tests."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.errors import (
    ConfigError,
    CorruptRecord,
    InvalidBatch,
    InvariantBroken,
    MessageTooLarge,
    Misuse,
)
from aegis_cluster.wire.batch import (
    BatchBuilder,
    Record,
    batch_header,
    check_client_batch,
    decode_batch,
    encode_batch,
    stamp,
)
from aegis_cluster.wire.records import RecordCodec, pure_codec, record_codec
from tests.wire.samples import (
    COMPRESSIONS,
    FIXED,
    ROWS,
    START_MS,
    both_codecs,
    mended,
    rows_of,
    with_body,
    with_field,
)

if TYPE_CHECKING:
    from aegis_cluster.wire import batch as batches

BATCH = encode_batch(ROWS, producer_id=9, producer_epoch=1, base_sequence=40)

codecs = pytest.mark.parametrize("codec", both_codecs(), ids=lambda codec: codec.name)


def decoded_or_corrupt(batch: bytes, codec: RecordCodec) -> list[Record] | None:
    try:
        return decode_batch(batch, codec=codec)
    except CorruptRecord:
        return None


# --- the broker's side -------------------------------------------------------------------------


def test_a_good_batch_is_accepted_whatever_buffer_it_lies_in() -> None:
    for batch in (BATCH, bytearray(BATCH), memoryview(BATCH)):
        header = check_client_batch(batch)
        assert (header.count, header.producer_id, header.base_sequence) == (len(ROWS), 9, 40)
        assert header.max_timestamp == max(row[0] for row in ROWS)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (b"", "too short"),
        (BATCH[:60], "too short"),
        (BATCH[:-1], "says that it has"),
        (BATCH + b"x", "says that it has"),
        (with_field(BATCH, 16, ">b", 1), "is of version 1"),
        (with_field(BATCH, 57, ">i", 0), "records; 1 to"),
        (with_field(BATCH, 57, ">i", -1), "records; 1 to"),
        (with_field(BATCH, 57, ">i", limits.BATCH_RECORDS_MAX + 1), "records; 1 to"),
        (with_field(BATCH, 23, ">i", len(ROWS)), "has gaps"),
        (with_field(BATCH, 23, ">i", -1), "has gaps"),
        (with_field(BATCH, 21, ">h", 0x05), "attributes"),  # a codec that does not exist
        (with_field(BATCH, 21, ">h", 0x08), "attributes"),  # append time
        (with_field(with_field(BATCH, 21, ">h", 0x10), 43, ">qhi", -1, -1, -1), "transaction"),
        (with_field(BATCH, 21, ">h", 0x20), "attributes"),  # control
        (with_field(BATCH, 21, ">h", 0x40), "attributes"),
        (with_field(BATCH, 21, ">h", -1), "attributes"),
        (with_field(BATCH, 43, ">q", -1), "producer"),
        (with_field(BATCH, 43, ">qhi", -2, -1, -1), "producer"),
        (with_field(BATCH, 51, ">h", -1), "producer"),
        (with_field(BATCH, 53, ">i", -1), "producer"),
        (BATCH[:-1] + b"?", "checksum"),
    ],
)
def test_what_a_client_may_not_claim_is_refused(batch: bytes, says: str) -> None:
    with pytest.raises(InvalidBatch, match=says):
        check_client_batch(batch)


def test_a_batch_over_the_limit_is_too_large() -> None:
    with pytest.raises(MessageTooLarge):
        check_client_batch(bytes(limits.BATCH_BYTES_MAX + 1))


@FIXED
@given(st.binary(max_size=200))
def test_any_bytes_from_a_client_are_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(InvalidBatch):
        check_client_batch(data)


def test_a_stamp_changes_two_fields_and_no_checksum() -> None:
    stamped = stamp(memoryview(BATCH), 2**40, 7)
    check_client_batch(stamped)
    header, before = batch_header(stamped), batch_header(BATCH)
    assert header == before._replace(base_offset=2**40, leader_epoch=7)
    assert stamped[16:] == BATCH[16:]


@pytest.mark.parametrize(("offset", "epoch"), [(-1, 0), (0, -1), (0, 2**31)])
def test_an_impossible_stamp_is_never_written(offset: int, epoch: int) -> None:
    with pytest.raises(InvariantBroken):
        stamp(BATCH, offset, epoch)


def test_a_header_is_read_where_it_lies() -> None:
    assert batch_header(b"xyz" + BATCH, 3) == batch_header(BATCH)
    assert batch_header(BATCH).size == len(BATCH)
    with pytest.raises(CorruptRecord):
        batch_header(BATCH, len(BATCH) - 60)


def test_a_control_batch_says_so() -> None:
    assert batch_header(with_field(BATCH, 21, ">h", 0x20)).is_control
    assert not batch_header(BATCH).is_control


# --- the client's side, on both codecs ---------------------------------------------------------


@codecs
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_records_come_back_equal(codec: RecordCodec, compression: str) -> None:
    batch = encode_batch(ROWS, compression=compression, codec=codec)
    check_client_batch(batch)
    assert batch_header(batch).codec == COMPRESSIONS.index(compression)
    records = decode_batch(stamp(batch, 1_000, 3), codec=codec)
    assert rows_of(records) == ROWS
    assert [record.offset for record in records] == list(range(1_000, 1_000 + len(ROWS)))
    assert all(type(record) is Record for record in records)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_both_codecs_write_the_same_bytes(compression: str) -> None:
    one, other = (encode_batch(ROWS, compression=compression, codec=c) for c in both_codecs())
    assert one == other


@codecs
def test_a_builder_counts_and_measures(codec: RecordCodec) -> None:
    builder = BatchBuilder(codec=codec)
    assert (builder.count, builder.size_bytes) == (0, 61)
    builder.append(START_MS, b"key", b"value")
    size = builder.size_bytes
    builder.append(START_MS, b"key", b"value", [("name", b"value")])
    assert builder.count == 2
    batch = builder.build(5, 6, 7)
    assert size < len(batch) == batch_header(batch).size
    header = batch_header(batch)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (5, 6, 7)
    assert (header.base_offset, header.leader_epoch, header.magic) == (0, -1, 2)


@codecs
@pytest.mark.parametrize(
    ("row", "error"),
    [
        ((-1, b"", b"", []), Misuse),
        ((2**63, b"", b"", []), Misuse),
        ((START_MS, b"", b"", [("h", b"")] * (limits.RECORD_HEADERS_MAX + 1)), MessageTooLarge),
        ((START_MS, "text", b"", []), TypeError),
        ((START_MS, b"", 5, []), TypeError),
        ((START_MS, b"", b"", [("\ud800", b"")]), UnicodeEncodeError),
    ],
)
def test_a_refused_record_leaves_the_batch_as_it_was(
    codec: RecordCodec, row: Any, error: type[Exception]
) -> None:
    builder = BatchBuilder(codec=codec)
    for wanted in ROWS[:3]:
        with pytest.raises(error):
            builder.append(*row)
        builder.append(*wanted)
        with pytest.raises(error):
            builder.extend([row])
    assert builder.count == 3
    assert rows_of(decode_batch(builder.build(), codec=codec)) == ROWS[:3]


def test_an_empty_batch_and_an_unknown_compression_are_refused() -> None:
    with pytest.raises(Misuse):
        encode_batch([])
    with pytest.raises(ConfigError):
        BatchBuilder(compression="brotli")


def test_a_full_batch_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS_MAX", 2)
    builder = BatchBuilder()
    builder.extend(ROWS[:2])
    with pytest.raises(Misuse):
        builder.append(*ROWS[2])


def test_a_batch_too_large_to_send_or_to_read_is_not_built() -> None:
    half = bytes(limits.BATCH_BYTES_MAX // 2)
    with pytest.raises(MessageTooLarge):
        encode_batch([(START_MS, None, half, [])] * 2)
    assert len(encode_batch([(START_MS, None, half, [])] * 2, compression="zstd")) < limits.KIB * 64
    with pytest.raises(MessageTooLarge):
        encode_batch([(START_MS, None, half, [])] * 9, compression="zstd")


def test_records_that_do_not_shrink_are_stored_as_they_are() -> None:
    noise = random.Random(4).randbytes(500)
    batch = encode_batch([(START_MS, None, noise, [])], compression="zstd")
    assert batch_header(batch).codec == 0
    assert decode_batch(batch)[0].value == noise


@codecs
def test_append_time_counts_for_every_record_of_its_batch(codec: RecordCodec) -> None:
    batch = with_field(with_field(BATCH, 35, ">q", 77), 21, ">h", 0x08)
    assert {record.timestamp_ms for record in decode_batch(batch, codec=codec)} == {77}


@codecs
def test_a_record_without_a_time_has_minus_one(codec: RecordCodec) -> None:
    batch = with_field(encode_batch([(START_MS, b"k", b"v", [])]), 27, ">q", -1)
    assert decode_batch(batch, codec=codec)[0].timestamp_ms == -1


@codecs
def test_gaps_that_compaction_leaves_are_read(codec: RecordCodec) -> None:
    # length 6, attributes, time +0, offset +4, no key, no value, no headers
    batch = with_field(with_body(b"\x0c\x00\x00\x08\x01\x01\x00"), 23, ">i", 9)
    assert [record.offset for record in decode_batch(batch, codec=codec)] == [4]
    empty = with_field(with_body(b"", count=0), 23, ">i", 9)
    assert decode_batch(empty, codec=codec) == []


@codecs
@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b"", 1),
        (b"\x0c\x00\x00\x00\x01\x01\x00", 2),  # one record, two claimed
        (b"\x0c\x00\x00\x00\x01\x01\x00" * 2, 1),  # bytes left over
        (b"\x0c\x00\x00\x00\x01\x01\x00" * 2, 2),  # the same offset twice
        (b"\x0c\x00\x00\x02\x01\x01\x00", 1),  # offset beyond the batch's last
        (b"\x0c\x00\x00\x01\x01\x01\x00", 1),  # offset -1
        (b"\x0e\x00\x00\x00\x01\x01\x00", 1),  # length is not the record's
        (b"\x0c\x00\x00\x00\x7e\x01\x00", 1),  # a key beyond the end
        (b"\x0c\x00\x00\x00\x01\x7e\x00", 1),  # a value beyond the end
        (b"\x0c\x00\x00\x00\x01\x01\x01", 1),  # -1 headers
        (b"\x0c\x00\x00\x00\x01\x01\x7e", 1),  # 63 headers, none there
        (b"\x10\x00\x00\x00\x01\x01\x02\x01\x01", 1),  # a header without a name
        (b"\x12\x00\x00\x00\x01\x01\x02\x02\xff\x01", 1),  # a name that is not UTF-8
        (b"\x0c\x00\x00\x00\x01\x01\x80", 1),  # a number that does not end
        (b"\x0c\x00\x00\x00\x01\x01\x02\x00\x81", 1),
        (b"\xff" * 11, 1),  # a number of more than 10 bytes
        (b"\x30\x00\x00\x00" + b"\xfe" + b"\xff" * 8 + b"\x01" + b"\x01\x00", 1),  # key of 2**63-1
        (b"\x0c\x00\x00\x00\x01" + b"\xf0" + b"\xff" * 8 + b"\x01" + bytes(60), 1),
    ],
)
def test_records_that_lie_about_themselves_are_corrupt(
    codec: RecordCodec, body: bytes, count: int
) -> None:
    with pytest.raises(CorruptRecord):
        decode_batch(with_body(body, count=count), codec=codec)


@pytest.mark.parametrize(
    "batch",
    [
        BATCH[:-1],
        BATCH[:-1] + b"?",
        with_field(BATCH, 16, ">b", 1),
        with_field(BATCH, 57, ">i", -1),
        with_field(BATCH, 57, ">i", limits.BATCH_RECORDS_MAX + 1),
        with_field(BATCH, 23, ">i", -1),
        with_field(BATCH, 0, ">q", -1),
        with_field(BATCH, 0, ">q", 2**63 - 2),
        with_field(BATCH, 21, ">h", 0x07),
    ],
)
def test_a_stored_batch_that_is_not_right_is_corrupt(batch: bytes) -> None:
    for codec in both_codecs():
        with pytest.raises(CorruptRecord):
            decode_batch(batch, codec=codec)


def test_a_claim_of_two_billion_offsets_costs_no_memory() -> None:
    batch = with_field(encode_batch(ROWS[:1]), 23, ">i", 2**31 - 1)
    assert len(decode_batch(batch)) == 1


# --- properties --------------------------------------------------------------------------------

texts = st.text(max_size=5)
nullable = st.none() | st.binary(max_size=100)
rows = st.lists(
    st.tuples(
        st.integers(min_value=0, max_value=2**62),
        nullable,
        nullable,
        st.lists(st.tuples(texts, nullable), max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@FIXED
@given(rows, st.sampled_from(COMPRESSIONS))
def test_what_one_codec_writes_the_other_reads(packed: list[batches.Row], compression: str) -> None:
    one, other = both_codecs()
    batch = encode_batch(packed, compression=compression, codec=one)
    assert batch == encode_batch(packed, compression=compression, codec=other)
    assert rows_of(decode_batch(batch, codec=one)) == packed
    assert rows_of(decode_batch(batch, codec=other)) == packed


@FIXED
@given(st.binary(max_size=80), st.integers(min_value=0, max_value=4))
def test_any_bytes_as_records_mean_the_same_to_both_codecs(body: bytes, count: int) -> None:
    batch = with_body(body, count=count)
    one, other = (decoded_or_corrupt(batch, codec) for codec in both_codecs())
    assert one == other


HOSTILE = [b"\xff" * 10, b"\xff" * 9 + b"\x01", b"\xfe" + b"\xff" * 8 + b"\x01", b"\x80", b"\x81"]


@pytest.mark.parametrize("seed", [20_261_123])  # so that a failure's name carries it
def test_damaged_batches_mean_the_same_to_both_codecs(seed: int) -> None:
    """Good batches, then bytes changed, cut, inserted or replaced by huge numbers; CRC mended."""
    rng = random.Random(seed)
    read = 0
    for _ in range(1_500):
        batch = bytearray(encode_batch(rng.choices(ROWS, k=rng.randrange(1, 4)), codec=_PURE))
        for _ in range(rng.randrange(1, 3)):
            _damage(batch, rng)
        one, other = (decoded_or_corrupt(mended(batch), codec) for codec in both_codecs())
        assert one == other, batch.hex()
        read += one is not None
    assert read > 50, "damage that always shows tests nothing"


_PURE = pure_codec()


def _damage(batch: bytearray, rng: random.Random) -> None:
    position = rng.randrange(61, len(batch) + 1)
    match rng.randrange(4):
        case 0:
            del batch[position:]
        case 1:
            batch[position : position + rng.randrange(3)] = rng.choice(HOSTILE)
        case 2:
            batch[position : position + 1] = bytes([rng.randrange(256)])
        case _:
            batch[27 + rng.randrange(16)] = rng.randrange(256)  # the timestamps


def test_the_codec_in_use_is_the_compiled_one() -> None:
    assert record_codec().name == "aiokafka"


@codecs
def test_rows_and_columns_pack_the_same_bytes_as_one_by_one(codec: RecordCodec) -> None:
    headers = [("aegis", b"s")]
    keys, values = [b"a", b"bb", b""], [b"1", b"", b"333"]
    one, rows, columns = (BatchBuilder(codec=codec) for _ in range(3))
    for builder in (one, rows, columns):
        builder.append(5, None, b"first")
    for key, value in zip(keys, values, strict=True):
        one.append(9, key, value, headers)
    rows.append_rows([(9, k, v, headers) for k, v in zip(keys, values, strict=True)])
    columns.append_columns(9, keys, values, headers)
    assert one.build(7, 1, 3) == rows.build(7, 1, 3) == columns.build(7, 1, 3)
    assert rows.count == columns.count == 4


def test_columns_are_refused_as_single_records_are() -> None:
    builder = BatchBuilder()
    with pytest.raises(Misuse):
        builder.append_columns(-1, [None], [b""])
    with pytest.raises(MessageTooLarge):
        builder.append_columns(0, [None], [b""], [("h", b"")] * 1_001)
    builder.append_columns(0, [], [])
    builder.append_rows([])
    assert builder.count == 0


def test_columns_carry_a_time_each_and_tombstones() -> None:
    columns, rows = BatchBuilder(), BatchBuilder()
    columns.append_columns([7, 5], [b"a", b"b"], [b"1", None], [])
    rows.append(7, b"a", b"1")
    rows.append(5, b"b", None)
    assert columns.build() == rows.build()
    with pytest.raises(Misuse):
        BatchBuilder().append_columns([5, -1], [b"a", b"b"], [b"1", b"2"])
