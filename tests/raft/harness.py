"""A shell without sockets or files: hosts with a disk that a crash rolls back, and a network.

The same few lines that a broker needs, so they also show how a replica is driven.
"""

from __future__ import annotations

import random
from collections import deque
from typing import NamedTuple

from aegis_cluster.ids import LogIndex, Member, NodeId, Term
from aegis_cluster.raft import (
    AppendRequest,
    Effects,
    Entry,
    Envelope,
    HardState,
    InstallSnapshot,
    Membership,
    Message,
    RaftConfig,
    RaftLog,
    Replica,
    Role,
)

DATA = 1


def member(node: int) -> Member:
    """A member that is easy to name in tests."""
    return Member(NodeId(node), "a")


def membership(*voters: int, learners: tuple[int, ...] = ()) -> Membership:
    """A membership of nodes by number."""
    return Membership.of(map(member, voters), map(member, learners))


def role_of(replica: Replica) -> Role:
    """The role now; asked through a function, the type checker believes that it may change."""
    return replica.role


def log_of(*terms: int) -> tuple[Entry, ...]:
    """Entries 1, 2, 3... with these terms."""
    return tuple(Entry(LogIndex(at), Term(term), DATA, at) for at, term in enumerate(terms, 1))


class Letter(NamedTuple):
    """A message on its way."""

    sender: Member
    to: Member
    message: Message


class Disk:
    """What survives a crash."""

    def __init__(self, group: Membership) -> None:
        self.hard_state = HardState(Term(0), None)
        self.base = group
        self.first_index = LogIndex(1)
        self.previous_term = Term(0)
        self.entries: list[Entry] = []
        self.commit_hint = LogIndex(0)

    def entry(self, index: LogIndex) -> Entry:
        return self.entries[index - self.first_index]

    @property
    def last_index(self) -> LogIndex:
        return LogIndex(self.first_index + len(self.entries) - 1)

    def write(self, effects: Effects) -> None:
        """Do the disk work of a round."""
        if effects.durable is not None:
            self.hard_state = effects.durable
        if effects.install is not None:
            self.base = effects.install.membership
            self.first_index = LogIndex(effects.install.index + 1)
            self.previous_term = effects.install.index_term
            self.entries = []
        if effects.truncate_from is not None:
            del self.entries[effects.truncate_from - self.first_index :]
        for entry in effects.append:
            assert entry.index == self.last_index + 1, "storage was asked to leave a gap"
            self.entries.append(entry)

    def compact(self, upto: LogIndex, base: Membership) -> None:
        """Drop entries up to and including `upto`."""
        self.previous_term = self.entry(upto).term
        del self.entries[: upto + 1 - self.first_index]
        self.first_index = LogIndex(upto + 1)
        self.base = base

    def copy(self) -> Disk:
        made = Disk(self.base)
        made.__dict__.update(self.__dict__)
        made.entries = list(self.entries)
        return made


