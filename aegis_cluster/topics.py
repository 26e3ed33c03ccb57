"""How a topic is made, and how it is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypedDict

from aegis_cluster import arguments
from aegis_cluster.config import StreamingConfig, parse_duration, parse_size
from aegis_cluster.errors import ConfigError, Misuse
from aegis_cluster.limits import TOMBSTONE_RETENTION_MS_DEFAULT
from aegis_cluster.wire.descriptions import TopicSettings

if TYPE_CHECKING:
    from collections.abc import Callable

UNLIMITED: Final = "unlimited"
TOPIC_KIND: Final = "topic"


@dataclass(frozen=True, slots=True)
class TopicConfig:
    """How a topic is made; None means the configured default.

    partitions: 1. replication_factor: min(3, nodes). retention: `"7d"`, or `"unlimited"`.
    retention_bytes: of each partition, unlimited. cleanup: `"delete"`. compression: none (of its
    producers). max_message_size: `"1MB"`.

    cleanup: `"delete"` (what is older than `retention` goes), `"compact"` (the latest message of
    each key is kept, whatever its age) or `"compact,delete"` (both). In a compacted topic every
    message has a key; one whose payload is None, a tombstone, deletes its key, and is itself kept
    for `tombstone_retention` (`"1d"`), so that readers learn of it.
    """

    partitions: int | None = None
    replication_factor: int | None = None
    retention: str | None = None
    retention_bytes: str | int | None = None
    cleanup: str | None = None
    compression: str | None = None
    max_message_size: str | int | None = None
    kind: str = TOPIC_KIND
    tombstone_retention: str | None = None

    def __post_init__(self) -> None:
        for key in ("partitions", "replication_factor"):
            value = getattr(self, key)
            arguments.setting(value, (int,), key, "a whole number, 1 or more")
            if value is not None and value < 1:
                raise ConfigError(f"{key} = {value}; allowed: 1 or more.", key=key, value=value)
        for key in ("cleanup", "compression", "kind"):
            arguments.setting(getattr(self, key), (str,), key, "one of its words, as text")

    def settings(self, defaults: StreamingConfig | None = None) -> TopicSettings:
        """As numbers. Raises `ConfigError`, naming the value."""
        defaults = defaults or StreamingConfig()
        return TopicSettings(
            kind=self.kind,
            retention_ms=self._retention_ms(defaults),
            retention_bytes=_limit(parse_size, "retention_bytes", self.retention_bytes),
            cleanup=_cleanup(self.cleanup),
            compression="none" if self.compression is None else self.compression,
            max_message_bytes=defaults.max_message_bytes
            if self.max_message_size is None
            else _parse(parse_size, "max_message_size", self.max_message_size),
            tombstone_retention_ms=TOMBSTONE_RETENTION_MS_DEFAULT
            if self.tombstone_retention is None
            else _parse(parse_duration, "tombstone_retention", self.tombstone_retention),
        )

    def _retention_ms(self, defaults: StreamingConfig) -> int | None:
        if self.retention is None:
            return defaults.default_retention_ms
        return _limit(parse_duration, "retention", self.retention)

    def changed_settings(self) -> dict[str, Any]:
        """What is not None, as fields of `TopicSettings`, for a topic that exists already.

        Raises `ConfigError`, naming the value, also for a kind, which cannot be changed.
        """
        if self.kind != TOPIC_KIND:
            raise ConfigError(f"kind = {self.kind!r}: a topic keeps its kind.", key="kind")
        wanted = self.settings()
        changes = {
            "retention_ms": (self.retention, wanted.retention_ms),
            "retention_bytes": (self.retention_bytes, wanted.retention_bytes),
            "cleanup": (self.cleanup, wanted.cleanup),
            "compression": (self.compression, wanted.compression),
            "max_message_bytes": (self.max_message_size, wanted.max_message_bytes),
            "tombstone_retention_ms": (self.tombstone_retention, wanted.tombstone_retention_ms),
        }
        return {field: value for field, (said, value) in changes.items() if said is not None}


class TopicChanges(TypedDict, total=False):
    """What `alter_topic` takes as keywords; each as in `TopicConfig`."""

    partitions: int | None
    replication_factor: int | None
    retention: str | None
    retention_bytes: str | int | None
    cleanup: str | None
    compression: str | None
    max_message_size: str | int | None
    tombstone_retention: str | None


def wanted_changes(config: TopicConfig | None, changes: TopicChanges) -> TopicConfig:
    """What is to be changed, however it was said. Raises `Misuse` when it was said twice or not at
    all, or something else was."""
    unknown = sorted(set(changes) - set(TopicChanges.__annotations__))
    if unknown:
        raise Misuse(
            f"A topic's {unknown[0]!r} cannot be altered; these can be:"
            f" {', '.join(TopicChanges.__annotations__)}."
        )
    if config is not None and changes:
        raise Misuse("Say what to alter by a TopicConfig or by keywords, not by both.")
    wanted = TopicConfig(**changes) if config is None else config
    if wanted == TopicConfig():
        raise Misuse("Nothing to alter was named; for example retention='1d'.")
    return wanted


def _cleanup(value: str | None) -> str:
    """Two words may come in either order."""
    words = sorted(word.strip() for word in ("delete" if value is None else value).split(","))
    return ",".join(words)


def _limit(parse: Callable[[object], int], name: str, value: object) -> int | None:
    return None if value is None or value == UNLIMITED else _parse(parse, name, value)


def _parse(parse: Callable[[object], int], name: str, value: object) -> int:
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}.", key=name, value=value) from None


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic as the cluster sees it; replicas: node names, preferred leader first."""

    name: str
    partitions: int
    replication_factor: int
    settings: TopicSettings
    replicas: dict[int, list[str]]
