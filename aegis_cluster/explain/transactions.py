"""Why a transaction does not end: pure, from what its coordinator says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.explain.findings import Finding, counted, listed, seconds
from aegis_cluster.explain.partitions import explain_partition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.explain.partitions import PartitionFacts


@dataclass(frozen=True, slots=True)
class PartFacts:
    """One log that takes part. partition: None where the nodes that answered don't know it. ended:
    its marker stands."""

    name: str
    partition: PartitionFacts | None
    ended: bool


@dataclass(frozen=True, slots=True)
class TransactionFacts:
    """phase: "idle", "open", "committing" or "aborting". age_ms: since it began. last: what became
    of the one before, in words; may be empty."""

    name: str
    coordinator: PartitionFacts | None
    known: bool = True
    phase: str = "idle"
    client: str = ""
    age_ms: int = 0
    timeout_ms: int = 60_000
    parts: tuple[PartFacts, ...] = ()
    last: str = ""

    @property
    def ms_left(self) -> int:
        return max(0, self.timeout_ms - self.age_ms)


def explain_transaction(facts: TransactionFacts) -> list[Finding]:
    """Who has it open, and what its end waits for."""
    if not facts.known:
        return [_without_coordinator(facts)]
    match facts.phase:
        case "idle":
            return [_idle(facts)]
        case "open":
            return [_open(facts), *_leaderless(facts)]
        case _:
            return list(_ending(facts))


def _without_coordinator(facts: TransactionFacts) -> Finding:
    reasons = [] if facts.coordinator is None else explain_partition(facts.coordinator)
    for reason in reasons:
        if reason.blocks:
            return Finding(
                "no_coordinator",
                f"Nobody coordinates transactional id {facts.name}: {reason.what} Its producer"
                " cannot begin, commit or abort until then.",
                reason.do,
                blocks=True,
                who=reason.who,
            )
    return Finding(
        "no_answer",
        f"The coordinator of transactional id {facts.name} did not answer in time.",
        "Ask again in a moment; if it stays so, look at `aegis cluster status`.",
        blocks=True,
    )


def _idle(facts: TransactionFacts) -> Finding:
    last = f" {facts.last}" if facts.last else ""
    return Finding(
        "idle", f"Transactional id {facts.name} ({facts.client}) has no transaction open.{last}"
    )


def _open(facts: TransactionFacts) -> Finding:
    names = [part.name for part in facts.parts]
    where = f" in {listed(names)}" if names else ""
    return Finding(
        "open",
        f"{facts.client or 'Its producer'} has a transaction of {facts.name} open{where} for"
        f" {seconds(facts.age_ms)}: readers of committed records wait there. It is aborted in"
        f" {seconds(facts.ms_left)} (time-out {seconds(facts.timeout_ms)}) unless its producer ends"
        " it.",
        f"Look whether that producer still works; `aegis txn abort {facts.name}` ends it now.",
        blocks=bool(names),
        who=(facts.client,) if facts.client else (),
    )


def _leaderless(facts: TransactionFacts) -> Iterator[Finding]:
    for part in facts.parts:
        if part.partition is not None and part.partition.leader is None and not part.ended:
            yield from (one for one in explain_partition(part.partition) if one.blocks)


def _ending(facts: TransactionFacts) -> Iterator[Finding]:
    lacking = [part for part in facts.parts if not part.ended]
    word = "committed" if facts.phase == "committing" else "aborted"
    if not lacking:
        yield Finding(
            "ended", f"The transaction of {facts.name} is {word}, and every partition knows it."
        )
        return
    yield Finding(
        "markers_missing",
        f"The transaction of {facts.name} is decided ({word}), and"
        f" {counted(len(lacking), 'partition')} of {len(facts.parts)} must still be told:"
        f" {listed(part.name for part in lacking)}. Readers of committed records wait there.",
        "The coordinator tells them again and again; what keeps them from hearing it follows.",
        blocks=True,
        who=tuple(part.name for part in lacking),
    )
    yield from _leaderless(facts)
