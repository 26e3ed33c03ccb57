"""A whole cluster in one process, from one seed: run it, and say whether it kept its promises.

The idea: two stages. Under faults only safety counts: whatever clients saw and replicas applied is
checked. Then everything is healed, and within a budget of virtual time all writes must end, new
ones must be stored, all replicas must agree, and everything must be read back.

The rule it protects: one seed, one run. Everything random comes from generators made of the seed,
and `Report.trace` is a hash of all that was delivered.
"""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker import partition as partition_module
from aegis_cluster.broker import replica_manager
from aegis_cluster.cluster import controller
from aegis_cluster.errors import InvariantBroken
from aegis_cluster.testing.checkers import check_history, check_logs, settled
from aegis_cluster.testing.faults import Adversary
from aegis_cluster.testing.history import History, Outcome
from aegis_cluster.testing.lease import Holder, LeaseService
from aegis_cluster.testing.network import Network, Repeats
from aegis_cluster.testing.node import SimulatedNode, founders_of
from aegis_cluster.testing.operations import Operations
from aegis_cluster.testing.plan import Plan, draw_plan, draw_retention, draw_transactions
from aegis_cluster.testing.scheduler import MS, SECOND, Runaway, Scheduler
from aegis_cluster.testing.sessions import Admin, Asker, Producer, Reader, Topic
from aegis_cluster.testing.transactions.checks import check_transactions
from aegis_cluster.testing.transactions.load import TransactionRun
from aegis_cluster.testing.transactions.worker import BALANCES
from aegis_cluster.testing.watch import ReplicaWatch, check_folds, whole_logs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from aegis_cluster.raft import Membership


BOOTSTRAP_US: Final = 30 * SECOND
VIOLATIONS_SHOWN: Final = 8
READ_US: Final = 10 * SECOND
"""For what is left to be read once transactions have ended."""
COMPACTION_US: Final = 6 * SECOND
"""In which closed segments of a compacted topic are compacted."""
INTERNAL_PARTITIONS: Final = 2
"""Of each of the cluster's own topics: as few as show that there may be several."""


class Verdict(IntEnum):
    """How a run ended; the value is the exit code of the tool that ran it."""

    OK = 0
    RUNAWAY = 126
    """More and more work, or memory: the run was stopped."""
    CRASH = 127
    LIVENESS = 128
    SAFETY = 129


@dataclass(slots=True)
class Report:
    """What one run found."""

    seed: int
    verdict: Verdict = Verdict.OK
    problems: list[str] = field(default_factory=list)
    trace: str = ""
    events: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    """What the adversary did, and why processes ended."""

    def fail(self, verdict: Verdict, problems: list[str]) -> None:
        """Note problems; the gravest verdict stays."""
        self.verdict = max(self.verdict, verdict)
        self.problems += problems


