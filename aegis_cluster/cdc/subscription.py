"""Reading a feed: the changes of some tables, as each subscriber wants to see them.

The idea: a subscription is one of the feed's topic, and a name is a consumer group, so it goes on
where it was. What it leaves out is passed over here, in its own process; nobody else is concerned.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.cdc.envelope import change_from
from aegis_cluster.cdc.events import Delete, Insert, Operation, Update
from aegis_cluster.errors import AegisError, ConfigError, Misuse
from aegis_cluster.message import Offset
from aegis_cluster.subscribe_config import AckMode, SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from aegis_cluster.cdc.events import ChangeEvent
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.subscriber import Subscriber

POLL_RECORDS: Final = 500
LOOK_S: Final = 1.0
"""A step that waits looks so often whether there will be further changes."""


@dataclass(frozen=True, slots=True)
class CDCConfig:
    """What of its tables' changes a subscription hands out.

    operations: which; None: all four. include_old_values: rows as they were before an update, and
    of a delete; False: None instead, and of a delete the key alone. columns: of every row, these
    (and no others); None: all. masks: columns whose values are replaced, by a text or by what a
    function makes of them. where: a function of the change that says whether it is handed out; it
    sees rows as they are, before columns and masks. snapshot: whether rows that were there before
    the feed began are handed out, as `Insert`s with `is_snapshot`.

    name: of the subscription, which then goes on where it was, and shares the feed's partitions
    with others of the same name; None: it begins at `start` each time. ack_mode: AUTO, handled
    when the next change is asked for, or MANUAL, when `ack()` is called. Raises `ConfigError`.
    """

    operations: Iterable[Operation] | None = None
    include_old_values: bool = True
    columns: Sequence[str] | None = None
    masks: Mapping[str, Any] = field(default_factory=dict)
    where: Callable[[ChangeEvent], bool] | None = None
    snapshot: bool = True
    name: str | None = None
    start: Offset = Offset.EARLIEST
    ack_mode: AckMode = AckMode.AUTO

    def __post_init__(self) -> None:
        if self.operations is not None:
            wanted = tuple(self.operations)
            wrong = [one for one in wanted if not isinstance(one, Operation)]
            if wrong or not wanted:
                raise ConfigError(
                    f"operations = {list(wanted)!r}; allowed: some of Operation.INSERT, UPDATE,"
                    " DELETE and TRUNCATE.",
                    key="operations",
                )
            object.__setattr__(self, "operations", frozenset(wanted))
        for column, mask in self.masks.items():
            if not isinstance(mask, str) and not callable(mask):
                raise ConfigError(
                    f"masks[{column!r}] = {mask!r}; allowed: a text, or a function of the value.",
                    key="masks",
                )
        if self.columns is not None and not self.columns:
            raise ConfigError("columns is empty; name some, or leave it out.", key="columns")

    def seen(self, change: ChangeEvent) -> ChangeEvent | None:
        """The change as it is handed out, or None."""
        if self.operations is not None and change.operation not in set(self.operations):
            return None
        if change.is_snapshot and not self.snapshot:
            return None
        if self.where is not None and not self.where(change):
            return None
        match change:
            case Insert():
                return replace(change, new_row=self._row(change.new_row))
            case Update():
                old = change.old_row if self.include_old_values else None
                return replace(
                    change,
                    new_row=self._row(change.new_row),
                    old_row=None if old is None else self._row(old),
                )
            case Delete():
                old = change.old_row if self.include_old_values else change.key
                return replace(change, old_row=None if old is None else self._row(old))
        return change

    def _row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.columns is not None:
            row = {name: row[name] for name in self.columns if name in row}
        if not self.masks:
            return row
        return {
            name: self._masked(self.masks[name], value) if name in self.masks else value
            for name, value in row.items()
        }

    @staticmethod
    def _masked(mask: Any, value: Any) -> Any:
        return mask if isinstance(mask, str) else mask(value)


@dataclass(frozen=True, slots=True)
class ChangeTransaction:
    """What one transaction has changed; or rows that a snapshot has read together."""

    changes: Sequence[ChangeEvent]
    _messages: Sequence[ReceivedMessage] = field(default=(), repr=False, compare=False)

    @property
    def transaction_id(self) -> str | None:
        """The source's own; None where it has none."""
        return self.changes[0].transaction_id

    def __iter__(self) -> Iterator[ChangeEvent]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    async def ack(self) -> None:
        """All of it is handled: a subscription by name does not hand it out again."""
        for message in self._messages:
            await message.ack()


