"""Change data capture for a program: a source's feed, and subscriptions to it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from aegis_cluster.cdc.connector import Connector
from aegis_cluster.cdc.control import SNAPSHOT, Control, command
from aegis_cluster.cdc.mirror import Mirror
from aegis_cluster.cdc.outbox import OutboxConfig, OutboxRouter
from aegis_cluster.cdc.subscription import CDCConfig, ChangeSubscription, is_named
from aegis_cluster.cdc.tracker import Tracker
from aegis_cluster.errors import AegisError, ConfigError, Misuse, SourceUnavailable, TopicExists
from aegis_cluster.topics import UNLIMITED, TopicConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from aegis_cluster.cdc.connector import ConnectorState
    from aegis_cluster.cdc.mirror import Target
    from aegis_cluster.cdc.progress import SnapshotProgress
    from aegis_cluster.cdc.source import Source
    from aegis_cluster.engine import StreamingEngine

FEED_KIND: Final = "cdc"
FIRST_READ_S: Final = 1.0
FEED_MESSAGE_SIZE: Final = "8MB"
"""The largest row of a feed that nobody has made before."""


class CDCEngine:
    """Captures one database into its feed, and reads the feed; an async context manager.

        async with CDCEngine(engine, SQLiteSource("shop.db")) as cdc:
            async with cdc.subscribe("users") as changes:
                async for change in changes: ...

    Of all processes that have one for the same feed, one runs the connector, under a lease; when
    it dies another one goes on within seconds, without a gap and without a repeat.

    connector: False: only read. topic: how to make the feed's topic where it is not there; None:
    one partition, kept without limit. Rows of one key stay in one partition, in order; with one
    partition, all changes are in the order of the source. tables: what of some tables comes into
    the feed at all, by name or pattern: `operations`, `include_old_values`, `columns`, `masks`,
    `where` and `snapshot` of a `CDCConfig`; what is left out or masked here nobody can read.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        source: Source,
        *,
        connector: bool = True,
        topic: TopicConfig | None = None,
        tables: Mapping[str, CDCConfig] | None = None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._captures = connector
        self._topic = topic or TopicConfig()
        self._tables = dict(tables or {})
        self._connector: Connector | None = None
        self._running: asyncio.Task[None] | None = None
        self._control: Control | None = None
        self._controlling: asyncio.Task[None] | None = None
        self._was_running = False
        self._failure: AegisError | None = None
        self._news = asyncio.Event()

    @property
    def feed(self) -> str:
        """The name of the feed's topic."""
        return self._source.name

    @property
    def state(self) -> ConnectorState | None:
        """What this process's connector does; None where there is none."""
        return None if self._connector is None else self._connector.state

    async def __aenter__(self) -> Self:
        """Returns once changes are captured, here or by another process; and, if that takes no
        longer than a second, what was there before has been read.

        Raises `SourceError` where the database cannot be captured, `ConfigError`, `TopicExists`
        (a topic of that name is no feed), and what making a topic does.
        """
        if self._running is not None:
            raise Misuse("This CDCEngine is in use already.")
        if not self._captures:
            return self
        if not self._engine.settings.cdc.enabled:
            raise ConfigError(
                "streaming.cdc.enabled = false: connectors may not run here. Set it to true, or"
                " read only (connector=False).",
                key="streaming.cdc.enabled",
            )
        await self._make_feed()
        info = await self._engine.cluster.topic(self.feed, self._engine.deadline(None))
        self._connector = Connector(
            self._engine,
            self._source,
            info,
            buffer_size=self._engine.settings.cdc.buffer_size,
            tracker=Tracker(self.feed, self._tables),
        )
        self._connector.on_change = self._news.set
        self._running = asyncio.create_task(self._run(self._connector), name=f"cdc {self.feed}")
        if not self._engine.is_embedded:  # nobody else can have it open
            self._control = Control(
                self._engine, self.feed, self._source, self._connector, self._told_to_stop
            )
            self._controlling = asyncio.create_task(
                self._control.run(), name=f"cdc control {self.feed}"
            )
        try:
            await self._started(self._connector)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the connector; another process that waits takes over. Subscriptions stay."""
        running, self._running = self._running, None
        controlling, self._controlling = self._controlling, None
        for task in (running, controlling):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._control is not None:
            control, self._control = self._control, None
            if self._was_running:
                await control.end()

    def _told_to_stop(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def snapshot(self, table: str, *, timeout: float | None = None) -> None:
        """Have all rows of a table read again, while changes go on; they come as `Insert`s with
        `is_snapshot`. It is done by the process whose connector runs, this one or another; returns
        once that will happen, whatever dies. Raises `SourceError` for a table that is not captured,
        if it is this one.
        """
        if self._connector is not None and self._connector.state.role == "running":
            async with asyncio.timeout(timeout or self._engine.request_timeout):
                await self._source.snapshot(table)
            return
        await command(self._engine, self.feed, SNAPSHOT, table)

    def progress(self) -> SnapshotProgress | None:
        """Of the snapshot that this process's connector makes; None where it makes none."""
        return self._source.progress()

    def subscribe(
        self,
        tables: str | Sequence[str],
        config: CDCConfig | None = None,
        *,
        timeout: float | None = None,
    ) -> ChangeSubscription:
        """The changes of some tables: one object, an async context manager and async iterator.

        tables: names or patterns (`"*"`), with or without the schema (`"public.users"`).
        """
        names = [tables] if isinstance(tables, str) else list(dict.fromkeys(tables))
        if not names:
            raise Misuse("A subscription needs at least one table or pattern.")
        return ChangeSubscription(
            self._engine, self.feed, names, config or CDCConfig(), lambda: self._failure, timeout
        )

    def apply_to(self, target: Target, tables: str | Sequence[str] = "*") -> Mirror:
        """Mirror the feed's changes of some tables into another database, exactly once: how far it
        is stands in the target, in the same transaction as the rows.

            async with cdc.apply_to(SQLiteTarget("copy.db")) as mirror:
                await mirror.caught_up()

        target: a `SQLiteTarget` or a `PostgresTarget`. tables: as in `subscribe`.
        """
        names = [tables] if isinstance(tables, str) else list(tables)
        return Mirror(self._engine, self.feed, target, lambda change: is_named(change, names))

    def outbox(self, config: OutboxConfig | None = None) -> OutboxRouter:
        """Publish the rows of an outbox table as messages of their own topics, exactly once.

        async with cdc.outbox(OutboxConfig(topic="events.{aggregatetype}")) as router:
            await router.stopped()
        """
        return OutboxRouter(self._engine, self.feed, config or OutboxConfig())

    async def stopped(self) -> None:
        """Wait for the end of this process's connector. Raises why it has ended."""
        if self._running is not None:
            await asyncio.wait([self._running])
        if self._failure is not None:
            raise self._failure

    async def _make_feed(self) -> None:
        wanted = self._topic
        config = TopicConfig(
            partitions=wanted.partitions,
            replication_factor=wanted.replication_factor,
            retention=wanted.retention or UNLIMITED,
            retention_bytes=wanted.retention_bytes,
            cleanup=wanted.cleanup,
            compression=wanted.compression,
            max_message_size=wanted.max_message_size or FEED_MESSAGE_SIZE,
            kind=FEED_KIND,
        )
        await self._engine.create_topic(self.feed, config, exist_ok=True)
        found = await self._engine.describe_topic(self.feed)
        if found.settings.kind != FEED_KIND:
            raise TopicExists(
                f"A topic {self.feed!r} is there and is no change feed; give the source another"
                " name (name=…).",
                topic=self.feed,
            )

    async def _run(self, connector: Connector) -> None:
        try:
            await connector.run()
        except AegisError as error:
            self._failure = error
        finally:
            self._was_running = connector.state.role == "running" or self._failure is not None
            connector.state.role = "stopped"
            connector.state.error = None if self._failure is None else str(self._failure)
            self._news.set()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _started(self, connector: Connector) -> None:
        try:
            async with asyncio.timeout(self._engine.request_timeout):
                while connector.state.role == "starting":
                    await self._wait()
        except TimeoutError:
            raise SourceUnavailable(
                f"The connector of feed {self.feed} could not begin in time:"
                f" {connector.state.error or 'the database does not answer'}."
            ) from None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_READ_S):
                while connector.state.role == "running" and not connector.state.is_current:
                    await self._wait()
        if self._failure is not None:
            raise self._failure
