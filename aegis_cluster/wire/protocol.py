"""Requests and replies between processes: one msgpack part, then raw parts.

    request: [api, version, correlation, ms_left, fields…]   reply: [api, version, correlation,
    code, fields…]

The rules it protects: decoders accept or raise PeerViolation, nothing else, on any bytes, and
within bounded memory; nothing is ever unpickled. Fields are only appended from version to version,
so a reader ignores what stands behind those that it knows. An api or version that this process does
not know is not a violation but a refusal (`check_version`), because newer peers are welcome.
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgpack

from aegis_cluster import limits
from aegis_cluster.errors import PeerViolation, UnsupportedVersion, invariant

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL_VERSION: Final = 1

REQUEST_CONTROL_BYTES_MAX: Final = 1 * limits.MIB
"""The msgpack part of a request, which comes from strangers; replies may carry all metadata."""
ARRAY_ITEMS_MAX: Final = 16_384
"""One list or map. msgpack takes memory for items that a header only announces."""
FIELDS_DEPTH_MAX: Final = 16
TEXT_BYTES_MAX: Final = 64 * limits.KIB
NUMBER_MAX: Final = 2**63 - 1
IDENTITY_CHARS_MAX: Final = 128
_FIXED_FIELDS: Final = 4

invariant(limits.TOPIC_PARTITIONS_MAX <= ARRAY_ITEMS_MAX, "a topic's partitions fit one list")
invariant(REQUEST_CONTROL_BYTES_MAX <= limits.CONTROL_PART_BYTES_MAX, "a request fits a part")

Part: TypeAlias = bytes | memoryview
"""A raw part: bytes, or what ZeroMQ received without a copy."""


@unique
class Api(IntEnum):
    """What can be asked of a shard; numbers keep their meaning for ever."""

    HELLO = 0
    METADATA = 1
    CREATE_TOPIC = 2
    DELETE_TOPIC = 3
    INIT_PRODUCER = 4
    PRODUCE = 5
    FETCH = 6
    LIST_OFFSETS = 7
    STATUS = 8
    STEP_DOWN = 9
    REGISTER_NODE = 10
    PRODUCER_IDS = 11
    RAFT = 12
    COPY_LOG = 13
    ALTER_TOPIC = 14
    COPY_SNAPSHOT = 15
    DISK_STATE = 16
    INTERNAL_TOPIC = 30
    GROUP_BEAT = 31
    GROUP_LEAVE = 32
    GROUP_COMMIT = 33
    GROUP_OFFSETS = 34
    GROUP_DESCRIBE = 35
    GROUP_LIST = 36
    GROUP_DELETE = 37

    TRANSACTION_INIT = 100
    TRANSACTION_JOIN = 101
    TRANSACTION_END = 102
    TRANSACTION_DESCRIBE = 103
    TRANSACTION_LIST = 104
    TRANSACTION_ABORT = 105
    WRITE_MARKERS = 106
    VERIFY_TRANSACTION = 107

    CLUSTER_VIEW = 40
    LEASE = 41

    FEED_FENCE = 60
    FEED_APPEND = 61
    FEED_READ = 62

    EVENT_APPEND = 70
    EVENT_READ = 71

    SUBSCRIPTION_OPEN = 80
    SUBSCRIPTION_POLL = 81
    SUBSCRIPTION_REPORT = 82
    SUBSCRIPTION_SETTLE = 83
    SUBSCRIPTION_LEAVE = 85
    SUBSCRIPTION_DESCRIBE = 86
    SUBSCRIPTION_LIST = 87
    SUBSCRIPTION_PARKED = 88
    SUBSCRIPTION_REPLAY = 89
    SUBSCRIPTION_DELETE = 90
    SUBSCRIPTION_BURY = 91
    SUBSCRIPTION_RESET = 92
    # 84 was used before the first release; it stays free.


class Acks(IntEnum):
    """When a batch is acknowledged; numbers keep their meaning for ever."""

    NONE = 0
    """Once it has its place in the leader's memory: the client does not wait for the answer."""
    LEADER = 1
    """Once it is synced to the leader's own disk; another leader may still not have it."""
    QUORUM = 2
    """Once it is synced on a majority: it is committed."""


