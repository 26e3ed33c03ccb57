"""What happens when: drawn from a seed, whole, before anything starts.

The idea: a run is a row of steps of a few seconds. A quarter of them are quiet, because a cluster
that is never left alone proves little; in each of the others a random subset of fault families
strikes together. Damage to a disk strikes alone and waits until the cluster is whole before and
after: two damaged copies of three are more than anybody promises to survive.

The rule it protects: the same seed gives the same schedule, on any machine, at any speed.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NODES: Final = ("node-1", "node-2", "node-3")
CLIENTS: Final = ("client-a", "client-b")
FROM_CLIENTS: Final = tuple((client, node) for client in CLIENTS for node in NODES)
COORDINATOR: Final = "coordinator"
"""The same: who leads a log of groups or of transactions."""
LEADER: Final = "leader"
"""A target that is looked up when the fault strikes: who leads a partition then."""
WORKLOADS: Final = ("unique-ids", "queue")
TRANSACTIONS: Final = "transactions"
"""A workload that is drawn apart, so that the schedules of the others stay what they were."""
TRANSACTIONS_SHARE: Final = 1 / 3
REPEATED_SHARE: Final = 0.3
QUIET_CHANCE: Final = 0.25
STEP_S: Final = (2.0, 6.0)
DISK_CHANCE: Final = 0.15
DAMAGES: Final = ("flip", "truncate", "wipe")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, and is mended at the end of its step."""

    kind: str
    targets: tuple[str, ...] = ()
    """Nodes or clients; `LEADER` is a node."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Ways between parties, for faults of the network."""
    amount: float = 0.0
    """Milliseconds or a chance, as the kind has it."""
    number: int = 0
    """Decides what is left to choose: the partition whose leader is meant, where to damage."""

    def __str__(self) -> str:
        shown = [self.kind, *self.targets]
        if self.pairs:
            shown.append(" ".join(f"{source}>{target}" for source, target in self.pairs))
        if self.amount:
            shown.append(f"{self.amount:g}")
        return " ".join(shown)


@dataclass(frozen=True, slots=True)
class Step:
    """Faults that strike together, last for so long and are mended together."""

    seconds: float
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the seed decides."""

    seed: int
    workload: str
    shards: int
    partitions: int
    pause_s: float
    """A writer's mean pause between two writes."""
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """For the directory of the run."""
        return asdict(self)


def draw(seed: int, seconds: float) -> Plan:
    """The plan of a seed: at least so many seconds of steps."""
    rng = random.Random(seed)
    workload = rng.choice(WORKLOADS)
    shards = rng.choice((1, 1, 2))
    partitions = rng.randint(1, 4)
    pause_s = rng.choice((0.01, 0.03))
    steps: list[Step] = [Step(2.0, ())]
    while sum(step.seconds for step in steps) < seconds:
        steps.append(draw_step(rng))
    plan = Plan(seed, workload, shards, partitions, pause_s, tuple(steps))
    apart = random.Random(f"transactions {seed}")
    return transactional(plan, apart) if apart.random() < TRANSACTIONS_SHARE else plan


def transactional(plan: Plan, rng: random.Random) -> Plan:
    """The plan with transactions: in some of its steps coordinators die or stop, and in half of
    them some requests of clients come again, 1 to 60 s later."""
    steps = tuple(
        replace(step, faults=(*step.faults, *_of_transactions(step, rng))) for step in plan.steps
    )
    return replace(plan, workload=TRANSACTIONS, pause_s=0.05, steps=steps)


def _of_transactions(step: Step, rng: random.Random) -> Iterator[Fault]:
    is_about_disks = any(fault.kind in DAMAGES for fault in step.faults)
    if rng.random() < 0.3 and not is_about_disks:
        kind = rng.choice(("kill", "pause"))
        yield Fault(kind, (COORDINATOR,), number=rng.randrange(1 << 16))
    if rng.random() < 0.5:
        yield Fault("repeat", pairs=FROM_CLIENTS, amount=REPEATED_SHARE)


