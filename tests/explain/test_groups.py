"""Facts in, sentences out: why a group does not go on, and who holds what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.client.coordinator import GroupPosition, GroupState, MemberState
from aegis_cluster.explain.findings import explanation
from aegis_cluster.explain.gather import group_facts, partitions_of
from aegis_cluster.explain.groups import GroupFacts, MemberFacts, PlaceFacts, explain_group
from aegis_cluster.explain.partitions import PartitionFacts, ReplicaFacts
from aegis_cluster.ids import TopicPartition

HERE = (ReplicaFacts("node-1", alive=True, in_sync=True),)
AWAY = (ReplicaFacts("node-2", alive=False),)
FIRST, SECOND = TopicPartition("orders", 0), TopicPartition("orders", 1)


def held(place: TopicPartition, end: int = 100, start: int = 0) -> PartitionFacts:
    return PartitionFacts(*place, HERE, "node-1", start, end, end)


def at(place: TopicPartition, position: int | None, **more: int) -> PlaceFacts:
    return PlaceFacts(place, held(place), position, **more)


def member(name: str, *places: TopicPartition, **more: object) -> MemberFacts:
    mine = frozenset(places)
    facts = MemberFacts(name, f"{name}.py", ("orders",), mine, frozenset(), mine)
    return replace(facts, **more)  # type: ignore[arg-type]


ANNA, BERT = member("anna", FIRST), member("bert", SECOND)
WELL = GroupFacts(
    "billing",
    held(TopicPartition("__groups", 3)),
    True,
    2_000,
    (ANNA, BERT),
    (at(FIRST, 100), at(SECOND, 100)),
    {"orders": 2},
)


def with_places(*places: PlaceFacts) -> GroupFacts:
    return replace(WELL, places=places)


LATE = at(FIRST, 40, committed_ms_ago=125_000)
CASES = {
    "keeps up": (WELL, ["keeps_up"], ["2 members hold 2 partitions, and nothing waits"]),
    "stuck": (
        with_places(LATE, at(SECOND, 100)),
        ["not_committing"],
        ["member anna (anna.py) holds orders/0", "nothing there for 2 min", "60 messages wait"],
    ),
    "nothing committed yet": (
        with_places(at(FIRST, None), at(SECOND, 100)),
        ["not_committing"],
        ["has committed nothing there yet", "100 messages wait"],
    ),
    "two partitions of one stuck member": (
        replace(WELL, members=(member("anna", FIRST, SECOND),), places=(LATE, at(SECOND, 90))),
        ["not_committing"],
        ["orders/0 and orders/1", "70 messages"],
    ),
    "catches up": (
        with_places(at(FIRST, 40, moved=30, grew=10), at(SECOND, 100)),
        ["moves", "catching_up"],
        ["15 messages/s", "5/s come in", "in 6.0 s"],
    ),
    "falls behind": (
        with_places(at(FIRST, 40, moved=10, grew=30), at(SECOND, 100)),
        ["moves", "falling_behind"],
        ["5 messages/s and 15/s"],
    ),
    "nobody reads": (
        replace(WELL, members=(), places=(LATE, at(SECOND, 90))),
        ["no_members"],
        ["no members", "70 messages wait in 2 partitions"],
    ),
    "nobody reads, nothing waits": (replace(WELL, members=()), ["idle"], ["nothing waits"]),
    "retention has passed": (
        with_places(PlaceFacts(FIRST, held(FIRST, start=50), 20, 1_000, 0), at(SECOND, 100)),
        ["position_lost"],
        ["20, is below what is kept there (50 and up): 30 offsets"],
    ),
    "beyond the end": (
        with_places(at(FIRST, 130), at(SECOND, 100)),
        ["position_beyond"],
        ["130, is beyond its end, 100"],
    ),
    "no leader": (
        with_places(PlaceFacts(FIRST, PartitionFacts(*FIRST, AWAY), 10, 1_000), at(SECOND, 100)),
        ["no_quorum"],
        ["orders/0 has no leader", "node-2 does not answer"],
    ),
    "no coordinator": (
        replace(WELL, known=False, coordinator=PartitionFacts("__groups", 3, AWAY)),
        ["no_coordinator"],
        ["Nobody coordinates group billing", "__groups/3", "node-2"],
    ),
    "a coordinator that is silent": (replace(WELL, known=False), ["no_answer"], ["in time"]),
    "a member about to expire": (
        replace(WELL, members=(replace(ANNA, silent=True, ms_left=3_200), BERT)),
        ["member_expiring"],
        ["anna", "is silent and counts as dead in 3.2 s", "1 partition"],
    ),
    "a member whose connection is lost": (
        replace(WELL, members=(replace(ANNA, connected=False, ms_left=200), BERT)),
        ["member_expiring"],
        ["has lost its connection", "0.2 s"],
    ),
    "moving": (
        replace(
            WELL,
            members=(
                member("anna", revoking=frozenset({FIRST}), target=frozenset()),
                member("bert", SECOND, target=frozenset({FIRST, SECOND})),
            ),
        ),
        ["moving"],
        ["anna (anna.py) is giving up orders/0 for bert"],
    ),
    "one member too many": (
        replace(WELL, members=(ANNA, BERT, member("carl"))),
        ["keeps_up", "idle_members"],
        ["carl has nothing to read: 3 members share 2 partitions"],
    ),
    "a topic that is not there": (
        GroupFacts("billing", WELL.coordinator, members=(member("anna", topics=("order",)),)),
        ["no_such_topic"],
        ["anna asked for topic order, which does not exist"],
    ),
    "behind an open transaction": (
        with_places(
            PlaceFacts(FIRST, replace(held(FIRST), last_stable=40), 40, 1_000), at(SECOND, 100)
        ),
        ["moves", "open_transaction"],
        ["begins at offset 40 of orders/0"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_what_is_said(case: str) -> None:
    facts, codes, words = CASES[case]
    found = explanation("group", "billing", explain_group(facts)).findings
    assert [one.code for one in found] == codes
    told = " ".join(one.what for one in found)
    for word in words:
        assert word in told, told
    assert all(one.do for one in found if one.blocks)


def test_two_looks_are_put_together() -> None:
    """Movement is what lies between them; a status says what each partition's leader has."""

    def status(end: int) -> dict[str, object]:
        one = {
            "partition": 0,
            "group": 9,
            "leader": "node-1",
            "replicas": ["node-1", "node-2"],
            "in_sync": ["node-1"],
            "log_start": 0,
            "high_watermark": end,
            "last_stable": end,
        }
        trouble = [{"group": 9, "topic": "orders", "why": "frame checksum"}]
        full = [{"group": 0, "topic": "", "why": "The disk of node 1 is full"}]
        nodes = [
            {"name": "node-1", "alive": True, "shards": [{"damaged": full}]},
            {"name": "node-2", "alive": True, "shards": [{"damaged": trouble}]},
        ]
        return {"nodes": nodes, "topics": [{"name": "orders", "partitions": [one]}]}

    def look(position: int, ms_left: int) -> tuple[GroupState, dict[TopicPartition, GroupPosition]]:
        mine = frozenset({FIRST})
        anna = MemberState(
            "anna", "anna.py", False, 3, ("orders",), mine, frozenset(), mine, ms_left, True
        )
        return GroupState(3, True, 1, (anna,)), {FIRST: GroupPosition(FIRST, position, 1)}

    before, after = partitions_of(status(50)), partitions_of(status(80))
    damaged = after[FIRST].replicas[1]
    assert (damaged.damage, after[FIRST].replicas[0].disk) == (
        "frame checksum",
        "The disk of node 1 is full",
    )
    facts = group_facts("billing", None, (before, after), (look(10, 9_000), look(30, 7_000)), 2_000)
    (place,) = facts.places
    assert (place.position, place.moved, place.grew, place.lag) == (30, 20, 30, 50)
    assert facts.members[0].silent, "its time has run on"
    facts = group_facts("billing", None, (before, after), (look(10, 9_000), look(10, 9_900)), 2_000)
    assert not facts.members[0].silent
    assert facts.places[0].moved == 0
