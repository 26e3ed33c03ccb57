"""Requests about transactions, as they reach a shard.

    init, join, end, describe, abort: first field: the transactional id; its partition of
    `__transactions` follows from it by murmur2, and the leader of that answers.

Every answer about a transaction's state rests on a round of read index or on a committed frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import Coordinators, read
from aegis_cluster.broker.transactions import markers
from aegis_cluster.broker.transactions.admission import Admission
from aegis_cluster.broker.transactions.commands import Identity, Participant
from aegis_cluster.broker.transactions.markers import MarkerSender
from aegis_cluster.broker.transactions.transaction_coordinator import TransactionCoordinator
from aegis_cluster.broker.transactions.transaction_stm import TransactionFold
from aegis_cluster.errors import (
    AegisError,
    InvalidTopic,
    NoOpenTransaction,
    NotLeader,
    NotReady,
    PeerViolation,
    TopicNotFound,
)
from aegis_cluster.ids import (
    TRANSACTIONAL_TOPICS,
    TRANSACTIONS_TOPIC,
    GroupId,
    ProducerId,
    TopicPartition,
)
from aegis_cluster.limits import (
    GROUP_NAME_CHARS_MAX,
    REQUEST_WAIT_MS_MAX,
    TOPIC_NAME_CHARS_MAX,
    TRANSACTION_PARTICIPANTS_MAX,
    TRANSACTION_TIMEOUT_MS_MAX,
    TRANSACTION_TIMEOUT_MS_MIN,
    TRANSACTIONAL_ID_CHARS_MAX,
)
from aegis_cluster.wire.protocol import (
    Api,
    Reply,
    is_none,
    take_bool,
    take_int,
    take_list,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.broker.transactions.transaction_table import Transaction

PRODUCER_ID_MS: Final = 2_000
TRANSACTION_APIS: Final = frozenset(
    {
        Api.TRANSACTION_INIT,
        Api.TRANSACTION_JOIN,
        Api.TRANSACTION_END,
        Api.TRANSACTION_DESCRIBE,
        Api.TRANSACTION_LIST,
        Api.TRANSACTION_ABORT,
    }
)


class TransactionFrontend:
    """One per shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.admission = Admission(shard)
        self._sender = MarkerSender(shard)
        self._coordinators = Coordinators(shard, TRANSACTIONS_TOPIC, self._make)
        self._spare_ids: list[ProducerId] = []
        self._asking_for_id = False

    # ---- inputs

    def handle(self, api: Api, fields: Sequence[Any], exchange: Exchange, *, ms_left: int) -> None:
        """One request. Raises its refusal, `PeerViolation`, or answers through `exchange`."""
        if api is Api.TRANSACTION_LIST:
            self._list(fields, exchange)
            return
        name = take_str(fields, 0, "transactional_id", chars_max=TRANSACTIONAL_ID_CHARS_MAX)
        coordinator = self._coordinators.of(name)
        deadline_ms = self._shard.now_ms + min(ms_left, REQUEST_WAIT_MS_MAX)
        match api:
            case Api.TRANSACTION_INIT:
                timeout_ms = take_int(
                    fields,
                    1,
                    "timeout_ms",
                    low=TRANSACTION_TIMEOUT_MS_MIN,
                    high=TRANSACTION_TIMEOUT_MS_MAX,
                )
                client = take_str(fields, 2, "client", chars_max=GROUP_NAME_CHARS_MAX)
                token = take_str(fields, 3, "token", chars_max=64)
                known = None if is_none(fields, 4, "known") else _known(fields)
                coordinator.begin(
                    exchange, name, timeout_ms, client, token, known, deadline_ms=deadline_ms
                )
            case Api.TRANSACTION_JOIN:
                participants = self._participants(fields)
                identity = _identity_from(fields)
                coordinator.join(exchange, name, identity, participants, deadline_ms=deadline_ms)
            case Api.TRANSACTION_END:
                committed = take_bool(fields, 3, "committed")
                coordinator.end(exchange, name, _identity_from(fields), committed=committed)
            case Api.TRANSACTION_DESCRIBE:
                self._describe(coordinator, name, exchange)
            case Api.TRANSACTION_ABORT:
                identity = _identity_from(fields)
                coordinator.abort(exchange, name, identity, deadline_ms=deadline_ms)
            case _:
                raise PeerViolation(f"Api {api.name} is not about transactions.")

    def write_markers(
        self, fields: Sequence[Any], done: Callable[[Reply | AegisError], None]
    ) -> None:
        """What a coordinator elsewhere asks of the logs that are led here."""
        markers.write_markers(self._shard, fields, done)

    def verify(self, fields: Sequence[Any], done: Callable[[Reply | AegisError], None]) -> None:
        """[id, producer id, epoch, log] -> [] if the transaction is open with that log in it.
        Raises `NotLeader`; see `admission`."""
        name = take_str(fields, 0, "transactional_id", chars_max=TRANSACTIONAL_ID_CHARS_MAX)
        coordinator = self._coordinators.of(name)

        def verified(error: AegisError | None) -> None:
            done(Reply(0, 0, 0, 0, [], []) if error is None else error)

        log = GroupId(take_int(fields, 3, "log"))
        coordinator.verify(name, _identity_from(fields), log, verified)

    def tick(self) -> None:
        """Begin and end coordinators with the leaderships here, and let time pass for them."""
        self._coordinators.tick()

    # ---- coordinators

    def _make(self, partition: Partition) -> TransactionCoordinator:
        fold = partition.state.fold
        if not isinstance(fold, TransactionFold):
            raise NotLeader(f"{partition.name} holds no transactions.")
        return TransactionCoordinator(
            partition,
            fold,
            sender=self._sender,
            fresh_id=self._fresh_id,
            now_ms=self._shard.now_ms,
        )

    def _fresh_id(self) -> ProducerId:
        """One that nobody has or had. Raises `NotReady` until one is at hand."""
        if not self._spare_ids and not self._asking_for_id:
            self._asking_for_id = True
            deadline_ms = self._shard.now_ms + PRODUCER_ID_MS
            self._shard.producer_ids.take(deadline_ms, self._take_id)
        if not self._spare_ids:
            raise NotReady("This node has no producer id at hand yet; ask again.")
        return self._spare_ids.pop()

    def _take_id(self, found: ProducerId | AegisError) -> None:
        self._asking_for_id = False
        if not isinstance(found, AegisError):
            self._spare_ids.append(found)

    # ---- who takes part

    def _participants(self, fields: Sequence[Any]) -> list[Participant]:
        """[id, producer id, epoch, [[topic, partition], ...], least index of the metadata]"""
        rows = take_list(fields, 3, "partitions", items_max=TRANSACTION_PARTICIPANTS_MAX)
        least_index = take_int(fields, 4, "least_index")
        if self._shard.table.index < least_index:
            raise NotReady("This node has not heard of the newest topics yet; ask again.")
        return [self._participant(take_list(rows, slot, "partition")) for slot in range(len(rows))]

    def _participant(self, row: Sequence[Any]) -> Participant:
        topic = take_str(row, 0, "topic", chars_max=TOPIC_NAME_CHARS_MAX)
        number = take_int(row, 1, "partition")
        if topic.startswith("__") and topic not in TRANSACTIONAL_TOPICS:
            raise InvalidTopic(f"{topic} is the cluster's own and no part of a transaction.")
        info = self._shard.table.topics.get(topic)
        if info is None or number >= len(info.partitions):
            raise TopicNotFound(f"There is no partition {topic}/{number}.", topic=topic)
        return Participant(TopicPartition(topic, number), info.partitions[number].group)

    # ---- looking

    def _describe(self, coordinator: TransactionCoordinator, name: str, exchange: Exchange) -> None:
        """[id] -> see `_fields`."""

        def answer() -> None:
            one = coordinator.fold.table.transactions.get(name)
            if one is None:
                exchange.refuse(
                    NoOpenTransaction(
                        f"There is no transactional id {name!r}, or nobody has used it for long.",
                        transactional_id=name,
                    )
                )
                return
            exchange.reply(self._fields(coordinator, one))

        read(coordinator.partition, exchange, answer)

    def _fields(self, coordinator: TransactionCoordinator, one: Transaction) -> list[Any]:
        """[producer id, epoch, phase, time-out in ms, ms since it opened, client, [[topic,
        partition, whether its marker stands], ...], [[producer id, epoch, committed, reason, time
        in ms], ...], coordinator's node]; outcomes: the newest last."""
        lacking = coordinator.lacking_markers(one.name)
        age_ms = coordinator.partition.now() - one.since_ms if one.since_ms else 0
        return [
            *one.identity,
            int(one.phase),
            one.timeout_ms,
            age_ms,
            one.client,
            [[*p.place, one.is_decided and p not in lacking] for p in one.participants],
            [[*o.identity, o.committed, o.reason, o.time_ms] for o in one.outcomes],
            self._shard.context.me.node,
        ]

    def _list(self, fields: Sequence[Any], exchange: Exchange) -> None:
        """[partition of `__transactions`, names after this one, at most so many]
        -> [[[name, phase, ms since it opened, partitions, client], ...], whether there are more]"""
        coordinator = self._coordinators.at(take_int(fields, 0, "partition"))
        after = take_str(fields, 1, "after", chars_max=TRANSACTIONAL_ID_CHARS_MAX)
        count = take_int(fields, 2, "count", low=1, high=10_000)
        partition, fold = coordinator.partition, coordinator.fold

        def answer() -> None:
            names = sorted(name for name in fold.table.transactions if name > after)
            now_ms = partition.now()
            found = [fold.table.transactions[name] for name in names[:count]]
            rows = [
                [
                    one.name,
                    int(one.phase),
                    now_ms - one.since_ms if one.since_ms else 0,
                    len(one.participants),
                    one.client,
                ]
                for one in found
            ]
            exchange.reply([rows, len(names) > count])

        read(partition, exchange, answer)


def _known(fields: Sequence[Any]) -> Identity:
    pair = take_list(fields, 4, "known")
    producer, epoch = take_int(pair, 0, "producer_id"), take_int(pair, 1, "epoch", high=2**15 - 1)
    return Identity(ProducerId(producer), epoch)


def _identity_from(fields: Sequence[Any]) -> Identity:
    return Identity(
        ProducerId(take_int(fields, 1, "producer_id")),
        take_int(fields, 2, "producer_epoch", high=2**15 - 1),
    )
