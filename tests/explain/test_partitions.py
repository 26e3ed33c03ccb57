"""Facts in, sentences out: what stands in a partition's way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.explain.partitions import PartitionFacts, ReplicaFacts, explain_partition

ONE, TWO, THREE = (ReplicaFacts(f"node-{n}", alive=True, in_sync=True) for n in (1, 2, 3))
WELL = PartitionFacts("orders", 0, (ONE, TWO, THREE), "node-1", 5, 90, 90)
LOST = replace(WELL, leader=None, log_start=None, high_watermark=None, last_stable=None)


def dead(one: ReplicaFacts) -> ReplicaFacts:
    return replace(one, alive=False, in_sync=False)


def damaged(one: ReplicaFacts) -> ReplicaFacts:
    return replace(one, in_sync=False, damage="frame checksum; it is being rebuilt.")


CASES = {
    "well": (WELL, ["serves"], ["node-1 leads", "3 of 3 replicas", "offsets 5 to 90"]),
    "one node away": (
        replace(WELL, replicas=(ONE, TWO, dead(THREE))),
        ["serves", "replica_missing"],
        ["node-3 does not answer", "one more loss would stop writes"],
    ),
    "one damaged": (
        replace(WELL, replicas=(ONE, damaged(TWO), THREE)),
        ["serves", "replica_damaged"],
        ["on node-2 is damaged", "frame checksum"],
    ),
    "no quorum": (
        replace(LOST, replicas=(ONE, dead(TWO), dead(THREE))),
        ["no_quorum"],
        ["needs 2 of 3 replicas and has 1", "node-2 and node-3 do not answer"],
    ),
    "no quorum, one dead and one damaged": (
        replace(LOST, replicas=(ONE, dead(TWO), damaged(THREE))),
        ["no_quorum"],
        ["node-2 does not answer and the copy on node-3 is damaged"],
    ),
    "electing": (LOST, ["electing"], ["no leader at this moment", "3 of 3 replicas could"]),
    "the only replica is damaged": (
        replace(LOST, replicas=(damaged(ONE),)),
        ["damaged"],
        ["is stopped", "node-1"],
    ),
    "the only replica is away": (
        replace(LOST, replicas=(dead(ONE),)),
        ["no_quorum"],
        ["needs 1 of 1 replica and has 0", "node-1 does not answer"],
    ),
    "the leader's disk is full": (
        replace(WELL, replicas=(replace(ONE, disk="The disk of node 1 is full."), TWO, THREE)),
        ["disk_full"],
        ["The disk of node 1 is full."],
    ),
    "a follower's disk is full": (
        replace(WELL, replicas=(ONE, TWO, replace(THREE, disk="The disk of node 3 is full."))),
        ["serves", "replica_disk_full"],
        ["The disk of node 3 is full."],
    ),
    "followers are behind": (
        replace(WELL, replicas=(ONE, replace(TWO, in_sync=False), dead(THREE))),
        ["catching_up"],
        ["only 1 of 3 replicas hold", "wait for node-2 and node-3"],
    ),
    "an open transaction": (
        replace(WELL, last_stable=40),
        ["serves", "open_transaction"],
        ["begins at offset 40", "50 offsets behind it"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_what_is_said(case: str) -> None:
    facts, codes, words = CASES[case]
    found = explain_partition(facts)
    assert [one.code for one in found] == codes
    told = " ".join(one.what for one in found)
    for word in words:
        assert word in told
    blocked = codes[0] != "serves"
    assert any(one.blocks for one in found) is blocked
    assert all(one.do for one in found if one.blocks and one.code != "disk_full")
