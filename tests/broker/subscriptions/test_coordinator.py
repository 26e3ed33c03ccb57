"""What a subscription promises, on a log that a test commits and loses as it likes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aegis_cluster.broker.subscriptions.commands import (
    Bury,
    Configure,
    Create,
    Drop,
    Handed,
    HandOut,
    Later,
    Letter,
    Park,
    Replay,
    Reset,
    Rules,
    Run,
    Settle,
    decode_command,
    encode_command,
)
from aegis_cluster.broker.subscriptions.ranges import Ranges
from aegis_cluster.broker.subscriptions.subscription_stm import SubscriptionFold
from aegis_cluster.errors import (
    ConfigError,
    CorruptRecord,
    NotLeader,
    NotReady,
    ProducerFenced,
    SubscriptionInUse,
    SubscriptionNotFound,
)
from aegis_cluster.ids import ProducerId
from aegis_cluster.wire.markers import Marker
from tests.broker.subscriptions.model import (
    KEY,
    LOG,
    Exchange,
    FakePartition,
    Model,
    leases,
    to_bury,
)

TIMEOUT_MS = 1_000
PLAIN = Rules(TIMEOUT_MS, 3, "", "round_robin", ordered=False)
ORDERED = PLAIN._replace(ordered=True)
PINNED = PLAIN._replace(strategy="pinned")


def filled(rules: Rules = PLAIN, count: int = 4, keys: list[int | None] | None = None) -> Model:
    model = Model(rules)
    assert model.report(0, count, keys if rules.keyed else None) == count
    return model


def taken(model: Model, consumer: str, want: int = 10) -> dict[int, int]:
    exchange = model.poll(consumer, want)
    model.partition.commit()
    return leases(exchange)


def accepted(model: Model, consumer: str, kind: str, offset: int, count: int, **more: Any) -> bool:
    exchange = model.settle(consumer, kind, offset, count, **more)
    model.partition.commit()
    assert exchange.answer is not None, exchange.error
    return not exchange.answer[0]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6))))
def test_ranges_are_a_set(added: list[tuple[int, int]]) -> None:
    ranges, twin = Ranges(), set()
    for first, size in added:
        ranges.add(first, first + size)
        twin |= set(range(first, first + size))
    assert {n for first, end in ranges for n in range(first, end)} == twin
    assert all(
        end < first for (_, end), (first, _) in zip(list(ranges), list(ranges)[1:], strict=False)
    )
    assert [n in ranges for n in range(40)] == [n in twin for n in range(40)]
    assert ranges.count == len(twin)


@pytest.mark.parametrize(
    "command",
    [
        Create(KEY, "t", PLAIN, ((LOG, 3),)),
        Configure(KEY, ORDERED),
        Drop(KEY),
        HandOut(KEY, (Handed(LOG, 1, 3, (None, 4)), Handed(LOG, 5, 6))),
        Settle(KEY, "s", 1, (Run(LOG, 1, 2),), (Later(LOG, 2, 9, 1),), (Park(LOG, 5, "why"),), ()),
        Bury(KEY, ProducerId(5), 3, (Letter(LOG, 1, 2),)),
        Reset(KEY, "u", ((LOG, 3),)),
        Replay(KEY, 9, ((LOG, 5),)),
    ],
)
def test_commands_come_back_equal(command: Any) -> None:
    assert decode_command(encode_command(command)) == command
    with pytest.raises(CorruptRecord):
        decode_command(encode_command(command)[:-1])


def test_a_message_is_handed_out_only_once_its_count_is_durable() -> None:
    model = filled()
    exchange = model.poll("a")
    assert exchange.answer is None
    model.partition.commit()
    assert leases(exchange) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_an_acknowledgement_after_the_lock_is_gone_changes_nothing() -> None:
    model = filled(count=1)
    assert taken(model, "a") == {0: 1}
    model.pass_time(TIMEOUT_MS + 100)
    frames = len(model.partition.frames)
    assert not accepted(model, "a", "ack", 0, 1)
    assert not accepted(model, "a", "nack", 0, 1)
    assert len(model.partition.frames) == frames
    assert taken(model, "b") == {0: 2}
    assert not accepted(model, "a", "ack", 0, 1)
    assert not accepted(model, "b", "ack", 99, 1), "beyond the end"
    assert accepted(model, "b", "ack", 0, 2)
    assert not accepted(model, "b", "ack", 0, 2), "settled before"


def test_a_repeated_request_gets_the_answer_that_it_got_before() -> None:
    model = filled(count=2)
    taken(model, "a")
    assert accepted(model, "a", "ack", 0, 1, number=1)
    model.fail_over()
    assert accepted(model, "a", "ack", 0, 1, number=1)
    first = model.poll("b", number=50)
    model.partition.commit()
    model.pass_time(TIMEOUT_MS + 100)
    second = model.poll("b", number=51)
    model.partition.commit()
    assert leases(first) == {}
    assert leases(second) == {1: 2}
    assert leases(model.poll("b", number=51)) == {1: 2}, "the answer was lost"


def test_a_new_coordinator_keeps_locks_and_counts() -> None:
    model = filled(count=2)
    assert taken(model, "a") == {0: 1, 1: 1}
    model.fail_over()
    assert model.report(0, 2) == 2
    assert taken(model, "b") == {}
    assert accepted(model, "a", "ack", 0, 1), "the holder is still the holder"
    model.pass_time(TIMEOUT_MS + 100)
    assert taken(model, "b") == {1: 2}


def test_what_was_not_committed_was_not_handed_out() -> None:
    model = filled(count=1)
    lost = model.poll("a")
    model.fail_over()
    assert lost.error is not None
    model.report(0, 1)
    assert taken(model, "a") == {0: 1}


def test_a_nack_waits_for_its_delay_also_at_another_coordinator() -> None:
    model = filled(count=1)
    taken(model, "a")
    assert accepted(model, "a", "nack", 0, 1, delay_ms=5_000)
    model.pass_time(2_000)
    assert taken(model, "a") == {}
    model.fail_over()
    model.report(0, 1)
    model.pass_time(2_500)
    assert taken(model, "a") == {}
    model.pass_time(1_000)
    assert taken(model, "a") == {0: 2}


def test_used_up_tries_park_and_a_replay_begins_anew() -> None:
    model = filled(count=1)
    for count in (1, 2, 3):
        assert taken(model, "a") == {0: count}
        assert accepted(model, "a", "nack", 0, count)
    assert taken(model, "a") == {}
    (parked,) = model.partition.fold.table.subscriptions[KEY].of(LOG).parked.values()
    assert parked.count == 3
    model.fail_over()
    assert model.report(1, 1) == 1, "the position has passed over it"
    exchange = Exchange()
    model.coordinator.replay(exchange, KEY, None)
    model.partition.commit()
    assert exchange.answer == [1]
    for count in (4, 5, 6):
        assert taken(model, "a") == {0: count}, "counts never fall"
        assert accepted(model, "a", "nack", 0, count)
    assert taken(model, "a") == {}


def test_what_was_not_shown_costs_no_try() -> None:
    model = filled(count=1)
    for count in range(1, 6):
        assert taken(model, "a") == {0: count}
        assert accepted(model, "a", "release", 0, count)
    assert model.partition.fold.table.subscriptions[KEY].parked == 0


DEAD = PLAIN._replace(dead_letter="orders.dead", max_deliveries=1)


def dying(count: int = 2) -> Model:
    """All messages have used up their tries."""
    model = filled(DEAD, count)
    for offset, n in taken(model, "a").items():
        assert accepted(model, "a", "nack", offset, n)
    return model


def unsettled(model: Model) -> list[int]:
    return sorted(model.partition.fold.table.subscriptions[KEY].of(LOG).open)


def test_a_message_is_settled_with_the_transaction_of_its_dead_letter() -> None:
    model = dying()
    assert to_bury(model.poll("a", want=0)) == [(0, 1), (1, 1)]
    assert not accepted(model, "a", "ack", 0, 1), "it is not handled, it is to be buried"
    exchange = model.bury("a", 3, [(0, 1), (1, 1)])
    assert exchange.answer is None, "not durable yet"
    model.partition.commit()
    assert exchange.answer == [[[LOG, 0], [LOG, 1]]]
    assert model.bury("a", 3, [(0, 1), (1, 1)]).answer == [[[LOG, 0], [LOG, 1]]], "a repeat"
    assert not accepted(model, "a", "park", 0, 1), "a transaction has it"
    assert unsettled(model) == [0, 1]
    model.partition.mark(3, committed=True)
    assert isinstance(model.bury("a", 3, [(0, 1)]).error, type(None)), "not known before it commits"
    model.partition.commit()
    assert unsettled(model) == []
    assert model.coordinator.described(KEY)[2] == [0, 0, 0, 0]
    assert isinstance(model.bury("a", 3, [(0, 1)]).error, ProducerFenced)


def test_an_aborted_dead_letter_is_written_by_the_next() -> None:
    model = dying()
    assert to_bury(model.poll("a", want=0)) == [(0, 1), (1, 1)]
    model.bury("a", 3, [(0, 1)])
    model.partition.mark(3, committed=False)
    model.partition.commit()
    model.coordinator.client_gone("a")
    model.pass_time(1_500)
    assert sorted(to_bury(model.poll("b"))) == [(0, 1), (1, 1)]
    exchange = model.bury("a", 4, [(0, 1)])
    model.partition.commit()
    assert exchange.answer == [[]], "another writes it by now"
    exchange = model.bury("b", 5, [(0, 2), (1, 1)])
    model.partition.commit()
    assert exchange.answer == [[[LOG, 1]]], "of that hand-out alone"
    model.partition.mark(5, committed=True)
    model.partition.commit()
    assert unsettled(model) == [0]


@pytest.mark.parametrize("crash", range(6))
@pytest.mark.parametrize("committed", [True, False])
def test_a_coordinator_that_dies_over_a_burial_settles_with_the_transaction_alone(
    crash: int, *, committed: bool
) -> None:
    """A failover before each step; the next transaction begins when the first has ended."""
    model = dying()
    steps: list[Any] = [
        lambda: to_bury(model.poll("a", want=0)),
        lambda: model.bury("a", 3, [(0, 1), (1, 1)]),
        model.partition.commit,
        lambda: model.partition.mark(3, committed=committed),
        model.partition.commit,
    ]
    for place, step in enumerate(steps):
        if place == crash:
            model.fail_over()
        step()
    if crash == len(steps):
        model.fail_over()
    model.pass_time(1_500)
    second = model.poll("b")
    settled = committed and crash != 1 and crash != 2 and crash != 4
    if settled:
        assert unsettled(model) == []
        assert to_bury(second) == []
        return
    if not any(isinstance(frame, Marker) for frame in model.partition.frames):
        model.partition.mark(3, committed=False)  # it is sent again, until it stands
        model.partition.commit()
        model.pass_time(1_500)
        second = model.poll("b")
    assert sorted(to_bury(second)) == [(0, 1), (1, 1)]


def test_a_key_in_order_is_out_once_at_a_time_and_others_go_on() -> None:
    model = filled(ORDERED, 5, [1, 1, 2, None, 1])
    assert taken(model, "a", 2) == {0: 1, 2: 1}
    assert taken(model, "b") == {3: 1}
    assert accepted(model, "a", "nack", 0, 1, delay_ms=500)
    assert taken(model, "b") == {}, "the key waits with its first message"
    model.pass_time(600)
    assert taken(model, "b") == {0: 2}
    assert accepted(model, "b", "ack", 0, 2)
    assert taken(model, "a") == {1: 1}
    assert accepted(model, "a", "park", 1, 1)
    assert taken(model, "b") == {4: 1}


def test_in_order_a_closed_connection_ends_no_lock() -> None:
    model = filled(ORDERED, 2, [1, 1])
    assert taken(model, "a") == {0: 1}
    model.coordinator.client_gone("a")
    model.pass_time(500)
    assert taken(model, "b") == {}
    model.pass_time(600)
    assert taken(model, "b") == {0: 2}


def test_without_order_a_closed_connection_ends_its_locks() -> None:
    model = filled(count=1)
    assert taken(model, "a") == {0: 1}
    model.coordinator.client_gone("a")
    model.pass_time(400)
    assert taken(model, "b") == {0: 2}


def test_pinned_keys_stay_with_their_consumers() -> None:
    model = filled(PINNED, 40, [key % 8 for key in range(40)])
    assert model.poll("a", want=0).answer is not None
    assert model.poll("b", want=0).answer is not None
    first, second = taken(model, "a", 40), taken(model, "b", 40)
    assert len(first) + len(second) == 40
    assert first
    assert second
    assert not {offset % 8 for offset in first} & {offset % 8 for offset in second}


def test_other_rules_and_another_life_are_refused() -> None:
    model = filled()
    exchange = Exchange()
    model.coordinator.create(exchange, Create(KEY, "other", ORDERED, ()), given=True)
    assert isinstance(exchange.error, ConfigError)
    assert "ordered" in str(exchange.error)
    model.coordinator.drop(Exchange(), KEY)
    model.partition.commit()
    with pytest.raises(SubscriptionNotFound):
        model.poll("a")
    model.coordinator.create(Exchange(), Create(KEY, "other", ORDERED, ()), given=True)
    with pytest.raises(SubscriptionNotFound):
        model.poll("a")  # it speaks of the one before


def test_a_log_that_takes_no_more_loses_no_decision() -> None:
    model = filled(count=2)
    assert taken(model, "a", 1) == {0: 1}
    model.partition.leads = False
    with pytest.raises(Exception, match="gone"):
        model.poll("a")
    model.partition.leads = True
    model.report(0, 2)
    assert taken(model, "a") == {1: 1}


def test_a_reset_begins_anew_and_what_was_handed_out_before_settles_nothing() -> None:
    model = filled(count=3)
    assert taken(model, "a", 2) == {0: 1, 1: 1}
    assert accepted(model, "a", "ack", 0, 1)
    exchange = Exchange()
    model.coordinator.reset(exchange, KEY, "new", [(LOG, 0)])
    assert isinstance(exchange.error, SubscriptionInUse)
    model.coordinator.leave(Exchange(), KEY, "token", "a")
    model.coordinator.reset(exchange := Exchange(), KEY, "new", [(LOG, 0)])
    model.partition.commit()
    assert exchange.answer == []
    model.coordinator.reset(exchange := Exchange(), KEY, "new", [(LOG, 2)])
    assert exchange.answer == [], "a repeat, which changes nothing"
    with pytest.raises(SubscriptionNotFound):
        model.settle("a", "ack", 1, 1)  # it speaks of what was before
    state = model.partition.fold.table.subscriptions[KEY]
    assert (state.token, state.of(LOG).position, unsettled(model)) == ("new", 0, [])


STEPS = st.one_of(
    st.tuples(st.just("report"), st.integers(1, 4)),
    st.tuples(st.just("poll"), st.sampled_from("abc"), st.integers(1, 5)),
    st.tuples(st.just("ack"), st.integers(0, 20)),
    st.tuples(st.just("nack"), st.integers(0, 20), st.sampled_from([0, 0, 300])),
    st.tuples(st.just("late"), st.integers(0, 20)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("time"), st.sampled_from([50, 400, 1_100])),
    st.tuples(st.just("gone"), st.sampled_from("abc")),
    st.tuples(st.just("fail over")),
)


class Watched:
    """Plays steps and watches the promises; keys: of each offset."""

    def __init__(self, rules: Rules) -> None:
        self.model = Model(rules)
        self.rules = rules
        self.reported = 0
        self.written = 0
        """As far as the log goes, whatever a reader has begun anew with."""
        self.open: list[tuple[str, Exchange]] = []
        self.held: dict[int, tuple[str, int, int]] = {}
        """By offset: consumer, count, and when its lock ends by the consumer's own count."""
        self.old: list[tuple[str, int, int]] = []
        self.acks: list[tuple[int, Exchange]] = []
        self.acked: set[int] = set()
        self.counts: dict[int, int] = {}

    def key(self, offset: int) -> int:
        return offset * 7 % 3

    def play(self, step: tuple[Any, ...]) -> None:
        with contextlib.suppress(NotReady):  # whoever hears that asks again
            self.do(step)
        self.look()

    def do(self, step: tuple[Any, ...]) -> None:
        model = self.model
        match step:
            case "report", count:
                self.report(count)
            case "poll", consumer, want:
                self.open.append((consumer, model.poll(consumer, want)))
            case "ack" | "nack" as kind, number, *delay if self.held:
                offset = sorted(self.held)[number % len(self.held)]
                consumer, count, _ = self.held.pop(offset)
                self.old.append((consumer, offset, count))
                delay_ms = delay[0] if delay else 0
                exchange = model.settle(consumer, kind, offset, count, delay_ms=delay_ms)
                if kind == "ack":
                    self.acks.append((offset, exchange))
            case "late", number if self.old:
                consumer, offset, count = self.old[number % len(self.old)]
                self.acks.append((offset, model.settle(consumer, "ack", offset, count)))
            case ("commit",):
                model.partition.commit()
            case "time", ms:
                model.pass_time(ms)
            case "gone", consumer:
                model.coordinator.client_gone(consumer)
                mine = [o for o, one in self.held.items() if one[0] == consumer]
                if not self.rules.ordered:
                    for offset in mine:
                        self.old.append((consumer, offset, self.held.pop(offset)[1]))
            case ("fail over",):
                model.fail_over()
                # Readers go on from where the new coordinator says.
                self.reported = model.report(0, 0)

    def report(self, count: int) -> None:
        end = self.reported + count
        keys = [self.key(o) for o in range(self.reported, end)] if self.rules.keyed else None
        self.reported = self.model.report(self.reported, end, keys)
        self.written = max(self.written, self.reported)

    def look(self) -> None:
        """What has been answered since."""
        for ack in [one for one in self.acks if one[1].answer is not None or one[1].error]:
            self.acks.remove(ack)
            offset, exchange = ack
            if exchange.answer is not None and not exchange.answer[0]:
                self.acked.add(offset)
        for one in [o for o in self.open if o[1].answer is not None or o[1].error]:
            self.open.remove(one)
            consumer, polled = one
            if polled.error is None:
                for offset, count in leases(polled).items():
                    self.given(consumer, offset, count)

    def given(self, consumer: str, offset: int, count: int) -> None:
        assert offset not in self.acked, "an acknowledged message was handed out"
        assert count > self.counts.get(offset, 0), "a count went back, or stood still"
        self.counts[offset] = count
        now_ms = self.model.now_ms
        self.held = {o: one for o, one in self.held.items() if one[2] > now_ms and o != offset}
        if self.rules.ordered:
            same = [o for o in self.held if self.key(o) == self.key(offset)]
            assert not same, f"{same} and {offset} of one key are out at a time"
            parked = self.model.partition.fold.table.subscriptions[KEY].of(LOG).parked
            before = {o for o in range(offset) if self.key(o) == self.key(offset)}
            assert before <= self.acked | set(parked) | self.unsure, "out of order"
        self.held[offset] = (consumer, count, now_ms + TIMEOUT_MS)

    @property
    def unsure(self) -> set[int]:
        """Acknowledged, and nobody knows whether that was taken: settled in the table, if so."""
        progress = self.model.partition.fold.table.subscriptions[KEY].of(LOG)
        return {o for o in range(self.reported + 1) if progress.is_settled(o)}

    def finish(self) -> None:
        """All faults end: every message is acknowledged, or parked."""
        model = self.model
        model.partition.commit()
        self.look()
        self.report(max(3, self.written - self.reported))
        for _ in range(200):
            model.partition.commit()
            self.look()
            for offset, (consumer, count, _) in list(self.held.items()):
                del self.held[offset]
                self.acks.append((offset, model.settle(consumer, "ack", offset, count)))
            self.open.append(("z", model.poll("z", 50)))
            model.partition.commit()
            self.look()
            model.pass_time(200)
            progress = model.partition.fold.table.subscriptions[KEY].of(LOG)
            if progress.position == self.reported and not progress.open:
                break
        progress = model.partition.fold.table.subscriptions[KEY].of(LOG)
        assert progress.position == self.reported, "a message was lost"
        assert not progress.open
        assert set(range(self.reported)) == set(self.counts), "one was settled and never handed out"
        self._snapshot_holds_all(model.partition)

    def _snapshot_holds_all(self, partition: FakePartition) -> None:
        fold = SubscriptionFold()
        loader = fold.loader()
        for piece in partition.fold.slices():
            loader.add(piece)
        loader.finish()
        assert list(fold.slices()) == list(partition.fold.slices())


