"""Keys and payloads: Python values to bytes and back, equal.

The idea (DESIGN §5): bytes travel bare; text and JSON-like values travel as UTF-8 and JSON, with
one record header that says so, so that Kafka clients read them naturally and ours get equal values
back.
The rule it protects: what could not come back equal (a tuple, a key that is not a string, NaN) is
refused before it is sent, never changed in silence.

JSON is written and read by msgspec, in a fifth of the time of Python's own module; that one
decides wherever msgspec refuses, or might have changed something (NaN becomes null).
"""

from __future__ import annotations

import json
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from aegis_cluster import limits
from aegis_cluster.errors import CorruptRecord, MessageTooLarge, UnsupportedPayload

if TYPE_CHECKING:
    from collections.abc import Sequence

Payload: TypeAlias = "bytes | str | int | float | bool | list[Any] | dict[str, Any] | None"
Header: TypeAlias = tuple[str, bytes | None]

PAYLOAD_HEADER: Final = "aegis"
KEY_HEADER: Final = "aegis-key"
RESERVED_HEADERS: Final = frozenset({PAYLOAD_HEADER, KEY_HEADER})
"""Names that users may not give to headers of their own."""

INTEGER_BITS_MAX: Final = 1_024
"""JSON has no limit of its own; Python refuses to read digits without end."""

_TEXT: Final = b"s"
_JSON: Final = b"j"
_BYTES_KEY: Final = b"b"
_PLAIN_TYPES: Final = frozenset({str, bool, type(None)})
_FLAT_TYPES: Final = _PLAIN_TYPES | {int, float}
_INTEGER_USUAL: Final = 2**63
_NULL: Final = b"null"

_JSON_ONLY: Final = [(PAYLOAD_HEADER, _JSON)]

_WRITE: Final = msgspec.json.Encoder().encode
_READ: Final = msgspec.json.Decoder().decode
_encode_json: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


def encode_payload(value: Payload) -> tuple[bytes | None, list[Header]]:
    """Bytes of a payload, and the record header that tells how to read them."""
    if value is None:
        return None, []
    kind = type(value)
    if kind is bytes:
        return value, []  # type: ignore[return-value]  # narrowed by `kind`
    if kind is str:
        return _utf8(value, "payload"), [(PAYLOAD_HEADER, _TEXT)]  # type: ignore[arg-type]
    return _json_of(value), [(PAYLOAD_HEADER, _JSON)]


def _json_of(value: Any) -> bytes:
    """Raises `UnsupportedPayload`, `MessageTooLarge`."""
    is_flat = type(value) is dict and _is_flat(value)
    if not is_flat:
        _refuse_unequal(value)
    try:
        data = _WRITE(value)
    except (ValueError, RecursionError):  # half a surrogate pair, mostly
        return _slowly(value)
    if not is_flat and _NULL in data:
        return _slowly(value)  # which tells NaN from None
    return data


def _is_flat(value: dict[Any, Any]) -> bool:
    """Text to plain values of usual size, as most records are: nothing in it could be changed."""
    for key, item in value.items():
        kind = type(item)
        if type(key) is not str or kind not in _FLAT_TYPES:
            return False
        if kind is float and not isfinite(item):
            return False
        if kind is int and not -_INTEGER_USUAL < item < _INTEGER_USUAL:
            return False
    return True


def _slowly(value: Any) -> bytes:
    try:
        text = _encode_json(value)
    except ValueError as cause:
        raise UnsupportedPayload(
            "NaN and infinities are not JSON; publish text or None in their place."
        ) from cause
    return _utf8(text, "payload")


def encode_payloads(values: Sequence[Any]) -> tuple[Sequence[bytes], list[Header]] | None:
    """Many payloads that have one header in common, in one pass; None where they do not, or where
    one of them cannot be encoded: `encode_payload` then says which, and why.
    """
    kinds = set(map(type, values))
    if kinds == {bytes}:
        return values, []
    if kinds == {str}:
        try:
            return list(map(str.encode, values)), [(PAYLOAD_HEADER, _TEXT)]
        except UnicodeEncodeError:
            return None
    if not kinds or kinds & {bytes, str, type(None)}:
        return None
    try:
        encoded = list(map(_json_of, values))
    except (UnsupportedPayload, MessageTooLarge):
        return None
    return encoded, [(PAYLOAD_HEADER, _JSON)]


def encode_keys(keys: Sequence[Any]) -> Sequence[bytes] | None:
    """Many keys that are all text, in one pass; None where `encode_key` has to look at each."""
    if set(map(type, keys)) != {str}:
        return None
    try:
        return list(map(str.encode, keys))
    except UnicodeEncodeError:
        return None


def decode_payload(value: bytes | None, headers: Sequence[Header]) -> Payload:
    """The value that went in; bytes as they are where no header of ours tells more."""
    if value is None:
        return None
    for name, marker in headers:
        if name == PAYLOAD_HEADER:
            return _decode_marked(value, marker)
    return value


