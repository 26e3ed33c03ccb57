"""Change data capture: a database's changes as a feed, a specialised topic that others read.

- `source`: what a connector needs of a database. `sqlite` (with `sqlite_schema`: its triggers) and
  `postgres` are two of them; of the latter `pgoutput` reads what a slot sends, `postgres_stream`
  makes transactions of it, `postgres_snapshot` has the rows that were there before, `postgres_rows`
  and `postgres_types` their values.
- `connector`: copies a source's changes into its feed; `tracker` leaves out and masks on the way.
  `engine`: runs it, and reads the feed.
- `control`: what connectors tell of themselves, and can be told, by a topic.
- `envelope`, `values`: a change as it stands in the feed (Debezium's form), and back.
- `configuration`: a connector as a file. `subscription`: what a subscriber sees of a feed.
  `events`: the classes it gets. `mirror`: a feed applied to another database. `outbox`: rows that
  are published as messages.

In: a `StreamingEngine` and a source. Out: `ChangeEvent`s. It stands on the client library alone.

The rule it protects: a change is in its feed exactly once, whoever dies: its position in the source
stands in the same frame, and the feed's leader refuses one that it has (`broker.feed_stm`).
"""

from __future__ import annotations

from aegis_cluster.cdc.connector import ConnectorState
from aegis_cluster.cdc.engine import CDCEngine
from aegis_cluster.cdc.events import (
    ChangeEvent,
    ChangeSource,
    Delete,
    Insert,
    Operation,
    Position,
    Truncate,
    Update,
)
from aegis_cluster.cdc.mirror import Mirror, PostgresTarget, SQLiteTarget
from aegis_cluster.cdc.outbox import OutboxConfig, OutboxRouter
from aegis_cluster.cdc.postgres import PostgresLag, PostgresSource
from aegis_cluster.cdc.progress import SnapshotProgress
from aegis_cluster.cdc.sqlite import SQLiteSource
from aegis_cluster.cdc.subscription import CDCConfig, ChangeSubscription, ChangeTransaction
from aegis_cluster.cdc.values import UNCHANGED
from aegis_cluster.errors import SourceError, SourceUnavailable

__all__ = [
    "UNCHANGED",
    "CDCConfig",
    "CDCEngine",
    "ChangeEvent",
    "ChangeSource",
    "ChangeSubscription",
    "ChangeTransaction",
    "ConnectorState",
    "Delete",
    "Insert",
    "Mirror",
    "Operation",
    "OutboxConfig",
    "OutboxRouter",
    "Position",
    "PostgresLag",
    "PostgresSource",
    "PostgresTarget",
    "SQLiteSource",
    "SQLiteTarget",
    "SnapshotProgress",
    "SourceError",
    "SourceUnavailable",
    "Truncate",
    "Update",
]
