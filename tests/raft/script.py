"""Scripts: commands, and the dialogue that they cause, as text that reads like a conversation.

A script is blocks separated by empty lines. A block is comments (`#`), commands, one or more to a
line with `;` between them, the line `----`, and the dialogue. Commands:

    cluster voters=1,2,3 learners=4 spare=5 [leader=1]    new hosts; leader= elects one in silence
    disk 2 term=3 vote=1 log=1,1,2       restart node 2 on a disk with entries 1..3 of these terms
    campaign 1 | tick 5 [at=1] | propose at=1 [count=2] | read at=1 context=7 | applied
    change at=1 add-learner=4 | add-voter=4 | remove=2
    transfer at=1 [to=2] | link-lost 1 at=2 | link-up 1 at=2
    cut 1,2 | cut-one-way 1 to=2 | heal | crash 1 | restart 1
    hold | settle        keep messages / deliver them all (the default after each command)
    step 3               deliver the messages that are on their way, and what they cause, 3 deep
    lose                 lose the messages that are on their way
    compact at=1 upto=3 | snapshot at=1 to=3
    send append to=2 from=1 term=2 prev=1/1 entries=2/2,3/2 commit=0      stray messages
    send ack to=1 from=2 term=2 matched=3 | send vote to=2 from=1 term=2 last=3/1
    logs | state         show logs as index/term, show roles

Lines of the dialogue: `1 -> 2 Message ...` for what arrived, `1 -x 2 ...` for what was lost, and
indented lines for what changed at a node because of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.errors import AegisError
from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft import (
    AppendRefusal,
    AppendReply,
    AppendRequest,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVoteReply,
    PreVoteRequest,
    RaftConfig,
    Replica,
    Role,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.raft.harness import DATA, Cluster, Letter, log_of, member, prepare

if TYPE_CHECKING:
    from collections.abc import Callable


class View(NamedTuple):
    """What of a replica is worth telling when it changes."""

    role: Role
    term: int
    vote: int | None
    leader: int | None
    commit: int
    log: tuple[tuple[int, int], ...]
    members: str
    quiet: bool
    damaged: bool
    snapshots: int
    ready: int
    failed: int


class Script:
    """Runs the commands of one file and writes down what happens."""

    def __init__(self, replica_type: type[Replica] = Replica) -> None:
        self.replica_type = replica_type
        self.cluster = Cluster(1)
        self.lines: list[str] = []
        self.held = False

    # -- the text ---------------------------------------------------------------------------------

    def run(self, text: str) -> str:
        """Run a script; return it with the dialogue as it happened."""
        blocks = [block for block in text.strip().split("\n\n") if block.strip()]
        return "\n\n".join(self._block(block) for block in blocks) + "\n"

    def _block(self, block: str) -> str:
        head = block.split("\n----")[0].rstrip()
        self.lines = []
        for line in head.splitlines():
            if not line.startswith("#"):
                for command in line.split(";"):
                    self._command(command.split())
        if all(line.startswith("#") for line in head.splitlines()):
            return head
        return "\n".join([head, "----", *(self.lines or ["(nothing)"])])

    def _command(self, words: list[str]) -> None:
        name, plain = words[0], [word for word in words[1:] if "=" not in word]
        named = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        handler: Callable[[list[str], dict[str, str]], None] = getattr(
            self, "do_" + name.replace("-", "_")
        )
        before = self._views()
        try:
            handler(plain, named)
        except AegisError as error:
            self.lines.append(f"refused, {type(error).__name__}: {error}")
        if name in ("cluster", "disk"):
            return
        if name not in ("tick", "step", "send", "snapshot"):  # these tell as they go
            self._tell(before)
        if not self.held:
            self._settle()

    # -- the dialogue -----------------------------------------------------------------------------

    def _views(self) -> dict[int, View]:
        return {node: self._view(node) for node, host in self.cluster.hosts.items() if host.up}

    def _view(self, node: int) -> View:
        host = self.cluster.hosts[node]
        replica = host.replica
        return View(
            replica.role,
            replica.term,
            replica.vote and replica.vote.node,
            replica.leader and replica.leader.node,
            replica.commit_index,
            tuple(host.entries()),
            _members(replica),
            replica.quiet,
            replica.damaged,
            len(host.snapshot_needs),
            len(host.ready),
            len(host.failed),
        )

    def _tell(self, before: dict[int, View]) -> None:
        for node, now in self._views().items():
            if node in before and before[node] != now:
                self._tell_one(node, before[node], now)

    def _tell_one(self, node: int, was: View, now: View) -> None:
        host = self.cluster.hosts[node]
        said = []
        if was.term != now.term:
            said.append(f"moves to term {now.term}")
        if now.vote is not None and (was.vote, was.term) != (now.vote, now.term):
            said.append(f"votes for {'itself' if now.vote == node else now.vote}")
        if was.role != now.role:
            said.append(f"becomes {now.role.value}")
        if was.leader != now.leader and now.leader not in (None, node):
            said.append(f"follows {now.leader}")
        said += _log_changes(was.log, now.log)
        if was.members != now.members:
            said.append(f"members are now {now.members}")
        if was.commit != now.commit:
            said.append(f"commits up to {now.commit}")
        for context, index in host.ready[was.ready :]:
            said.append(f"may serve read {context} at {index}")
        said += [f"gives up read {context}" for context in host.failed[was.failed :]]
        if was.snapshots < now.snapshots:
            said.append(f"needs a snapshot for {host.snapshot_needs[-1].node}")
        if was.damaged != now.damaged:
            said.append("finds itself damaged")
        if was.quiet != now.quiet:
            said.append("falls quiet" if now.quiet else "wakes")
        if said:
            self.lines.append(f"  {node} {', '.join(said)}")

    def _settle(self) -> None:
        for _ in range(10_000):
            before = self._views()
            self.cluster.collect()
            self._tell(before)
            if not self.cluster.letters:
                return
            self._deliver_round()

    def _deliver_round(self) -> None:
        for _ in range(len(self.cluster.letters)):
            self._deliver(self.cluster.letters.popleft())

    def _deliver(self, letter: Letter) -> None:
        before = self._views()
        arrow = "->" if self.cluster.deliver(letter) else "-x"
        ends = f"{letter.sender.node} {arrow} {letter.to.node}"
        self.lines.append(f"{ends} {describe(letter.message)}")
        self._tell(before)

    # -- commands ---------------------------------------------------------------------------------

    def do_cluster(self, _plain: list[str], named: dict[str, str]) -> None:
        config = RaftConfig(quiet_ticks=int(named.get("quiet-ticks", "0")))
        self.cluster = Cluster(
            *_numbers(named["voters"]),
            learners=tuple(_numbers(named.get("learners", ""))),
            spare=tuple(_numbers(named.get("spare", ""))),
            config=config,
            replica_type=self.replica_type,
        )
        self.held = False
        if "leader" in named:
            self.cluster.elect(int(named["leader"]))
            self.cluster.tick()  # so that all know what is committed

    def do_disk(self, plain: list[str], named: dict[str, str]) -> None:
        vote = named.get("vote")
        prepare(
            self.cluster.hosts[int(plain[0])],
            term=int(named["term"]),
            vote=None if vote is None else int(vote),
            log=log_of(*_numbers(named.get("log", ""))),
        )

    def _at(self, named: dict[str, str]) -> Replica:
        return self.cluster[int(named["at"])]

    def do_campaign(self, plain: list[str], _named: dict[str, str]) -> None:
        self.cluster[int(plain[0])].campaign()

    def do_tick(self, plain: list[str], named: dict[str, str]) -> None:
        for _ in range(int(plain[0])):
            before = self._views()
            for node, host in self.cluster.hosts.items():
                if host.up and named.get("at", str(node)) == str(node):
                    host.replica.tick()
            self._tell(before)
            if not self.held:
                self._settle()

    def do_propose(self, _plain: list[str], named: dict[str, str]) -> None:
        for _ in range(int(named.get("count", "1"))):
            self._at(named).propose(DATA, 100)

    def do_read(self, _plain: list[str], named: dict[str, str]) -> None:
        self._at(named).read_index(int(named["context"]))

    def do_change(self, _plain: list[str], named: dict[str, str]) -> None:
        replica = self._at(named)
        wanted = replica.membership
        if "add-learner" in named:
            wanted = wanted.with_learner(member(int(named["add-learner"])))
        if "add-voter" in named:
            wanted = wanted.with_voter(member(int(named["add-voter"])))
        if "remove" in named:
            wanted = wanted.without(member(int(named["remove"])))
        replica.change_membership(wanted, 100)

    def do_transfer(self, _plain: list[str], named: dict[str, str]) -> None:
        to = named.get("to")
        self._at(named).transfer_leadership(None if to is None else member(int(to)))

    def do_link_lost(self, plain: list[str], named: dict[str, str]) -> None:
        self._at(named).link_lost(member(int(plain[0])))

    def do_link_up(self, plain: list[str], named: dict[str, str]) -> None:
        self._at(named).link_up(member(int(plain[0])))

    def do_cut(self, plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.cut(*_numbers(plain[0]))

    def do_cut_one_way(self, plain: list[str], named: dict[str, str]) -> None:
        self.cluster.cut_off.add((int(plain[0]), int(named["to"])))

    def do_heal(self, _plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.heal()

    def do_crash(self, plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.hosts[int(plain[0])].crash()

    def do_restart(self, plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.hosts[int(plain[0])].start()

    def do_hold(self, _plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.collect()
        self.held = True

    def do_settle(self, _plain: list[str], _named: dict[str, str]) -> None:
        self.held = False

    def do_step(self, plain: list[str], _named: dict[str, str]) -> None:
        for _ in range(int(plain[0])):
            before = self._views()
            self.cluster.collect()
            self._tell(before)
            self._deliver_round()

    def do_lose(self, _plain: list[str], _named: dict[str, str]) -> None:
        self.cluster.collect()
        self.cluster.letters.clear()

    def do_compact(self, _plain: list[str], named: dict[str, str]) -> None:
        self.cluster.hosts[int(named["at"])].compact(LogIndex(int(named["upto"])))

    def do_snapshot(self, _plain: list[str], named: dict[str, str]) -> None:
        host = self.cluster.hosts[int(named["at"])]
        self._deliver(Letter(host.me, member(int(named["to"])), host.snapshot()))

    def do_send(self, plain: list[str], named: dict[str, str]) -> None:
        messages = {"append": _append, "ack": _ack, "vote": _vote}
        message = messages[plain[0]](named)
        self._deliver(Letter(member(int(named["from"])), member(int(named["to"])), message))

    def do_logs(self, _plain: list[str], _named: dict[str, str]) -> None:
        for node, host in self.cluster.hosts.items():
            shown = " ".join(f"{index}/{term}" for index, term in host.entries())
            self.lines.append(f"{node}: {shown}  (commit {host.replica.commit_index})")

    def do_state(self, _plain: list[str], _named: dict[str, str]) -> None:
        for node, host in self.cluster.hosts.items():
            replica = host.replica
            role = replica.role.value if host.up else "down"
            self.lines.append(f"{node}: {role} term={replica.term}")


def _ack(named: dict[str, str]) -> Message:
    matched = LogIndex(int(named["matched"]))
    return AppendReply(Term(int(named["term"])), matched, LogIndex(0))


def _vote(named: dict[str, str]) -> Message:
    last_index, last_term = _place(named["last"])
    return VoteRequest(Term(int(named["term"])), last_index, last_term, transfer=False)


def _append(named: dict[str, str]) -> Message:
    prev_index, prev_term = _place(named["prev"])
    places = [_place(word) for word in named.get("entries", "").split(",") if word]
    entries = tuple(Entry(index, term, DATA, 100) for index, term in places)
    return AppendRequest(
        Term(int(named["term"])),
        prev_index,
        prev_term,
        LogIndex(int(named["commit"])),
        LogIndex(int(named.get("acknowledged", "0"))),
        LogIndex(prev_index + len(entries)),
        entries,
    )


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def _place(text: str) -> tuple[LogIndex, Term]:
    index, term = text.split("/")
    return LogIndex(int(index)), Term(int(term))


def _members(replica: Replica) -> str:
    voters = ",".join(str(each.node) for each in replica.membership.voters)
    learners = ",".join(str(each.node) for each in replica.membership.learners)
    return f"{voters}+{learners}" if learners else voters


def _log_changes(was: tuple[tuple[int, int], ...], now: tuple[tuple[int, int], ...]) -> list[str]:
    """Entries removed and entries added."""
    if was and now and was[-len(now) :] == now and len(was) > len(now):
        return [f"forgets its log up to {now[0][0] - 1}"]
    same = next(
        (at for at, (a, b) in enumerate(zip(was, now, strict=False)) if a != b),
        min(len(was), len(now)),
    )
    said = []
    if was[same:]:
        said.append(f"cuts its log from {was[same][0]}")
    if now[same:]:
        said.append("appends " + " ".join(f"{index}/{term}" for index, term in now[same:]))
    return said


def describe(message: Message) -> str:
    """One message in words."""
    name = type(message).__name__
    match message:
        case PreVoteRequest():
            last = f"last={message.last_index}/{message.last_term}"
            return f"{name} term={message.term} for={message.proposed_term} {last}"
        case PreVoteReply():
            answer = "yes" if message.granted else "no"
            return f"{name} term={message.term} for={message.proposed_term} {answer}"
        case VoteRequest():
            last = f"last={message.last_index}/{message.last_term}"
            return f"{name} term={message.term} {last}{' transfer' * message.transfer}"
        case VoteReply():
            return f"{name} term={message.term} {'yes' if message.granted else 'no'}"
        case AppendRequest():
            entries = " ".join(f"{entry.index}/{entry.term}" for entry in message.entries)
            prev = f"prev={message.prev_index}/{message.prev_term}"
            return f"{name} term={message.term} {prev} [{entries}] commit={message.commit_index}"
        case AppendReply():
            return f"{name} term={message.term} matched={message.matched}"
        case AppendRefusal():
            hint = f"hint={message.hint_index}/{message.hint_term}"
            return f"{name} term={message.term} prev={message.prev_index} {hint}"
        case Heartbeat() | HeartbeatReply():
            read = f" read={message.read_round}" if message.read_round else ""
            quiet = " quiet" * message.quiet
            return f"{name} term={message.term} commit={message.commit_index}{read}{quiet}"
        case InstallSnapshot():
            return f"{name} term={message.term} upto={message.index}/{message.index_term}"
        case TimeoutNow():
            return f"{name} term={message.term}"
