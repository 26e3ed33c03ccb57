"""What is measured: scenarios, their runs, and figures drawn from several runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aegis_cluster.bench.stage import Stage

FSYNC: Final = "fsync"
MEMORY: Final = "memory"

RECORDS_S: Final = "records/s"
MB_S: Final = "MB/s"
P50_MS: Final = "p50 ms"
P99_MS: Final = "p99 ms"
CREATE_S: Final = "s to create"
READY_S: Final = "s to ready after up"
RELED_S: Final = "s to lead again"
SETTLED_S: Final = "s to settle"
PAUSE_S: Final = "s without what is kept"
IDLE_CPU: Final = "% of a core, idle"
RSS_MB: Final = "MB per shard"
ELECTIONS: Final = "elections"
SMALLER_IS_BETTER: Final = frozenset(
    {P50_MS, P99_MS, CREATE_S, READY_S, RELED_S, SETTLED_S, PAUSE_S, IDLE_CPU, RSS_MB, ELECTIONS}
)


class WrongCount(AegisError):
    """What was read back is not what was acknowledged: the figure means nothing."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. figures: by unit. extra: what else is worth knowing, not judged."""

    records: int
    seconds: float
    figures: dict[str, float]
    client_cpu_s: float = 0.0
    nodes_cpu_s: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def cpu_us(self) -> tuple[float, float]:
        """Processor time of the client and of all nodes, per record, in microseconds."""
        count = max(self.records, 1)
        return self.client_cpu_s / count * 1e6, self.nodes_cpu_s / count * 1e6


@dataclass(frozen=True, slots=True)
class Goal:
    """What one figure of a scenario must reach, and what we aim at.

    limit: the machine's limit that the figure is shown as a share of; None where none applies.
    of_limit: must and aim are shares of it, not figures of their own.
    """

    unit: str
    limit: str | None
    must: float | None = None
    aim: float | None = None
    of_limit: bool = False

    def target(self, value: float | None, limit: float) -> float | None:
        """Must or aim as a figure of this unit."""
        return value * limit if self.of_limit and value is not None else value


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to measure. goals: by durability; none for one it is not measured with.

    apart: it takes minutes and changes the nodes, so it has nodes of its own, and is measured once,
    and only when it is named.
    """

    name: str
    title: str
    run: Callable[[Stage, float], Awaitable[Sample]]
    goals: dict[str, tuple[Goal, ...]]
    prepare: Callable[[Stage], Awaitable[None]] | None = None
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A scenario's figure over all of its runs."""

    scenario: str
    title: str
    durability: str
    unit: str
    median: float
    least: float
    most: float
    limit_name: str | None
    share: float | None
    """How near it comes to the limit: 1.0 is there, whichever way is better."""
    must: float | None
    aim: float | None
    client_us: float
    nodes_us: float
    extra: dict[str, float]

    @property
    def reached(self) -> str:
        """`aim`, `must`, `below`, or nothing where no goal is set."""
        if self.must is None:
            return ""
        if self.aim is not None and _at_least(self.unit, self.median, self.aim):
            return "aim"
        return "must" if _at_least(self.unit, self.median, self.must) else "below"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "scenario": self.scenario,
            "durability": self.durability,
            "unit": self.unit,
            "median": self.median,
            "min": self.least,
            "max": self.most,
            "limit": self.limit_name,
            "share_of_limit": self.share,
            "must": self.must,
            "aim": self.aim,
            "reached": self.reached,
            "client_cpu_us_per_record": self.client_us,
            "nodes_cpu_us_per_record": self.nodes_us,
            **({"extra": self.extra} if self.extra else {}),
        }


def _at_least(unit: str, have: float, want: float) -> bool:
    return have <= want if unit in SMALLER_IS_BETTER else have >= want


def _share(unit: str, median: float, limit: float) -> float:
    return limit / median if unit in SMALLER_IS_BETTER else median / limit


def figures_of(
    scenario: Scenario, durability: str, samples: list[Sample], limits: dict[str, float]
) -> list[Figure]:
    """One figure for each goal of the scenario."""
    client, nodes = zip(*(sample.cpu_us for sample in samples), strict=True)
    extra = {
        name: statistics.median(sample.extra[name] for sample in samples)
        for name in samples[0].extra
    }
    found = []
    for goal in scenario.goals[durability]:
        values = [sample.figures[goal.unit] for sample in samples]
        median = statistics.median(values)
        limit = 0.0 if goal.limit is None else limits[goal.limit]
        share = None if goal.limit is None else _share(goal.unit, median, limit)
        figure = Figure(
            scenario=scenario.name,
            title=scenario.title,
            durability=durability,
            unit=goal.unit,
            median=median,
            least=min(values),
            most=max(values),
            limit_name=goal.limit,
            share=share,
            must=goal.target(goal.must, limit),
            aim=goal.target(goal.aim, limit),
            client_us=statistics.median(client),
            nodes_us=statistics.median(nodes),
            extra=extra,
        )
        found.append(figure)
    return found
