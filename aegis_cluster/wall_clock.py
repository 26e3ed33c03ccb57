"""What to say of a node's wall clock that is far from those of the others."""

from __future__ import annotations

from typing import Final

TOLERANCE_MS: Final = 60_000
"""Less is not spoken of: announcements take seconds themselves."""
_UNITS: Final = (("days", 86_400_000), ("hours", 3_600_000), ("minutes", 60_000))


def clock_problem(ahead_ms: int | None) -> str | None:
    """A sentence for a clock that is so many ms ahead of the others' median (or behind: negative);
    None where nothing is wrong or nothing is known."""
    if ahead_ms is None or abs(ahead_ms) < TOLERANCE_MS:
        return None
    unit, length = next(each for each in _UNITS if abs(ahead_ms) >= each[1])
    side = "ahead of" if ahead_ms > 0 else "behind"
    return (
        f"The clock is {abs(ahead_ms) / length:.1f} {unit} {side} the other nodes'. Set it (NTP):"
        " nothing is lost, but messages that this node dates are kept and found by a wrong time."
    )
