"""Keys and payloads: equal on both sides, or refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.errors import CorruptRecord, MessageTooLarge, UnsupportedPayload
from aegis_cluster.wire.payload import (
    KEY_HEADER,
    PAYLOAD_HEADER,
    RESERVED_HEADERS,
    Payload,
    decode_key,
    decode_payload,
    encode_key,
    encode_payload,
)
from tests.wire.samples import FIXED


class Colour(IntEnum):
    RED = 1


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def typed(value: Any) -> Any:
    """The value with its types, since 1 == 1.0 == True."""
    if type(value) is list:
        return [typed(item) for item in value]
    if type(value) is dict:
        return {key: typed(item) for key, item in value.items()}
    return type(value), repr(value)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**80), max_value=2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)


@FIXED
@given(json_like | st.binary(max_size=20))
def test_a_payload_comes_back_equal_with_its_types(value: Payload) -> None:
    data, headers = encode_payload(value)
    assert typed(decode_payload(data, headers)) == typed(value)


@FIXED
@given(st.none() | st.text(max_size=20) | st.binary(max_size=20))
def test_a_key_comes_back_equal(key: str | bytes | None) -> None:
    data, headers = encode_key(key)
    returned = decode_key(data, headers)
    assert (type(returned), returned) == (type(key), key)


@pytest.mark.parametrize(
    ("value", "data", "marker"),
    [
        (None, None, None),
        (b"raw", b"raw", None),
        ("grüße", "grüße".encode(), b"s"),
        ({"a": [1, "ü"]}, '{"a":[1,"ü"]}'.encode(), b"j"),
        (5, b"5", b"j"),
    ],
)
def test_kafka_clients_read_them_naturally(value: Payload, data: bytes, marker: bytes) -> None:
    assert encode_payload(value) == (data, [(PAYLOAD_HEADER, marker)] if marker else [])


def test_text_and_bytes_of_one_key_land_together_and_come_back_apart() -> None:
    assert encode_key("order-1") == (b"order-1", [])
    assert encode_key(b"order-1") == (b"order-1", [(KEY_HEADER, b"b")])
    assert {PAYLOAD_HEADER, KEY_HEADER} == RESERVED_HEADERS


loop: list[Any] = []
loop.append(loop)
wide: list[Any] = []
for _ in range(60):
    wide = [wide, wide]


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        [(1, 2)],
        {"a": (1,)},
        {1: "a"},
        {None: "a"},
        {b"a": 1},
        [b"bytes inside"],
        {1, 2},
        bytearray(b"x"),
        math.nan,
        math.inf,
        [-math.inf],
        OrderedDict(a=1),
        Colour.RED,
        2**1024,
        {"a": -(2**1024)},
        "\ud800",
        ["\udfff"],
        {"\ud83d\ude00": 1},
        nested(limits.PAYLOAD_DEPTH_MAX + 1),
        loop,
        object(),
    ],
    ids=range(22),
)
def test_what_could_not_come_back_equal_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedPayload):
        encode_payload(value)


def test_nesting_up_to_the_limit_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    value = nested(limits.PAYLOAD_DEPTH_MAX)
    assert decode_payload(*encode_payload(value)) == value


def test_a_payload_that_repeats_itself_without_end_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MESSAGE_BYTES_MAX", 10_000)
    with pytest.raises(MessageTooLarge):
        encode_payload(wide)


@pytest.mark.parametrize("key", [5, 1.5, ("a",), bytearray(b"a"), Colour.RED])
def test_a_key_of_another_type_is_refused(key: Any) -> None:
    with pytest.raises(UnsupportedPayload):
        encode_key(key)


def test_half_a_surrogate_pair_is_no_key() -> None:
    with pytest.raises(UnsupportedPayload):
        encode_key("\ud800")


@pytest.mark.parametrize(
    ("data", "marker"),
    [
        (b"\xff", b"s"),
        (b"\xff", b"j"),
        (b"{", b"j"),
        (b"", b"j"),
        (b"NaN", b"j"),
        (b"-Infinity", b"j"),
        (b"1 2", b"j"),
        (b"[" * 100_000, b"j"),
        (b"[" * 65 + b"]" * 65, b"j"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, b"j"),
        (b"9" * 5_000, b"j"),
        (b"x", b"?"),
        (b"x", b""),
        (b"x", None),
    ],
    ids=range(14),
)
def test_a_payload_that_does_not_decode_is_corrupt(data: bytes, marker: bytes | None) -> None:
    with pytest.raises(CorruptRecord):
        decode_payload(data, [("other", b""), (PAYLOAD_HEADER, marker)])


def test_many_brackets_without_depth_are_read() -> None:
    value: Payload = [[] for _ in range(200)]
    assert decode_payload(*encode_payload(value)) == value
    assert decode_payload(*encode_payload(["[" * 200])) == ["[" * 200]


@FIXED
@given(st.binary(max_size=40), st.sampled_from([b"s", b"j", b"x", None]))
def test_any_bytes_are_a_payload_or_corrupt(data: bytes, marker: bytes | None) -> None:
    try:
        decode_payload(data, [(PAYLOAD_HEADER, marker)])
    except CorruptRecord:
        return


def test_what_kafka_clients_wrote_comes_back_as_bytes_or_text() -> None:
    assert decode_payload(b"plain", [("source", b"web")]) == b"plain"
    assert decode_payload(None, [(PAYLOAD_HEADER, b"j")]) is None
    assert decode_key(b"text", []) == "text"
    assert decode_key(b"\xff\xfe", []) == b"\xff\xfe"
    assert decode_key(None, [(KEY_HEADER, b"b")]) is None
    with pytest.raises(CorruptRecord):
        decode_key(b"x", [(KEY_HEADER, b"?")])
