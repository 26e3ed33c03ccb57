"""One run: a database under load is captured by two connectors into a feed on three nodes, while
connectors, leaders and the database itself are killed; then the feed has to be the database."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster import Offset, SubscribeConfig
from aegis_cluster.bench.stage import running_stage
from aegis_cluster.cdc.envelope import change_from
from aegis_cluster.cli.connection import cluster_status as cli_status
from aegis_cluster.client.admin import cluster_status
from aegis_cluster.errors import AegisError
from aegis_cluster.node.node_files import bootstrap_of
from chaos.cdc.databases import Postgres, SQLite
from chaos.cdc.fold import Fold, difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.bench.stage import Stage
    from chaos.cdc.databases import Database

FEED: Final = "captured"
CONNECTORS: Final = 2
KINDS: Final = ("connector", "leader", "database")
KEEP_UP_S: Final = 0.2
CATCH_UP_S: Final = 120.0
"""After the end of all faults the feed has to be the database within so long."""
VALID, CRASH, LIVENESS, SAFETY = 0, 127, 128, 129


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. pause_s: from one blow to the next, at least and at most."""

    source: str
    seconds: float
    seed: int
    partitions: int = 1
    pause_s: tuple[float, float] = (1.0, 4.0)


@dataclass(slots=True)
class Outcome:
    """How a run went: an exit code, and what is to be said about it."""

    code: int = VALID
    problems: list[str] = field(default_factory=list)
    blows: dict[str, int] = field(default_factory=dict)
    changes: int = 0
    snapshot_rows: int = 0
    rows: int = 0
    caught_up_s: float = 0.0

    def describe(self) -> str:
        """For a person."""
        blows = ", ".join(f"{count} x {what}" for what, count in sorted(self.blows.items()))
        verdict = {VALID: "VALID", LIVENESS: "NO PROGRESS", SAFETY: "BROKEN PROMISE"}
        return "\n".join(
            (
                f"{verdict.get(self.code, 'CRASH')}: {self.changes} changes, {self.snapshot_rows}"
                f" of them rows of snapshots; {self.rows} rows in the database; equal"
                f" {self.caught_up_s:.1f} s after the end; killed: {blows or 'nothing'}",
                *(f"  {problem}" for problem in self.problems),
            )
        )


