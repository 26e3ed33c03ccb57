"""PostgreSQL's values from their text form, without loss.

The idea: a snapshot and the stream both hand out each value as its type's own text (with the same
`DateStyle`, `bytea_output` and time zone), so one function makes it a value, and equal rows are
equal. Types that have no twin in Python stay text: ranges, intervals, addresses, enums, ….
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from aegis_cluster.cdc.values import JsonText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SESSION: Final = (
    "-c datestyle=ISO,MDY -c timezone=UTC -c intervalstyle=postgres -c bytea_output=hex"
    " -c extra_float_digits=1 -c client_encoding=UTF8"
)
"""What the text forms below rest on."""

Convert = "Callable[[str], Any]"


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("\\x"))


def _boolean(text: str) -> bool:
    return text in ("t", "true")


def _or_text(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`infinity`, years before 1 or after 9999: moments that Python has not, as text."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            return text

    return convert


def _timestamptz(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


_BASE: Final[dict[int, tuple[int, Callable[[str], Any]]]] = {
    # Type, and the type of arrays of it (pg_type.dat).
    16: (1000, _boolean),
    17: (1001, _bytes),
    20: (1016, int),
    21: (1005, int),
    23: (1007, int),
    26: (1028, int),
    114: (199, JsonText),
    700: (1021, float),
    701: (1022, float),
    1082: (1182, _or_text(date.fromisoformat)),
    1083: (1183, _or_text(time.fromisoformat)),
    1114: (1115, _or_text(datetime.fromisoformat)),
    1184: (1185, _or_text(_timestamptz)),
    1700: (1231, Decimal),
    2950: (2951, UUID),
    3802: (3807, JsonText),
}
_TEXT: Final = {
    # Those without a twin in Python, so that their arrays are lists all the same.
    18: 1002, 19: 1003, 25: 1009, 142: 143, 600: 1017, 650: 651, 790: 791, 829: 1040, 869: 1041,
    1042: 1014, 1043: 1015, 1186: 1187, 1266: 1270, 1560: 1561, 1562: 1563, 3904: 3905, 3906: 3907,
    3908: 3909, 3910: 3911, 3912: 3913, 3926: 3927,
}  # fmt: skip


class TypeTable:
    """How to read each type, by its number; grows by the types that a database defines."""

    def __init__(self) -> None:
        self._converters: dict[int, Callable[[str], Any]] = {}
        known = _BASE | {base: (array, str) for base, array in _TEXT.items()}
        for base, (array, convert) in known.items():
            self._converters[base] = convert
            self._converters[array] = _array_of(convert)

    @property
    def built_in(self) -> tuple[int, ...]:
        """Types whose text has to be asked for as it is."""
        return tuple(self._converters)

    def add(self, oid: int, *, base: int, element: int) -> None:
        """A type of the database's own. base: of a domain; element: of an array; else 0."""
        if base:
            self._converters[oid] = self.converter(base)
        elif element:
            self._converters[oid] = _array_of(self.converter(element))

    def converter(self, oid: int) -> Callable[[str], Any]:
        """Text where nothing better is known."""
        return self._converters.get(oid, str)


def _array_of(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        body = text.partition("=")[2] if text.startswith("[") else text
        items = _items(iter(body))
        if next(items) != "{":
            raise ValueError("an array begins with a brace")
        return _level(items, convert)

    return read


def _level(items: Iterator[Any], convert: Callable[[str], Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item == "}":
            return found
        found.append(_level(items, convert) if item == "{" else _element(item, convert))
    raise ValueError("an array does not end")


def _element(item: Any, convert: Callable[[str], Any]) -> Any:
    """Quoted text comes as a tuple, so that it is never taken for NULL or a brace."""
    if isinstance(item, tuple):
        return convert(item[0])
    return None if item == "NULL" else convert(item)


def _items(characters: Iterator[str]) -> Iterator[Any]:
    """Braces, bare words, and quoted texts as tuples."""
    word = ""
    for character in characters:
        if character == '"':
            yield (_quoted(characters),)
        elif character in "{},":
            if word:
                yield word
            word = ""
            if character != ",":
                yield character
        else:
            word += next(characters) if character == "\\" else character


def _quoted(characters: Iterator[str]) -> str:
    text = ""
    for character in characters:
        if character == '"':
            return text
        text += next(characters) if character == "\\" else character
    raise ValueError("a text in an array does not end")
