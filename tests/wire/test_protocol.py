"""Messages: whatever arrives is a message or a PeerViolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import limits
from aegis_cluster.errors import PeerViolation, UnsupportedVersion
from aegis_cluster.wire import protocol
from aegis_cluster.wire.protocol import (
    API_VERSIONS,
    PROTOCOL_VERSION,
    Api,
    Hello,
    Reply,
    Request,
    check_protocol,
    check_version,
    decode_fields,
    decode_reply,
    decode_request,
    encode_fields,
    encode_reply,
    encode_request,
)
from tests.wire.samples import FIXED

if TYPE_CHECKING:
    from collections.abc import Callable

HELLO = Hello(PROTOCOL_VERSION, "client", "", 0, "", "boot-1", 0)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63), max_value=2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
numbers = st.integers(min_value=0, max_value=2**63 - 1)
part_lists = st.lists(st.binary(max_size=20), max_size=3)


@FIXED
@given(numbers, numbers, numbers, numbers, st.lists(values, max_size=4), part_lists)
def test_messages_come_back_equal(
    api: int, version: int, correlation: int, fourth: int, fields: list[Any], parts: list[bytes]
) -> None:
    request = encode_request(
        api, fields, parts, correlation=correlation, ms_left=fourth, version=version
    )
    assert decode_request(request) == Request(api, version, correlation, fourth, fields, [*parts])
    reply = encode_reply(api, fields, parts, correlation=correlation, code=fourth, version=version)
    assert decode_reply(reply) == Reply(api, version, correlation, fourth, fields, [*parts])


@FIXED
@given(st.lists(st.binary(max_size=60), max_size=3))
def test_any_bytes_are_a_message_or_a_violation(message: list[bytes]) -> None:
    for decode in (decode_request, decode_reply):
        try:
            decode(message)
        except PeerViolation:
            continue


@FIXED
@given(st.lists(values, max_size=5), st.data())
def test_damaged_messages_are_a_message_or_a_violation(fields: list[Any], data: Any) -> None:
    part = bytearray(encode_request(5, fields, correlation=1, ms_left=2)[0])
    position = data.draw(st.integers(min_value=0, max_value=len(part) - 1))
    part[position : position + 1] = data.draw(st.binary(max_size=3))
    try:
        request = decode_request([bytes(part)])
        Hello.from_fields(request.fields)
    except PeerViolation:
        return


def nested(depth: int) -> bytes:
    """A list in a list …, `depth` lists in all."""
    return b"\x91" * (depth - 1) + b"\x90"


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"\xc1",
        b"\x90",  # too few fields
        b"\x93\x01\x01\x01",
        msgpack.packb({"api": 1}),
        msgpack.packb("text"),
        msgpack.packb([1, 1, 1, 1]) + b"\x00",  # bytes left over
        msgpack.packb([1, 1, 1, -1]),
        msgpack.packb([True, 1, 1, 1]),
        msgpack.packb([1.0, 1, 1, 1]),
        msgpack.packb([2**63, 1, 1, 1]),
        msgpack.packb([1, 1, 1, 1, {2: 3}]),
        msgpack.packb([1, 1, 1, 1, msgpack.ExtType(4, b"data")]),
        msgpack.packb([1, 1, 1, 1, msgpack.Timestamp(5)]),
        msgpack.packb([1, 1, 1, 1, [0] * (protocol.ARRAY_ITEMS_MAX + 1)]),
        b"\x95\x01\x01\x01\x01\xa1\xff",  # text that is not UTF-8
        b"\xdd\xff\xff\xff\xff",  # 2**32 - 1 items announced
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdc\x40\x00" * 600,  # lists in lists, each announcing thousands
        nested(2_000),
        b"\x95\x01\x01\x01\x01" + nested(protocol.FIELDS_DEPTH_MAX),
    ],
    ids=range(22),
)
def test_what_is_not_a_message_is_a_violation(part: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(PeerViolation):
            decode([part])


def test_nesting_up_to_the_limit_is_read() -> None:
    part = b"\x95\x01\x01\x01\x01" + nested(protocol.FIELDS_DEPTH_MAX - 1)
    assert decode_request([part]).api == 1


def test_messages_are_bounded_in_parts_and_bytes() -> None:
    first = encode_request(1, correlation=1, ms_left=1)
    decode_request(first + [b""] * limits.REQUEST_PARTS_MAX)
    for message in (
        [],
        first + [b""] * (limits.REQUEST_PARTS_MAX + 1),
        [*first, bytes(limits.REQUEST_BYTES_MAX)],
        [msgpack.packb([1, 1, 1, 1, bytes(protocol.REQUEST_CONTROL_BYTES_MAX)])],
    ):
        with pytest.raises(PeerViolation):
            decode_request(message)


def test_a_reply_may_be_larger_than_a_request() -> None:
    data = bytes(protocol.REQUEST_CONTROL_BYTES_MAX)
    assert decode_reply(encode_reply(1, [data], correlation=1)).fields == [data]
    with pytest.raises(PeerViolation):
        decode_reply(encode_reply(1, [bytes(limits.CONTROL_PART_BYTES_MAX)], correlation=1))


def test_parts_of_zeromq_may_be_memoryviews() -> None:
    message = [
        memoryview(part) for part in encode_request(6, ["a"], [b"x"], correlation=1, ms_left=1)
    ]
    request = decode_request(message)
    assert (request.fields, bytes(request.parts[0])) == (["a"], b"x")


def test_fields_alone_come_back_equal() -> None:
    assert decode_fields(encode_fields([1, ("a", b"b")])) == [1, ["a", b"b"]]


# --- versions ----------------------------------------------------------------------------------


def request_of(api: int, version: int) -> Request:
    return decode_request(encode_request(api, correlation=1, ms_left=1, version=version))


def test_every_api_has_a_version_and_is_served_in_it() -> None:
    assert set(API_VERSIONS) == set(Api)
    for api, (lowest, highest) in API_VERSIONS.items():
        assert 1 <= lowest <= highest
        for version in range(lowest, highest + 1):
            assert check_version(request_of(api, version)) is Api(api)


@pytest.mark.parametrize(
    ("api", "version"), [(999, 1), (Api.FETCH, 0), (Api.FETCH, 2), (2**63 - 1, 1)]
)
def test_what_a_newer_peer_asks_is_refused_not_a_violation(api: int, version: int) -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        check_version(request_of(api, version))
    assert caught.value.details["api"] == api


def test_api_numbers_are_for_ever() -> None:
    names = (
        "HELLO METADATA CREATE_TOPIC DELETE_TOPIC INIT_PRODUCER PRODUCE FETCH LIST_OFFSETS STATUS "
        "STEP_DOWN REGISTER_NODE PRODUCER_IDS RAFT COPY_LOG ALTER_TOPIC COPY_SNAPSHOT DISK_STATE"
    )
    groups = (
        "INTERNAL_TOPIC GROUP_BEAT GROUP_LEAVE GROUP_COMMIT GROUP_OFFSETS GROUP_DESCRIBE GROUP_LIST"
        " GROUP_DELETE"
    )
    first = {name: number for number, name in enumerate(names.split())}
    later = {name: 30 + number for number, name in enumerate(groups.split())}
    later |= {"CLUSTER_VIEW": 40, "LEASE": 41}
    later |= {"FEED_FENCE": 60, "FEED_APPEND": 61, "FEED_READ": 62}
    later |= {"EVENT_APPEND": 70, "EVENT_READ": 71}
    subscriptions = "OPEN POLL REPORT SETTLE - LEAVE DESCRIBE LIST PARKED REPLAY DELETE BURY RESET"
    later |= {
        f"SUBSCRIPTION_{name}": 80 + at
        for at, name in enumerate(subscriptions.split())
        if name != "-"  # was used once, and stays free
    }
    transactions = "INIT JOIN END DESCRIBE LIST ABORT"
    later |= {f"TRANSACTION_{name}": 100 + at for at, name in enumerate(transactions.split())}
    later |= {"WRITE_MARKERS": 106, "VERIFY_TRANSACTION": 107}
    assert {api.name: api.value for api in Api} == first | later


# --- hello -------------------------------------------------------------------------------------


def test_a_hello_comes_back_equal_and_may_be_longer_one_day() -> None:
    assert Hello.from_fields(HELLO.to_fields()) == HELLO
    assert Hello.from_fields([*HELLO.to_fields(), "new"]) == HELLO


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, "1"),
        (0, -1),
        (1, "king"),
        (1, None),
        (2, 5),
        (3, True),
        (4, "x" * 129),
        (5, b""),
        (6, 1.0),
    ],
)
def test_a_hello_with_a_wrong_field_is_a_violation(position: int, value: Any) -> None:
    fields = HELLO.to_fields()
    fields[position] = value
    with pytest.raises(PeerViolation):
        Hello.from_fields(fields)


def test_a_short_hello_is_a_violation() -> None:
    for count in range(len(HELLO)):
        with pytest.raises(PeerViolation, match="missing"):
            Hello.from_fields(HELLO.to_fields()[:count])


def test_another_protocol_is_refused() -> None:
    check_protocol(HELLO)
    with pytest.raises(UnsupportedVersion):
        check_protocol(HELLO._replace(protocol_version=PROTOCOL_VERSION + 1))


# --- accessors ---------------------------------------------------------------------------------

FIELDS: list[Any] = [5, "text", b"bytes", True, [1, 2], {"a": 1}, None, 1.5]
TAKERS: list[tuple[Callable[..., Any], set[int]]] = [
    (protocol.take_int, {0}),
    (protocol.take_str, {1}),
    (protocol.take_bytes, {2}),
    (protocol.take_bool, {3}),
    (protocol.take_list, {4}),
    (protocol.take_map, {5}),
    (protocol.take, set(range(len(FIELDS)))),
]


@pytest.mark.parametrize(("taker", "right"), TAKERS)
def test_an_accessor_takes_its_own_type_and_no_other(
    taker: Callable[..., Any], right: set[int]
) -> None:
    for index, value in enumerate(FIELDS):
        if index in right:
            assert taker(FIELDS, index, "name") == value
        else:
            with pytest.raises(PeerViolation, match="field 'name'"):
                taker(FIELDS, index, "name")
    with pytest.raises(PeerViolation, match="missing"):
        taker(FIELDS, len(FIELDS), "name")


def test_accessors_know_bounds() -> None:
    for taken in (
        lambda: protocol.take_int([5], 0, "n", high=4),
        lambda: protocol.take_int([5], 0, "n", low=6),
        lambda: protocol.take_int([-1], 0, "n"),
        lambda: protocol.take_str(["abc"], 0, "n", chars_max=2),
        lambda: protocol.take_bytes([b"abc"], 0, "n", bytes_max=2),
        lambda: protocol.take_list([[1, 2]], 0, "n", items_max=1),
        lambda: protocol.take_map([{"a": 1}], 0, "n", items_max=0),
        lambda: protocol.take_map([{b"a": 1}], 0, "n"),
        lambda: protocol.take_part([], 0, "n"),
        lambda: protocol.take_part([b""], -1, "n"),
    ):
        with pytest.raises(PeerViolation):
            taken()
    assert protocol.take_int([-1], 0, "n", low=-1) == -1
    assert protocol.take_part([b"x"], 0, "n") == b"x"


def test_an_optional_field_is_asked_for_first() -> None:
    assert protocol.is_none([None], 0, "name")
    assert not protocol.is_none([0], 0, "name")
