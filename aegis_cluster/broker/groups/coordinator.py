"""The coordinator's decisions: a group and what happened go in, commands come out, or a refusal.

Pure. The leader of the group's partition calls these on the group as it will be once everything
under way has committed, so requests can follow each other without waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from aegis_cluster.broker.groups.assignor import assign
from aegis_cluster.broker.groups.commands import DropMember, GroupMember, PutMember, SetTarget
from aegis_cluster.broker.groups.membership import Seen, next_step
from aegis_cluster.errors import MemberFenced, MemberInUse, Throttled
from aegis_cluster.limits import GROUP_MEMBERS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aegis_cluster.broker.groups.commands import Places
    from aegis_cluster.broker.groups.group_table import Group
    from aegis_cluster.ids import TopicPartition

    MembershipCommand = PutMember | DropMember | SetTarget

JOINING = 0
"""The version that a member reports which has seen nothing yet."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: who, in which life, and what it has seen and reads."""

    group: str
    name: str
    session: str
    static: bool
    topics: tuple[str, ...]
    session_timeout_ms: int
    client: str
    seen: Seen


class Decision:
    """Commands under way, and the group as it is after them."""

    def __init__(self, group: Group) -> None:
        self.group = group.copy()
        self.commands: list[MembershipCommand] = []
        self._holders: dict[TopicPartition, str] | None = None

    def add(self, command: MembershipCommand) -> None:
        self.commands.append(command)
        self.group.apply(command)
        self._holders = None

    def step(self, name: str, seen: Seen) -> None:
        """Move one member on, as far as it can go now."""
        if self._holders is None:
            self._holders = self.group.holders()
        member = self.group.members[name]
        step = next_step(self.group, member, seen, self._holders)
        if step is member:
            return
        self.commands.append(PutMember(self.group.name, step))
        self.group.members[name] = step
        for place in member.held - step.held:
            del self._holders[place]
        for place in step.held:
            self._holders[place] = name


def beat(
    group: Group,
    beat: Beat,
    topics: Mapping[str, int],
    is_alive: Callable[[GroupMember], bool],
    waiting: Mapping[str, Seen],
) -> Decision:
    """What a heartbeat leads to.

    topics: partition counts of all topics of users. is_alive: whether the process behind a member
    still is. waiting: what the other members have said that wait for news. Raises `MemberFenced`,
    `MemberInUse`, `Throttled`.
    """
    decision = Decision(group)
    known = decision.group.members.get(beat.name)
    if known is None or known.session != beat.session:
        known = _admit(decision, beat, known, is_alive)
    elif known.topics != beat.topics:
        decision.add(PutMember(beat.group, replace(known, topics=beat.topics)))
    if _is_outdated(decision.group, topics, changed=known.topics != beat.topics):
        _retarget(decision, topics, newly_subscribed=_names_of(beat.topics))
    _move_on(decision, {**waiting, beat.name: beat.seen})
    return decision


def leave(
    group: Group, names: Iterable[str], topics: Mapping[str, int], waiting: Mapping[str, Seen]
) -> Decision:
    """Members go; what they held is free for the others at once."""
    decision = Decision(group)
    for name in sorted(names):
        if name in decision.group.members:
            decision.add(DropMember(group.name, name))
    if decision.commands and decision.group.members:
        _retarget(decision, topics)
    _move_on(decision, waiting)
    return decision


def topics_changed(
    group: Group, topics: Mapping[str, int], waiting: Mapping[str, Seen]
) -> Decision:
    """Topics were made, deleted or widened."""
    decision = Decision(group)
    if group.members and _is_outdated(group, topics):
        _retarget(decision, topics)
        _move_on(decision, waiting)
    return decision


def check_commit(
    group: Group, name: str, session: str, epoch: int, places: Iterable[TopicPartition]
) -> None:
    """Raise `MemberFenced` unless this very process holds all of these partitions at this epoch."""
    member = group.members.get(name)
    if member is None or member.session != session:
        raise fenced(group.name, name)
    if member.epoch != epoch:
        raise MemberFenced(
            f"Member {name} of group {group.name} commits as of epoch {epoch}, and it is at"
            f" {member.epoch} by now; its next heartbeat tells it what it may still commit.",
            have=member.epoch,
            got=epoch,
            stale=True,
        )
    lost = sorted(set(places) - member.held)
    if lost:
        raise MemberFenced(
            f"Member {name} of group {group.name} does not hold {lost[0]} (any more), so it cannot"
            " commit a position of it.",
            partition=str(lost[0]),
        )


