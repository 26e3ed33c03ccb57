"""How to read: what `engine.subscribe` takes.

A value is checked when it is made, so a wrong one is refused where it was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from aegis_cluster import arguments
from aegis_cluster.config import parse_duration
from aegis_cluster.errors import ConfigError
from aegis_cluster.limits import (
    GROUP_NAME_CHARS_MAX,
    SESSION_TIMEOUT_MS_MAX,
    SESSION_TIMEOUT_MS_MIN,
)
from aegis_cluster.message import Offset
from aegis_cluster.wire.protocol import Isolation


class DeliveryMode(Enum):
    """How often a message is handled when things fail, in a consumer group.

    AT_MOST_ONCE: the group's position is committed before a message is handed out, so a consumer
    that dies loses what it had in hand, and nothing comes twice.
    AT_LEAST_ONCE: the position moves over messages that were acknowledged, so a consumer that dies
    loses nothing, and what it had not committed yet comes again.
    EXACTLY_ONCE: positions are committed by `tx.send_offsets` only, in one transaction with what
    was made of the messages: a consumer that dies at any moment leaves both or none of them, and
    what it had not committed comes again, also after an abort. It holds for what is written in the
    transaction, and for readers with `read_committed`; what a handler does elsewhere may be done
    again. Acknowledging a message does nothing here.
    """

    AT_MOST_ONCE = "at_most_once"
    AT_LEAST_ONCE = "at_least_once"
    EXACTLY_ONCE = "exactly_once"


class AckMode(Enum):
    """When a message counts as handled; without a group there is no position to move.

    MANUAL: when `ack()` is called. AUTO: when the next one is asked for. NONE: never; no positions
    are kept.
    """

    MANUAL = "manual"
    AUTO = "auto"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SubscribeConfig:
    """How to read.

    group_id: share the partitions with all members of this group, and keep positions there.
    start: where, in every partition; with a group: where that has no position yet.
    delivery_mode, ack_mode (None: AUTO where `auto_commit = true`, else MANUAL): see there.
    isolation: `"read_committed"`: of a transaction either everything, once it is committed, or
    nothing; an open one holds back what comes after its start in the same partition.
    `"read_uncommitted"`: everything at once, aborted messages included.
    max_poll_records: of one `poll`; None: as configured (500).
    session_timeout ("30s"): a member that is silent for so long is dead; None: as configured.
    member_id: a name that outlives the process: a restart within the session time-out moves
    nothing. None: a name for this time only. Raises `ConfigError`.
    """

    group_id: str | None = None
    start: Offset = Offset.LATEST
    delivery_mode: DeliveryMode = DeliveryMode.AT_LEAST_ONCE
    ack_mode: AckMode | None = None
    isolation: str = "read_committed"
    max_poll_records: int | None = None
    session_timeout: str | None = None
    member_id: str | None = None

    def __post_init__(self) -> None:
        arguments.setting(self.group_id, (str,), "group_id", "the group's name, as text")
        arguments.setting(self.member_id, (str,), "member_id", "a name, as text")
        arguments.setting(self.max_poll_records, (int,), "max_poll_records", "1 or more")
        for key, value, kind in (
            ("start", self.start, Offset),
            ("delivery_mode", self.delivery_mode, DeliveryMode),
            ("ack_mode", self.ack_mode or AckMode.MANUAL, AckMode),
        ):
            if not isinstance(value, kind):
                raise ConfigError(
                    f"{key} = {value!r}; allowed: {_allowed(kind)}.", key=key, value=value
                )
        self._check_names()
        self.session_timeout_ms(0)
        if self.isolation not in ("read_committed", "read_uncommitted"):
            raise ConfigError(
                f"isolation = {self.isolation!r}; allowed: 'read_committed', 'read_uncommitted'.",
                key="isolation",
            )
        if self.max_poll_records is not None and self.max_poll_records < 1:
            raise ConfigError(
                f"max_poll_records = {self.max_poll_records}; allowed: 1 or more.",
                key="max_poll_records",
            )

    def _check_names(self) -> None:
        for key, value in (("group_id", self.group_id), ("member_id", self.member_id)):
            if value is not None and not 1 <= len(value) <= GROUP_NAME_CHARS_MAX:
                raise ConfigError(
                    f"{key} = {value[:300]!r}; allowed: 1 to {GROUP_NAME_CHARS_MAX} characters.",
                    key=key,
                )
        if self.group_id is not None:
            return
        for key in ("member_id", "session_timeout"):
            if getattr(self, key) is not None:
                raise ConfigError(
                    f"{key} means something in a group only; give a group_id.", key=key
                )
        if self.delivery_mode is not DeliveryMode.AT_LEAST_ONCE:
            raise ConfigError(
                f"delivery_mode = {self.delivery_mode.name} commits positions, and only a group"
                " keeps them; give a group_id.",
                key="delivery_mode",
            )

    @property
    def sees(self) -> Isolation:
        """The isolation, as it is asked of a leader."""
        committed = self.isolation == "read_committed"
        return Isolation.COMMITTED if committed else Isolation.UNCOMMITTED

    def session_timeout_ms(self, default_ms: int) -> int:
        """In milliseconds. Raises `ConfigError`."""
        if self.session_timeout is None:
            return default_ms
        try:
            found = parse_duration(self.session_timeout)
        except (TypeError, ValueError):
            found = 0
        if SESSION_TIMEOUT_MS_MIN <= found <= SESSION_TIMEOUT_MS_MAX:
            return found
        raise ConfigError(
            f'session_timeout = {self.session_timeout!r}; allowed: a duration such as "30s",'
            f" from {SESSION_TIMEOUT_MS_MIN} ms to {SESSION_TIMEOUT_MS_MAX} ms.",
            key="session_timeout",
        )


def _allowed(kind: type[Offset] | type[Enum]) -> str:
    if issubclass(kind, Enum):
        return ", ".join(f"{kind.__name__}.{one.name}" for one in kind)
    return "Offset.EARLIEST, Offset.LATEST, Offset.at(n), Offset.at_time(t)"
