"""Facts in, sentences out: who has a transaction open, and what its end waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.client.transactions import (
    Identity,
    PartInTransaction,
    PastTransaction,
    Phase,
    TransactionState,
)
from aegis_cluster.explain.gather import transaction_facts
from aegis_cluster.explain.partitions import PartitionFacts, ReplicaFacts
from aegis_cluster.explain.transactions import PartFacts, TransactionFacts, explain_transaction
from aegis_cluster.ids import TopicPartition

AWAY = PartitionFacts("orders", 1, (ReplicaFacts("node-2", alive=False),))
HERE = PartitionFacts("orders", 0, (ReplicaFacts("node-1", alive=True),), "node-1", 0, 9, 4)
PARTS = (PartFacts("orders/0", HERE, ended=True), PartFacts("orders/1", AWAY, ended=False))
OPEN = TransactionFacts("billing-1", None, True, "open", "anna.py", 12_000, 60_000, PARTS[:1])

CASES = {
    "idle": (
        replace(OPEN, phase="idle", last="The last one was committed."),
        ["idle"],
        ["billing-1 (anna.py) has no transaction open. The last one was committed."],
    ),
    "open": (
        OPEN,
        ["open"],
        ["anna.py has a transaction of billing-1 open in orders/0 for 12 s", "aborted in 48 s"],
    ),
    "decided, not told": (
        replace(OPEN, phase="committing", parts=PARTS),
        ["markers_missing", "no_quorum"],
        ["decided (committed)", "1 partition of 2 must still be told: orders/1", "node-2"],
    ),
    "decided and told": (
        replace(OPEN, phase="aborting", parts=PARTS[:1]),
        ["ended"],
        ["is aborted, and every partition knows it"],
    ),
    "no coordinator": (
        replace(OPEN, known=False, coordinator=AWAY),
        ["no_coordinator"],
        ["Nobody coordinates", "node-2 does not answer"],
    ),
    "no answer": (replace(OPEN, known=False), ["no_answer"], ["did not answer in time"]),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_what_is_said(case: str) -> None:
    facts, codes, words = CASES[case]
    found = explain_transaction(facts)
    assert [one.code for one in found] == codes
    told = " ".join(one.what for one in found)
    for word in words:
        assert word in told
    assert all(one.do for one in found if one.blocks)


def test_the_coordinators_words() -> None:
    place = TopicPartition("orders", 1)
    state = TransactionState(
        Identity(7, 2),
        Phase.ABORTING,
        60_000,
        5_000,
        "anna.py",
        (PartInTransaction(place, ended=False),),
        (PastTransaction(Identity(7, 1), committed=False, reason="it timed out", time_ms=1),),
        1,
    )
    facts = transaction_facts("billing-1", None, {place: AWAY}, state)
    assert (facts.phase, facts.last) == ("aborting", "The last one was aborted: it timed out.")
    assert facts.parts == (PartFacts("orders/1", AWAY, ended=False),)
