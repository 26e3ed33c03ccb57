"""A small cluster under chance: one seed decides network, crashes, disks, clocks and requests.

It checks what Raft promises (figure 3): one leader per term, logs that match, leaders that have
everything committed, one value per committed index; and that reads are never stale. At the end it
heals and demands progress.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.errors import Refused
from aegis_cluster.ids import LogIndex, Member, Term
from aegis_cluster.raft import (
    AppendRequest,
    Entry,
    Membership,
    RaftConfig,
    Replica,
    Role,
)
from tests.raft.harness import DATA, Host, Letter, member, membership

if TYPE_CHECKING:
    from collections.abc import Callable


class Violation(AssertionError):
    """A promise of Raft is broken."""


class World:
    """The whole cluster, its network, and what is known to be promised."""

    def __init__(self, seed: int, replica_type: type[Replica] = Replica) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        count = rng.choice([1, 2, 3, 3, 3, 5])
        self.config = RaftConfig(
            quiet_ticks=rng.choice([0, 5, 30]),
            append_bytes_max=rng.choice([300, 5_000]),
            in_flight_bytes_max=rng.choice([5_000, 100_000]),
            in_flight_appends_max=rng.choice([1, 3, 64]),
            probe_bytes_max=rng.choice([0, 200, 10_000]),
        )
        group = membership(*range(1, count + 1))
        spares = rng.choice([0, 0, 2])
        self.hosts: dict[Member, Host] = {
            member(node): Host(
                member(node),
                group,
                config=self.config,
                seed=str(seed),
                replica_type=replica_type,
            )
            for node in range(1, count + spares + 1)
        }
        self.letters: list[Letter] = []
        self.cut_off: set[tuple[Member, Member]] = set()
        self.loss = rng.choice([0.0, 0.02, 0.2])
        self.duplication = rng.choice([0.0, 0.1])
        self.reordering = rng.choice([True, False])
        self.values = 0
        self.reads: dict[int, LogIndex] = {}
        """Read context -> the highest committed index when it was asked."""
        self.leaders: dict[Term, Member] = {}
        self.committed: dict[LogIndex, Entry] = {}
        self.committed_last = LogIndex(0)
        self.seen_commit: dict[Member, LogIndex] = {}
        self.identity: dict[tuple[LogIndex, Term], tuple[Entry, Term]] = {}
        """(index, term) -> the entry, and the term before it: log matching, by induction."""
        weights: dict[Callable[[], None], int] = {
            self.tick_one: 30,
            self.deliver_one: 90,
            self.work_one: 80,
            self.propose: 12,
            self.read: 3,
            self.cut: rng.choice([0, 1]),
            self.mend: 2,
            self.crash: rng.choice([0, 1, 2]),
            self.restart: 4,
            self.link_news: rng.choice([0, 2]),
            self.transfer: rng.choice([0, 1]),
            self.change_membership: rng.choice([0, 2]),
            self.compact: rng.choice([0, 1]),
            self.send_snapshots: 8,
        }
        self._actions = list(weights)
        self._weights = list(weights.values())

    # -- running ----------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """Faults and requests for a while, then healing and progress."""
        for action in self.rng.choices(self._actions, self._weights, k=steps):
            action()
        self.heal_and_progress()

    def _any_up(self) -> Host | None:
        up = [host for host in self.hosts.values() if host.up]
        return self.rng.choice(up) if up else None

    def _leading(self) -> list[Host]:
        return [
            host for host in self.hosts.values() if host.up and host.replica.role is Role.LEADER
        ]

    # -- time, network, disk ----------------------------------------------------------------------

    def tick_one(self) -> None:
        host = self._any_up()
        if host is not None:
            host.replica.tick()
            self.check(host)

    def deliver_one(self) -> None:
        if not self.letters:
            return
        at = self.rng.randrange(len(self.letters)) if self.reordering else 0
        letter = self.letters.pop(at)
        if self.rng.random() < self.duplication:
            self.letters.append(letter)
        if self.rng.random() >= self.loss:
            self._deliver(letter)

    def _deliver(self, letter: Letter) -> None:
        host = self.hosts[letter.to]
        if host.up and (letter.sender, letter.to) not in self.cut_off:
            host.replica.receive(letter.sender, letter.message)
            self.check(host)

    def work_one(self) -> None:
        """One host takes effects, or its disk finishes a round."""
        host = self._any_up()
        if host is None:
            return
        if host.unsynced and self.rng.random() < 0.5:
            self._post(host.sync_one())
        elif host.replica.has_effects:
            ready = len(host.ready)
            self._post(host.take())
            for context, index in host.ready[ready:]:
                self._check_read(context, index)
        self.check(host)

    def _post(self, letters: list[Letter]) -> None:
        for letter in letters:
            self.letters.append(self._shorten(letter))
        if len(self.letters) > 400:
            del self.letters[: len(self.letters) - 400]

    def _shorten(self, letter: Letter) -> Letter:
        """A shell may send fewer entries than the core named."""
        request = letter.message
        if isinstance(request, AppendRequest) and request.entries and self.rng.random() < 0.1:
            count = self.rng.randint(1, len(request.entries))
            return letter._replace(message=request._replace(entries=request.entries[:count]))
        return letter

    # -- requests ---------------------------------------------------------------------------------

    def propose(self) -> None:
        for host in self._leading():
            self.values += 1
            try:
                host.replica.propose(DATA, 100 + self.values)
            except Refused:
                continue

    def read(self) -> None:
        for host in self._leading():
            context = len(self.reads)
            self.reads[context] = self.committed_last
            host.replica.read_index(context)

    def transfer(self) -> None:
        for host in self._leading():
            voters = [each for each in host.replica.membership.voters if each != host.me]
            if voters:
                host.replica.transfer_leadership(self.rng.choice(voters))

    def change_membership(self) -> None:
        for host in self._leading():
            replica = host.replica
            who = self.rng.choice(list(self.hosts))
            wanted = _changed(replica.membership, who)
            if wanted is not None:
                try:
                    replica.change_membership(wanted, 100)
                except Refused:
                    continue

    # -- faults -----------------------------------------------------------------------------------

    def cut(self) -> None:
        pairs = [(a, b) for a in self.hosts for b in self.hosts if a != b]
        if self.rng.random() < 0.5 and pairs:
            self.cut_off.add(self.rng.choice(pairs))  # one way only
            return
        some = [each for each in self.hosts if self.rng.random() < 0.5]
        leaders = [host.me for host in self._leading()]
        if self.rng.random() < 0.5:
            some = leaders
        self.cut_off |= {(a, b) for a, b in pairs if (a in some) != (b in some)}
        if self.rng.random() < 0.5:
            for leader in leaders:
                self._everybody_loses_link(leader)

    def mend(self) -> None:
        self.cut_off.clear()

    def crash(self) -> None:
        host = self._any_up()
        if host is not None:
            host.crash()
            if self.rng.random() < 0.7:
                self._everybody_loses_link(host.me)

    def _everybody_loses_link(self, lost: Member) -> None:
        for other in self.hosts.values():
            if other.up and other.me != lost:
                other.replica.link_lost(lost)

    def restart(self) -> None:
        for host in self.hosts.values():
            if not host.up and self.rng.random() < 0.5:
                host.start()
                self.seen_commit.pop(host.me, None)
                for other in self.hosts.values():
                    if other.up and other is not host:
                        other.replica.link_up(host.me)

    def link_news(self) -> None:
        """Links flap: the news need not even be true."""
        host = self._any_up()
        if host is not None:
            other = self.rng.choice(list(self.hosts))
            if other != host.me:
                news = host.replica.link_lost if self.rng.random() < 0.5 else host.replica.link_up
                news(other)

    def compact(self) -> None:
        host = self._any_up()
        if host is None or host.replica.role is Role.FOLLOWER or host.unsynced:
            return
        upto = host.replica.commit_hint
        if upto >= host.disk.first_index and upto >= host.replica.log.first_index:
            host.compact(LogIndex(self.rng.randint(host.disk.first_index, upto)))

    def send_snapshots(self) -> None:
        for host in self.hosts.values():
            while host.up and host.snapshot_needs:
                to = host.snapshot_needs.popleft()
                if host.replica.role is not Role.LEADER:
                    continue
                if self.rng.random() < 0.3:
                    host.replica.snapshot_failed(to)
                else:
                    self.letters.append(Letter(host.me, to, host.snapshot()))

    # -- checks -----------------------------------------------------------------------------------

    def check(self, host: Host) -> None:
        """Everything that this host's newest step could have broken."""
        replica = host.replica
        if replica.role is Role.LEADER:
            self._check_leader(host)
        if replica.commit_index > self.seen_commit.get(host.me, 0):
            self._check_commit(host)

    def _check_leader(self, host: Host) -> None:
        replica = host.replica
        known = self.leaders.setdefault(replica.term, host.me)
        if known != host.me:
            raise Violation(f"election safety: {known} and {host.me} lead term {replica.term}")
        self._check_completeness(replica)

    def _check_completeness(self, replica: Replica) -> None:
        """A leader has every entry that was committed before its term (Raft §5.4)."""
        last = self.committed.get(self.committed_last)
        if last is None or last.term >= replica.term or replica.log.last_index < last.index:
            if last is not None and last.term < replica.term:
                raise Violation(f"leader completeness: {replica.me} lacks {last}")
            return
        if replica.log.can_follow(last.index) and replica.log.term_at(last.index) != last.term:
            raise Violation(f"leader completeness: {replica.me} has another {last}")

    def _check_commit(self, host: Host) -> None:
        """What is committed stays committed, and is the same everywhere."""
        replica = host.replica
        # What a snapshot brought is checked where it was made.
        first = max(self.seen_commit.get(host.me, 0) + 1, replica.log.first_index)
        known = {each.index: each for each in host.staged.entries}
        known.update((entry.index, entry) for entry in replica._append)
        for index in range(first, replica.commit_index + 1):
            entry = known.get(LogIndex(index))
            if entry is None or entry.term != replica.log.term_at(entry.index):
                raise Violation(f"{host.me} committed {index}, which nobody can apply: {entry}")
            other = self.committed.setdefault(entry.index, entry)
            if other != entry:
                raise Violation(f"state machine safety: {other} and {entry} at {index}")
            self.committed_last = max(self.committed_last, entry.index)
        self.seen_commit[host.me] = replica.commit_index

    def check_logs(self) -> None:
        """Log matching (Raft §5.3): same index and term, same entry and same past."""
        for host in self.hosts.values():
            before = host.staged.previous_term
            for entry in host.staged.entries:
                fact = (entry, before)
                known = self.identity.setdefault((entry.index, entry.term), fact)
                if known != fact and before != 0 and known[1] != 0:
                    raise Violation(f"log matching: {known} and {fact} on {host.me}")
                before = entry.term

    def _check_read(self, context: int, index: LogIndex) -> None:
        if index < self.reads[context]:
            raise Violation(f"stale read {context}: {index} < {self.reads[context]}")

    # -- healing ----------------------------------------------------------------------------------

    def heal_and_progress(self) -> None:
        """All are up and linked: within a bounded time something new must be committed by all."""
        self.check_logs()
        self._heal()
        before, proposed = self.committed_last, False
        for _ in range(300):
            for host in self.hosts.values():
                host.replica.tick()
                self.check(host)
            self._settle()
            leading = [host for host in self._leading() if host.replica.serving]
            if leading and not proposed:
                proposed = self._propose_at(leading[-1])
            if proposed and self.committed_last > before and self._all_agree():
                self.check_logs()
                return
        raise Violation("no progress after healing")

    def _propose_at(self, host: Host) -> bool:
        try:
            host.replica.propose(DATA, 50)
        except Refused:
            return False
        return True

    def _heal(self) -> None:
        self.cut_off.clear()
        self.loss = self.duplication = 0.0
        self.reordering = False
        for host in self.hosts.values():
            if not host.up:
                host.start()
                self.seen_commit.pop(host.me, None)
        for host in self.hosts.values():
            for other in self.hosts:
                if other != host.me:
                    host.replica.link_lost(other)
                    host.replica.link_up(other)

    def _settle(self) -> None:
        for _ in range(60):
            for host in self.hosts.values():
                while host.replica.has_effects or host.unsynced:
                    self._post(host.take() if host.replica.has_effects else host.sync_one())
                    self.check(host)
            self.send_snapshots()
            if not self.letters:
                return
            letters, self.letters = self.letters, []
            for letter in letters:
                self._deliver(letter)

    def _all_agree(self) -> bool:
        """All members of the newest membership have everything."""
        leading = [host for host in self._leading() if host.replica.serving]
        if not leading:
            return False
        return all(
            self.hosts[each].replica.commit_index == self.committed_last
            for each in leading[-1].replica.membership.members
        )


def _changed(before: Membership, who: Member) -> Membership | None:
    """Add a stranger as a learner, promote a learner, remove a voter; keep at least one voter."""
    if who in before.learners:
        return before.with_voter(who)
    if who not in before.voters:
        return before.with_learner(who)
    return before.without(who) if len(before.voters) > 1 else None
