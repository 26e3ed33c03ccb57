"""What callers hand over: it is what the call takes, or a `Misuse` says what was given.

The rule it protects: a slip of the pen never surfaces as an `AttributeError` from deep within,
never goes over the wire, and never breaks what others share (a producer, a subscription). The
sentence also says what to give instead.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aegis_cluster.errors import ConfigError, Misuse

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_NUMBERS: Final = (int, float)
SECONDS_MAX: Final = 366 * 86_400.0
"""What stands for "without end" too: a year from now is a number that every clock can hold."""


def instance(value: T, kind: type[Any], what: str, hint: str) -> T:
    """`value`, which must be a `kind`. Raises `Misuse`.

    what: which argument it is. hint: how to write it, as the end of the sentence.
    """
    if isinstance(value, kind):
        return value
    raise Misuse(f"{what} is {_given(value)}; {hint}.")


def name(value: str, what: str = "topic") -> str:
    """A topic's or group's name. Raises `Misuse` for what is no text; whether there is one of that
    name is for others to say."""
    found: str = instance(value, str, what, "give its name, as text")
    if not is_unicode(found):
        raise Misuse(f"{what} is {found!r}, which holds half a surrogate pair; no name does.")
    return found


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(value: Any, what: str, *, least: int) -> int:
    """A whole number, at least `least`. Raises `Misuse`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise Misuse(f"{what} is {_given(value)}; give a whole number.") from None
    if number < least:
        raise Misuse(f"{what} is {number}; give {least} or more.")
    return number


def seconds(value: Any, what: str = "timeout") -> float:
    """Seconds, a year at most; less than none counts as passed. Raises `Misuse`."""
    if isinstance(value, _NUMBERS) and not isinstance(value, bool) and value == value:
        return min(value, SECONDS_MAX)
    raise Misuse(f"{what} is {_given(value)}; give seconds, as a number.")


def many(value: object, what: str, hint: str) -> Iterable[Any]:
    """What can be stepped through, and is not text, bytes or a mapping, whose steps nobody means.

    Raises `Misuse`.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping):
        return value
    raise Misuse(f"{what} is {_given(value)}; {hint}.")


def setting(value: object, kinds: tuple[type, ...], key: str, allowed: str) -> None:
    """A field of a configuration, None where it may be left out. Raises `ConfigError`.

    A bool is a number in Python, and in no setting.
    """
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return
    raise ConfigError(f"{key} = {value!r}; allowed: {allowed}.", key=key, value=value)


def choice(value: object, choices: Sequence[str], key: str) -> None:
    """One of a few words, or None. Raises `ConfigError`."""
    if value is not None and value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ConfigError(f"{key} = {value!r}; allowed: {allowed}.", key=key, value=value)


def _given(value: object) -> str:
    """A value and its type, cut to what fits a sentence."""
    if value is None:
        return "None"
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return f"{shown} ({type(value).__name__})"