@pytest.mark.parametrize("rules", [PLAIN, ORDERED, PINNED], ids=["plain", "ordered", "pinned"])
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, max_size=60))
@example([("report", 4), ("poll", "a", 4), ("commit",), ("fail over",)])
@example(
    [
        *(("report", 1), ("poll", "a", 1), ("gone", "a"), ("commit",), ("ack", 0)),
        *(("time", 400), ("report", 1), ("poll", "a", 1), ("ack", 0)),
    ]
)
def test_nothing_is_lost_and_nothing_acknowledged_comes_again(
    rules: Rules, steps: list[tuple[Any, ...]]
) -> None:
    watched = Watched(rules._replace(max_deliveries=0))
    for step in steps:
        watched.play(step)
    watched.finish()


@pytest.mark.parametrize("rules", [PLAIN, ORDERED], ids=["plain", "ordered"])
def test_a_message_that_is_out_and_gone_from_the_log_is_settled_by_who_finds_out(
    rules: Rules,
) -> None:
    """Retention or compaction drops it meanwhile, and a new coordinator hears of the log anew."""
    keys: list[int | None] = [1, 2, 3, 4, 5, 6]
    model = filled(rules, len(keys), keys)
    assert taken(model, "a", want=4) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert accepted(model, "a", "ack", 1, 1)
    model.fail_over()
    assert model.report(0, 6, keys[5:] if rules.keyed else None, gone=5) == 6
    model.partition.commit()
    assert taken(model, "b") == {5: 1}
    assert accepted(model, "a", "ack", 0, 1)
    model.pass_time(TIMEOUT_MS + 100)
    assert taken(model, "b") == {2: 2, 3: 2, 5: 2}
    for offset in (2, 3, 5):
        assert accepted(model, "b", "ack", offset, 2)
    state = model.partition.fold.table.subscriptions[KEY]
    assert (state.unsettled, state.of(LOG).position) == (0, 6)


