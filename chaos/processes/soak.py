"""Runs on real processes, seed after seed, until a number, a time or a failure ends it.

Exit codes are the simulator's: 127 no verdict or a crash, 128 no progress after healing, 129 a
broken promise. What failed is kept in `soak/`, with the command that plays its schedule again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.simulation import Verdict as Outcome
from chaos.processes.checks import Judgement, Verdict, overall
from chaos.processes.run import Run, describe, recheck
from chaos.processes.schedule import draw
from chaos.soak import commit

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).parents[2]
KEPT: Final = ROOT / "soak"
SECONDS: Final = 40.0
SIMULATED_SHARE: Final = 0.25
"""Of the time of a mixed soak."""
LATE: Final = frozenset({"progress", "unseen", "group_unseen", "transactions_progress"})
"""Checks that ask whether something came about at all."""


def outcome(judgements: Sequence[Judgement]) -> Outcome:
    """The exit code of a run."""
    invalid = {one.check for one in judgements if one.verdict is Verdict.INVALID}
    if invalid - LATE - {"crash"}:
        return Outcome.SAFETY
    if invalid & LATE:
        return Outcome.LIVENESS
    return Outcome.OK if overall(judgements) is Verdict.VALID else Outcome.CRASH


def run_seed(seed: int, seconds: float, *, keep: bool, mistake: str = "") -> Outcome:
    """One run; its directory stays if something is wrong."""
    replay = f"./tools/soak --processes --seed {seed} --seconds {seconds:g}"
    directory = KEPT / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-seed-{seed}"
    plan = draw(seed, seconds)
    print(f"SEED {seed}\ncommit {commit()}\nreplay: {replay}", flush=True)
    print(
        f"workload {plan.workload}, {plan.shards} shards, {plan.partitions} partitions,"
        f" {len(plan.steps)} steps",
        flush=True,
    )
    judgements = Run(plan, directory, lambda line: print(line, flush=True), mistake).run()
    found = outcome(judgements)
    print(describe(judgements))
    if found is not Outcome.OK:
        print(f"SEED {seed}: {found.name}; kept in {directory}\nreplay: {replay}")
    elif keep:
        print(f"kept in {directory}")
    else:
        shutil.rmtree(directory)
    sys.stdout.flush()
    return found


def judge_again(directory: Path) -> Outcome:
    """The verdicts of a kept history."""
    judgements = recheck(directory)
    for one in judgements:
        print(f"{one.verdict.value:8} {one.check}")
        for sentence in one.found:
            print(f"    {sentence}")
    return outcome(judgements)


class Soak:
    """One seed after another; between them, the simulator."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begun = time.monotonic()
        self._worst = Outcome.OK
        self._simulated_s = 0.0
        self._simulator_seed = options.start * 1_000

    def run(self) -> int:
        seed: int = self._options.start
        while not self._is_over(seed):
            self._take(run_seed(seed, self._options.seconds, keep=self._options.keep))
            seed += 1
            if self._worst is not Outcome.OK and not self._options.keep_going:
                break
            if not self._options.processes:
                self._simulate()
        print(f"{seed - self._options.start} runs: {self._worst.name}")
        return self._worst

    def _is_over(self, seed: int) -> bool:
        options = self._options
        if options.minutes is None:
            end: int = options.start + options.runs
            return seed >= end
        end_s: float = self._begun + options.minutes * 60
        return time.monotonic() >= end_s

    def _simulate(self) -> None:
        """Give the simulator its share of the time so far."""
        begun = time.monotonic()
        due_s = (begun - self._begun) * SIMULATED_SHARE - self._simulated_s
        if due_s <= 0:
            return
        command = [sys.executable, "-m", "chaos.soak", "--minutes", f"{due_s / 60:.2f}"]
        command += ["--start", str(self._simulator_seed)]
        self._simulator_seed += 1_000
        self._take(Outcome(subprocess.run(command, cwd=ROOT, check=False).returncode))
        self._simulated_s += time.monotonic() - begun

    def _take(self, found: Outcome) -> None:
        self._worst = max(self._worst, found)


def parser() -> argparse.ArgumentParser:
    """The command line of `tools/soak` for real processes."""
    made = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    made.add_argument("--minutes", type=float, help="run for so long")
    made.add_argument("--processes", action="store_true", help="real processes only")
    made.add_argument("--runs", type=int, default=1, help="how many, without --minutes")
    made.add_argument("--seed", type=int, help="run this schedule, once")
    made.add_argument("--start", type=int, help="the first seed; default: from the clock")
    made.add_argument("--seconds", type=float, default=SECONDS, help="of faults in each run")
    made.add_argument("--keep", action="store_true", help="keep what is valid too")
    made.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    made.add_argument("--recheck", type=Path, metavar="DIR", help="judge a kept history again")
    made.add_argument("--mistake", default="", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    if options.recheck is not None:
        return judge_again(options.recheck)
    if options.seed is not None:
        return run_seed(options.seed, options.seconds, keep=options.keep, mistake=options.mistake)
    if options.start is None:
        options.start = int(time.time()) % 1_000_000
    return Soak(options).run()


if __name__ == "__main__":
    sys.exit(main())