def decode_payloads(values: Sequence[bytes | None], headers: Sequence[Any]) -> list[Any]:
    """As `decode_payload` for each; in one pass where all are JSON and have no other header."""
    if headers.count(_JSON_ONLY) == len(headers) and None not in values:
        try:
            return list(map(_decode_json, values))  # type: ignore[arg-type]  # just looked
        except (ValueError, RecursionError) as cause:
            raise CorruptRecord("a payload is not what its header says", have=_JSON) from cause
    return list(map(decode_payload, values, headers))


def decode_keys(keys: Sequence[bytes | None], headers: Sequence[Any]) -> list[Any]:
    """As `decode_key` for each."""
    if headers.count(_JSON_ONLY) == len(headers) and None not in keys:
        try:
            return list(map(bytes.decode, keys))  # type: ignore[arg-type]  # just looked
        except UnicodeDecodeError:
            pass  # some are bytes that a Kafka client wrote
    return list(map(decode_key, keys, headers))


def encode_key(key: str | bytes | None) -> tuple[bytes | None, list[Header]]:
    """Bytes of a key, which choose its partition, and a record header for keys of bytes."""
    if key is None:
        return None, []
    if type(key) is str:
        return _utf8(key, "key"), []
    if type(key) is bytes:
        return key, [(KEY_HEADER, _BYTES_KEY)]
    have = type(key).__name__
    raise UnsupportedPayload(f"A key is str, bytes or None; this one is {have}.", have=have)


def decode_key(key: bytes | None, headers: Sequence[Header]) -> str | bytes | None:
    """The key that went in; what a Kafka client wrote and is not UTF-8 comes out as bytes."""
    if key is None:
        return None
    for name, marker in headers:
        if name == KEY_HEADER:
            if marker != _BYTES_KEY:
                raise CorruptRecord("unknown kind of key", have=marker)
            return key
    try:
        return key.decode()
    except UnicodeDecodeError:
        return key


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as cause:
        raise UnsupportedPayload(
            f"A {what} holds half a surrogate pair, which UTF-8 cannot carry; publish bytes."
        ) from cause


def _decode_marked(value: bytes, marker: bytes | None) -> Payload:
    try:
        if marker == _TEXT:
            return value.decode()
        if marker == _JSON:
            return _decode_json(value)
    except (ValueError, RecursionError) as cause:
        raise CorruptRecord("a payload is not what its header says", have=marker) from cause
    raise CorruptRecord("unknown kind of payload", have=marker)


def _decode_json(value: bytes) -> Payload:
    # Counting brackets costs nothing, and only text with many of them can be nested too deep.
    suspect = value.count(b"[") + value.count(b"{") > limits.PAYLOAD_DEPTH_MAX
    decoded: Payload
    try:
        decoded = _READ(value)
    except msgspec.DecodeError:
        decoded = _DECODER.decode(value.decode())
    if suspect and type(decoded) in (list, dict) and _too_deep(decoded):
        raise ValueError("nested too deep")
    return decoded


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(limits.PAYLOAD_DEPTH_MAX):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) in (list, dict)
        ]
    return bool(level)


def _refuse_unequal(value: Any) -> None:
    """Walk level by level: no recursion, and a value that contains itself ends at the depth."""
    level: list[Any] = [[value]]
    for _ in range(limits.PAYLOAD_DEPTH_MAX + 1):
        nested: list[Any] = []
        for container in level:
            _refuse_items(container, nested)
            if len(nested) > limits.MESSAGE_BYTES_MAX:
                raise MessageTooLarge(
                    f"A payload has more than {limits.MESSAGE_BYTES_MAX} values in it; publish"
                    " it in parts.",
                    at_most=limits.MESSAGE_BYTES_MAX,
                )
        if not nested:
            return
        level = nested
    raise UnsupportedPayload(
        f"A payload is nested deeper than {limits.PAYLOAD_DEPTH_MAX} levels, or contains itself.",
        at_most=limits.PAYLOAD_DEPTH_MAX,
    )


def _refuse_items(container: Any, nested: list[Any]) -> None:
    """Check one list or dict; what it contains and is to be checked goes to `nested`."""
    if type(container) is dict:
        for key in container:
            if type(key) is not str:
                raise UnsupportedPayload(
                    f"A payload has a dict with the key {key!r:.60}; JSON has text for keys only.",
                    have=type(key).__name__,
                )
        container = container.values()
    for item in container:
        kind = type(item)
        if kind in _PLAIN_TYPES or kind is float:
            continue
        if kind is list or kind is dict:
            nested.append(item)
        elif kind is not int:
            raise UnsupportedPayload(
                f"A payload is bytes, str, None or JSON-like; {kind.__name__} would not come back"
                " equal.",
                have=kind.__name__,
            )
        elif item.bit_length() > INTEGER_BITS_MAX:
            raise UnsupportedPayload(
                f"A payload has an integer of {item.bit_length()} bits; {INTEGER_BITS_MAX} are"
                " possible. Publish it as text.",
                have_bits=item.bit_length(),
            )
