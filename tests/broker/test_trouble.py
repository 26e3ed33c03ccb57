"""Disks that rot or are emptied, kills and retention in any order; one bad disk at a time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import Corruption
from aegis_cluster.ids import LogIndex
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import DIRECTORY, Client, Cluster, Host, batch, records_of
from tests.broker.test_repair import holds_all, lead_with

if TYPE_CHECKING:
    from collections.abc import Iterator


class Trouble:
    """One cluster, one topic, and what was acknowledged: offset -> value."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cluster = Cluster(seed=seed)
        limit = self.rng.choice([None, 100_000])
        settings = TopicSettings(retention_bytes=limit)
        self.group = self.cluster.topic(settings=settings).partitions[0].group
        self.acknowledged: dict[int, bytes] = {}
        self.down: Host | None = None
        self.sick: Host | None = None

    def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self.rng.choice(
                [self.write, self.write, self.wait, self.kill, self.power_off, self.rot, self.wipe]
            )
            step()
            if self.down is not None and self.rng.random() < 0.4:
                self.start()
        self.start()
        self.whole()
        for host in list(self.cluster.alive):
            lead_with(self.cluster, host, self.group)
            self.check(host)

    def write(self) -> None:
        client = Client(self.cluster, self.cluster.elect(self.group))
        numbers = {}
        for _ in range(self.rng.randint(1, 30)):
            value = self.rng.randbytes(self.rng.choice([10, 3_000]))
            numbers[client.produce(self.group, batch(value))] = value
            if self.rng.random() < 0.2:
                self.cluster.settle(self.rng.randint(1, 5))
        self.cluster.tick(4)
        for number, value in numbers.items():
            outcome = client.outcome(number)
            if isinstance(outcome, tuple):
                assert self.acknowledged.setdefault(outcome[0], value) == value
        self.acknowledged = dict(sorted(self.acknowledged.items()))

    def wait(self) -> None:
        self.cluster.tick(self.rng.randint(1, 60))

    def kill(self) -> None:
        if self.down is None:
            self.down = self.victim()
            self.cluster.kill(self.down)

    def victim(self) -> Host:
        """Who may end: the one with the bad disk, until it is well again; then anybody."""
        if self.sick is not None and not self.is_well():
            return self.sick
        self.sick = None
        return self.rng.choice(self.cluster.alive)

    def power_off(self) -> None:
        if self.down is None:
            self.down = self.victim()
            self.cluster.power_off(self.down, self.rng)

    def rot(self) -> None:
        """A bit of a file flips, of a node that is down; the others are whole."""
        if self.down is None:
            self.whole()
            self.kill()
        elif self.down is not self.sick:
            return  # nobody knows whether the others were well when it ended
        assert self.down is not None
        self.sick = self.down
        paths = sorted(path for path in self.down.disk.files() if path.startswith(DIRECTORY))
        paths = [one for one in paths if "partitions" in one]
        if not paths:
            return  # emptied just now
        path = self.rng.choice(paths)
        size = self.down.disk.open(path).size()
        if size:
            self.down.disk.flip_bit(path, self.rng.randrange(size), self.rng.randrange(8))

    def wipe(self) -> None:
        if self.down is not None:
            return
        self.whole()
        self.kill()
        assert self.down is not None
        self.sick = self.down
        self.cluster.wipe(self.down.key.node)

    def start(self) -> None:
        if self.down is not None:
            self.down.start()
            scrub(self.down)
            self.down = None
            self.cluster.tick(self.rng.randint(0, 20))

    def whole(self) -> None:
        """Until everybody is well: only then may the next disk go bad."""

        self.cluster.until(self.is_well, "everybody is well", 4_000)
        self.sick = None

    def is_well(self) -> bool:
        return all(
            group in host.alive.manager.partitions
            and self.cluster.leader(group) is not None
            and holds_all(host, self.cluster, group)
            and host.alive.context.me in host.partition(group).replica.membership.voters
            and len(host.partition(group).replica.membership.members) == 3
            for host in self.cluster.alive
            for group in (0, self.group)
        )

    def check(self, host: Host) -> None:
        start = host.partition(self.group).log_start_offset
        found = dict(self.read(host, start))
        wanted = {at: value for at, value in self.acknowledged.items() if at >= start}
        assert wanted.items() <= found.items()

    def read(self, host: Host, offset: int) -> Iterator[tuple[int, bytes | None]]:
        client = Client(self.cluster, host)
        while True:
            reply = client.ask(Api.FETCH, [0, [[self.group, offset, 1 << 20]]])
            (result,) = reply.fields[0]
            assert result[0] == 0, result
            more = [one for one in records_of(reply.parts[0]) if one.offset >= offset]
            if not more:
                return
            for record in more:
                assert record.offset == offset
                yield record.offset, record.value
                offset += 1


def scrub(host: Host) -> None:
    """Read all there is: rot that nobody has read yet would be a second bad disk later."""
    for partition in host.alive.manager.partitions.values():
        log = partition.log
        index = log.first_index
        try:
            while log.damage is None and index <= log.last_index:
                index = LogIndex(log.read(index, log.last_index, 1 << 20).last + 1)
        except Corruption as error:
            partition.damage_met(error)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(12))
def test_nothing_acknowledged_is_lost(seed: int) -> None:
    Trouble(seed).run(25)
