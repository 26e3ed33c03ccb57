"""Aggregates: objects that are what their events made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aegis_cluster.event.model import Event


class AggregateRoot:
    """To be subclassed: `__init__` without arguments makes an empty one, `apply` takes an event in.

    `version` is that of the last event that was stored, -1 for none. `record` applies a new event
    and keeps it for `EventStore.save`, which stores it on the condition that nobody else was
    faster.
    """

    version: int = -1
    snapshot_revision: ClassVar[int] = 1
    """To be raised when `snapshot` or `apply` have changed: older snapshots are left alone then."""
    subject: str | None = None
    """The person that it is about, with whose key its snapshots are encrypted."""
    _recorded: list[Event]

    def apply(self, event: Event) -> None:
        """Take in one event; it happened, so there is nothing to refuse."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to apply an event.")

    def record(self, event: Event) -> None:
        """Apply a new event, and keep it until it is saved."""
        self.apply(event)
        self.recorded.append(event)

    @property
    def recorded(self) -> list[Event]:
        """Events that are applied here and not stored yet."""
        if "_recorded" not in self.__dict__:
            self._recorded = []
        return self._recorded

    def saved(self, version: int) -> None:
        """What was recorded is stored, up to this version."""
        self.recorded.clear()
        self.version = version

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Self:
        """One that these events made, in their order."""
        return cls().replay(events)

    def replay(self, events: Iterable[Event]) -> Self:
        """Apply events that were stored."""
        for event in events:
            self.apply(event)
            if event.version is not None:
                self.version = event.version
        return self

    def snapshot(self) -> Any:
        """Its state as a JSON-like value; by default its attributes."""
        hidden = ("version", "_recorded")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def restore(self, state: Any) -> None:
        """Become what `snapshot` said."""
        vars(self).update(state)
