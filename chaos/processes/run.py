"""One run: nodes, proxies and clients, the schedule, healing, the last read, the verdict.

The idea: everything that a person needs afterwards lies in one directory: `plan.json` with the
seed, the history, node files, node logs and data, what clients said, and the verdicts. `recheck`
judges such a directory again, when checks have become better or somebody doubts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.engine import StreamingEngine, TopicConfig
from aegis_cluster.errors import AegisError
from aegis_cluster.message import Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from chaos.processes.banking import account_topics
from chaos.processes.checks import Judgement, Verdict, judge, overall
from chaos.processes.clients import ClientProcess
from chaos.processes.cluster import ProcessCluster, wait_for
from chaos.processes.faults import Adversary
from chaos.processes.injection import write_settings
from chaos.processes.links import Links
from chaos.processes.recording import TOPIC, Recorder, load
from chaos.processes.schedule import CLIENTS, TRANSACTIONS
from chaos.processes.workloads import FINISH_S, TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.processes.schedule import Plan

READY_S: Final = 120.0
HEAL_S: Final = 90.0
SETTLE_S: Final = 60.0
"""In which every write that is under way has an outcome: far more than its own deadline."""
STEP_POLL_S: Final = 0.2
BROKEN: Final = re.compile(r"Traceback|InvariantBroken")
LINES_SHOWN: Final = 12
NEVER_STARTED: Final = "the cluster did not start"


@dataclass(slots=True)
class Run:
    """One plan, carried out in a directory of its own.

    tell: gets a line about each thing that happens.
    mistake: "module:function" to be planted in every shard, for the proof that it is found.
    """

    plan: Plan
    directory: Path
    tell: Callable[[str], None]
    mistake: str = ""

    def run(self) -> list[Judgement]:
        """Do it all; returns what the checks say."""
        self.directory.mkdir(parents=True)
        content = json.dumps(self.plan.to_json(), indent=1)
        (self.directory / "plan.json").write_text(content, encoding="utf-8")
        recorder = Recorder(self.directory, "run")
        try:
            self._carry_out(recorder)
        finally:
            recorder.close()
        return recheck(self.directory)

    def _carry_out(self, recorder: Recorder) -> None:
        cluster = ProcessCluster(self.directory, shards=self.plan.shards)
        links = Links(self.plan.seed)
        parties = [*cluster.nodes, *CLIENTS]
        detours = {
            party: links.detours(
                party, {name: cluster.addresses(name) for name in cluster.nodes if name != party}
            )
            for party in parties
        }
        write_settings(cluster.settings, detours, self.mistake)
        clients = {
            party: ClientProcess(party, cluster.settings, self._options(cluster), self.plan.seed)
            for party in CLIENTS
        }
        stage = _Stage(self.plan, cluster, links, clients, recorder, self.tell)
        try:
            stage.play()
        finally:
            for client in clients.values():
                client.kill()
            cluster.close()
            links.close()
        stage.collect_errors()

    def _options(self, cluster: ProcessCluster) -> dict[str, object]:
        return {
            "bootstrap": cluster.bootstrap,
            "directory": str(self.directory),
            "workload": self.plan.workload,
            "partitions": self.plan.partitions,
            "pause_s": self.plan.pause_s,
        }


class _Stage:
    """What is there while a run goes on."""

    def __init__(
        self,
        plan: Plan,
        cluster: ProcessCluster,
        links: Links,
        clients: dict[str, ClientProcess],
        recorder: Recorder,
        tell: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._cluster = cluster
        self._links = links
        self._clients = clients
        self._recorder = recorder
        self._show = tell
        self._begun = time.monotonic()
        self._adversary = Adversary(
            cluster, links, clients, plan.partitions, self._tell, self._not_healed
        )

    def play(self) -> None:
        """From the first start to the last read."""
        if not self._begin():
            return
        for step in self._plan.steps:
            mends = [self._adversary.strike(fault) for fault in step.faults]
            self._let_pass(step.seconds)
            for mend in reversed(mends):
                mend()
        self._heal()
        self._end()

    def _begin(self) -> bool:
        cluster = self._cluster
        cluster.format()
        for name in cluster.nodes:
            cluster.start(name)
        troubles = cluster.wait_whole(seconds=READY_S) or asyncio.run(self._create_topic())
        if troubles:
            self._not_healed(f"{NEVER_STARTED}: {'; '.join(troubles)}")
            return False
        self._recorder.note("topic", partitions=self._plan.partitions)
        for client in self._clients.values():
            client.start()
        self._wait("writes are not acknowledged", ClientProcess.is_writing, READY_S)
        self._tell("the cluster serves, clients write")
        return True

    async def _create_topic(self) -> list[str]:
        config = TopicConfig(partitions=self._plan.partitions, replication_factor=3)
        try:
            async with StreamingEngine.connect(self._cluster.bootstrap) as engine:
                await engine.create_topic(TOPIC, config)
                for name, partitions in self._others.items():
                    config = TopicConfig(partitions=partitions, replication_factor=3)
                    await engine.create_topic(name, config)
        except AegisError as error:
            return [str(error)]
        return []

    @property
    def _others(self) -> dict[str, int]:
        """Topics beside that which is always there: partitions by name."""
        return account_topics() if self._plan.workload == TRANSACTIONS else {}

    def _let_pass(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name in self._cluster.nodes:
                self._cluster.alive(name)
            time.sleep(min(STEP_POLL_S, max(0.0, until - time.monotonic())))

    # ---- the end

    def _heal(self) -> None:
        """Let the cluster become whole; what can be read of one that does not is read all the same,
        because it may have lost something besides."""
        self._links.heal()
        for name in self._cluster.nodes:
            self._cluster.resume(name)
            self._cluster.start(name)
        for client in self._clients.values():
            client.resume()
            client.start()
        self._tell("healed")
        troubles = self._cluster.wait_whole(TOPIC, seconds=HEAL_S, tell=self._tell)
        if troubles:
            self._not_healed(f"{HEAL_S:.0f} s after healing: {'; '.join(troubles)}")

    def _end(self) -> None:
        """Let writes end, then readers, then read all there is."""
        clients = self._clients.values()
        self._links.repeat_what_is_left()
        for client in clients:
            client.say("stop")
        self._wait("writes have no outcome", ClientProcess.has_stopped, SETTLE_S)
        ends = asyncio.run(self._ends())
        if ends is None:
            return
        self._tell(f"the partitions end at {ends}")
        for client in clients:
            client.say(f"finish {json.dumps(ends)}")
        self._wait("readers do not end", ClientProcess.has_ended, FINISH_S + 4 * TIMEOUT_S)
        asyncio.run(self._read_to_end(ends))
        if self._others:
            self._tell(f"{self._links.repeats_sent} requests were repeated")
            for topic in self._others:
                asyncio.run(self._read_committed(topic))

    def _wait(self, what: str, ready: Callable[[ClientProcess], bool], seconds: float) -> None:
        clients = self._clients.values()
        late = wait_for(lambda: [c.party for c in clients if not ready(c)], seconds)
        if late:
            self._not_healed(f"{what}, after {seconds:.0f} s: {', '.join(late)}")

    async def _ends(self) -> dict[int, int] | None:
        try:
            async with StreamingEngine.connect(self._cluster.bootstrap) as engine:
                found = await engine.offsets(TOPIC)
        except AegisError as error:
            self._not_healed(f"nobody says where partitions end: {error}")
            return None
        return {partition: one.high_watermark for partition, one in found.items()}

    async def _read_to_end(self, ends: dict[int, int]) -> None:
        final: dict[int, list[tuple[int, str]]] = {partition: [] for partition in ends}
        positions = dict.fromkeys(ends, 0)
        config = SubscribeConfig(start=Offset.EARLIEST, max_poll_records=5_000)
        try:
            async with (
                StreamingEngine.connect(self._cluster.bootstrap) as engine,
                asyncio.timeout(SETTLE_S),
                engine.subscribe(TOPIC, config) as subscriber,
            ):
                while any(positions[partition] < end for partition, end in ends.items()):
                    for one in await subscriber.poll(timeout=TIMEOUT_S):
                        final[one.partition].append((one.offset, one.payload))
                        positions[one.partition] = one.offset + 1
        except (AegisError, TimeoutError) as error:
            self._not_healed(f"the last read ended at {positions} of {ends}: {error!r}")
            return
        for partition, records in final.items():
            self._recorder.note("final", partition=partition, records=records)
        self._tell(f"read {sum(map(len, final.values()))} records to the end")

    async def _read_committed(self, topic: str) -> None:
        """Wait until nothing is open any more, and read all that is committed."""
        rows: list[tuple[int, int, str]] = []
        try:
            async with (
                StreamingEngine.connect(self._cluster.bootstrap) as engine,
                asyncio.timeout(SETTLE_S),
            ):
                while True:
                    found = await engine.offsets(topic)
                    if all(one.last_stable_offset == one.high_watermark for one in found.values()):
                        break
                    await asyncio.sleep(STEP_POLL_S)
                ends = {partition: one.high_watermark for partition, one in found.items()}
                config = SubscribeConfig(start=Offset.EARLIEST, max_poll_records=5_000)
                async with engine.subscribe(topic, config) as subscriber:
                    while any(subscriber.positions.get(p, 0) < end for p, end in ends.items()):
                        messages = await subscriber.poll(timeout=STEP_POLL_S)
                        rows += [(one.partition, one.offset, one.payload) for one in messages]
        except (AegisError, TimeoutError) as error:
            self._not_healed(f"transactions hang in {topic}, or it cannot be read: {error!r}")
            return
        self._recorder.note("committed", topic=topic, partitions=sorted(ends), rows=rows)

    def collect_errors(self) -> None:
        """What processes said when they ended by themselves."""
        for client in self._clients.values():
            for error in client.errors:
                self._recorder.note("error", who=client.party, what=error)
        for what in self._cluster.unexpected:
            self._recorder.note("error", who="node", what=what)
        for name in self._cluster.nodes:
            for what in _broken(self._cluster.data(name)):
                self._recorder.note("error", who=name, what=what)

    def _tell(self, what: str) -> None:
        self._recorder.note("fault", what=what)
        self._show(f"{time.monotonic() - self._begun:6.1f} s  {what}")

    def _not_healed(self, what: str) -> None:
        self._recorder.note("not_healed", what=what)
        self._show(f"{time.monotonic() - self._begun:6.1f} s  NOT HEALED: {what}")


def _broken(data: Path) -> list[str]:
    """Places of a node's logs where something happened that never may."""
    found = []
    for file in sorted(data.glob("node.log*")):
        lines = file.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            if BROKEN.search(line):
                found.append("\n".join(lines[number : number + LINES_SHOWN]))
    return found


def recheck(directory: Path) -> list[Judgement]:
    """Judge the history of a directory, and write the verdicts beside it."""
    judgements = judge(load(directory))
    lines = [f"{overall(judgements).value}\n"]
    for one in judgements:
        lines.append(f"{one.verdict.value:8} {one.check}\n")
        lines += [f"    {sentence}\n" for sentence in one.found]
    with contextlib.suppress(OSError):  # a history may be kept where nobody may write
        (directory / "verdicts.txt").write_text("".join(lines), encoding="utf-8")
    return judgements


def describe(judgements: list[Judgement]) -> str:
    """What is wrong, for people."""
    lines = []
    for one in judgements:
        if one.verdict is not Verdict.VALID:
            lines.append(f"{one.verdict.value}: {one.check}")
            lines += [f"  {sentence}" for sentence in one.found]
    return "\n".join(lines) or "valid"
