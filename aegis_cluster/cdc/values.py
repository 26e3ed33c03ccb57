"""Column values as JSON, and back, equal.

The idea: a row travels as JSON, so that every consumer of Debezium's envelope reads it; what JSON
has no form for travels as text in Debezium's way (bytes as base64, exact numbers as digits, moments
in ISO 8601), and beside the row stands which columns those are, so that ours get the value itself.
"""

from __future__ import annotations

import base64
import json
import math
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aegis_cluster.errors import CorruptRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PLACEHOLDER: Final = "__debezium_unavailable_value"


class Unchanged:
    """What stands for a value that the database did not send, since it did not change (a large
    value of PostgreSQL, stored out of line, without `REPLICA IDENTITY FULL`). False in a test."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged()


class JsonText(str):
    """A JSON document of the database, as it was written; readers get what it says."""

    __slots__ = ()


_PLAIN: Final = frozenset({bool, int, type(None)})


def encode_value(value: Any) -> tuple[Any, str | None]:
    """A JSON-like form, and the tag that leads back; None: it is the value itself."""
    kind = type(value)
    if kind in _PLAIN:
        return value, None
    if kind is str:
        return _encode_text(value)
    if kind is float:
        return (value, None) if math.isfinite(value) else (repr(value), "float")
    if kind is list:
        return _encode_list(value)
    for known, tag, encode in _ENCODERS:
        if isinstance(value, known):
            if tag == "timestamp" and value.tzinfo is not None:
                tag = "timestamptz"
            return encode(value), tag
    return str(value), None


def decode_value(value: Any, tag: str | None) -> Any:
    """The value that was encoded. Raises `CorruptRecord`."""
    if tag is None or value is None:
        return value
    if isinstance(value, list):
        return [decode_value(item, tag) for item in value]
    try:
        return _DECODERS[tag](value)
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise CorruptRecord(f"A value of a change is no {tag}.", have=str(value)[:100]) from error


def encode_row(row: Mapping[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """A row's JSON form; `types` is told which columns have a tag."""
    found = {}
    for name, value in row.items():
        encoded, tag = encode_value(value)
        found[name] = encoded
        if tag is not None:
            types[name] = tag
    return found


def decode_row(row: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """The row that was encoded. Raises `CorruptRecord`."""
    if not types:
        return dict(row)
    return {name: decode_value(value, types.get(name)) for name, value in row.items()}


def _encode_text(value: str) -> tuple[str, str | None]:
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, which SQLite keeps as text all the same
        return base64.b64encode(value.encode("utf-8", "surrogateescape")).decode(), "text"
    return value, None


def _encode_list(value: list[Any]) -> tuple[list[Any], str | None]:
    encoded = [encode_value(item) for item in value]
    tags = {tag for _, tag in encoded} - {None}
    return [item for item, _ in encoded], tags.pop() if tags else None


_ENCODERS: Final[tuple[tuple[type[Any], str, Callable[[Any], Any]], ...]] = (
    (Unchanged, "unchanged", lambda _: PLACEHOLDER),
    (JsonText, "json", str),
    (bytes, "bytes", lambda value: base64.b64encode(value).decode()),
    (Decimal, "decimal", str),
    (datetime, "timestamp", datetime.isoformat),
    (date, "date", date.isoformat),
    (time, "time", time.isoformat),
    (UUID, "uuid", str),
)
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "json": json.loads,
    "bytes": base64.b64decode,
    "text": lambda value: base64.b64decode(value).decode("utf-8", "surrogateescape"),
    "float": float,
    "decimal": Decimal,
    "timestamp": datetime.fromisoformat,
    "timestamptz": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "uuid": UUID,
    "unchanged": lambda _: UNCHANGED,
}