class Host:
    """One member: its replica, its disk, and what is written but not yet synced."""

    replica_type: type[Replica] = Replica

    def __init__(
        self,
        me: Member,
        group: Membership,
        *,
        config: RaftConfig | None = None,
        seed: str = "",
        replica_type: type[Replica] = Replica,
    ) -> None:
        self.me = me
        self.config = config or RaftConfig()
        self.seed = seed
        self.replica_type = replica_type
        self.disk = Disk(group)
        self.starts = 0
        self.up = False
        self.ready: list[tuple[int, LogIndex]] = []
        self.failed: list[int] = []
        self.snapshot_needs: deque[Member] = deque()
        self.start()

    def start(self) -> None:
        """Start a process on what the disk holds."""
        self.starts += 1
        self.up = True
        disk = self.disk
        self.staged = disk.copy()
        self.unsynced: deque[Effects] = deque()
        runs: list[tuple[LogIndex, Term]] = []
        for entry in disk.entries:
            if not runs or runs[-1][1] != entry.term:
                runs.append((entry.index, entry.term))
        self.replica = self.replica_type(
            self.config,
            self.me,
            term=disk.hard_state.term,
            vote=disk.hard_state.vote,
            log=RaftLog(
                first_index=disk.first_index,
                last_index=disk.last_index,
                term_runs=runs,
                previous_term=disk.previous_term,
            ),
            membership=disk.base,
            membership_entries=[
                (entry.index, entry.membership) for entry in disk.entries if entry.membership
            ],
            commit_index=disk.commit_hint,
            rng=random.Random(f"{self.seed}/{self.me.node}/{self.starts}"),
        )

    def crash(self) -> None:
        """Lose the process and everything that was not synced."""
        self.up = False
        self.unsynced.clear()

    def take(self) -> list[Letter]:
        """Take one round of effects; return what leaves at once."""
        effects = self.replica.take_effects()
        self.staged.write(effects)
        self.unsynced.append(effects)
        self.ready.extend(effects.read_ready)
        self.failed.extend(effects.read_failed)
        self.snapshot_needs.extend(need.to for need in effects.snapshots)
        return self._letters(effects.send)

    def sync_one(self) -> list[Letter]:
        """Finish the oldest round; return what had to wait for it."""
        effects = self.unsynced.popleft()
        self.disk.write(effects)
        self.replica.effects_done(effects)
        self.apply()
        return self._letters(effects.reply)

    def apply(self) -> None:
        """Apply what is committed, and remember how far as a hint."""
        self.replica.applied(self.replica.commit_index)
        self.disk.commit_hint = max(self.disk.commit_hint, self.replica.commit_hint)

    def _letters(self, envelopes: tuple[Envelope, ...]) -> list[Letter]:
        letters = []
        for to, message in envelopes:
            filled = self.fill(message) if isinstance(message, AppendRequest) else message
            if filled is not None:
                letters.append(Letter(self.me, to, filled))
        return letters

    def fill(self, request: AppendRequest) -> AppendRequest | None:
        """Fill in the entries of a range, as the shell does; None if they are gone."""
        first = request.prev_index + 1
        if first < self.staged.first_index:
            return None
        at = first - self.staged.first_index
        count = request.last_index - request.prev_index
        return request._replace(entries=tuple(self.staged.entries[at : at + count]))

    def snapshot(self) -> InstallSnapshot:
        """The newest snapshot: everything that is committed here."""
        replica = self.replica
        index = replica.commit_index
        return InstallSnapshot(
            replica.term, index, replica.log.term_at(index), replica.membership_at(index)
        )

    def compact(self, upto: LogIndex) -> None:
        """Drop the beginning of the log, in the core and on disk."""
        base = self.replica.membership_at(upto)
        self.replica.compact(upto)
        self.staged.compact(upto, base)
        self.disk.compact(upto, base)

    def run(self) -> list[Letter]:
        """Take and sync until nothing is due; return everything that leaves."""
        letters: list[Letter] = []
        while self.up and (self.replica.has_effects or self.unsynced):
            if self.replica.has_effects:
                letters.extend(self.take())
            else:
                letters.extend(self.sync_one())
        return letters

    def entries(self) -> list[tuple[int, int]]:
        """The log as (index, term) pairs."""
        return [(entry.index, entry.term) for entry in self.staged.entries]


def prepare(
    host: Host, *, term: int = 0, vote: int | None = None, log: tuple[Entry, ...] = ()
) -> None:
    """Put a host on a disk with this term, vote and log."""
    host.disk.hard_state = HardState(Term(term), None if vote is None else member(vote))
    host.disk.entries = list(log)
    host.start()


class Cluster:
    """Hosts that talk over a network which delivers in order and loses nothing, unless told."""

    def __init__(
        self,
        *voters: int,
        learners: tuple[int, ...] = (),
        spare: tuple[int, ...] = (),
        config: RaftConfig | None = None,
        replica_type: type[Replica] = Replica,
        seed: str = "",
    ) -> None:
        group = membership(*voters, learners=learners)
        self.hosts = {
            node: Host(member(node), group, config=config, seed=seed, replica_type=replica_type)
            for node in (*voters, *learners, *spare)
        }
        self.letters: deque[Letter] = deque()
        self.cut_off: set[tuple[int, int]] = set()
        """(from, to) pairs whose messages are lost."""

    def __getitem__(self, node: int) -> Replica:
        return self.hosts[node].replica

    def cut(self, *nodes: int) -> None:
        """Separate these nodes from all others, in both directions."""
        for a in self.hosts:
            for b in self.hosts:
                if (a in nodes) != (b in nodes):
                    self.cut_off.add((a, b))

    def heal(self) -> None:
        """Let everything through again."""
        self.cut_off.clear()

    def collect(self) -> None:
        """Do everybody's effects; what leaves goes on its way."""
        for host in self.hosts.values():
            self.letters.extend(host.run())

    def deliver(self, letter: Letter) -> bool:
        """Deliver one message, unless it is lost."""
        host = self.hosts[letter.to.node]
        if not host.up or (letter.sender.node, letter.to.node) in self.cut_off:
            return False
        host.replica.receive(letter.sender, letter.message)
        return True

    def settle(self) -> None:
        """Deliver until nobody has anything to say."""
        self.collect()
        while self.letters:
            self.deliver(self.letters.popleft())
            if not self.letters:
                self.collect()

    def tick(self, count: int = 1) -> None:
        """Let time pass for everybody."""
        for _ in range(count):
            for host in self.hosts.values():
                if host.up:
                    host.replica.tick()
            self.settle()

    def elect(self, node: int) -> Replica:
        """Make a node leader."""
        self[node].campaign()
        self.settle()
        assert self[node].role is Role.LEADER
        return self[node]

    def leaders(self) -> list[int]:
        """Nodes that believe to lead."""
        return [
            node
            for node, host in self.hosts.items()
            if host.up and host.replica.role is Role.LEADER
        ]