class Run:
    """Faults, and the processes that they strike."""

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        database: Database,
        directory: Path,
        say: Callable[[str], None],
    ) -> None:
        self.outcome = Outcome()
        self._plan, self._stage, self._database, self._say = plan, stage, database, say
        self._rng = random.Random(plan.seed)
        self._bootstrap = bootstrap_of(stage.nodes)
        self._config = directory / "connector.toml"
        self._config.write_text(
            f'[cdc]\nsource = "{database.source}"\nname = "{FEED}"\n'
            f"partitions = {plan.partitions}\nreplication_factor = 3\n"
        )
        self._log = (directory / "connectors.log").open("ab")
        self._connectors: list[subprocess.Popen[bytes]] = []
        self._rogues: list[subprocess.Popen[bytes]] = []
        self._next_kinds: list[str] = []

    # ---- processes

    def _connector(self) -> subprocess.Popen[bytes]:
        command = ["aegis_cluster.cli", "cdc", "run", str(self._config), "--bootstrap"]
        return self._start(*command, self._bootstrap)

    def _rogue(self) -> subprocess.Popen[bytes]:
        return self._start("chaos.cdc.rogue", str(self._config), self._bootstrap)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=self._log,
            stderr=self._log,
            cwd=Path(__file__).parents[2],
        )

    def _keep_up(self) -> None:
        """Whatever died is started again."""
        for number, process in enumerate(self._connectors):
            if process.poll() is not None:
                self._connectors[number] = self._connector()
        for number, process in enumerate(self._rogues):
            if process.poll() is not None:
                self._rogues[number] = self._rogue()
        self._database.keep_up()

    def close(self) -> None:
        """End every process of this run."""
        self._database.end()
        for process in (*self._connectors, *self._rogues):
            process.kill()
            process.wait()
        self._log.close()

    # ---- what happens

    async def play(self) -> None:
        """Load and blows, then quiet, then the judge."""
        self._connectors = [self._connector() for _ in range(CONNECTORS)]
        await self._until_begun()
        await asyncio.to_thread(self._database.begin)
        end = time.monotonic() + self._plan.seconds
        rogue_from, rogue_until = end - 0.7 * self._plan.seconds, end - 0.3 * self._plan.seconds
        next_blow = time.monotonic() + self._pause()
        while (now := time.monotonic()) < end or self._blows < len(KINDS):
            await asyncio.sleep(KEEP_UP_S)
            if rogue_from <= now < rogue_until and not self._rogues:
                self._say("a second holder of the lease begins")
                self._rogues = [self._rogue()]
            if now >= rogue_until and self._rogues:
                self._end_rogues()
            await asyncio.to_thread(self._keep_up)
            if now >= next_blow:
                await self._blow()
                next_blow = time.monotonic() + self._pause()
        self._end_rogues()
        await asyncio.to_thread(self._database.end)
        await self._judge()

    @property
    def _blows(self) -> int:
        return sum(self.outcome.blows.values())

    def _pause(self) -> float:
        return self._rng.uniform(*self._plan.pause_s)

    async def _until_begun(self) -> None:
        """The feed is there."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(AegisError):
                    await self._stage.engine.offsets(FEED)
                    return
                await asyncio.sleep(KEEP_UP_S)

    def _end_rogues(self) -> None:
        for process in self._rogues:
            process.kill()
            process.wait()
        self._rogues = []

    async def _blow(self) -> None:
        if not self._next_kinds:  # each once, in any order; then again
            self._next_kinds = self._rng.sample(KINDS, len(KINDS))
        kind = self._next_kinds.pop()
        self._say(f"kill -9 of a {kind}")
        self.outcome.blows[kind] = self.outcome.blows.get(kind, 0) + 1
        if kind == "connector":
            self._rng.choice(self._connectors).kill()
        elif kind == "database":
            await asyncio.to_thread(self._database.crash)
        else:
            name = await self._leader(self._rng.randrange(self._plan.partitions))
            await asyncio.to_thread(self._stage.cluster.kill, name)
            await asyncio.sleep(self._rng.random())
            await asyncio.to_thread(self._stage.cluster.restart, name)

    async def _leader(self, partition: int) -> str:
        async with asyncio.timeout(30):
            while True:
                view = await cluster_status(self._bootstrap, 10.0)
                for topic in view["topics"]:
                    leader = (
                        topic["partitions"][partition]["leader"] if topic["name"] == FEED else None
                    )
                    if leader is not None:
                        return str(leader)

    # ---- the judge

    async def _judge(self) -> None:
        """Read the feed from its beginning until it is the database."""
        outcome, begun = self.outcome, time.monotonic()
        database = await asyncio.to_thread(self._database.tables)
        outcome.rows = sum(rows.total() for rows in database.values())
        fold = Fold(self._database.once)
        found = ["nothing was read"]
        reading = SubscribeConfig(start=Offset.EARLIEST)
        async with self._stage.engine.subscribe(FEED, reading) as subscriber:
            while time.monotonic() - begun < CATCH_UP_S and not fold.problems:
                await asyncio.to_thread(self._keep_up_connectors)
                messages = await subscriber.poll(5_000, timeout=0.5)
                for message in messages:
                    change = change_from(message)
                    if change is not None:
                        fold.add(change)
                if not messages and not (found := difference(fold.tables(), database)):
                    break
        outcome.caught_up_s = time.monotonic() - begun
        outcome.changes, outcome.snapshot_rows = fold.changes, fold.snapshot_rows
        outcome.problems = [*fold.problems, *found]
        if fold.problems:
            outcome.code = SAFETY
        elif found:
            outcome.code = SAFETY if await self._is_idle() else LIVENESS

    def _keep_up_connectors(self) -> None:
        for number, process in enumerate(self._connectors):
            if process.poll() is not None:
                self._connectors[number] = self._connector()

    async def _is_idle(self) -> bool:
        """Nothing more comes into the feed."""
        before = await self._stage.engine.offsets(FEED)
        await asyncio.sleep(5)
        return before == await self._stage.engine.offsets(FEED)


async def play(plan: Plan, directory: Path, say: Callable[[str], None]) -> Outcome:
    """One run, with all its files in `directory`."""
    with contextlib.ExitStack() as stack:
        database: Database
        if plan.source == "postgres":
            from aegis_cluster.testing.postgres_server import postgres

            database = await asyncio.to_thread(Postgres, stack.enter_context(postgres()))
        else:
            database = SQLite(directory / "captured.db", plan.seed)
        nodes = directory / "nodes-of-run"
        nodes.mkdir()
        async with running_stage(nodes, "fsync", 1, probe=cli_status) as stage:
            run = Run(plan, stage, database, directory, say)
            try:
                await run.play()
            finally:
                run.close()
        return run.outcome


def main() -> int:
    """The command line: `python -m chaos.cdc.run postgres --seconds 30 --seed 7`."""
    parser = argparse.ArgumentParser(prog="python -m chaos.cdc.run", description=__doc__)
    parser.add_argument("source", choices=("postgres", "sqlite"))
    parser.add_argument("--seconds", type=float, default=30.0, help="of load and blows")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--partitions", type=int, default=1, help="of the feed")
    parser.add_argument("--keep", type=Path, help="keep all files in this new directory")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    plan = Plan(options.source, options.seconds, seed, options.partitions)
    print(f"SEED {seed}", flush=True)
    begun = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {what}", flush=True)

    with contextlib.ExitStack() as stack:
        if options.keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aegis-cdc-")))
        else:
            options.keep.mkdir(parents=True)
            directory = options.keep
        outcome = asyncio.run(play(plan, directory, say))
        print(outcome.describe(), flush=True)
        if outcome.code != VALID:
            print((directory / "connectors.log").read_text()[-3_000:], file=sys.stderr)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
