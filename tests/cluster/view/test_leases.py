"""The lease table: one holder at a time on the holders' own clocks, tokens that only rise."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from aegis_cluster import limits
from aegis_cluster.cluster.view.leases import (
    GRANTED,
    HELD,
    LOST,
    REFUSED,
    RELEASED,
    TICK_MS_MAX,
    TOKEN_REIGN_BITS,
    LeaseTable,
)

TTL = limits.LEASE_TTL_MS_MIN


def test_one_holder_at_a_time() -> None:
    table = LeaseTable()
    first = table.acquire("job", "a", TTL, now_ms=0, reign=7)
    second = table.acquire("job", "b", TTL, now_ms=10, reign=7)
    assert (first.kind, second.kind, second.holder) == (GRANTED, HELD, "a")
    assert second.left_ms == TTL + TICK_MS_MAX - 10
    assert table.acquire("other job", "b", TTL, now_ms=10, reign=7).kind == GRANTED


def test_asked_again_the_holder_gets_the_same_token_and_more_time() -> None:
    table = LeaseTable()
    first = table.acquire("job", "a", TTL, now_ms=0, reign=7)
    again = table.acquire("job", "a", TTL, now_ms=3_000, reign=7)
    assert again.token == first.token
    assert table.held["job"].expires_ms == 3_000 + TTL + TICK_MS_MAX


def test_a_late_repeat_does_not_shorten_a_lease() -> None:
    table = LeaseTable()
    table.acquire("job", "a", limits.LEASE_TTL_MS_MAX, now_ms=0, reign=7)
    table.acquire("job", "a", TTL, now_ms=0, reign=7)
    assert table.held["job"].expires_ms == limits.LEASE_TTL_MS_MAX + TICK_MS_MAX


def test_it_goes_to_another_only_when_it_has_ended() -> None:
    table = LeaseTable()
    first = table.acquire("job", "a", TTL, now_ms=0, reign=7)
    end_ms = TTL + TICK_MS_MAX
    assert table.acquire("job", "b", TTL, now_ms=end_ms - 1, reign=7).kind == HELD
    second = table.acquire("job", "b", TTL, now_ms=end_ms, reign=7)
    assert second.kind == GRANTED
    assert second.token > first.token
    assert table.renew("job", "a", first.token, TTL, now_ms=end_ms).kind == LOST
    assert table.release("job", "a", first.token).kind == LOST
    assert table.held["job"].holder == "b"


def test_a_lease_that_has_ended_is_not_renewed_even_if_nobody_wants_it() -> None:
    table = LeaseTable()
    first = table.acquire("job", "a", TTL, now_ms=0, reign=7)
    assert table.renew("job", "a", first.token, TTL, now_ms=TTL).kind == GRANTED
    assert table.renew("job", "a", first.token, TTL, now_ms=3 * TTL).kind == LOST
    assert table.acquire("job", "a", TTL, now_ms=3 * TTL, reign=7).token > first.token


def test_released_it_is_free_at_once() -> None:
    table = LeaseTable()
    first = table.acquire("job", "a", TTL, now_ms=0, reign=7)
    assert table.release("job", "a", first.token).kind == RELEASED
    assert table.acquire("job", "b", TTL, now_ms=1, reign=7).kind == GRANTED


def test_tokens_begin_with_the_reign_and_rise_for_ever() -> None:
    table = LeaseTable()
    tokens = []
    for number, reign in enumerate([5, 5, 5, 9, 9, 9]):
        tokens.append(table.acquire(f"job {number}", "a", TTL, now_ms=0, reign=reign).token)
    assert tokens == sorted(set(tokens))
    assert [token >> TOKEN_REIGN_BITS for token in tokens] == [5, 5, 5, 9, 9, 9]
    # After a total loss a new table begins in a higher reign, and so with higher tokens.
    assert LeaseTable().acquire("job", "a", TTL, now_ms=0, reign=10).token > tokens[-1]


def test_there_is_a_limit_to_their_number() -> None:
    table = LeaseTable()
    for number in range(limits.LEASES_MAX):
        assert table.acquire(f"job {number}", "a", TTL, now_ms=0, reign=1).kind == GRANTED
    assert table.acquire("one more", "a", TTL, now_ms=0, reign=1).kind == REFUSED
    assert table.acquire("one more", "a", TTL, now_ms=2 * TTL, reign=1).kind == GRANTED


@dataclass
class Holder:
    """As a client counts: from before it asked, on a clock of its own."""

    name: str
    token: int = 0
    until: float = 0.0
    asked: list[tuple[float, str]] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(20))
def test_no_two_holders_are_valid_at_once_on_their_own_clocks(seed: int) -> None:
    """The table's clock is behind or ahead by a tick, leaders change, answers come late."""
    rng = random.Random(seed)
    table, holders = LeaseTable(), [Holder("a"), Holder("b"), Holder("c")]
    now, measured, clock_ms, reign = 0.0, 0.0, 0, 1
    for _ in range(3_000):
        now += rng.choice([1, 20, 200, 600])
        if rng.random() < 0.02:  # a new leader: the time since the last tick is never counted
            reign, measured = reign + 1, now
        if rng.random() < 0.5:
            clock_ms += min(int(now - measured), TICK_MS_MAX)
            measured = now
        holder = rng.choice(holders)
        if rng.random() < 0.3:
            holder.asked.append((now, "ask"))
        if holder.asked and rng.random() < 0.5:
            asked_at, _action = holder.asked.pop(0)
            outcome = table.acquire("job", holder.name, TTL, now_ms=clock_ms, reign=reign)
            if outcome.kind == GRANTED:
                assert outcome.token >= holder.token
                holder.token = outcome.token
                holder.until = max(holder.until, asked_at + limits.LEASE_HOLDER_SHARE * TTL)
        valid = [each for each in holders if now < each.until]
        assert len(valid) <= 1, f"seed {seed}: {valid}"
