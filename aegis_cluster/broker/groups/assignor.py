"""Who should read which partition: pure, sticky and balanced.

The idea: everybody keeps what they have, as far as the balance allows; only what is over or free
moves. Members of a group usually follow the same topics: then two of them never differ by more
than one partition, and no assignment as balanced as this one moves less. Where subscriptions
differ, partitions move one by one while that brings two members closer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.ids import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aegis_cluster.broker.groups.commands import Places


def assign(
    subscriptions: Mapping[str, frozenset[str]],
    partitions: Mapping[str, int],
    previous: Mapping[str, Places],
) -> dict[str, Places]:
    """Places for every member.

    subscriptions: topics by member. partitions: count by topic. previous: the assignment to stay
    close to. A partition that nobody subscribes to is left out.
    """
    if not subscriptions:
        return {}
    held = _kept(subscriptions, partitions, previous)
    followed = set().union(*subscriptions.values())
    taken = {place for places in held.values() for place in places}
    free = [
        TopicPartition(topic, number)
        for topic in sorted(followed)
        for number in range(partitions.get(topic, 0))
        if TopicPartition(topic, number) not in taken
    ]
    if len(set(subscriptions.values())) == 1:
        _fill_evenly(held, free)
    else:
        _fill_one_by_one(held, free, subscriptions)
        _even_out(held, subscriptions)
    return {name: frozenset(places) for name, places in held.items()}


def _kept(
    subscriptions: Mapping[str, frozenset[str]],
    partitions: Mapping[str, int],
    previous: Mapping[str, Places],
) -> dict[str, list[TopicPartition]]:
    """What each member has and may keep, in order; nothing twice."""
    taken: set[TopicPartition] = set()
    held: dict[str, list[TopicPartition]] = {}
    for name in sorted(subscriptions):
        mine = [
            place
            for place in sorted(previous.get(name, ()))
            if place.topic in subscriptions[name]
            and place.partition < partitions.get(place.topic, 0)
            and place not in taken
        ]
        taken.update(mine)
        held[name] = mine
    return held


def _fill_evenly(held: dict[str, list[TopicPartition]], free: list[TopicPartition]) -> None:
    """All follow the same topics: those who have most now may keep one more than the others."""
    total = len(free) + sum(map(len, held.values()))
    share, extra = divmod(total, len(held))
    names = sorted(held, key=lambda name: (-len(held[name]), name))
    quota = {name: share + (place < extra) for place, name in enumerate(names)}
    spare = list(free)
    for name in names:
        spare.extend(held[name][quota[name] :])
        del held[name][quota[name] :]
    spare.sort(reverse=True)
    for name in names:
        while len(held[name]) < quota[name]:
            held[name].append(spare.pop())


def _fill_one_by_one(
    held: dict[str, list[TopicPartition]],
    free: Iterable[TopicPartition],
    subscriptions: Mapping[str, frozenset[str]],
) -> None:
    for place in free:
        able = [name for name in held if place.topic in subscriptions[name]]
        least = min(able, key=lambda name: (len(held[name]), name))
        held[least].append(place)


def _even_out(
    held: dict[str, list[TopicPartition]], subscriptions: Mapping[str, frozenset[str]]
) -> None:
    """Move partitions from one member to another while they differ by two or more.

    Every move makes the sum of squares of all loads smaller, so it ends.
    """
    moved = True
    while moved:
        moved = False
        for name in sorted(held, key=lambda name: (-len(held[name]), name)):
            for place in list(held[name]):
                able = [other for other in held if place.topic in subscriptions[other]]
                least = min(able, key=lambda other: (len(held[other]), other))
                if len(held[name]) - len(held[least]) >= 2:
                    held[name].remove(place)
                    held[least].append(place)
                    moved = True
