"""Aggregates that grow record by record, so a window keeps one small value and not its records.

The rule it protects: the result does not depend on the order in which records came. So sums and
averages of floats are exact until they are read (Shewchuk 1997, as in `math.fsum`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    By = str | Callable[[Any], Any] | None


class Aggregator:
    """Subclass it for an aggregate of your own; what `add` returns is kept in the state, so it is
    JSON-like, bytes, tuple, set, datetime, date, timedelta or Decimal."""

    @property
    def form(self) -> str:
        """By which its state is known: a processor refuses state of another form."""
        return type(self).__name__

    def initial(self) -> Any:
        """Of a window without records."""
        raise NotImplementedError

    def add(self, state: Any, value: Any) -> Any:
        """The state with one record more."""
        raise NotImplementedError

    def result(self, state: Any) -> Any:
        """What is sent on."""
        return state


def _reader(by: By) -> Callable[[Any], Any]:
    if by is None:
        return _itself
    if isinstance(by, str):
        return lambda value: value[by]
    if callable(by):
        return by
    raise ConfigError(f"by = {by!r}; give the name of a field, or a function.", key="by")


def _itself(value: Any) -> Any:
    return value


class Count(Aggregator):
    """How many records."""

    def initial(self) -> int:
        return 0

    def add(self, state: int, value: Any) -> int:
        return state + 1


class _By(Aggregator):
    """Looks at one number of each record: a field, what a function gives, or the value itself."""

    def __init__(self, by: By = None) -> None:
        self._read = _reader(by)

    def initial(self) -> Any:
        return None


class Sum(_By):
    """The sum; of integers an integer, else a float that is rounded once."""

    def initial(self) -> Any:
        return 0

    def add(self, state: Any, value: Any) -> Any:
        return exact_add(state, self._read(value))

    def result(self, state: Any) -> Any:
        return exact_sum(state)


class Avg(_By):
    """The mean; None of no records."""

    def initial(self) -> Any:
        return [0, 0]

    def add(self, state: Any, value: Any) -> Any:
        count, total = state
        return [count + 1, exact_add(total, self._read(value))]

    def result(self, state: Any) -> float | None:
        count, total = state
        return exact_sum(total) / count if count else None


class Min(_By):
    """The smallest; None of no records."""

    def add(self, state: Any, value: Any) -> Any:
        found = self._read(value)
        return found if state is None or found < state else state


class Max(_By):
    """The largest; None of no records."""

    def add(self, state: Any, value: Any) -> Any:
        found = self._read(value)
        return found if state is None or found > state else state


@dataclass(frozen=True)
class Reduce(Aggregator):
    """`combine(so far, value)`, beginning with the first value; in the order of arrival."""

    combine: Callable[[Any, Any], Any]

    def initial(self) -> list[Any]:
        return []

    def add(self, state: list[Any], value: Any) -> list[Any]:
        return [self.combine(state[0], value)] if state else [value]

    def result(self, state: list[Any]) -> Any:
        return state[0] if state else None


class Together(Aggregator):
    """Several aggregates under names: what `aggregate({"n": Count(), …})` means."""

    def __init__(self, parts: Mapping[str, Aggregator]) -> None:
        self._names = list(parts)
        self._parts = list(parts.values())

    @property
    def form(self) -> str:
        """That of each, by name."""
        pairs = zip(self._names, self._parts, strict=True)
        return ", ".join(f"{name}: {part.form}" for name, part in pairs)

    def initial(self) -> list[Any]:
        return [part.initial() for part in self._parts]

    def add(self, state: list[Any], value: Any) -> list[Any]:
        return [part.add(one, value) for part, one in zip(self._parts, state, strict=True)]

    def result(self, state: list[Any]) -> dict[str, Any]:
        found = zip(self._names, self._parts, state, strict=True)
        return {name: part.result(one) for name, part, one in found}


def aggregator_of(value: object) -> Aggregator | Callable[[Any], Any]:
    """What `aggregate()` was given: an incremental one, or a function of the whole window.

    Raises `ConfigError`.
    """
    if isinstance(value, Aggregator):
        return value
    if isinstance(value, type) and issubclass(value, Aggregator):
        return value()
    if isinstance(value, dict) and value:
        parts = {name: aggregator_of(part) for name, part in value.items()}
        return Together({name: _incremental(name, part) for name, part in parts.items()})
    if callable(value):
        return value
    raise ConfigError(
        f"aggregate({value!r}): give a function of the window, an aggregate such as Count(), or a"
        " dict of aggregates.",
        key="aggregate",
    )


def _incremental(name: str, part: object) -> Aggregator:
    if isinstance(part, Aggregator):
        return part
    raise ConfigError(
        f"aggregate: {name!r} is {part!r}; a dict holds aggregates such as Count().",
        key="aggregate",
    )


def exact_add(total: Any, number: Any) -> Any:
    """A sum so far plus one number: an integer, other exact numbers, or floats that do not overlap
    and together are the exact sum."""
    if type(number) is not float:
        return total + number if type(total) is not list else _with_float(total, float(number))
    return _with_float(total if type(total) is list else [float(total)], number)


def _with_float(partials: list[float], number: float) -> list[float]:
    if not math.isfinite(number):
        return [math.fsum(partials) + number]
    if partials and not math.isfinite(partials[-1]):
        return [partials[-1] + number]
    kept = []
    for other in partials:
        large, small = (number, other) if abs(number) >= abs(other) else (other, number)
        number = large + small
        rest = small - (number - large)
        if rest:
            kept.append(rest)
    kept.append(number)
    return kept


def exact_sum(total: Any) -> Any:
    """What `exact_add` has collected."""
    return math.fsum(total) if type(total) is list else total
