"""Does what the schedule says to nodes, ways, disks and clients, and mends it again.

The idea: each kind of fault is one method that strikes and returns what mends it. Targets that
are roles (`leader`) are looked up then; everything else the schedule has decided.

The rule it protects: one copy of the data is damaged at a time. Before a disk is damaged the
cluster is whole, and it has to become whole again by itself before anything else is done.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.ids import GROUPS_TOPIC, TRANSACTIONS_TOPIC
from aegis_cluster.limits import INTERNAL_PARTITIONS
from chaos.processes.injection import FAIL, disk_order
from chaos.processes.links import Conditions
from chaos.processes.recording import TOPIC
from chaos.processes.schedule import COORDINATOR, LEADER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.processes.clients import ClientProcess
    from chaos.processes.cluster import ProcessCluster
    from chaos.processes.links import Links
    from chaos.processes.schedule import Fault

    Mend = Callable[[], None]

WHOLE_BEFORE_S: Final = 20.0
"""In which a cluster becomes whole for a disk to be damaged; else the fault is left out."""
WHOLE_AFTER_S: Final = 90.0
"""In which it mends a damaged disk."""


@dataclass(frozen=True, slots=True)
class Adversary:
    """Strikes; `tell` gets a line for each thing that was done, `complain` what did not mend."""

    cluster: ProcessCluster
    links: Links
    clients: dict[str, ClientProcess]
    partitions: int
    tell: Callable[[str], None]
    complain: Callable[[str], None]

    def strike(self, fault: Fault) -> Mend:
        """Do it; what comes back undoes it."""
        self.tell(f"strikes: {fault}")
        match fault.kind:
            case "kill":
                return self._kill(self._nodes(fault))
            case "stop":
                return self._stop(self._nodes(fault))
            case "pause":
                return self._pause(self._nodes(fault))
            case "cut" | "delay" | "loss" | "reset":
                return self._network(fault)
            case "repeat":
                return self._repeat(fault)
            case "slow_disk":
                return self._disk(self._nodes(fault), str(int(fault.amount)))
            case "sync_error":
                return self._disk(self._nodes(fault), FAIL)
            case "kill_client":
                return self._kill_client(fault.targets[0])
            case "pause_client":
                return self._pause_client(fault.targets[0])
            case _:
                return self._damage(fault, fault.targets[0])

    def _nodes(self, fault: Fault) -> list[str]:
        number = fault.number
        if fault.targets == (COORDINATOR,):
            topic = (GROUPS_TOPIC, TRANSACTIONS_TOPIC)[number % 2]
            found = self.cluster.leader(topic, number // 2 % INTERNAL_PARTITIONS)
        elif fault.targets == (LEADER,):
            found = self.cluster.leader(TOPIC, number % self.partitions)
        else:
            return list(fault.targets)
        names = sorted(self.cluster.nodes)
        found = found or names[number % len(names)]
        self.tell(f"the {fault.targets[0]} is {found}")
        return [found]

    # ---- processes

    def _kill(self, names: list[str]) -> Mend:
        self.cluster.kill(*names)
        return lambda: self._start(names)

    def _stop(self, names: list[str]) -> Mend:
        for name in names:
            self.cluster.stop(name)
        return lambda: self._start(names)

    def _start(self, names: list[str]) -> None:
        for name in names:
            self.cluster.start(name)

    def _pause(self, names: list[str]) -> Mend:
        for name in names:
            self.cluster.pause(name)

        def mend() -> None:
            for name in names:
                self.cluster.resume(name)

        return mend

    def _kill_client(self, name: str) -> Mend:
        self.clients[name].kill()
        return self.clients[name].start

    def _pause_client(self, name: str) -> Mend:
        self.clients[name].pause()
        return self.clients[name].resume

    # ---- the network

    def _network(self, fault: Fault) -> Mend:
        match fault.kind:
            case "cut":
                conditions = Conditions(cut=True)
            case "delay":
                delay_ms = int(fault.amount)
                conditions = Conditions(delay_ms=delay_ms, jitter_ms=delay_ms)
            case "loss":
                conditions = Conditions(loss=fault.amount)
            case _:
                self.links.reset(fault.pairs)
                return lambda: None
        self.links.set(fault.pairs, conditions)
        return self.links.heal

    def _repeat(self, fault: Fault) -> Mend:
        self.links.repeat(fault.pairs, fault.amount)
        return lambda: self.links.repeat(fault.pairs, 0.0)

    # ---- disks

    def _disk(self, names: list[str], order: str) -> Mend:
        files = [disk_order(self.cluster.settings, name) for name in names]
        for file in files:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(order, encoding="utf-8")
            temporary.replace(file)

        def mend() -> None:
            for file in files:
                file.unlink(missing_ok=True)

        return mend

    def _damage(self, fault: Fault, name: str) -> Mend:
        troubles = self.cluster.wait_whole(TOPIC, seconds=WHOLE_BEFORE_S)
        if troubles:
            self.tell(f"left out, as the cluster is not whole: {troubles[0]}")
            return lambda: None
        self.cluster.kill(name)
        rng = random.Random(fault.number)
        if fault.kind == "wipe":
            self.cluster.wipe(name)
        else:
            self._spoil(fault.kind, self.cluster.data(name), rng)
        self.cluster.start(name)
        return self._require_whole

    def _require_whole(self) -> None:
        begun = time.monotonic()
        troubles = self.cluster.wait_whole(TOPIC, seconds=WHOLE_AFTER_S, tell=self.tell)
        if not troubles:
            self.tell(f"whole again after {time.monotonic() - begun:.1f} s more")
        else:
            self.complain(f"{WHOLE_AFTER_S:.0f} s after a disk was damaged: {'; '.join(troubles)}")

    def _spoil(self, kind: str, data: Path, rng: random.Random) -> None:
        files = sorted(file for file in (data / "partitions").rglob("*") if file.is_file())
        files = [file for file in files if file.stat().st_size]
        for file in rng.sample(files, min(len(files), rng.randint(1, 3))):
            size = file.stat().st_size
            if kind == "truncate":
                # Mostly a little of the tail, sometimes nearly all (as Zipf has it).
                os.truncate(file, size - max(1, int(size ** rng.random())))
            else:
                for _ in range(2):
                    flip(file, rng.randrange(size), 1 << rng.randrange(8))
            self.tell(f"{kind}: {file.relative_to(data)}, of {size} bytes")


def flip(file: Path, position: int, bits: int) -> None:
    """Change some bits of one byte."""
    with file.open("r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ bits]))
