"""A producer's order and retries, against a leader in miniature that loses, refuses and forgets."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker.producer_stm import Decision, ProducerTable
from aegis_cluster.client.partition_queue import (
    EPOCH_MAX,
    SEQUENCES,
    Outcome,
    PartitionQueue,
    PendingBatch,
)
from aegis_cluster.errors import (
    AegisError,
    InvalidBatch,
    NotLeader,
    OutcomeUnknown,
    OutOfOrderSequence,
    Refused,
    RequestTimeout,
    TransactionAborted,
)
from aegis_cluster.ids import LogIndex, RecordOffset
from aegis_cluster.limits import PRODUCER_WINDOW_BATCHES
from aegis_cluster.wire.batch import BatchBuilder, batch_header, decode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = 30


class Results:
    """What each batch ended as."""

    def __init__(self) -> None:
        self.of: dict[int, Outcome | AegisError] = {}

    def callback(self, number: int) -> Callable[[Outcome | AegisError], None]:
        def done(result: Outcome | AegisError) -> None:
            assert number not in self.of, "a batch ends once"
            self.of[number] = result

        return done


def queue_with(
    count: int, *, deadline: float = 100.0, results: Results | None = None
) -> tuple[PartitionQueue, Results]:
    results = results or Results()
    queue = PartitionQueue(producer_id=7)
    for number in range(count):
        builder = BatchBuilder()
        builder.append(1, None, str(number).encode())
        done = results.callback(number)
        queue.add(PendingBatch(builder, deadline, done, count=1, size=1))
    return queue, results


def take(queue: PartitionQueue, now: float = 0.0) -> PendingBatch:
    assert queue.can_send(now)
    batch = queue.take()
    assert batch is not None
    return batch


def test_sequences_follow_each_other_and_stay_over_retries() -> None:
    queue, _ = queue_with(2)
    first, second = take(queue), take(queue)
    assert [first.sequence, second.sequence] == [0, 1]
    queue.retry(second, unanswered=True, at=0)
    queue.retry(first, unanswered=True, at=0)
    assert [take(queue).sequence, take(queue).sequence] == [0, 1]


def test_the_window_bounds_what_is_in_flight() -> None:
    queue, _ = queue_with(PRODUCER_WINDOW_BATCHES + 1)
    for _ in range(PRODUCER_WINDOW_BATCHES):
        take(queue)
    assert not queue.can_send(0)


def test_nothing_new_leaves_until_those_under_way_have_come_back() -> None:
    queue, _ = queue_with(3)
    first, second = take(queue), take(queue)
    queue.retry(first, unanswered=False, at=0)
    assert not queue.can_send(0)
    queue.refused(second, OutOfOrderSequence("behind the first"))
    assert [take(queue) is first, take(queue) is second, take(queue).sequence] == [True, True, 2]


def test_a_final_refusal_moves_the_rest_to_a_new_epoch() -> None:
    queue, results = queue_with(2)
    first, second = take(queue), take(queue)
    queue.refused(first, InvalidBatch("broken"))
    queue.refused(second, OutOfOrderSequence("a gap"))
    assert isinstance(results.of[0], InvalidBatch)
    again = take(queue)
    assert again is second
    header = batch_header(again.data)
    assert (header.producer_epoch, header.base_sequence) == (1, 0)
    assert decode_batch(again.data)[0].value == b"1"


def test_in_a_transaction_one_failure_ends_all_and_there_is_no_next_epoch() -> None:
    queue, results = queue_with(5)
    queue.transactional, queue.epoch = True, 9
    first, second, third = take(queue), take(queue), take(queue)
    header = batch_header(third.data)
    assert (header.is_transactional, header.producer_epoch, header.base_sequence) == (True, 9, 2)
    queue.retry(third, unanswered=True, at=0.0)
    queue.refused(first, InvalidBatch("broken"))
    assert isinstance(results.of[0], InvalidBatch)
    assert all(isinstance(results.of[number], TransactionAborted) for number in (2, 3, 4))
    queue.refused(second, OutOfOrderSequence("a gap"))
    assert isinstance(results.of[1], TransactionAborted)
    queue.add(PendingBatch(BatchBuilder(), 100.0, results.callback(5)))
    assert isinstance(results.of[5], TransactionAborted)
    assert not queue.can_send(0.0)


def test_in_a_transaction_all_end_at_the_first_deadline_that_passes() -> None:
    queue, results = queue_with(4, deadline=1.0)
    queue.transactional = True
    queue.retry(take(queue), unanswered=True, at=0.0)
    queue.retry(take(queue), unanswered=True, at=0.0)
    queue.expire(2.0)
    assert len(results.of) == 4
    queue.expire(3.0)


def test_a_refusal_after_an_unanswered_try_is_unknown() -> None:
    queue, results = queue_with(1)
    queue.retry(take(queue), unanswered=True, at=0)
    queue.refused(take(queue), InvalidBatch("broken"))
    assert isinstance(results.of[0], OutcomeUnknown)


def test_past_the_deadline_unsent_is_refused_and_sent_is_unknown() -> None:
    queue, results = queue_with(2, deadline=5.0)
    take(queue)
    queue.expire(5.0)
    assert isinstance(results.of[0], OutcomeUnknown)
    assert isinstance(results.of[1], RequestTimeout)
    assert not queue.waiting
    assert not queue.in_flight


def test_what_was_sent_and_refused_is_certainly_not_stored() -> None:
    queue, results = queue_with(1, deadline=5.0)
    queue.retry(take(queue), unanswered=False, at=0)
    queue.expire(5.0)
    assert isinstance(results.of[0], RequestTimeout)


def test_a_late_answer_to_a_batch_that_was_given_up_changes_nothing() -> None:
    queue, results = queue_with(1, deadline=5.0)
    batch = take(queue)
    queue.expire(5.0)
    queue.acknowledged(batch, (3, 1))
    assert isinstance(results.of[0], OutcomeUnknown)


def test_an_unanswered_batch_of_an_ended_epoch_is_never_sent_again() -> None:
    queue, results = queue_with(2)
    first, second = take(queue), take(queue)
    queue.retry(second, unanswered=True, at=0)
    queue.refused(first, InvalidBatch("broken"))
    assert queue.take() is None
    assert isinstance(results.of[1], OutcomeUnknown)


@pytest.mark.parametrize("seed", range(300))
def test_no_loss_no_duplicate_no_disorder(seed: int) -> None:
    """Against a leader that drops requests, drops answers, and changes: acknowledged once each,
    in order; what is unknown may be there, what is refused is not."""
    rng = random.Random(seed)
    queue, results = queue_with(COUNT, deadline=400.0 if rng.random() < 0.5 else 60.0)
    log = serve(queue, results, ProducerTable(), rng)
    judge(seed, results, log)


@pytest.mark.parametrize("seed", range(60))
def test_nor_where_sequences_wrap_and_epochs_run_out(seed: int) -> None:
    rng = random.Random(seed)
    queue, results = queue_with(COUNT, deadline=400.0 if rng.random() < 0.5 else 60.0)
    queue.epoch, queue.next_sequence = EPOCH_MAX - 2, SEQUENCES - 3
    table = ProducerTable()
    table.load_body([[7, EPOCH_MAX - 2, [[0, SEQUENCES - 4, 0, 0, 1]]]])
    log = serve(queue, results, table, rng)
    judge(seed, results, log)


def serve(
    queue: PartitionQueue, results: Results, table: ProducerTable, rng: random.Random
) -> list[int]:
    """A bad leader answers until every batch has ended; what it has in its log then."""
    count, index = COUNT, 0
    log: list[int] = []
    now = 0.0
    while len(results.of) < count:
        now += 1.0
        assert now < 3000, "it does not end"
        queue.expire(now)
        if queue.needs_producer_id and rng.random() < 0.5:
            queue.renew(queue.producer_id + 1)
        while queue.can_send(now) and rng.random() < 0.9:
            queue.take()
        for batch in list(queue.in_flight):
            chance = rng.random()
            if chance < 0.3:
                continue  # still under way
            if chance < 0.4:  # the request is lost
                queue.retry(batch, unanswered=True, at=now + rng.random() * 3)
                continue
            if chance < 0.5:
                queue.retry(batch, unanswered=False, at=now + rng.random() * 3)
                continue
            header = batch_header(batch.data)
            decision = table.decide(header)
            if decision == Decision():
                index += 1
                place = {"index": LogIndex(index), "offset": RecordOffset(len(log))}
                table.apply(header, **place, time_ms=1)  # type: ignore[arg-type]
                log.append(int(decode_batch(batch.data)[0].value or b""))
                outcome = len(log) - 1
            elif decision.known is not None:
                outcome = decision.known.offset
            else:
                assert decision.error is not None
                queue.refused(batch, decision.error)
                continue
            if chance < 0.6:  # the answer is lost
                queue.retry(batch, unanswered=True, at=now)
            else:
                queue.acknowledged(batch, (outcome, 1))
    return log


def judge(seed: int, results: Results, log: list[int]) -> None:
    assert len(set(log)) == len(log), f"seed {seed}: stored twice {log}"
    assert log == sorted(log), f"seed {seed}: out of order {log}"
    for number, result in results.of.items():
        if isinstance(result, tuple):
            assert log[result[0]] == number, f"seed {seed}: {number} is not at its offset"
        elif isinstance(result, Refused):
            assert number not in log, f"seed {seed}: {number} was refused and stored"
        else:
            assert isinstance(result, OutcomeUnknown), f"seed {seed}"


def test_after_the_last_epoch_comes_another_producer_id() -> None:
    """KIP-98: an epoch is an int16, and 32,767 is never given out."""
    queue, results = queue_with(3)
    queue.epoch = EPOCH_MAX
    first = take(queue)
    assert (queue.producer_id, batch_header(first.data).producer_epoch) == (7, EPOCH_MAX)
    second = take(queue)
    queue.retry(second, unanswered=True, at=0)
    queue.refused(first, InvalidBatch("no"))
    assert queue.needs_producer_id
    assert not queue.can_send(1.0), "under an epoch that does not exist"
    queue.renew(8)
    assert not queue.needs_producer_id
    assert queue.take() is None, "what may have been stored under the old id is not sent again"
    assert isinstance(results.of[1], OutcomeUnknown)
    header = batch_header(take(queue).data)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (8, 0, 0)


def test_sequences_go_on_at_zero_after_the_largest() -> None:
    queue, _ = queue_with(3)
    queue.next_sequence = SEQUENCES - 1
    assert [batch_header(take(queue).data).base_sequence for _ in range(3)] == [SEQUENCES - 1, 0, 1]


def test_retriable_refusals_keep_the_epoch() -> None:
    queue, _ = queue_with(1)
    queue.retry(take(queue), unanswered=isinstance(NotLeader("no"), OutcomeUnknown), at=0)
    assert take(queue).epoch == 0
