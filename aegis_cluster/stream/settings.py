"""How a processor runs; every field is a keyword of `StreamProcessor(…)`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from aegis_cluster.errors import ConfigError
from aegis_cluster.stream.windows import span_ms

if TYPE_CHECKING:
    from pathlib import Path

ON_ERROR = ("stop", "skip", "dead_letter")


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """on_error: what becomes of a record at which a step fails: `"stop"` the processor before it
    (a restart begins with it again), `"skip"` it, or send it to the topic `dead_letter` (default:
    `<application_id>.dead`, made if it is missing) with the reason in its headers.
    commit_interval: results, state and positions become visible together, so often; with much to
    do in fewer, larger transactions, up to ten times as late.
    idle_timeout: a partition that has been read to its end and got nothing for so long does not
    hold event time back; it follows the others.
    standby_replicas: so many other workers keep a copy of each task's state up to date, so that the
    task moves there without a long restore; 0: none does.
    state_dir: where tasks keep their state; everything in it can be rebuilt from the changelogs.
    """

    on_error: str = "stop"
    dead_letter: str | None = None
    commit_interval: timedelta = timedelta(milliseconds=100)
    idle_timeout: timedelta = timedelta(seconds=5)
    standby_replicas: int = 0
    state_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ConfigError(
                f"on_error = {self.on_error!r}; allowed: {', '.join(map(repr, ON_ERROR))}.",
                key="on_error",
            )
        if self.dead_letter is not None and self.on_error != "dead_letter":
            raise ConfigError(
                f"dead_letter = {self.dead_letter!r} means something with on_error='dead_letter'"
                " only.",
                key="dead_letter",
            )
        if type(self.standby_replicas) is not int or self.standby_replicas < 0:
            raise ConfigError(
                f"standby_replicas = {self.standby_replicas!r}; allowed: 0 or more.",
                key="standby_replicas",
            )
        span_ms(self.commit_interval, "commit_interval")
        span_ms(self.idle_timeout, "idle_timeout")

    @classmethod
    def of(cls, given: dict[str, Any]) -> ProcessorSettings:
        """From keywords. Raises `ConfigError` for one that is none of them."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"A processor has no setting {unknown[0]!r}; these are: {', '.join(known)}.",
                key=unknown[0],
            )
        return cls(**given)
