"""The adversary: at random moments it does one of the things that the plan allows.

The idea: a fault is a method, its name is its kind; each one plans its own end (restart, mend,
resume), so the cluster recovers between faults unless they happen to overlap.

The rule it protects: no fault takes away what a correct cluster needs. Disks lose only what was not
synced, unless a kind says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.testing.disk import SimulatedCrash
from aegis_cluster.testing.plan import DISK_FAULTS, SHARDS_MAX
from aegis_cluster.testing.scheduler import MS

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from aegis_cluster.testing.network import Network
    from aegis_cluster.testing.node import SimulatedNode
    from aegis_cluster.testing.operations import Operations
    from aegis_cluster.testing.plan import Plan
    from aegis_cluster.testing.scheduler import Scheduler


class Adversary:
    """Acts until told to stop; `heal` then undoes everything."""

    def __init__(
        self,
        *,
        plan: Plan,
        rng: random.Random,
        scheduler: Scheduler,
        network: Network,
        nodes: Sequence[SimulatedNode],
        operations: Operations,
    ) -> None:
        self.acts: list[str] = []
        """What it did, for the report."""
        self.client_crashes = 0
        """Clients that are to be replaced; whoever runs them looks here."""
        self._plan = plan
        self._rng = rng
        self._scheduler = scheduler
        self._network = network
        self._nodes = nodes
        self._operations = operations
        self._active = False
        self._kinds = sorted(plan.faults)
        self._victim = rng.choice(list(nodes))
        """The only node whose disk damages what was durable."""
        self._victim.keeps_settled = any(kind in DISK_FAULTS for kind in plan.faults)
        self._weights = [plan.faults[kind] for kind in self._kinds]

    def begin(self) -> None:
        self._active = True
        self._network.faults = self._plan.network
        for node in self._nodes:
            node.restart_after_us = self._restart_pause
        self._plan_next()

    def heal(self) -> None:
        """Everything works again, but for a minority that is dead until `revive`."""
        self._active = False
        dead = self._rng.sample(range(len(self._nodes)), self._plan.down_after_heal)
        self._network.mend()
        self._network.faults = type(self._network.faults)()
        for place, node in enumerate(self._nodes):
            node.disk.forget_faults()
            node.disk.capacity = None
            node.traits.sync_slow = 0.0
            if place in dead:
                node.restart_after_us = _never
                node.kill("stays down for a while")
                node.held_down = True
            else:
                self._mend_node(node)

    def revive(self) -> None:
        """The rest comes back."""
        for node in self._nodes:
            node.held_down = False
            self._mend_node(node)

    def _mend_node(self, node: SimulatedNode) -> None:
        node.restart_after_us = _soon
        node.resume()
        if not node.up:
            node.start()

    def _plan_next(self) -> None:
        if self._kinds:
            pause_us = int(self._rng.expovariate(1 / self._plan.fault_every_us)) + MS
            self._scheduler.after(pause_us, self._act)

    def _act(self) -> None:
        if not self._active:
            return
        kind = self._rng.choices(self._kinds, self._weights)[0]
        self.acts.append(f"{self._scheduler.now_us} {kind}")
        getattr(self, f"_{kind}")()
        self._plan_next()

    def _restart_pause(self) -> int | None:
        """How long a process stays down; healing starts those that are down then."""
        if not self._active:
            return 50 * MS
        return self._rng.choice((1 * MS, 50 * MS, 300 * MS, 1_500 * MS))

    def _some_node(self) -> SimulatedNode:
        return self._rng.choice(self._nodes)

    def _numbers(self) -> list[int]:
        return [node.number for node in self._nodes]

    # ---- processes and machines

    def _kill(self) -> None:
        self._some_node().kill()

    def _kill_shard(self) -> None:
        """One process of a machine; the others go on."""
        node = self._some_node()
        node.kill_shard(self._rng.randrange(node.shards))

    def _reshard(self) -> None:
        """The operator starts a node again with another number of shards."""
        self._some_node().reshard(self._rng.randint(1, SHARDS_MAX))

    def _wipe(self) -> None:
        """A whole directory is gone. Never while another one is missing: of each group a majority
        must have kept what it had."""
        node = self._some_node()
        if self._operations.survives_loss_of(node):
            self.acts.append(f"{self._scheduler.now_us} node {node.number} is wiped")
            node.wipe()

    def _move(self) -> None:
        """The operator asks for a replica more, less, or elsewhere."""
        self.acts.append(f"{self._scheduler.now_us} {self._operations.move_one(self._rng)}")

    def _power(self) -> None:
        self._some_node().lose_power()

    def _power_all(self) -> None:
        for node in self._nodes:
            node.lose_power()

    def _disk_crash(self) -> None:
        """The power goes in the middle of a disk operation, soon."""
        disk = self._some_node().disk
        left = self._rng.randint(1, 30)

        def before(operation: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise SimulatedCrash

        disk.before = before

    def _pause(self) -> None:
        node = self._some_node()
        node.pause()
        self._scheduler.after(self._rng.choice((100, 700, 2_000)) * MS, node.resume)

    def _kill_coordinator(self) -> None:
        """A coordinator of groups or transactions dies."""
        found = self._operations.coordinating_nodes()
        if found:
            self._rng.choice(found).kill("killed as a coordinator")

    def _pause_coordinator(self) -> None:
        """A coordinator sleeps, and goes on in the belief that it still is one."""
        found = self._operations.coordinating_nodes()
        if found:
            node = self._rng.choice(found)
            node.pause()
            self._scheduler.after(self._rng.choice((700, 2_000)) * MS, node.resume)

    def _pause_kill(self) -> None:
        """RELIABILITY §2.3: one sleeps while others go on; then one that went on loses its power
        and is left with the sleeper alone. What it had promised must still be there."""
        sleeper, killed, others = self._three_parts()
        if killed is None:
            return
        sleeper.pause()

        def turn_round() -> None:
            killed.lose_power()
            for node in others:
                node.pause()
                self._scheduler.after(1_500 * MS, node.resume)
            sleeper.resume()

        self._scheduler.after(self._rng.choice((100, 300, 700)) * MS, turn_round)

    def _cut_kill(self) -> None:
        """The same with cuts."""
        sleeper, killed, others = self._three_parts()
        if killed is None:
            return
        self._isolate([sleeper.number])

        def turn_round() -> None:
            killed.lose_power()
            self._network.mend()
            self._isolate([node.number for node in others])
            self._scheduler.after(1_500 * MS, self._network.mend)

        self._scheduler.after(self._rng.choice((100, 300, 700)) * MS, turn_round)

    def _three_parts(
        self,
    ) -> tuple[SimulatedNode, SimulatedNode | None, list[SimulatedNode]]:
        """One that will be behind, one to be killed, and those that are kept away afterwards."""
        nodes = list(self._nodes)
        self._rng.shuffle(nodes)
        away = (len(nodes) - 1) // 2
        return nodes[0], nodes[1] if away else None, nodes[2 : 2 + away]

    def _isolate(self, some: Sequence[int]) -> None:
        """Nothing passes between these and the other nodes; clients reach them all."""
        pairs = [(a, b) for a in self._numbers() for b in self._numbers()]
        apart = [(a, b) for a, b in pairs if (a in some) != (b in some)]
        self._network.cut(apart, break_after_us=self._break_after())

    # ---- network

    def _break_after(self) -> int | None:
        return self._rng.choice((None, 1, 300 * MS, 1_500 * MS))

    def _cut(self, pairs: list[tuple[int, int]]) -> None:
        self._network.cut(pairs, break_after_us=self._break_after())
        self._scheduler.after(self._rng.choice((200, 800, 2_000)) * MS, self._network.mend)

    def _cut_node(self) -> None:
        one = self._some_node().number
        others = [n for n in self._numbers() if n != one]
        self._cut([(one, n) for n in others] + [(n, one) for n in others])

    def _cut_half(self) -> None:
        numbers = self._numbers()
        side = {n for n in numbers if self._rng.random() < 0.5}
        self._cut([(a, b) for a in numbers for b in numbers if (a in side) != (b in side)])

    def _cut_one_way(self) -> None:
        one = self._some_node().number
        others = [n for n in self._numbers() if n != one]
        to_it = self._rng.random() < 0.5
        self._cut([(n, one) if to_it else (one, n) for n in others])

    def _cut_leader(self) -> None:
        """Whoever leads something hears no other node any more, and may not know it yet."""
        leaders = [node.number for node in self._nodes if node.leads_something]
        if leaders:
            one = self._rng.choice(leaders)
            others = [n for n in self._numbers() if n != one]
            self._cut([(one, n) for n in others] + [(n, one) for n in others])

    def _cut_coordinator(self) -> None:
        """A coordinator does not reach the others who hold its log; those who hold other logs it
        does reach, where there are any."""
        found = self._operations.coordinators()
        if found:
            replica = self._rng.choice(found).replica
            one = int(replica.me.node)
            members = (int(member.node) for member in replica.membership.members)
            others = [n for n in members if n != one]
            self._cut([(one, n) for n in others] + [(n, one) for n in others])

    def _reset(self) -> None:
        self._network.reset_some(self._rng.choice((0.2, 1.0)))

    # ---- disks and clocks

    def _sync_error(self) -> None:
        self._some_node().disk.fail_next("sync")

    def _write_error(self) -> None:
        self._some_node().disk.fail_next("write")

    def _disk_full(self) -> None:
        disk = self._some_node().disk
        disk.capacity = disk.used() + self._rng.choice((0, 500, 3_000))

        def free() -> None:
            disk.capacity = None

        self._scheduler.after(self._rng.choice((100, 1_000)) * MS, free)

    def _rot(self) -> None:
        """A bit of what was stored flips."""
        found = self._some_settled()
        if found is not None:
            path, position = found
            self._victim.disk.flip_bit(path, position, self._rng.randrange(8))
            self._maybe_kill()

    def _roll_back(self) -> None:
        """A block of a segment is as it was a checkpoint ago."""
        found = self._some_settled()
        if found is None:
            return
        path, position = found
        start = position - position % 512
        older = _merged(self._victim.older).get(path, b"")[start : start + 512]
        if older:
            self._victim.disk.roll_back(path, start, older.ljust(512, b"\0"))
            self._maybe_kill()

    def _cut_tail(self) -> None:
        """A segment ends too early."""
        found = self._some_settled()
        if found is not None:
            path, position = found
            self._victim.disk.cut(path, position)
            self._victim.kill("its disk lost the end of a segment")

    def _some_settled(self) -> tuple[str, int] | None:
        """A place in a segment that was durable at the last checkpoint and is as it was then."""
        victim = self._victim
        now = victim.disk.stored(".log")
        settled = _merged(victim.settled)
        same = [path for path, was in sorted(settled.items()) if _starts(now, path, was)]
        if not same:
            return None
        path = self._rng.choice(same)
        return path, self._rng.randrange(len(settled[path]))

    def _maybe_kill(self) -> None:
        if self._rng.random() < 0.7:
            self._victim.kill("its disk was damaged")

    def _wall_jump(self) -> None:
        traits = self._some_node().traits
        traits.wall_offset_ms += self._rng.choice((-86_400_000, -700, 700, 86_400_000))

    # ---- clients and operators

    def _client_crash(self) -> None:
        self.client_crashes += 1

    def _step_down(self) -> None:
        """An operator moves leaders elsewhere."""
        self._some_node().step_aside()


def _merged(by_shard: dict[int, dict[str, bytes]]) -> dict[str, bytes]:
    return {path: data for _, files in sorted(by_shard.items()) for path, data in files.items()}


def _starts(now: dict[str, bytes], path: str, was: bytes) -> bool:
    return len(was) > 0 and now.get(path, b"").startswith(was)


def _never() -> None:
    return None


def _soon() -> int:
    return 50 * MS