class ChangeSubscription:
    """Changes of some tables, each partition in order: an async context manager and an async
    iterator, which starts on entering or on the first step."""

    def __init__(
        self,
        engine: StreamingEngine,
        feed: str,
        tables: Sequence[str],
        config: CDCConfig,
        failure: Callable[[], AegisError | None],
        timeout: float | None,
    ) -> None:
        """tables: names or patterns, with or without the schema. failure: why there will be no
        further changes, once that is so."""
        self._engine, self._feed = engine, feed
        self._tables = tables
        self._config = config
        self._failure = failure
        reading = SubscribeConfig(
            group_id=config.name,
            start=config.start,
            ack_mode=config.ack_mode if config.name is not None else None,
        )
        self._fetched: deque[ReceivedMessage] = deque()
        # What was polled counts as handled at the next poll, so a name gets one at a time.
        self._ahead = POLL_RECORDS if config.name is None else 1
        self._subscriber: Subscriber = engine.subscribe(feed, reading, timeout=timeout)

    async def __aenter__(self) -> Self:
        await self._subscriber.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop reading; a step that waits ends."""
        self._fetched.clear()
        await self._subscriber.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChangeEvent:
        """The next change. Raises what a subscriber's step does, and why the connector has
        stopped, once all that it had sent was handed out."""
        while (message := await self._next_message()) is not None:
            change = await self._wanted(message)
            if change is not None:
                return change
        raise StopAsyncIteration

    async def _next_message(self) -> ReceivedMessage | None:
        """None once the subscription is closed."""
        while not self._fetched:
            if self._subscriber.is_closed:
                return None
            failure = self._failure()
            self._fetched.extend(await self._subscriber.poll(self._ahead, timeout=LOOK_S))
            if failure is not None and not self._fetched:
                raise failure
        return self._fetched.popleft()

    async def transactions(self) -> AsyncIterator[ChangeTransaction]:
        """All changes of one source transaction at a time, in the order of their commits: what
        the filters leave of it, and never a part. Those of which they leave nothing are passed
        over.

        SQLite's triggers cannot tell transactions apart; there it is one or several whole ones.
        All of a transaction is in memory at once. Raises `Misuse` for a feed of several partitions
        (their order is not that of the source), and for a name without `AckMode.MANUAL`.
        """
        await self._check_transactions()
        changes: list[ChangeEvent] = []
        messages: list[ReceivedMessage] = []
        while (message := await self._next_message()) is not None:
            messages.append(message)
            change = change_from(message)
            if change is None:
                continue
            if changes and change.transaction_id != changes[-1].transaction_id:
                # The last change of it was left out of the feed, and so was its end.
                yield ChangeTransaction(tuple(changes), tuple(messages[:-1]))
                changes, messages = [], [message]
            seen = self._config.seen(change) if is_named(change, self._tables) else None
            if seen is not None:
                changes.append(seen)
            if change.is_last and changes:
                yield ChangeTransaction(tuple(changes), tuple(messages))
            if change.is_last:
                changes, messages = [], [] if changes else messages

    async def _check_transactions(self) -> None:
        if self._config.name is not None and self._config.ack_mode is not AckMode.MANUAL:
            raise Misuse(
                "Transactions of a named subscription are acknowledged as a whole: give it"
                " ack_mode=AckMode.MANUAL, and call transaction.ack()."
            )
        if len(await self._engine.offsets(self._feed)) > 1:
            raise Misuse(
                f"The feed {self._feed} has several partitions, whose order is not that of the"
                " source. Read single changes, or make a feed of one partition."
            )

    async def _wanted(self, message: ReceivedMessage) -> ChangeEvent | None:
        change = change_from(message)
        seen = None
        if change is not None and is_named(change, self._tables):
            seen = self._config.seen(change)
        if seen is None and self._config.ack_mode is AckMode.MANUAL:
            await message.ack()  # nobody else will
        return seen


def is_named(change: ChangeEvent, tables: Sequence[str]) -> bool:
    """Whether its table is one of these names or patterns, with or without the schema."""
    source = change.source
    return any(
        fnmatchcase(source.table, name) or fnmatchcase(source.full_name, name) for name in tables
    )
