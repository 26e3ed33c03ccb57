"""Whether the loop waits for its syncs itself, or leaves them to a helper thread.

The idea: handing a sync to a thread and hearing of its end costs two changes of thread, which is as
much as a quick disk takes for the sync. So a loop waits while syncs are quick. After a slow one it
leaves them to the thread, where heartbeats do not wait for a disk, until many in a row were quick
again: as many as it took milliseconds, so that a disk that stalls now and then holds up the loop
once (decision 0067).
"""

from __future__ import annotations

from typing import Final

QUICK_MS: Final = 10.0
"""A tenth of the time between heartbeats."""
QUICK_IN_A_ROW: Final = 16
"""At least."""


class SyncPace:
    """Of one disk; it begins as one that nothing is known about."""

    def __init__(self) -> None:
        self._lacking = QUICK_IN_A_ROW

    @property
    def is_quick(self) -> bool:
        """Whether the next sync may be waited for."""
        return self._lacking == 0

    def note(self, took_ms: float) -> None:
        """A sync has ended, wherever it ran."""
        if took_ms > QUICK_MS:
            self._lacking = max(self._lacking, QUICK_IN_A_ROW, int(took_ms))
        elif self._lacking:
            self._lacking -= 1
