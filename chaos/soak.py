"""Runs the simulator from seed to seed, until a number of seeds, a time or a failure ends it.

The idea: whoever reads the output can replay what it found: seed, commit and command come first.
Exit codes tell kinds of failure apart: 127 crash, 128 no progress, 129 a broken promise.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.testing.simulation import Verdict, run_seed

if TYPE_CHECKING:
    from aegis_cluster.testing.simulation import Report

ROOT: Final = Path(__file__).parents[1]
SHOW_EVERY_S: Final = 10.0


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


class Soak:
    """One process's share of the seeds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begun = time.monotonic()
        self._shown = self._begun
        self._count = 0
        self._worst = Verdict.OK

    def run(self) -> Verdict:
        options = self._options
        seed: int = options.start
        while not self._is_over():
            report = run_seed(seed)
            self._count += 1
            if report.verdict is not Verdict.OK:
                self._worst = max(self._worst, report.verdict)
                print(describe(report), flush=True)
                if not options.keep_going:
                    break
            self._show(seed)
            seed += options.stride
        self._show(seed, last=True)
        return self._worst

    def _is_over(self) -> bool:
        options = self._options
        if options.minutes is not None:
            seconds: float = options.minutes * 60
            return time.monotonic() - self._begun >= seconds
        seeds: int = options.seeds
        done: int = self._count * options.stride
        return done >= seeds

    def _show(self, seed: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._shown >= SHOW_EVERY_S:
            self._shown = now
            rate = self._count / max(now - self._begun, 0.001)
            print(f"{self._count} seeds, up to {seed}; {rate:.1f} a second", flush=True)


def replay(seed: int) -> Verdict:
    """One seed, twice: what it found, and whether it is the same both times."""
    print(f"SEED {seed}\ncommit {commit()}\nreplay: ./tools/soak --seed {seed}")
    first, second = run_seed(seed), run_seed(seed)
    print(describe(first))
    if first.trace != second.trace:
        print(f"It is NOT deterministic: {first.trace} and {second.trace}")
        return Verdict.CRASH
    return first.verdict


def spread(options: argparse.Namespace) -> int:
    """Share the seeds among several processes."""
    children = []
    for job in range(options.jobs):
        arguments = ["--start", str(options.start + job), "--stride", str(options.jobs)]
        arguments += ["--seeds", str(options.seeds)]
        if options.minutes is not None:
            arguments += ["--minutes", str(options.minutes)]
        if options.keep_going:
            arguments.append("--keep-going")
        children.append(subprocess.Popen([sys.executable, "-m", "chaos.soak", *arguments]))
    return max(child.wait() for child in children)


def main() -> int:
    """The command line of `tools/soak`."""
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one, twice, and tell all about it")
    parser.add_argument("--minutes", type=float, help="run for so long instead")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        return replay(options.seed)
    if options.jobs > 1:
        return spread(options)
    return Soak(options).run()


if __name__ == "__main__":
    sys.exit(main())
