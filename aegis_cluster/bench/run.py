"""From options to figures: every scenario, several times, with the limits measured beside it."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.bench import capture, data_path, events, groups, pipeline, scale, stream
from aegis_cluster.bench.figures import FSYNC, MEMORY, Figure, Sample, Scenario, figures_of
from aegis_cluster.bench.machine import Limit, measure
from aegis_cluster.bench.stage import running_stage
from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.bench.stage import Stage
    from aegis_cluster.node.local import Probe

SCENARIOS: Final[tuple[Scenario, ...]] = (
    *data_path.SCENARIOS,
    *pipeline.SCENARIOS,
    *groups.SCENARIOS,
    *scale.SCENARIOS,
    *capture.SCENARIOS,
    *events.SCENARIOS,
    *stream.SCENARIOS,
)
DURABILITIES: Final = (FSYNC, MEMORY)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. only: names of scenarios, in any order; none: all of them."""

    seconds: float = 10.0
    repeats: int = 3
    only: tuple[str, ...] = ()
    durabilities: tuple[str, ...] = DURABILITIES
    partitions: int = 3

    def scenarios(self, durability: str) -> list[Scenario]:
        """Those that are asked for and measured with this durability. Raises `ConfigError`."""
        known = [scenario.name for scenario in SCENARIOS]
        unknown = [name for name in self.only if name not in known]
        if unknown:
            raise ConfigError(f"There is no scenario {unknown[0]!r}; there are: {', '.join(known)}")
        wanted = self.only or tuple(one.name for one in SCENARIOS if not one.apart)
        return [one for one in SCENARIOS if one.name in wanted and durability in one.goals]


@dataclass(slots=True)
class Report:
    """All that one run of the benchmark found."""

    plan: Plan
    machine: dict[str, Any]
    limits: list[Limit] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "machine": self.machine,
            "seconds": self.plan.seconds,
            "repeats": self.plan.repeats,
            "partitions": self.plan.partitions,
            "limits": [limit._asdict() for limit in self.limits],
            "figures": [figure.to_json() for figure in self.figures],
        }


async def run(plan: Plan, directory: Path, *, probe: Probe, tell: Callable[[str], None]) -> Report:
    """Measure what the plan says, with all files in `directory`.

    tell: gets a sentence about each step. Raises `WrongCount` when records are missing.
    """
    report = Report(plan, describe_machine())
    tell("measuring the machine")
    report.limits = measure(directory, min(plan.seconds / 5, 2.0))
    limits = {limit.name: limit.value for limit in report.limits}
    for durability in plan.durabilities:
        scenarios = plan.scenarios(durability)
        together = [one for one in scenarios if not one.apart]
        apart = [[one] for one in scenarios if one.apart]
        for number, group in enumerate(filter(None, (together, *apart))):
            tell(f"starting three nodes, durability = {durability}")
            place = directory / f"{durability}-{number}"
            place.mkdir()
            async with running_stage(place, durability, plan.partitions, probe=probe) as stage:
                for scenario in group:
                    samples = await _repeat(stage, scenario, plan, tell)
                    report.figures += figures_of(scenario, durability, samples, limits)
    return report


async def _repeat(
    stage: Stage, scenario: Scenario, plan: Plan, tell: Callable[[str], None]
) -> list[Sample]:
    if scenario.prepare is not None:
        tell(f"{scenario.name}: preparing")
        await scenario.prepare(stage)
    samples = []
    for number in range(1, (1 if scenario.apart else plan.repeats) + 1):
        gc.collect()
        sample = await scenario.run(stage, plan.seconds)
        samples.append(sample)
        tell(f"{scenario.name} ({stage.durability}), run {number}: {describe(sample)}")
    return samples


def describe(sample: Sample) -> str:
    """One run in a line."""
    shown = {**sample.figures, **sample.extra}
    client, nodes = sample.cpu_us
    figures = ", ".join(
        f"{value:,.{2 if value < 100 else 0}f} {unit}" for unit, value in shown.items()
    )
    return f"{figures}; processor per record: client {client:.2f} µs, nodes {nodes:.2f} µs"


def describe_machine() -> dict[str, Any]:
    """Where and of what the figures are."""
    return {
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
