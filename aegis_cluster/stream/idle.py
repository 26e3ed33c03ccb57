"""Partitions that nobody writes to must not hold event time back: they follow the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Place = TypeVar("Place")


def followed(watermarks: Mapping[Place, int], idle: Collection[Place]) -> dict[Place, int]:
    """How far idle partitions may move, those that may.

    watermarks: of all source partitions of the application. An idle one follows the slowest that
    is not; if all are, the fastest.
    """
    if not watermarks:
        return {}
    active = [mark for place, mark in watermarks.items() if place not in idle]
    target = min(active) if active else max(watermarks.values())
    return {place: target for place in idle if watermarks[place] < target}