class Simulation:
    """One cluster and its clients; `run` is all that most callers need."""

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        if plan is None:
            plan = draw_plan(self.rng)
            draw_retention(plan, random.Random(f"retention {seed}"))
            draw_transactions(plan, random.Random(f"transactions {seed}"))
        self.plan = plan
        self.scheduler = Scheduler()
        self.network = Network(self.scheduler, self._generator())
        self.watch = ReplicaWatch(plan.retention_ms)
        self.history = History(expires=plan.expires)
        self.topic = Topic("numbers")
        self.report = Report(seed)
        self.nodes = self._make_nodes()
        self.operations = Operations(self.nodes, self.topic)
        self.adversary = Adversary(
            plan=self.plan,
            rng=self._generator(),
            scheduler=self.scheduler,
            network=self.network,
            nodes=self.nodes,
            operations=self.operations,
        )
        self.transactions = self._new_transactions()
        self.lease: LeaseService | None = None
        self.producers: list[Producer] = []
        self.readers: list[Reader] = []
        self.askers: list[Asker] = []
        self._sessions = 0
        self._writing = False

    def _generator(self) -> random.Random:
        return random.Random(self.rng.getrandbits(64))

    def _make_nodes(self) -> list[SimulatedNode]:
        founders = founders_of(self.plan.nodes)
        nodes = [
            SimulatedNode(
                number=number,
                founders=founders,
                shards=self.plan.shards,
                scheduler=self.scheduler,
                network=self.network,
                rng=self._generator(),
                limits=self.plan.limits,
                on_turn=self.watch.look,
            )
            for number in range(1, self.plan.nodes + 1)
        ]
        for node, traits in zip(nodes, self.plan.machines, strict=False):
            node.traits = traits
        return nodes

    def _new_transactions(self) -> TransactionRun | None:
        load = self.plan.transactions
        if load is None:
            return None
        rng = random.Random(f"transactional clients {self.seed}")
        return TransactionRun(
            load,
            rng,
            scheduler=self.scheduler,
            network=self.network,
            session=self._session,
        )

    # ---- the run

    def run(self) -> Report:
        """Both stages; never raises for what the cluster did wrong."""
        try:
            with _knobs(self.plan):
                self._run()
        except (Runaway, MemoryError) as error:
            self.report.fail(
                Verdict.RUNAWAY, [f"{type(error).__name__}: {error}", *self._describe()]
            )
        except InvariantBroken as error:
            self._crashed(error)
        except Exception as error:  # noqa: BLE001 - whatever ends a process is this run's finding
            self._crashed(error)
        report = self.report
        if self.watch.violations:
            report.fail(Verdict.SAFETY, self.watch.violations[:VIOLATIONS_SHOWN])
        found = check_history(self.history)
        if self.transactions is not None:
            found += check_transactions(self.transactions.record)
            found += [f"orders: {what}" for what in check_history(self.transactions.orders)]
        if found:
            report.fail(Verdict.SAFETY, found[:VIOLATIONS_SHOWN])
        self._finish_report()
        return report

    def _run(self) -> None:
        self.bootstrap()
        self.begin_load()
        self.adversary.begin()
        self.scheduler.run(self.scheduler.now_us + self.plan.safety_us, self._is_broken)
        if self._is_broken():
            return
        self.heal()

    def _is_broken(self) -> bool:
        """Nothing that happens after a violation tells anything new."""
        return bool(self.watch.violations)

    def _crashed(self, error: BaseException) -> None:
        self.report.fail(Verdict.CRASH, [f"{type(error).__name__}: {error}", *_places(error)])

    def _finish_report(self) -> None:
        report, writes = self.report, self.history.writes
        report.trace, report.events = self.scheduler.trace, self.scheduler.events
        report.counts = {
            **{
                outcome.value: sum(write.outcome is outcome for write in writes)
                for outcome in Outcome
            },
            "reads": len(self.history.reads),
            "messages": self.network.messages,
            "elections": self.watch.elections,
            "ends": sum(len(node.ends) for node in self.nodes),
        }
        report.acts = self.adversary.acts + [
            f"node {node.number}: {end}" for node in self.nodes for end in node.ends
        ]

    # ---- beginning

    def bootstrap(self) -> None:
        """Start the nodes and create the topic, before any fault."""
        for node in self.nodes:
            node.restart_after_us = lambda: 50 * MS
            node.start()
        plan = self.plan
        admin = Admin(
            partitions=plan.partitions,
            replicas=min(3, plan.nodes),
            retention=(plan.retention_ms, plan.retention_bytes),
            **self._session(),
        )
        done = self.scheduler.run(self.scheduler.now_us + BOOTSTRAP_US, lambda: admin.done)
        admin.close()
        if not done:
            self.report.fail(Verdict.LIVENESS, ["the topic could not be created"])
        if self.transactions is not None:
            self._bootstrap_transactions(self.transactions)

    def _bootstrap_transactions(self, run: TransactionRun) -> None:
        run.make_topics()
        if not self.scheduler.run(self.scheduler.now_us + BOOTSTRAP_US, run.topics_made):
            self.report.fail(Verdict.LIVENESS, ["the topics of transactions could not be created"])
        self.operations.others = list(run.topics.values())
        for topic in run.topics.values():
            self.watch.keep(topic.groups, compacted=topic.name == BALANCES)
        load = run.load
        if load.repeated:
            rng = random.Random(f"repeated requests {self.seed}")
            self.network.repeats = Repeats(rng, load.repeated, longest_us=load.repeated_us)

    def _session(self) -> dict[str, Any]:
        self._sessions += 1
        return {
            "number": self._sessions,
            "scheduler": self.scheduler,
            "network": self.network,
            "rng": self._generator(),
            "nodes": self.plan.nodes,
            "history": self.history,
            "topic": self.topic,
        }

    def begin_load(self) -> None:
        """Clients begin to write and read."""
        plan = self.plan
        self._writing = True
        for place in range(plan.producers):
            self.producers.append(self._new_producer())
            self.scheduler.after(0, self._write_on, place, self.scheduler.now_us)
        self.readers = [Reader(**self._session()) for _ in range(plan.readers)]
        if self.transactions is not None:
            self.transactions.begin()
        if plan.lease_us:
            self._begin_lease()
        if not plan.pause_to_us:  # strict questions would keep every group awake
            self.askers = [Asker(every_us=200 * MS, **self._session())]

    def _begin_lease(self) -> None:
        """Somebody writes under a lease, and then somebody else does."""
        partitions, rng = self.plan.partitions, self._generator()

        def new_holder(lease: LeaseService, token: int) -> Holder:
            return Holder(lease=lease, token=token, deadline_s=1.0, **self._session())

        self.lease = LeaseService(
            scheduler=self.scheduler,
            rng=rng,
            new_holder=new_holder,
            every_us=self.plan.lease_us,
            write=lambda holder: holder.publish(rng.randrange(partitions), 1),
        )
        self.lease.hand_on()

    def _new_producer(self) -> Producer:
        return Producer(deadline_s=self.rng.choice((1.0, 3.0)), **self._session())

    def _write_on(self, place: int, begun_us: int) -> None:
        """One producer writes, now and then, until the load ends."""
        if not self._writing:
            return
        plan, rng = self.plan, self.rng
        since = self.scheduler.now_us - begun_us
        if self.adversary.client_crashes:
            self.adversary.client_crashes -= 1
            self.producers[place].close()
            self.producers[place] = self._new_producer()
        if not plan.pause_from_us <= since < plan.pause_to_us:
            for _ in range(rng.choice((1, 1, 1, 4))):
                self.producers[place].publish(
                    rng.randrange(plan.partitions),
                    rng.randint(1, plan.records_max),
                    rng.randint(0, plan.value_bytes_max),
                )
        pause_us = int(rng.expovariate(1 / plan.write_every_us)) + MS
        self.scheduler.after(pause_us, self._write_on, place, begun_us)

    # ---- the end

    def heal(self) -> None:
        """End all faults and demand progress."""
        self._writing = False
        if self.lease is not None:
            self.lease.stop()
        self.adversary.heal()
        if self.transactions is not None:
            self.transactions.stop_trouble()
        deadline_us = self.scheduler.now_us + self.plan.heal_us
        if not self._wait(deadline_us, self._writes_ended):
            self._stuck("writes did not end")
            return
        for partition in range(self.plan.partitions):
            if not self._store_one(partition, deadline_us):
                self._stuck(f"no new write was stored in partition {partition}")
                return
        self._end_transactions()
        self._read_back(max(deadline_us, self.scheduler.now_us + READ_US))

    def _end_transactions(self) -> None:
        """All orders get handled; requests that come late find nothing to change; all is read."""
        run = self.transactions
        if run is None:
            return
        for done, what in (
            (run.is_drained, "orders are not handled"),
            (run.has_stopped, "transactional clients do not come to an end"),
        ):
            if not self._wait(self.scheduler.now_us + self.plan.heal_us, done):
                self._stuck(what)
                return
            run.stop()
        run.go()
        repeats, self.network.repeats = self.network.repeats, None
        if repeats is not None:
            self.scheduler.run(repeats.until_us + SECOND, self._is_broken)
            run.repeated_requests = repeats.count
        if run.load.restarts:
            self._start_anew()
        run.read_back()
        if not self._wait(self.scheduler.now_us + self.plan.heal_us, run.is_read):
            self._stuck("transactions hang, or cannot be read")
            self.report.problems += run.hanging()

    def _start_anew(self) -> None:
        """Once compaction has had its time, all nodes but one start again, and so fold their logs
        again; the one that goes on still has what it folded before."""
        self.scheduler.run(self.scheduler.now_us + COMPACTION_US, self._is_broken)
        goes_on = random.Random(f"restarts {self.seed}").randrange(len(self.nodes))
        for place, node in enumerate(self.nodes):
            if place != goes_on:
                node.kill("starts anew")

    def _store_one(self, partition: int, deadline_us: int) -> bool:
        """Write until a write is acknowledged."""
        while True:
            write = self.producers[0].publish(partition, 1)
            if not self._wait(deadline_us, lambda write=write: settled([write])):  # type: ignore[misc]
                return False
            if write.outcome is Outcome.OK:
                return True

    def _wait(self, deadline_us: int, done: Callable[[], bool]) -> bool:
        """Run on until something holds; looked at now and then, for that is cheaper."""
        while not done():
            if self.scheduler.now_us >= deadline_us or self._is_broken():
                return False
            self.scheduler.run(min(deadline_us, self.scheduler.now_us + 20 * MS))
        return True

    def _writes_ended(self) -> bool:
        holders = self.lease.holders if self.lease is not None else []
        live = {one.number for one in (*self.producers, *holders) if not one.closed}
        return settled([write for write in self.history.writes if write.producer in live])

    def _stuck(self, what: str) -> None:
        if not self._is_broken():
            self.report.fail(Verdict.LIVENESS, [what, *self._describe()])

    def _describe(self) -> list[str]:
        """Every replica in a line, for a run that does not get on."""
        lines = []
        for node in self.nodes:
            for group, partition in node.partitions():
                replica = partition.replica
                lines.append(
                    f"node {node.number} group {group}: {replica.role.value} term {replica.term}"
                    f" log {replica.log.last_index} commit {replica.commit_index} applied"
                    f" {partition.applied} quiet {replica.quiet} damaged {replica.damaged}"
                    f" members {_members(replica.membership)}"
                )
        return lines

    def _read_back(self, deadline_us: int) -> None:
        """A new reader gets everything up to the end that the leaders name; logs agree."""
        self.adversary.revive()
        asker = Asker(every_us=100 * MS, **self._session())
        everything = range(self.plan.partitions)
        if not self._wait(deadline_us, lambda: len(asker.ends) == len(everything)):
            self._stuck("nobody answers for the end of the log")
            return
        reader = Reader(**self._session())
        readers = [reader, *self.readers]
        if not self._wait(
            deadline_us,
            lambda: all(r.positions[p] >= asker.ends[p] for r in readers for p in everything),
        ):
            places = [r.positions for r in readers]
            self._stuck(f"readers stand at {places}, not at the ends {asker.ends}")
            return
        if self.plan.expires:
            self.history.starts = self._log_starts()
        self.history.final = {p: [] for p in everything}
        for read in self.history.reads:
            if read.reader == reader.number:
                self.history.final[read.partition].append((read.offset, read.value))
        self._compare_replicas(deadline_us)

    def _log_starts(self) -> dict[int, int]:
        """The highest log start of each partition that anybody was told of."""
        starts: defaultdict[int, int] = defaultdict(int)
        told = [(one.partition, one.start) for one in self.history.gone]
        told += [(mark.partition, mark.start) for mark in self.history.watermarks]
        for partition, start in told:
            starts[partition] = max(starts[partition], start)
        return starts

    def _compare_replicas(self, deadline_us: int) -> None:
        if not self._wait(deadline_us, self.operations.is_whole):
            self._stuck("not every group has the members that it should have")
        elif not self._wait(deadline_us, self._replicas_agree):
            self._stuck("replicas did not catch up")
        for group in self.operations.groups:
            compacted = group in self.watch.compacted
            found = check_logs(whole_logs(self.nodes, group, compacted=compacted))
            found += check_folds(self.nodes, group)
            if found:
                self.report.fail(Verdict.SAFETY, found[:VIOLATIONS_SHOWN])

    def _replicas_agree(self) -> bool:
        """All healthy members of a group have applied the same, and have no more than that."""
        for group in self.operations.groups:
            ends = {
                (partition.applied, partition.log.last_index)
                for partition in self.operations.members(group)
                if not partition.replica.damaged
            }
            if len(ends) != 1 or any(applied != last for applied, last in ends):
                return False
        return True


def _members(membership: Membership) -> str:
    """Incarnations of voters, and of learners behind a plus."""
    sides = (membership.voters, membership.learners)
    return "+".join(" ".join(m.incarnation for m in side) for side in sides)


@contextmanager
def _knobs(plan: Plan) -> Iterator[None]:
    """Numbers that the product fixes and a run draws, for the time of that run."""
    wanted: list[tuple[ModuleType, str, object]] = [
        (partition_module, "SNAPSHOT_FRAMES", plan.snapshot_frames),
        (controller, "INTERNAL_PARTITIONS", INTERNAL_PARTITIONS),
        (replica_manager, "RaftConfig", lambda **chosen: replace(plan.raft, **chosen)),
    ]
    before = [getattr(module, name) for module, name, _ in wanted]
    for module, name, value in wanted:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(wanted, before, strict=True):
            setattr(module, name, value)


def _places(error: BaseException) -> list[str]:
    """Where an error came from, innermost last."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"  {code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places[-8:]


def run_seed(seed: int, plan: Plan | None = None) -> Report:
    """One run from one seed."""
    return Simulation(seed, plan).run()