@pytest.mark.timeout(5)
def test_a_gap_costs_nothing_however_long_it_is() -> None:
    """Retention was faster than the subscription, by many messages."""
    model = filled(count=2)
    assert taken(model, "a") == {0: 1, 1: 1}
    end = 10**12
    assert model.report(2, end, gone=end - 2) == end
    model.partition.commit()
    assert accepted(model, "a", "ack", 0, 1)
    assert accepted(model, "a", "ack", 1, 1)
    progress = model.partition.fold.table.subscriptions[KEY].of(LOG)
    assert (progress.position, progress.open) == (end, {})


@pytest.mark.parametrize("rules", [PLAIN, ORDERED], ids=["plain", "ordered"])
def test_an_append_that_the_log_refuses_ends_no_lock_early(rules: Rules) -> None:
    """Leadership is being handed over, in vain: the same coordinator goes on."""
    keys: list[int | None] = [1, 2]
    model = Model(rules)
    model.pass_time(5 * TIMEOUT_MS)
    model.report(0, 2, keys if rules.keyed else None)
    assert taken(model, "a", want=1) == {0: 1}
    model.partition.leads = False
    with pytest.raises(NotLeader):
        model.poll("b")
    model.partition.leads = True
    model.report(0, 2, keys if rules.keyed else None)
    model.pass_time(TIMEOUT_MS // 2)
    assert taken(model, "b") == {1: 1}, "the other one is in the hands of a"
    assert accepted(model, "a", "ack", 0, 1)
