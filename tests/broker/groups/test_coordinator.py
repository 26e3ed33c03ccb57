"""Members that come, go, sleep and speak late: no partition is ever read by two of them.

The coordinator is pure, so a test is a conversation: members send what they have seen and read,
the network loses, repeats and delays it, and after every step the promise is checked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker.groups import coordinator
from aegis_cluster.broker.groups.commands import (
    CommitOffsets,
    decode_command,
    encode_command,
)
from aegis_cluster.broker.groups.coordinator import Beat
from aegis_cluster.broker.groups.group_table import Group, GroupTable
from aegis_cluster.broker.groups.membership import Seen
from aegis_cluster.errors import MemberFenced, MemberInUse
from aegis_cluster.ids import GroupId, RecordOffset, TopicPartition

if TYPE_CHECKING:
    from aegis_cluster.broker.groups.commands import Places
    from aegis_cluster.broker.groups.coordinator import Decision

TOPICS = {"orders": 6}
NOTHING: Places = frozenset()


def beat_of(name: str, seen: Seen, *, session: str = "s", topics: tuple[str, ...] = ()) -> Beat:
    return Beat("g", name, session, False, topics or ("orders",), 10_000, "here", seen)


@dataclass
class Coordinator:
    """The table behind the decisions, each applied at once and through its encoding."""

    table: GroupTable = field(default_factory=GroupTable)
    topics: dict[str, int] = field(default_factory=lambda: dict(TOPICS))
    alive: set[str] = field(default_factory=set)

    @property
    def group(self) -> Group:
        return self.table.group("g")

    def hear(self, beat: Beat) -> tuple[int, Places]:
        """What the member is told: version and places."""
        decision = coordinator.beat(
            self.group, beat, self.topics, lambda member: member.name in self.alive, {}
        )
        self.carry_out(decision)
        member = self.group.members[beat.name]
        return member.version, member.assigned

    def drop(self, name: str) -> None:
        self.carry_out(coordinator.leave(self.group, [name], self.topics, {}))

    def carry_out(self, decision: Decision) -> None:
        for command in decision.commands:
            self.table.apply(decode_command(encode_command(command)), 0)


@dataclass
class Reader:
    """A process in the group, as the client library behaves."""

    name: str
    session: str
    version: int = 0
    owned: Places = NOTHING
    told: Places = NOTHING

    def says(self) -> Beat:
        return beat_of(self.name, Seen(self.version, self.owned), session=self.session)

    def hears(self, version: int, places: Places) -> None:
        """Gives up at once; takes the rest when it gets to it."""
        self.version, self.told = version, places
        self.owned &= places

    def takes(self) -> None:
        self.owned = self.told


def test_one_member_gets_everything() -> None:
    one = Coordinator()
    assert one.hear(beat_of("a", Seen(0, NOTHING))) == (2, frozenset(_all()))


def test_the_second_waits_until_the_first_has_given_up() -> None:
    one = Coordinator()
    version, everything = one.hear(beat_of("a", Seen(0, NOTHING)))
    assert one.hear(beat_of("b", Seen(0, NOTHING)))[1] == NOTHING
    version, kept = one.hear(beat_of("a", Seen(version, everything)))
    assert len(kept) == 3
    seen_b = Seen(one.group.members["b"].version, NOTHING)
    assert one.hear(beat_of("b", seen_b))[1] == NOTHING
    # Still reading all of it, though it has seen the word.
    assert one.hear(beat_of("a", Seen(version, everything)))[1] == kept
    assert one.hear(beat_of("b", seen_b))[1] == NOTHING
    one.hear(beat_of("a", Seen(version, kept)))
    assert one.hear(beat_of("b", seen_b))[1] == everything - kept
    assert one.group.is_settled or one.group.members["b"].epoch == one.group.epoch


def test_what_was_said_before_the_word_is_no_giving_up() -> None:
    one = Coordinator()
    old_version, everything = one.hear(beat_of("a", Seen(0, NOTHING)))
    one.hear(beat_of("b", Seen(0, NOTHING)))
    one.hear(beat_of("a", Seen(old_version, everything)))
    # A message that was sent before "a" had anything comes late.
    one.hear(beat_of("a", Seen(old_version - 1, NOTHING)))
    seen_b = Seen(one.group.members["b"].version, NOTHING)
    assert one.hear(beat_of("b", seen_b))[1] == NOTHING


def test_a_stranger_under_a_living_members_name_is_refused() -> None:
    one = Coordinator(alive={"a"})
    one.hear(beat_of("a", Seen(0, NOTHING)))
    with pytest.raises(MemberInUse):
        one.hear(beat_of("a", Seen(0, NOTHING), session="other"))
    with pytest.raises(MemberFenced):
        one.hear(beat_of("a", Seen(7, NOTHING), session="other"))


def test_a_new_process_of_the_same_name_takes_over_what_the_dead_one_held() -> None:
    one = Coordinator()
    _, everything = one.hear(beat_of("a", Seen(0, NOTHING)))
    epoch = one.group.epoch
    assert one.hear(beat_of("a", Seen(0, NOTHING), session="next"))[1] == everything
    assert one.group.epoch == epoch
    with pytest.raises(MemberFenced):
        coordinator.check_commit(one.group, "a", "s", epoch, everything)


def test_commits_are_fenced() -> None:
    one = Coordinator()
    _, everything = one.hear(beat_of("a", Seen(0, NOTHING)))
    epoch = one.group.members["a"].epoch
    coordinator.check_commit(one.group, "a", "s", epoch, everything)
    with pytest.raises(MemberFenced) as stale:
        coordinator.check_commit(one.group, "a", "s", epoch - 1, everything)
    assert stale.value.details["stale"]
    with pytest.raises(MemberFenced):
        coordinator.check_commit(one.group, "b", "s", epoch, everything)
    with pytest.raises(MemberFenced):
        coordinator.check_commit(one.group, "a", "s", epoch, {TopicPartition("orders", 99)})
    one.drop("a")
    with pytest.raises(MemberFenced):
        coordinator.check_commit(one.group, "a", "s", epoch, everything)


def test_a_late_commit_does_not_move_the_position_back() -> None:
    table = GroupTable()
    place = TopicPartition("orders", 0)

    def commit(session: str, number: int, offset: int) -> int:
        row = (place, GroupId(1), RecordOffset(offset))
        table.apply(CommitOffsets("g", session, number, (row,)), 0)
        return table.positions("g")[place].offset

    assert commit("s", 1, 10) == 10
    assert commit("s", 2, 20) == 20
    assert commit("s", 1, 10) == 20
    assert commit("s", 2, 20) == 20
    assert commit("s", 3, 5) == 5, "a member may go back on purpose"
    assert commit("", 0, 0) == 0, "so may an administrator"
    assert commit("", 0, 7) == 7


def test_topics_that_grow_and_go() -> None:
    one = Coordinator()
    one.hear(beat_of("a", Seen(0, NOTHING)))
    one.topics = {"orders": 8}
    one.carry_out(coordinator.topics_changed(one.group, one.topics, {}))
    member = one.group.members["a"]
    assert len(one.hear(beat_of("a", Seen(member.version, member.assigned)))[1]) == 8
    assert one.group.is_later(TopicPartition("orders", 6))
    assert not one.group.is_later(TopicPartition("orders", 5))
    one.topics = {}
    one.carry_out(coordinator.topics_changed(one.group, one.topics, {}))
    member = one.group.members["a"]
    assert one.hear(beat_of("a", Seen(member.version, member.assigned)))[1] == NOTHING


def test_a_topic_that_is_named_was_there_before_this_node_heard_of_it() -> None:
    """Else a group that begins at the latest record begins at the first one, because another node
    had the news of the topic sooner."""
    one = Coordinator(topics={})
    one.hear(beat_of("a", Seen(0, NOTHING)))
    one.topics = {"orders": 1}
    one.carry_out(coordinator.topics_changed(one.group, one.topics, {}))
    assert one.group.partitions == {"orders": 1}
    assert not one.group.is_later(TopicPartition("orders", 0))
    one.topics = {"orders": 2}
    one.carry_out(coordinator.topics_changed(one.group, one.topics, {}))
    assert one.group.is_later(TopicPartition("orders", 1))


def test_a_pattern_follows_new_topics_from_their_beginning() -> None:
    one = Coordinator(topics={"orders.eu": 1})
    one.hear(beat_of("a", Seen(0, NOTHING), topics=("orders.*",)))
    one.topics = {"orders.eu": 1, "orders.us": 1, "invoices": 1}
    one.carry_out(coordinator.topics_changed(one.group, one.topics, {}))
    assert set(one.group.partitions) == {"orders.eu", "orders.us"}
    assert one.group.is_later(TopicPartition("orders.us", 0))
    assert not one.group.is_later(TopicPartition("orders.eu", 0))


def test_members_that_restart_one_by_one_move_little() -> None:
    one = Coordinator(topics={"orders": 40})
    readers = {f"m{n:02}": Reader(f"m{n:02}", "s0") for n in range(20)}
    _talk_until_settled(one, readers)
    moved = 0
    for name in sorted(readers):
        before = {n: r.owned for n, r in readers.items()}
        one.drop(name)
        readers[name] = Reader(name, "s1")
        _talk_until_settled(one, readers)
        moved += sum(len(readers[n].owned - before[n]) for n in readers if n != name)
        moved += len(readers[name].owned)
    # Each leaves two partitions behind and gets two: four moves a restart at the very least.
    assert moved <= 20 * 4 * 1.5


@pytest.mark.parametrize("seed", range(60))
def test_never_two_readers_of_one_partition(seed: int) -> None:
    """SEED is the parameter: the same number gives the same conversation."""
    rng = random.Random(seed)
    one = Coordinator(topics={"orders": rng.randint(1, 9)})
    readers: dict[str, Reader] = {}
    late: list[Beat] = []
    for step in range(300):
        name = rng.choice("abcd")
        reader = readers.get(name)
        match rng.choice(["join", "beat", "beat", "beat", "lost", "late", "take", "die"]):
            case "join" if reader is None:
                readers[name] = Reader(name, f"{name}{step}")
            case "die" if reader is not None and rng.random() < 0.3:
                del readers[name]
                one.drop(name)
            case "beat" | "lost" as kind if reader is not None:
                said = reader.says()
                late.append(said)
                answer = one.hear(said)
                if kind == "beat":
                    reader.hears(*answer)
            case "late" if late:
                _hear_late(one, rng.choice(late))
            case "take" if reader is not None:
                reader.takes()
        read = [place for reader in readers.values() for place in reader.owned]
        assert len(read) == len(set(read)), f"two read one partition; seed {seed}, step {step}"
    _talk_until_settled(one, readers)


def _hear_late(one: Coordinator, said: Beat) -> None:
    """Nobody waits for the answer any more."""
    known = one.group.members.get(said.name)
    if said.seen.version == 0 and (known is None or known.session != said.session):
        return  # it would join under its own, dead name; its session then ends by itself
    try:
        one.hear(said)
    except MemberFenced:
        return


def _talk_until_settled(one: Coordinator, readers: dict[str, Reader]) -> None:
    for _ in range(20):
        for _, reader in sorted(readers.items()):
            reader.hears(*one.hear(reader.says()))
            reader.takes()
        if one.group.is_settled:
            break
    assert one.group.is_settled
    copy = GroupTable()
    for piece in one.table.slices():
        copy.add(piece)
    assert list(copy.slices()) == list(one.table.slices())
    read = {place for reader in readers.values() for place in reader.owned}
    assert not readers or len(read) == one.topics["orders"]


def _all() -> list[TopicPartition]:
    return [TopicPartition("orders", number) for number in range(6)]
