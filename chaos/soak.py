"""Runs the simulator from seed to seed, until a number of seeds, a time or a failure ends it.

The idea: whoever reads the output can replay what it found: seed, commit and command come first.
Exit codes tell kinds of failure apart: 126 a run that grows without bound, 127 crash, 128 no
progress, 129 a broken promise.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.scheduler import Runaway
from aegis_cluster.testing.simulation import Verdict, run_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.testing.simulation import Report

ROOT: Final = Path(__file__).parents[1]
SHOW_EVERY_S: Final = 10.0
CPU_SECONDS_MAX: Final = 120
"""A seed takes well under a second."""
MEMORY_BYTES_MAX: Final = 4 * 1024**3
"""Address space of one process; seeds need a few hundred MiB."""
QUEUE_SEEDS: Final = 4
"""Seeds handed out ahead, for each process."""


@cache
def commit() -> str:
    """The commit that is being tested, marked when files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def describe(report: Report) -> str:
    """What somebody needs to see and to replay a failure."""
    lines = [
        f"SEED {report.seed}: {report.verdict.name}",
        f"commit {commit()}",
        f"replay: ./tools/soak --seed {report.seed}",
        f"trace {report.trace}, {report.events} events, {report.counts}",
        *(f"  {problem}" for problem in report.problems),
        "what happened:",
        *(f"  {act}" for act in report.acts[-60:]),
    ]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one seed; `text` is for the reader, and empty when all was well."""

    seed: int
    verdict: Verdict
    text: str = ""


def examine(seed: int) -> Finding:
    """Run one seed in this process, guarded against what would never end."""
    report = guarded(seed)
    is_well = report.verdict is Verdict.OK
    return Finding(seed, report.verdict, "" if is_well else describe(report))


def guarded(seed: int) -> Report:
    """A run that spins within one event, where virtual time stands still, is a `Runaway` too."""

    def stop(*_: object) -> None:
        raise Runaway(f"more than {CPU_SECONDS_MAX} seconds of computing for one seed")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_MAX)
    try:
        return run_seed(seed)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def prepare() -> None:
    """Of every process that runs seeds: no logs, and no more memory than is good."""
    logging.disable(logging.CRITICAL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, hard))


def here(seeds: Iterator[int]) -> Iterator[Finding]:
    """One seed after the other, in this process."""
    prepare()
    yield from map(examine, seeds)


def side_by_side(seeds: Iterator[int], jobs: int) -> Iterator[Finding]:
    """Seeds in several processes, in the order in which they are done."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare) as pool:
        running: dict[Future[Finding], int] = {}
        try:
            while True:
                for seed in itertools.islice(seeds, QUEUE_SEEDS * jobs - len(running)):
                    running[pool.submit(examine, seed)] = seed
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    seed = running.pop(future)
                    yield _result(future, seed)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Finding], seed: int) -> Finding:
    try:
        return future.result()
    except BrokenProcessPool:
        text = f"SEED {seed} or one beside it ended its process\nreplay: ./tools/soak --seed {seed}"
        return Finding(seed, Verdict.CRASH, text)


class Soak:
    """Seed after seed, until there were enough, or the time is over, or one has failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begun = time.monotonic()
        self._shown = self._begun
        self._count = 0
        self._failed: list[Finding] = []

    def run(self) -> Verdict:
        options = self._options
        print(
            f"seeds from {options.start} on, commit {commit()}; any of them again:"
            " ./tools/soak --seed N",
            flush=True,
        )
        jobs: int = options.jobs
        for finding in here(self._seeds()) if jobs == 1 else side_by_side(self._seeds(), jobs):
            self._count += 1
            if finding.verdict is not Verdict.OK:
                self._failed.append(finding)
                print(finding.text, flush=True)
                if not options.keep_going:
                    break
            self._show(finding.seed)
        self._sum_up()
        return max((finding.verdict for finding in self._failed), default=Verdict.OK)

    def _seeds(self) -> Iterator[int]:
        options = self._options
        for seed in itertools.count(options.start):
            if options.minutes is not None:
                seconds: float = options.minutes * 60
                if time.monotonic() - self._begun >= seconds:
                    return
            elif seed >= options.start + options.seeds:
                return
            yield seed

    def _show(self, seed: int) -> None:
        now = time.monotonic()
        if now - self._shown >= SHOW_EVERY_S:
            self._shown = now
            print(f"{self._count} seeds, near {seed}; {self._rate()}", flush=True)

    def _rate(self) -> str:
        seconds = time.monotonic() - self._begun
        return f"{seconds:.0f} s, {self._count / max(seconds, 0.001):.1f} a second"

    def _sum_up(self) -> None:
        print(f"{self._count} seeds in {self._rate()}; {len(self._failed)} failed", flush=True)
        for finding in sorted(self._failed, key=lambda one: one.seed):
            print(f"  {finding.verdict.name} ./tools/soak --seed {finding.seed}", flush=True)


def replay(seed: int) -> Verdict:
    """One seed, twice: what it found, and whether it is the same both times."""
    print(f"SEED {seed}\ncommit {commit()}\nreplay: ./tools/soak --seed {seed}")
    prepare()
    first, second = guarded(seed), guarded(seed)
    print(describe(first))
    if first.trace != second.trace:
        print(f"It is NOT deterministic: {first.trace} and {second.trace}")
        return Verdict.CRASH
    return first.verdict


def main() -> int:
    """The command line of `tools/soak`."""
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one, twice, and tell all about it")
    parser.add_argument("--minutes", type=float, help="run for so long instead")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    return Soak(options).run()


if __name__ == "__main__":
    sys.exit(main())