def fenced(group: str, name: str) -> MemberFenced:
    return MemberFenced(
        f"Group {group} has no member {name} of this session (any more): it left, or was silent"
        " for longer than its session time-out. Join again.",
        group=group,
        member=name,
    )


def _admit(
    decision: Decision,
    beat: Beat,
    known: GroupMember | None,
    is_alive: Callable[[GroupMember], bool],
) -> GroupMember:
    """Take a new member in, or a new process in the place of a dead one of the same name."""
    if beat.seen.version != JOINING:
        raise fenced(beat.group, beat.name)
    if known is None:
        if len(decision.group.members) >= GROUP_MEMBERS_MAX:
            raise Throttled(f"Group {beat.group} has {GROUP_MEMBERS_MAX} members, the most it may.")
        member = _member_of(beat, version=1)
        decision.add(PutMember(beat.group, member))
        return replace(member, topics=())
    if is_alive(known):
        raise MemberInUse(
            f"Group {beat.group} has a living member {beat.name} in another process. Stop that one"
            " first, or join under another member_id.",
            group=beat.group,
            member=beat.name,
        )
    member = _member_of(beat, version=known.version + 1)
    # The old process is gone and reads nothing, so all it held is the new one's.
    decision.add(PutMember(beat.group, replace(member, epoch=known.epoch, assigned=known.assigned)))
    return known


def _member_of(beat: Beat, *, version: int) -> GroupMember:
    return GroupMember(
        name=beat.name,
        session=beat.session,
        static=beat.static,
        epoch=0,
        version=version,
        topics=beat.topics,
        session_timeout_ms=beat.session_timeout_ms,
        client=beat.client,
    )


def _is_outdated(group: Group, topics: Mapping[str, int], *, changed: bool = False) -> bool:
    return changed or _followed(group, topics) != group.partitions


def _retarget(
    decision: Decision, topics: Mapping[str, int], newly_subscribed: frozenset[str] = frozenset()
) -> None:
    """Decide anew who should hold what."""
    group = decision.group
    followed = _followed(group, topics)
    # Whoever names a topic has seen it; this node may hear of it later than that.
    named = _names_of(topic for member in group.members.values() for topic in member.topics)
    first_seen = {
        name: count if group.epoch == 0 or name in newly_subscribed or name in named else 0
        for name, count in followed.items()
        if name not in group.first_seen
    }
    subscriptions = {
        name: _matching(member.topics, followed) for name, member in group.members.items()
    }
    target = assign(subscriptions, followed, _present(group))
    decision.add(SetTarget(group.name, group.epoch + 1, target, followed, first_seen))


def _present(group: Group) -> dict[str, Places]:
    """The assignment to stay close to: the target, and for those without one, what they hold."""
    return {name: group.target.get(name, member.assigned) for name, member in group.members.items()}


def _move_on(decision: Decision, seen: Mapping[str, Seen]) -> None:
    """Everybody's next step; what one gives up in it, another may take in the same decision."""
    done = -1
    while done < len(decision.commands):
        done = len(decision.commands)
        for name in sorted(seen):
            if name in decision.group.members:
                decision.step(name, seen[name])


def _followed(group: Group, topics: Mapping[str, int]) -> dict[str, int]:
    """Partition counts of all topics that some member follows."""
    wanted = {topic for member in group.members.values() for topic in member.topics}
    return {topic: topics[topic] for topic in sorted(_matching(wanted, topics))}


def _matching(subscribed: Iterable[str], topics: Mapping[str, int]) -> frozenset[str]:
    """The topics that these names and patterns mean."""
    names = _names_of(subscribed)
    found = {name for name in names if name in topics}
    for pattern in sorted(set(subscribed) - names):
        found |= {topic for topic in topics if fnmatchcase(topic, pattern)}
    return frozenset(found)


def _names_of(subscribed: Iterable[str]) -> frozenset[str]:
    """Those that are no patterns."""
    return frozenset(topic for topic in subscribed if not any(sign in topic for sign in "*?["))
