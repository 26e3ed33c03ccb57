"""What a connector needs of a database: changes in order, and a snapshot between them.

A source gives its changes in batches, whose positions only rise. The rows of a snapshot travel as
*chunks* between the changes: each was read together with the position up to which changes had
been given before, so that nothing is missing and nothing is older than what went before it. A
batch that is a chunk carries a *mark*, which the feed keeps with it in the same frame; with the
marks of all partitions a source finds where a snapshot was broken off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.cdc.envelope import Change
    from aegis_cluster.cdc.progress import SnapshotProgress

ROWS_PER_BATCH_MAX = 2_000
"""Of one `read`; the setting `buffer_size` may make it fewer."""
CHUNK_BYTES = 1 << 20
"""A chunk ends when it is about so large, so that it fits one frame of a partition."""


class PartitionPoint(NamedTuple):
    """Where one partition of the feed stands."""

    position: tuple[int, int]
    mark: bytes


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """Changes in order, by rising position.

    mark: for every partition that gets a part of it. only: which partitions lack these changes;
    None: all may. token: what `confirm` is to be called with. more: there was more to be had when
    it was read. position: with the mark, every partition gets this one, records or not.
    """

    changes: Sequence[Change] = ()
    mark: bytes | None = None
    only: frozenset[int] | None = None
    token: Any = None
    position: tuple[int, int] | None = None
    more: bool = True

    @property
    def is_plain(self) -> bool:
        """Changes and nothing else, so that it may travel together with others."""
        return self.mark is None and self.only is None and self.position is None


class Source(Protocol):
    """One database. `confirm` and `snapshot` may be called while a `read` is under way; nothing
    else may."""

    @property
    def name(self) -> str:
        """Of the feed's topic."""

    async def open(self, feed: str, points: Sequence[PartitionPoint], rows_max: int) -> None:
        """Connect, prepare the database, and be ready to go on from where the feed stands.

        feed: names it, together with its cluster. Raises `SourceError`, `SourceUnavailable`.
        """

    async def read(self) -> SourceBatch:
        """The next changes, or none after a short while. Raises as `open` does."""

    async def confirm(self, token: Any) -> None:
        """All changes up to this batch, and it, are in the feed for good."""

    async def snapshot(self, table: str) -> None:
        """Read all rows of a table again, while changes go on; returns once that will happen
        whatever dies. Raises `SourceError` for a table that is not captured."""

    def progress(self) -> SnapshotProgress | None:
        """Of the snapshot that is being made; None where there is none."""

    async def close(self) -> None:
        """Let the database go; what is confirmed stays so."""
