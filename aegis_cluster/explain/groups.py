"""Why a consumer group makes no progress: pure, from two looks at it a moment apart."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aegis_cluster.explain.findings import Finding, counted, listed, seconds
from aegis_cluster.explain.partitions import explain_partition

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aegis_cluster.explain.partitions import PartitionFacts
    from aegis_cluster.ids import TopicPartition

EXPIRING_MS: Final = 5_000
REBALANCE_MINUTES: Final = 5
"""As `limits.REBALANCE_TIMEOUT_MS`: whoever gives nothing up for so long loses its membership."""


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """ms_left: until it counts as dead unless it is heard. silent: it was not heard between the two
    looks."""

    name: str
    client: str
    topics: tuple[str, ...] = ()
    assigned: frozenset[TopicPartition] = frozenset()
    revoking: frozenset[TopicPartition] = frozenset()
    target: frozenset[TopicPartition] = frozenset()
    ms_left: int = 30_000
    connected: bool = True
    silent: bool = False

    @property
    def described(self) -> str:
        return f"member {self.name} ({self.client})" if self.client else f"member {self.name}"


@dataclass(frozen=True, slots=True)
class PlaceFacts:
    """One partition that the group reads, or has read.

    position: None before the first commit. committed_ms_ago: by our clock. moved, grew: how far
    position and high watermark went between the two looks.
    """

    place: TopicPartition
    partition: PartitionFacts | None
    position: int | None = None
    committed_ms_ago: int | None = None
    moved: int = 0
    grew: int = 0

    @property
    def start(self) -> int:
        """Where reading goes on."""
        return self.position if self.position is not None else self._log_start

    @property
    def lag(self) -> int:
        end = self.partition.high_watermark if self.partition is not None else None
        return 0 if end is None else max(0, end - self.start)

    @property
    def _log_start(self) -> int:
        start = self.partition.log_start if self.partition is not None else None
        return 0 if start is None else start


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """coordinator: partition of `__groups` whose leader knows the group. known: that leader has
    answered; only then is the rest to be trusted. topics: those that exist, with partition counts.
    """

    name: str
    coordinator: PartitionFacts | None
    known: bool = True
    watched_ms: int = 0
    members: tuple[MemberFacts, ...] = ()
    places: tuple[PlaceFacts, ...] = ()
    topics: Mapping[str, int] = field(default_factory=dict)

    @property
    def lag(self) -> int:
        return sum(one.lag for one in self.places)

    @property
    def holders(self) -> dict[TopicPartition, MemberFacts]:
        return {
            place: member for member in self.members for place in member.assigned | member.revoking
        }


def explain_group(facts: GroupFacts) -> list[Finding]:
    """What keeps it from going on, in the order in which it should be looked at."""
    if not facts.known:
        return list(_without_coordinator(facts))
    found = [
        *_leaderless(facts),
        *_lost_positions(facts),
        *_without_members(facts),
        *_missing_topics(facts),
        *_dying_members(facts),
        *_moving(facts),
        *_unheld(facts),
        *_stuck(facts),
        *_trend(facts),
        *_idle(facts),
    ]
    if not any(finding.blocks for finding in found):
        found.insert(0, _well(facts))
    return found


def _well(facts: GroupFacts) -> Finding:
    held = len(facts.holders)
    who = f"{counted(len(facts.members), 'member', 'hold')} {counted(held, 'partition')}"
    if not facts.members:
        return Finding("idle", f"Group {facts.name} has no members, and nothing waits for it.")
    if facts.lag == 0:
        return Finding("keeps_up", f"Group {facts.name} keeps up: {who}, and nothing waits.")
    return Finding(
        "moves",
        f"Group {facts.name} makes progress: {who}, {counted(facts.lag, 'message', 'wait')}.",
    )


def _without_coordinator(facts: GroupFacts) -> Iterator[Finding]:
    if facts.coordinator is not None:
        for finding in explain_partition(facts.coordinator):
            if finding.blocks:
                yield Finding(
                    "no_coordinator",
                    f"Nobody coordinates group {facts.name}: {finding.what} Members that run go on"
                    " with what they hold, but cannot commit.",
                    finding.do,
                    blocks=True,
                    who=finding.who,
                )
                return
    yield Finding(
        "no_answer",
        f"The coordinator of group {facts.name} did not answer in time.",
        "Ask again in a moment; if it stays so, look at `aegis cluster status`.",
        blocks=True,
    )


def _leaderless(facts: GroupFacts) -> Iterator[Finding]:
    for one in facts.places:
        if one.partition is not None and one.partition.leader is None:
            yield from (finding for finding in explain_partition(one.partition) if finding.blocks)


def _lost_positions(facts: GroupFacts) -> Iterator[Finding]:
    for one in facts.places:
        partition = one.partition
        if partition is None or one.position is None or partition.log_start is None:
            continue
        do = (
            f"Stop the members and run `aegis group reset {facts.name} --to earliest --topic"
            f" {one.place.topic}`, or seek in the program."
        )
        if one.position < partition.log_start:
            yield Finding(
                "position_lost",
                f"The group's position in {one.place}, {one.position}, is below what is kept there"
                f" ({partition.log_start} and up): {partition.log_start - one.position} offsets are"
                " gone by retention, and a reader gets OffsetOutOfRange.",
                do,
                blocks=True,
            )
        elif partition.high_watermark is not None and one.position > partition.high_watermark:
            yield Finding(
                "position_beyond",
                f"The group's position in {one.place}, {one.position}, is beyond its end,"
                f" {partition.high_watermark}: a reader gets OffsetOutOfRange.",
                do,
                blocks=True,
            )


def _without_members(facts: GroupFacts) -> Iterator[Finding]:
    if facts.members or facts.lag == 0:
        return
    behind = [one for one in facts.places if one.lag]
    yield Finding(
        "no_members",
        f"Nobody reads: group {facts.name} has no members, and"
        f" {counted(facts.lag, 'message', 'wait')} in {counted(len(behind), 'partition')}.",
        f'Start a consumer with group_id="{facts.name}".',
        blocks=True,
    )


def _missing_topics(facts: GroupFacts) -> Iterator[Finding]:
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for member in facts.members:
        for topic in member.topics:
            if topic not in facts.topics and not any(sign in topic for sign in "*?["):
                wanted[topic].append(member.name)
    for topic, names in sorted(wanted.items()):
        yield Finding(
            "no_such_topic",
            f"{listed(names)} asked for topic {topic}, which does not exist.",
            f"Create it (`aegis topic create {topic}`), or mend the name in the program.",
            blocks=not facts.places,
            who=tuple(names),
        )


def _dying_members(facts: GroupFacts) -> Iterator[Finding]:
    for member in facts.members:
        if member.connected and not (member.silent and member.ms_left < EXPIRING_MS):
            continue
        why = "is silent" if member.connected else "has lost its connection"
        yield Finding(
            "member_expiring",
            f"{member.described} {why} and counts as dead in {seconds(member.ms_left)} unless it is"
            f" heard; then its {counted(len(member.assigned), 'partition')} go to others.",
            "If its process is gone, wait; if it runs, look why it does not reach the coordinator.",
            blocks=bool(member.assigned),
            who=(member.name,),
        )


def _moving(facts: GroupFacts) -> Iterator[Finding]:
    """Partitions that somebody has to give up before another may read them."""
    takers = {
        place: member for member in facts.members for place in member.target - member.assigned
    }
    for member in facts.members:
        if not member.revoking:
            continue
        to = sorted({takers[one].name for one in member.revoking if one in takers})
        yield Finding(
            "moving",
            f"{member.described} is giving up {listed(map(str, sorted(member.revoking)))}"
            f"{f' for {listed(to)}' if to else ''}; until its handler is done with what it was"
            " handed, nobody reads on there.",
            f"It has {REBALANCE_MINUTES} minutes; if its handler hangs, restart that process.",
            blocks=True,
            who=(member.name, *to),
        )


def _unheld(facts: GroupFacts) -> Iterator[Finding]:
    if not facts.members:
        return
    followed = {place.topic for member in facts.members for place in member.target}
    free = [
        one
        for one in facts.places
        if one.lag and one.place not in facts.holders and one.place.topic in followed
    ]
    if free:
        yield Finding(
            "unheld",
            f"Nobody holds {listed(str(one.place) for one in free)} at this moment, where"
            f" {counted(sum(one.lag for one in free), 'message', 'wait')}.",
            "An assignment takes a heartbeat or two; ask again.",
            blocks=True,
        )
    left = sorted({one.place.topic for one in facts.places if one.lag} - followed)
    if left:
        yield Finding(
            "not_followed",
            f"No member follows {listed(left)} any more, where the group has positions.",
            "Let a consumer subscribe to it, or forget that.",
        )


def _stuck(facts: GroupFacts) -> Iterator[Finding]:
    stuck: defaultdict[str, list[PlaceFacts]] = defaultdict(list)
    members = {member.name: member for member in facts.members}
    for one in facts.places:
        holder = facts.holders.get(one.place)
        partition = one.partition
        if holder is None or not one.lag or one.moved or partition is None:
            continue
        if partition.last_stable is not None and one.start >= partition.last_stable:
            yield from (f for f in explain_partition(partition) if f.code == "open_transaction")
        elif holder.connected and not _is_outside(one):
            stuck[holder.name].append(one)
    for name, places in sorted(stuck.items()):
        yield _not_committing(facts, members[name], places)


def _is_outside(one: PlaceFacts) -> bool:
    start = one.partition.log_start if one.partition is not None else None
    return start is not None and one.start < start


def _not_committing(facts: GroupFacts, member: MemberFacts, places: list[PlaceFacts]) -> Finding:
    ages = [one.committed_ms_ago for one in places if one.committed_ms_ago is not None]
    since = (
        f"has committed nothing there for {seconds(min(ages))}"
        if ages
        else "has committed nothing there yet"
    )
    return Finding(
        "not_committing",
        f"{member.described} holds {listed(str(one.place) for one in places)} and {since}, while"
        f" {counted(sum(one.lag for one in places), 'message', 'wait')}. It is alive (its"
        " heartbeats arrive), so its handler is slow or stuck, or does not ack.",
        f"Look at that process, {member.client or member.name}; restarting it hands its partitions"
        " on, from the last committed positions.",
        blocks=True,
        who=(member.name,),
    )


def _trend(facts: GroupFacts) -> Iterator[Finding]:
    moving = [one for one in facts.places if one.lag and one.moved > 0]
    if not moving or facts.watched_ms <= 0:
        return
    per_s = 1000 / facts.watched_ms
    moved = sum(one.moved for one in moving) * per_s
    grew = sum(one.grew for one in moving) * per_s
    lag = sum(one.lag for one in moving)
    if grew > moved:
        yield Finding(
            "falling_behind",
            f"The group reads {moved:.0f} messages/s and {grew:.0f}/s come in, so the"
            f" {lag} that wait become more.",
            "Add members, up to one for each partition, or make the handler faster.",
        )
    elif moved > grew:
        eta = seconds(round(lag / (moved - grew) * 1000))
        yield Finding(
            "catching_up",
            f"The group reads {moved:.0f} messages/s and {grew:.0f}/s come in: at this pace nothing"
            f" waits any more in {eta}.",
        )


def _idle(facts: GroupFacts) -> Iterator[Finding]:
    idle = [one.name for one in facts.members if not (one.assigned or one.revoking or one.target)]
    if idle and facts.places:
        yield Finding(
            "idle_members",
            f"{listed(idle)} {'has' if len(idle) == 1 else 'have'} nothing to read:"
            f" {counted(len(facts.members), 'member', 'share')}"
            f" {counted(len(facts.holders), 'partition')}.",
            "That is well as a reserve; more partitions would give them work.",
            who=tuple(idle),
        )
