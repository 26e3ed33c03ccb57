"""How far a snapshot is, for whoever watches."""

from __future__ import annotations

from typing import NamedTuple


class SnapshotProgress(NamedTuple):
    """table: that is being read; with its schema where it has one. rows: read of it so far.
    estimate: how many there are, about; None where nobody knows. waiting: tables after it."""

    table: str
    rows: int
    estimate: int | None
    waiting: int = 0
