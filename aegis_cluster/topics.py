"""How a topic is made, and how it is described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.config import StreamingConfig, parse_duration, parse_size
from aegis_cluster.errors import ConfigError
from aegis_cluster.wire.descriptions import TopicSettings

if TYPE_CHECKING:
    from collections.abc import Callable

UNLIMITED = "unlimited"


@dataclass(frozen=True, slots=True)
class TopicConfig:
    """How a topic is made; None means the configured default.

    partitions: 1. replication_factor: min(3, nodes). retention: `"7d"`, or `"unlimited"`.
    retention_bytes: unlimited. cleanup: `"delete"`. compression: none (of its producers).
    max_message_size: `"1MB"`.
    """

    partitions: int | None = None
    replication_factor: int | None = None
    retention: str | None = None
    retention_bytes: str | int | None = None
    cleanup: str | None = None
    compression: str | None = None
    max_message_size: str | int | None = None
    kind: str = "topic"

    def settings(self, defaults: StreamingConfig | None = None) -> TopicSettings:
        """As numbers. Raises `ConfigError`, naming the value."""
        defaults = defaults or StreamingConfig()
        return TopicSettings(
            kind=self.kind,
            retention_ms=self._retention_ms(defaults),
            retention_bytes=None
            if self.retention_bytes is None
            else _parse(parse_size, "retention_bytes", self.retention_bytes),
            cleanup=self.cleanup or "delete",
            compression=self.compression or "none",
            max_message_bytes=defaults.max_message_bytes
            if self.max_message_size is None
            else _parse(parse_size, "max_message_size", self.max_message_size),
        )

    def _retention_ms(self, defaults: StreamingConfig) -> int | None:
        if self.retention is None:
            return defaults.default_retention_ms
        if self.retention == UNLIMITED:
            return None
        return _parse(parse_duration, "retention", self.retention)


def _parse(parse: Callable[[object], int], name: str, value: object) -> int:
    try:
        return parse(value)
    except ValueError:
        raise ConfigError(
            f"{name} = {value!r} is not understood; write it like '7d' or '1MB'.", key=name
        ) from None


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic as the cluster sees it; replicas: node names, preferred leader first."""

    name: str
    partitions: int
    replication_factor: int
    settings: TopicSettings
    replicas: dict[int, list[str]]
