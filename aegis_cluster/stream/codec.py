"""Python values to bytes and back, equal: for state, changelogs and repartition topics.

More than a message can carry (tuples, times, decimals, sets), because values inside a processor
are whatever its functions return. What could not come back equal is refused, never changed.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import msgpack

from aegis_cluster.errors import CorruptRecord, UnsupportedPayload

_TUPLE: Final = 1
_TIME: Final = 2
_DATE: Final = 3
_DECIMAL: Final = 4
_SET: Final = 5
_FROZENSET: Final = 6
_INTEGER: Final = 7
_DURATION: Final = 8
_MILLION: Final = 1_000_000


def pack(value: Any) -> bytes:
    """Raises `UnsupportedPayload` for what would not come back equal."""
    try:
        packed: bytes = msgpack.packb(value, default=_extension, strict_types=True)
    except OverflowError:  # a large integer inside; the slow way finds it
        packed = msgpack.packb(_small(value), default=_extension, strict_types=True)
    except (TypeError, ValueError) as cause:
        raise UnsupportedPayload(f"A processor cannot keep this value: {cause}") from cause
    return packed


def unpack(data: bytes) -> Any:
    """Raises `CorruptRecord` for bytes that `pack` did not make."""
    try:
        return msgpack.unpackb(data, ext_hook=_value, strict_map_key=False)
    except (ValueError, TypeError, ArithmeticError, RecursionError, msgpack.UnpackException) as why:
        raise CorruptRecord(f"The state of a processor does not decode: {why}") from why


def _small(value: Any) -> Any:
    """With integers of more than 64 bits as extensions."""
    kind = type(value)
    if kind is int and not -(2**63) <= value < 2**64:
        return msgpack.ExtType(_INTEGER, str(value).encode())
    if kind is list:
        return [_small(item) for item in value]
    if kind is dict:
        return {_small(key): _small(item) for key, item in value.items()}
    if kind in (tuple, set, frozenset):
        return kind(_small(item) for item in value)
    return value


def _extension(value: Any) -> msgpack.ExtType:
    kind = type(value)
    if kind is tuple:
        return msgpack.ExtType(_TUPLE, pack(list(value)))
    if kind is datetime:
        return msgpack.ExtType(_TIME, value.isoformat().encode())
    if kind is date:
        return msgpack.ExtType(_DATE, value.isoformat().encode())
    if kind is timedelta:
        micros = (value.days * 86_400 + value.seconds) * _MILLION + value.microseconds
        return msgpack.ExtType(_DURATION, str(micros).encode())
    if kind is Decimal:
        return msgpack.ExtType(_DECIMAL, str(value).encode())
    if kind is set or kind is frozenset:
        # Sorted, or the same set would give other bytes in another process.
        items = sorted(map(pack, value))
        return msgpack.ExtType(_SET if kind is set else _FROZENSET, pack(items))
    raise TypeError(
        f"{kind.__name__} {value!r:.80} is none of the types that come back equal (JSON-like"
        " values, bytes, tuple, set, datetime, date, timedelta, Decimal); make it one of these"
    )


def _value(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(unpack(data))
    if code == _TIME:
        return datetime.fromisoformat(data.decode())
    if code == _DATE:
        return date.fromisoformat(data.decode())
    if code == _DURATION:
        return timedelta(microseconds=int(data))
    if code == _DECIMAL:
        return Decimal(data.decode())
    if code == _INTEGER:
        return int(data)
    if code in (_SET, _FROZENSET):
        items = [unpack(item) for item in unpack(data)]
        return set(items) if code == _SET else frozenset(items)
    raise ValueError(f"unknown extension {code}")