class Isolation(IntEnum):
    """What a reader sees of transactions; numbers keep their meaning for ever, and are Kafka's."""

    UNCOMMITTED = 0
    """Everything below the high watermark, aborted records included."""
    COMMITTED = 1
    """Only what is committed, and so nothing beyond the start of an open transaction."""


API_VERSIONS: Final[dict[int, tuple[int, int]]] = {api.value: (1, 1) for api in Api}
"""Lowest and highest version of every api that this process speaks."""
API_VERSION: Final = 1
"""The version that encoders write unless told otherwise."""
_APIS: Final = {api.value: api for api in Api}


class Request(NamedTuple):
    """One request; `api` may be a number that `Api` does not have."""

    api: int
    version: int
    correlation: int
    ms_left: int
    """Until the asker gives up; what is older is not worth doing."""
    fields: list[Any]
    parts: list[Part]


class Reply(NamedTuple):
    """One reply; `code` 0 is success, the rest is in `codes`."""

    api: int
    version: int
    correlation: int
    code: int
    fields: list[Any]
    parts: list[Part]


def encode_request(
    api: int,
    fields: Sequence[Any] = (),
    parts: Sequence[Part] = (),
    *,
    correlation: int,
    ms_left: int,
    version: int = API_VERSION,
) -> list[Part]:
    """The parts of one ZeroMQ message."""
    return [msgpack.packb([int(api), version, correlation, ms_left, *fields]), *parts]


def encode_reply(
    api: int,
    fields: Sequence[Any] = (),
    parts: Sequence[Part] = (),
    *,
    correlation: int,
    code: int = 0,
    version: int = API_VERSION,
) -> list[Part]:
    """The parts of one ZeroMQ message."""
    return [msgpack.packb([int(api), version, correlation, int(code), *fields]), *parts]


def decode_request(message: Sequence[Part]) -> Request:
    """A request from its parts, or PeerViolation."""
    fields = _decode_message(message, REQUEST_CONTROL_BYTES_MAX)
    api, version, correlation, ms_left = fields[:_FIXED_FIELDS]
    return Request(api, version, correlation, ms_left, fields[_FIXED_FIELDS:], list(message[1:]))


def decode_reply(message: Sequence[Part]) -> Reply:
    """A reply from its parts, or PeerViolation."""
    fields = _decode_message(message, limits.CONTROL_PART_BYTES_MAX)
    api, version, correlation, code = fields[:_FIXED_FIELDS]
    return Reply(api, version, correlation, code, fields[_FIXED_FIELDS:], list(message[1:]))


def check_version(request: Request) -> Api:
    """The api of a request that this process can serve, or the refusal to send back."""
    spoken = API_VERSIONS.get(request.api)
    if spoken is None:
        raise UnsupportedVersion(
            f"There is no api {request.api} here. Run the same version of aegis-cluster on both"
            " sides.",
            api=request.api,
        )
    lowest, highest = spoken
    if not lowest <= request.version <= highest:
        raise UnsupportedVersion(
            f"Api {Api(request.api).name} is spoken in versions {lowest} to {highest} here, and"
            f" not in {request.version}. Run the same version of aegis-cluster on both sides.",
            api=request.api,
            have=request.version,
            lowest=lowest,
            highest=highest,
        )
    return _APIS[request.api]