def draw_step(rng: random.Random) -> Step:
    """Quiet, a damaged disk, or some families of faults at once."""
    seconds = round(rng.uniform(*STEP_S), 1)
    if rng.random() < QUIET_CHANCE:
        return Step(seconds, ())
    if rng.random() < DISK_CHANCE:
        return Step(seconds, (_damage(rng),))
    families = list(FAMILIES)
    rng.shuffle(families)
    count = rng.choice((1, 1, 2, 2, 3))
    return Step(seconds, tuple(draw_fault(rng) for draw_fault in families[:count]))


def _subset(rng: random.Random) -> tuple[str, ...]:
    """One node, the leader, a majority, or all: the fewer the likelier."""
    return rng.choice(
        (
            (rng.choice(NODES),),
            (LEADER,),
            (LEADER,),
            tuple(sorted(rng.sample(NODES, 2))),
            NODES,
        )
    )


def _process(rng: random.Random) -> Fault:
    kind = rng.choice(("kill", "kill", "kill", "pause", "pause", "stop"))
    return Fault(kind, _subset(rng), number=rng.randrange(1 << 16))


def _network(rng: random.Random) -> Fault:
    shape = rng.choice((_isolate, _isolate, _halves, _one_way, _clients_only, _bridge))
    pairs = shape(rng)
    kind = rng.choice(("cut", "cut", "cut", "delay", "loss", "reset"))
    amounts = {"delay": rng.choice((20, 100, 400)), "loss": rng.choice((0.02, 0.1, 0.3))}
    return Fault(kind, pairs=pairs, amount=amounts.get(kind, 0))


def _disk(rng: random.Random) -> Fault:
    if rng.random() < 0.2:
        return Fault("sync_error", (rng.choice(NODES),))
    targets = rng.choice(((rng.choice(NODES),), (LEADER,), NODES))
    return Fault("slow_disk", targets, amount=rng.choice((20, 100, 500)))


def _client(rng: random.Random) -> Fault:
    return Fault(rng.choice(("kill_client", "pause_client")), (rng.choice(CLIENTS),))


FAMILIES: Final[tuple[Callable[[random.Random], Fault], ...]] = (_process, _network, _disk, _client)


def _damage(rng: random.Random) -> Fault:
    return Fault(rng.choice(DAMAGES), (rng.choice(NODES),), number=rng.randrange(1 << 30))


# ---- who hears whom


def _between(
    one: Sequence[str], other: Sequence[str], *, back: bool = True
) -> tuple[tuple[str, str], ...]:
    there = [(a, b) for a in one for b in other if not {a, b} <= set(CLIENTS)]
    return tuple(there + [(b, a) for a, b in there] if back else there)


def _isolate(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """One node from the others; clients still see both sides, or do not."""
    node = rng.choice(NODES)
    others = [other for other in NODES if other != node]
    clients = CLIENTS if rng.random() < 0.5 else ()
    return _between([node], [*others, *clients])


def _halves(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """A node and a client on one side, everybody else on the other."""
    node, client = rng.choice(NODES), rng.choice(CLIENTS)
    others = [party for party in (*NODES, *CLIENTS) if party not in (node, client)]
    return _between([node, client], others)


def _one_way(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """A node that is heard and does not hear, or the other way round."""
    node = rng.choice(NODES)
    others = [party for party in NODES if party != node]
    if rng.random() < 0.5:
        return _between([node], others, back=False)
    return _between(others, [node], back=False)


def _clients_only(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Clients from some nodes, which hear each other well."""
    nodes = rng.sample(NODES, rng.randint(1, 3))
    return _between(sorted(nodes), CLIENTS, back=rng.random() < 0.7)


def _bridge(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Two nodes that do not hear each other, and one that hears both."""
    one, other = sorted(rng.sample(NODES, 2))
    return _between([one], [other])
