"""Why a persistent subscription hands nothing out: pure, from what its coordinator says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.explain.findings import Finding, counted, listed, seconds
from aegis_cluster.explain.partitions import explain_partition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.explain.partitions import PartitionFacts


@dataclass(frozen=True, slots=True)
class ConsumerFacts:
    """holds: messages that it was handed and has not settled."""

    name: str
    client: str
    holds: int
    silent_ms: int


@dataclass(frozen=True, slots=True)
class SubscriptionFacts:
    """lag: messages that are not settled. ready: known to the coordinator and waiting to be handed
    out; settled: how many were between the two looks."""

    topic: str
    name: str
    coordinator: PartitionFacts | None
    partitions: tuple[PartitionFacts, ...] = ()
    known: bool = True
    ack_timeout_ms: int = 30_000
    lag: int = 0
    ready: int = 0
    held: int = 0
    delayed: int = 0
    to_bury: int = 0
    parked: int = 0
    settled: int = 0
    consumers: tuple[ConsumerFacts, ...] = ()

    @property
    def label(self) -> str:
        return f"subscription {self.name} of {self.topic}"


def explain_subscription(facts: SubscriptionFacts) -> list[Finding]:
    """What keeps it from going on."""
    if not facts.known:
        return [_without_coordinator(facts)]
    found = [*_leaderless(facts), *_without_consumers(facts), *_busy(facts), *_waiting(facts)]
    if not any(finding.blocks for finding in found):
        found.insert(0, _well(facts))
    return found


def _well(facts: SubscriptionFacts) -> Finding:
    who = counted(len(facts.consumers), "consumer")
    if facts.lag == 0:
        return Finding("keeps_up", f"The {facts.label} keeps up: {who}, and nothing waits.")
    return Finding(
        "moves",
        f"The {facts.label} has {who}; {counted(facts.lag, 'message')} are not settled yet, of"
        f" which consumers hold {facts.held}.",
    )


def _without_coordinator(facts: SubscriptionFacts) -> Finding:
    reasons = [] if facts.coordinator is None else explain_partition(facts.coordinator)
    for reason in reasons:
        if reason.blocks:
            return Finding(
                "no_coordinator",
                f"Nobody coordinates the {facts.label}: {reason.what}",
                reason.do,
                blocks=True,
                who=reason.who,
            )
    return Finding(
        "no_answer",
        f"The coordinator of the {facts.label} did not answer in time.",
        "Ask again in a moment; if it stays so, look at `aegis cluster status`.",
        blocks=True,
    )


def _leaderless(facts: SubscriptionFacts) -> Iterator[Finding]:
    for one in facts.partitions:
        if one.leader is None:
            yield from (finding for finding in explain_partition(one) if finding.blocks)


def _without_consumers(facts: SubscriptionFacts) -> Iterator[Finding]:
    if facts.lag and not facts.consumers:
        yield Finding(
            "no_consumers",
            f"Nobody takes messages from the {facts.label}, and {facts.lag} wait.",
            "Start a consumer: `async with engine.persistent_subscription(…)`.",
            blocks=True,
        )


def _busy(facts: SubscriptionFacts) -> Iterator[Finding]:
    full = [one for one in facts.consumers if one.holds]
    if full and len(full) == len(facts.consumers) and facts.settled == 0:
        yield Finding(
            "not_settling",
            f"The consumers of the {facts.label} hold messages and have settled none of them while"
            f" we looked: {listed(f'{one.name} ({one.client}) holds {one.holds}' for one in full)}."
            f" {facts.lag} are not settled. Their handlers are slow or stuck, or do not ack.",
            f"What is not settled goes to another consumer {seconds(facts.ack_timeout_ms)} after it"
            " was handed out. Add consumers, or raise max_in_flight.",
            blocks=True,
            who=tuple(one.name for one in full),
        )


def _waiting(facts: SubscriptionFacts) -> Iterator[Finding]:
    if facts.delayed:
        yield Finding(
            "delayed",
            f"{counted(facts.delayed, 'message', 'wait')} for the delay of a nack.",
        )
    if facts.to_bury:
        yield Finding(
            "to_bury",
            f"{counted(facts.to_bury, 'message')} were delivered as often as allowed and wait to"
            " be written to the dead letters, which a consumer does.",
        )
    if facts.parked:
        yield Finding(
            "parked",
            f"{counted(facts.parked, 'message')} are parked: nobody gets them until they are"
            " replayed.",
            "Look at them with `parked()`, and call `replay_parked()`.",
        )