def _decode_message(message: Sequence[Part], control_bytes_max: int) -> list[Any]:
    if not 1 <= len(message) <= limits.REQUEST_PARTS_MAX + 1:
        raise PeerViolation(
            f"A message has {len(message)} parts; {limits.REQUEST_PARTS_MAX + 1} are possible.",
            have=len(message),
        )
    size = sum(map(len, message))
    if size > limits.REQUEST_BYTES_MAX:
        raise PeerViolation(
            f"A message has {size} bytes; at most {limits.REQUEST_BYTES_MAX} are possible.",
            have=size,
            at_most=limits.REQUEST_BYTES_MAX,
        )
    fields = decode_fields(message[0], control_bytes_max)
    if len(fields) < _FIXED_FIELDS:
        raise PeerViolation(
            f"A message begins with {_FIXED_FIELDS} fields; this one has {len(fields)}.",
            have=len(fields),
        )
    for number in fields[:_FIXED_FIELDS]:
        if type(number) is not int or not 0 <= number <= NUMBER_MAX:
            raise PeerViolation(
                "The first four fields of a message are numbers from 0 on; here they are not."
            )
    return fields


# --- msgpack, with limits ----------------------------------------------------------------------

_SCALARS: Final = frozenset({int, str, bytes, bool, float, type(None)})
_DECODE_FAILURES: Final = (
    ValueError,  # also what msgpack raises for garbage, trailing bytes and text that is not UTF-8
    msgpack.exceptions.UnpackException,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
)


def encode_fields(fields: Sequence[Any]) -> bytes:
    """A list of fields as one msgpack part."""
    return bytes(msgpack.packb(list(fields)))


def decode_fields(part: Part, bytes_max: int = limits.CONTROL_PART_BYTES_MAX) -> list[Any]:
    """The list in one msgpack part: bounded in bytes, items and nesting, and of plain types."""
    if len(part) > bytes_max:
        raise PeerViolation(
            f"A msgpack part has {len(part)} bytes; at most {bytes_max} are possible.",
            have=len(part),
            at_most=bytes_max,
        )
    try:
        fields = msgpack.unpackb(
            part, max_array_len=ARRAY_ITEMS_MAX, max_map_len=ARRAY_ITEMS_MAX, max_ext_len=0
        )
    except _DECODE_FAILURES as cause:
        raise PeerViolation(
            f"A part is not msgpack within our limits: {cause}.", cause=str(cause)
        ) from cause
    if type(fields) is not list:
        raise PeerViolation(
            f"A msgpack part is a list; this one is {type(fields).__name__}.",
            have=type(fields).__name__,
        )
    _check_nesting(fields)
    return fields


def _check_nesting(fields: list[Any]) -> None:
    """Level by level, so that the check itself has no depth."""
    level: list[Any] = [item for item in fields if type(item) not in _SCALARS]
    depth = 1
    while level:
        depth += 1
        if depth > FIELDS_DEPTH_MAX:
            raise PeerViolation(
                f"Fields are nested deeper than {FIELDS_DEPTH_MAX} levels.",
                at_most=FIELDS_DEPTH_MAX,
            )
        level = [
            item
            for container in level
            for item in (container if type(container) is list else _values_of(container))
            if type(item) not in _SCALARS
        ]


def _values_of(container: Any) -> Any:
    kind = type(container)
    if kind is dict:
        return container.values()
    raise PeerViolation(f"A field is of a type that we never send, {kind.__name__}.")


# --- fields, for handlers ----------------------------------------------------------------------


def take(fields: Sequence[Any], index: int, name: str) -> Any:
    """The field at `index`, of any type; PeerViolation where there is none."""
    if index < len(fields):
        return fields[index]
    raise PeerViolation(f"The field {name!r} is missing.", have=len(fields), want=index + 1)


def take_int(
    fields: Sequence[Any], index: int, name: str, *, low: int = 0, high: int = NUMBER_MAX
) -> int:
    """A whole number within bounds (a bool is none)."""
    value = take(fields, index, name)
    if type(value) is int and low <= value <= high:
        return value
    raise _wrong(name, value, f"a number from {low} to {high}")


def take_str(
    fields: Sequence[Any], index: int, name: str, *, chars_max: int = TEXT_BYTES_MAX
) -> str:
    """Text of bounded length."""
    value = take(fields, index, name)
    if type(value) is str and len(value) <= chars_max:
        return value
    raise _wrong(name, value, f"text of at most {chars_max} characters")


