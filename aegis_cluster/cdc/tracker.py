"""What of each table comes into the feed at all: what is left out or masked here, nobody reads.

The idea: the same settings as a subscription's (`CDCConfig`), applied between source and feed. A
change of a table with settings is decoded, filtered and written anew; those of other tables pass
as they are. Positions and keys stay, so nothing of what a feed promises depends on this.
"""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from aegis_cluster.cdc.envelope import RowChange, event_from
from aegis_cluster.cdc.events import Delete, Insert, Update

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.cdc.envelope import Change
    from aegis_cluster.cdc.events import ChangeEvent, ChangeSource
    from aegis_cluster.cdc.source import SourceBatch
    from aegis_cluster.cdc.subscription import CDCConfig


class Tracker:
    """tables: settings by name or pattern, with or without the schema; the first that fits counts.
    feed: its name."""

    def __init__(self, feed: str, tables: Mapping[str, CDCConfig]) -> None:
        self._feed, self._tables = feed, tables
        self._known: dict[ChangeSource, CDCConfig | None] = {}

    def tracked(self, batch: SourceBatch) -> SourceBatch:
        """What of a batch comes into the feed; its position and marks are as they were."""
        if not self._tables or not batch.changes:
            return batch
        found: list[Change] = []
        for change in batch.changes:
            settings = self._settings(change.source)
            kept = change if settings is None else self._kept(change, settings)
            if kept is not None:
                found.append(kept)
            elif change.is_last and found:
                found[-1] = found[-1].as_last()  # the end of a transaction stays one
        return replace(batch, changes=found)

    def _settings(self, source: ChangeSource) -> CDCConfig | None:
        if source not in self._known:
            fits = (
                config
                for name, config in self._tables.items()
                if fnmatchcase(source.table, name) or fnmatchcase(source.full_name, name)
            )
            self._known[source] = next(fits, None)
        return self._known[source]

    def _kept(self, change: Change, settings: CDCConfig) -> Change | None:
        envelope = json.loads(change.record_value(self._feed, 0))
        event = event_from(envelope, change.record_key)
        seen = settings.seen(event)
        return None if seen is None else _written(change, event, seen)


def _written(change: Change, event: ChangeEvent, seen: ChangeEvent) -> RowChange:
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    if isinstance(seen, (Update, Delete)):
        before = seen.old_row
    if isinstance(seen, (Insert, Update)):
        after = seen.new_row
    return RowChange(
        change.source,
        change.op,
        change.position,
        change.ts_ms,
        event.key if event.key is not None or change.is_everywhere else {},
        before,
        after,
        event.transaction_id,
        event.is_last,
    )
