"""Facts in, sentences out: why a persistent subscription hands nothing out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aegis_cluster.explain.findings import counted, listed, seconds
from aegis_cluster.explain.partitions import PartitionFacts, ReplicaFacts
from aegis_cluster.explain.subscriptions import (
    ConsumerFacts,
    SubscriptionFacts,
    explain_subscription,
)

AWAY = PartitionFacts("__subscriptions", 1, (ReplicaFacts("node-2", alive=False),))
ANNA = ConsumerFacts("anna", "anna.py", 3, 100)
WELL = SubscriptionFacts("orders", "billing", None, lag=5, held=3, settled=2, consumers=(ANNA,))

CASES = {
    "moves": (WELL, ["moves"], ["1 consumer", "5 messages are not settled"]),
    "keeps up": (replace(WELL, lag=0, held=0), ["keeps_up"], ["nothing waits"]),
    "nobody": (replace(WELL, consumers=(), held=0), ["no_consumers"], ["5 wait"]),
    "stuck": (replace(WELL, settled=0), ["not_settling"], ["anna (anna.py) holds 3"]),
    "no coordinator": (
        replace(WELL, known=False, coordinator=AWAY),
        ["no_coordinator"],
        ["node-2 does not answer"],
    ),
    "parked": (replace(WELL, parked=2), ["moves", "parked"], ["2 messages are parked"]),
    "delayed": (
        replace(WELL, delayed=1, to_bury=1),
        ["moves", "delayed", "to_bury"],
        ["1 message waits"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_what_is_said(case: str) -> None:
    facts, codes, words = CASES[case]
    found = explain_subscription(facts)
    assert [one.code for one in found] == codes
    told = " ".join(one.what for one in found)
    for word in words:
        assert word in told


def test_words() -> None:
    assert [listed("abcdefg"[:n]) for n in (0, 1, 2, 3, 7)] == [
        "",
        "a",
        "a and b",
        "a, b and c",
        "a, b, c, d and 3 more",
    ]
    assert (counted(1, "node"), counted(0, "node")) == ("1 node", "0 nodes")
    assert [seconds(ms) for ms in (1_234, 64_000, 300_000, 9_000_000)] == [
        "1.2 s",
        "64 s",
        "5 min",
        "2 h",
    ]