def take_bytes(
    fields: Sequence[Any], index: int, name: str, *, bytes_max: int = TEXT_BYTES_MAX
) -> bytes:
    """Bytes of bounded length."""
    value = take(fields, index, name)
    if type(value) is bytes and len(value) <= bytes_max:
        return value
    raise _wrong(name, value, f"at most {bytes_max} bytes")


def take_bool(fields: Sequence[Any], index: int, name: str) -> bool:
    """True or False, not 0 or 1."""
    value = take(fields, index, name)
    if type(value) is bool:
        return value
    raise _wrong(name, value, "true or false")


def take_list(
    fields: Sequence[Any], index: int, name: str, *, items_max: int = ARRAY_ITEMS_MAX
) -> list[Any]:
    """A list of bounded length; its items are the caller's to check."""
    value = take(fields, index, name)
    if type(value) is list and len(value) <= items_max:
        return value
    raise _wrong(name, value, f"a list of at most {items_max}")


def take_map(
    fields: Sequence[Any], index: int, name: str, *, items_max: int = ARRAY_ITEMS_MAX
) -> dict[str, Any]:
    """A map with text for keys, of bounded length."""
    value = take(fields, index, name)
    if type(value) is dict and len(value) <= items_max and all(type(k) is str for k in value):
        return value
    raise _wrong(name, value, f"a map of at most {items_max}, keys of text")


def is_none(fields: Sequence[Any], index: int, name: str) -> bool:
    """Whether an optional field is left empty; ask before taking it."""
    return take(fields, index, name) is None


def take_part(parts: Sequence[Part], index: int, name: str) -> Part:
    """The raw part at `index`; PeerViolation where there is none."""
    if 0 <= index < len(parts):
        return parts[index]
    raise PeerViolation(f"The raw part {name!r} is missing.", have=len(parts), want=index + 1)


def _wrong(name: str, value: Any, want: str) -> PeerViolation:
    return PeerViolation(f"The field {name!r} is not {want}.", have=repr(value)[:80])


# --- hello -------------------------------------------------------------------------------------

ROLES: Final = frozenset({"client", "peer"})


class Hello(NamedTuple):
    """The first request on every link: who is there, and in which life."""

    protocol_version: int
    role: str
    """`client` or `peer`."""
    cluster_id: str
    """Empty: a client that does not know yet."""
    node: int
    """0 for a client."""
    incarnation: str
    boot_id: str
    """One start of one process; links use it, Raft never does."""
    shard: int

    def to_fields(self) -> list[Any]:
        """As the fields of a HELLO request or reply."""
        return list(self)

    @classmethod
    def from_fields(cls, fields: Sequence[Any]) -> Hello:
        """From fields, of any protocol version (they are only ever appended to)."""
        role = take_str(fields, 1, "role", chars_max=IDENTITY_CHARS_MAX)
        if role not in ROLES:
            raise PeerViolation(
                f"A hello names the role {role!r}; there are client and peer.", have=role
            )
        return cls(
            protocol_version=take_int(fields, 0, "protocol_version"),
            role=role,
            cluster_id=take_str(fields, 2, "cluster_id", chars_max=IDENTITY_CHARS_MAX),
            node=take_int(fields, 3, "node"),
            incarnation=take_str(fields, 4, "incarnation", chars_max=IDENTITY_CHARS_MAX),
            boot_id=take_str(fields, 5, "boot_id", chars_max=IDENTITY_CHARS_MAX),
            shard=take_int(fields, 6, "shard"),
        )


def check_protocol(hello: Hello) -> None:
    """Refuse a link whose other end speaks another protocol."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise UnsupportedVersion(
            f"The other side speaks version {hello.protocol_version} of the protocol, this one"
            f" {PROTOCOL_VERSION}. Run the same version of aegis-cluster on both.",
            have=hello.protocol_version,
            want=PROTOCOL_VERSION,
        )
