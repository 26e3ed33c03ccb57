"""Who should read what: all of it, evenly, and with as few moves as that takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster.broker.groups.assignor import assign
from aegis_cluster.ids import TopicPartition

ORDERS = {"orders": 4}


def places(*numbers: int, topic: str = "orders") -> frozenset[TopicPartition]:
    return frozenset(TopicPartition(topic, number) for number in numbers)


def test_one_member_reads_all() -> None:
    assert assign({"a": frozenset({"orders"})}, ORDERS, {}) == {"a": places(0, 1, 2, 3)}


def test_nobody_and_nothing() -> None:
    assert assign({}, ORDERS, {}) == {}
    assert assign({"a": frozenset({"gone"})}, ORDERS, {}) == {"a": frozenset()}


def test_a_second_member_gets_half_and_the_first_keeps_the_rest() -> None:
    both = {"a": frozenset({"orders"}), "b": frozenset({"orders"})}
    found = assign(both, ORDERS, {"a": places(0, 1, 2, 3)})
    assert len(found["a"]) == len(found["b"]) == 2
    assert found["a"] < places(0, 1, 2, 3)


def test_each_reads_only_what_it_subscribed_to() -> None:
    subscriptions = {"a": frozenset({"x"}), "b": frozenset({"x", "y"})}
    found = assign(subscriptions, {"x": 2, "y": 2}, {})
    assert found["a"] == places(0, 1, topic="x")
    assert found["b"] == places(0, 1, topic="y")


MEMBERS = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(
    before=MEMBERS,
    after=MEMBERS,
    counts=st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(1, 12), min_size=1),
)
def test_members_of_the_same_topics_share_evenly_and_stay(
    before: list[str], after: list[str], counts: dict[str, int]
) -> None:
    topics = frozenset(counts)
    first = assign(dict.fromkeys(before, topics), counts, {})
    second = assign(dict.fromkeys(after, topics), counts, first)
    for found in (first, second):
        held = [place for mine in found.values() for place in mine]
        assert len(held) == len(set(held)) == sum(counts.values())
        sizes = [len(mine) for mine in found.values()]
        assert max(sizes) - min(sizes) <= 1
    moved = sum(len(second[name] - first.get(name, frozenset())) for name in second)
    assert moved == _moves_needed(first, second)
    assert assign(dict.fromkeys(after, topics), counts, second) == second


def _moves_needed(
    first: dict[str, frozenset[TopicPartition]], second: dict[str, frozenset[TopicPartition]]
) -> int:
    """What must move so that everybody who stays has just its share."""
    total = sum(map(len, second.values()))
    share, extra = divmod(total, len(second))
    had = sorted((len(first.get(name, ())) for name in second), reverse=True)
    kept = sum(min(n, share + (place < extra)) for place, n in enumerate(had))
    return total - kept


@given(
    subscriptions=st.dictionaries(
        st.sampled_from("abcdef"), st.frozensets(st.sampled_from("xyz"), min_size=1), min_size=1
    ),
    counts=st.dictionaries(st.sampled_from("xyz"), st.integers(1, 8), min_size=1),
)
def test_any_subscriptions(
    subscriptions: dict[str, frozenset[str]], counts: dict[str, int]
) -> None:
    found = assign(subscriptions, counts, {})
    held = [place for mine in found.values() for place in mine]
    followed = {topic for topics in subscriptions.values() for topic in topics}
    assert len(held) == len(set(held)) == sum(n for t, n in counts.items() if t in followed)
    assert all(place.topic in subscriptions[name] for name in found for place in found[name])
    assert assign(subscriptions, counts, found) == found
