"""Transactions of real clients: workers that handle orders exactly once, tellers, and auditors.

The idea is the simulator's (`aegis_cluster.testing.transactions`), and so are the checks: an order
is handled by moving money between two accounts and writing a result, in one transaction with the
group's position. Each account is a partition.

The rule it protects: a record is written down before it is sent, and an outcome as the client
library gave it; a transaction whose commit nobody asked for is aborted for sure.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from aegis_cluster.errors import (
    AegisError,
    Misuse,
    OutcomeUnknown,
    ProducerFenced,
    Refused,
    TransactionAborted,
)
from aegis_cluster.message import Message, Offset
from aegis_cluster.producer import ProducerConfig
from aegis_cluster.subscribe_config import DeliveryMode, SubscribeConfig
from aegis_cluster.transaction import TransactionOutcome
from chaos.processes.recording import now_us
from chaos.processes.sharing import SESSION, is_done
from chaos.processes.workloads import (
    FINISH_S,
    PAUSE_S,
    POLL_S,
    TIMEOUT_S,
    Client,
    Subscribed,
    key_of,
)

if TYPE_CHECKING:
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.producer import Producer
    from aegis_cluster.subscriber import Subscriber
    from aegis_cluster.transaction import Transaction

ACCOUNTS: Final = "accounts"
RESULTS: Final = "results"
ACCOUNT_PARTITIONS: Final = 3
BANK: Final = "bank"
ORDERS_MAX: Final = 10
TRANSACTION_S: Final = 3
CHANGED_MIND: Final = 0.1
"""Share of transactions that are given up for no reason."""
LIFE_S: Final = (4.0, 12.0)
"""A worker leaves the group after so long, and comes back."""
OUTCOME_S: Final = 10.0


class _ChangedMind(Exception):
    """The program's own reason to abort."""


def account_topics() -> dict[str, int]:
    """What has to be there beside the topic of the orders: partitions by name."""
    return {ACCOUNTS: ACCOUNT_PARTITIONS, RESULTS: 1}


def transfer(transaction: str, order: str) -> list[dict[str, Any]]:
    """Both sides of one, as the history has them."""
    drawn = crc32(order.encode())
    here = drawn % ACCOUNT_PARTITIONS
    there = (here + 1 + drawn // 7 % (ACCOUNT_PARTITIONS - 1)) % ACCOUNT_PARTITIONS
    amount = 1 + drawn // 64 % 100
    return [
        _row(ACCOUNTS, here, f"{transaction}/{order}/from", amount=-amount),
        _row(ACCOUNTS, there, f"{transaction}/{order}/to", amount=amount),
    ]


def _row(
    topic: str, partition: int, value: str, *, amount: int = 0, order: str | None = None
) -> dict[str, Any]:
    return {
        "topic": topic,
        "partition": partition,
        "value": value,
        "amount": amount,
        "order": order,
    }


async def carry_out(
    client: Client,
    producer: Producer,
    name: str,
    number: str,
    rows: list[dict[str, Any]],
    subscriber: Subscriber | None = None,
) -> bool:
    """One transaction with these records, and the positions of the subscriber; whether it is
    committed. Raises `ProducerFenced` once another producer has the transactional id."""
    note = client.recorder.note
    note("tx", id=number, name=name, client=client.name, rows=rows)
    subscribers = () if subscriber is None else (subscriber,)
    transaction = producer.transaction(*subscribers)
    asked = False
    outcome, reason = "refused", ""
    try:
        async with transaction as tx:
            await _fill(client, tx, number, rows, subscriber)
            asked = True
            note("tx_commit", id=number)
        outcome = "ok"
    except _ChangedMind:
        reason = "it changed its mind"
    except TransactionAborted as error:
        reason = str(error)
    except ProducerFenced as error:
        # Of a commit that was asked for before, and not answered, this may be the second answer.
        outcome, reason = "unknown" if asked else "refused", str(error)
        note("tx_end", id=number, outcome=outcome, reason=reason)
        raise
    except OutcomeUnknown as error:
        if asked:
            outcome = await _settled(transaction)
        reason = str(error)
    except Refused as error:
        outcome, reason = "unknown" if asked else "refused", str(error)
    note("tx_end", id=number, outcome=outcome, reason=reason)
    return outcome == "ok"


async def _fill(
    client: Client,
    tx: Transaction,
    number: str,
    rows: list[dict[str, Any]],
    subscriber: Subscriber | None,
) -> None:
    counts = {**account_topics()}
    pending = []
    for row in rows:
        message = Message(key=key_of(row["partition"], counts[row["topic"]]), payload=row["value"])
        pending.append(await tx.send(row["topic"], message))
    if subscriber is not None:
        await tx.send_offsets(subscriber)
    receipts = [await one for one in pending]
    client.recorder.note("tx_stored", id=number, offsets=[one.offset for one in receipts])
    if client.rng.random() < CHANGED_MIND:
        raise _ChangedMind


async def _settled(transaction: Transaction) -> str:
    """What was decided, if anybody says so in time."""
    try:
        async with asyncio.timeout(OUTCOME_S):
            found = await transaction.outcome()
    except (AegisError, TimeoutError):
        return "unknown"
    return "ok" if found is TransactionOutcome.COMMITTED else "refused"


class _Names:
    """Of transactions; no two of a run are the same."""

    def __init__(self, client: Client, what: str) -> None:
        self._prefix = f"{client.name}.{what}"
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"


def _config(name: str) -> ProducerConfig:
    return ProducerConfig(
        transactional_id=name,
        transaction_timeout=f"{TRANSACTION_S}s",
        request_timeout=f"{TIMEOUT_S:.0f}s",
    )


async def handle_orders(client: Client, party: str) -> None:
    """A worker, as a member that comes and goes; after healing, until all orders are handled."""
    engine = await client.engine()
    name = f"worker-{party}"
    names = _Names(client, f"{name}.")
    config = SubscribeConfig(
        group_id=BANK,
        start=Offset.EARLIEST,
        session_timeout=SESSION,
        delivery_mode=DeliveryMode.EXACTLY_ONCE,
        max_poll_records=ORDERS_MAX,
    )
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    while deadline is None or loop.time() < deadline:
        producer = engine.producer(_config(name))
        until = loop.time() + client.rng.uniform(*LIFE_S)
        async with Subscribed(engine, config) as subscriber:
            while loop.time() < until and not (
                client.ends.done() and await is_done(client, engine, BANK)
            ):
                if not await _handle_some(client, producer, subscriber, name, names.next()):
                    break
        await producer.close()
        if client.ends.done():
            deadline = deadline or loop.time() + FINISH_S
            if await is_done(client, engine, BANK):
                break
    await engine.close()


async def _handle_some(
    client: Client, producer: Producer, subscriber: Subscriber, name: str, number: str
) -> bool:
    """Poll and handle; False: it is over with this producer."""
    try:
        messages = await subscriber.poll(timeout=POLL_S)
        if not messages:
            return True
        rows = []
        for message in messages:
            order = str(message.payload)
            rows += transfer(number, order)
            rows.append(_row(RESULTS, 0, f"{number}/{order}/result", order=order))
        if await carry_out(client, producer, name, number, rows, subscriber):
            ends = {one.partition: one.offset + 1 for one in messages}
            client.recorder.note("position", asked=-1, places=sorted(ends.items()))
    except ProducerFenced:
        return False
    except (Refused, OutcomeUnknown, Misuse):
        await asyncio.sleep(PAUSE_S)
    return True


async def tell(client: Client, pause_s: float) -> None:
    """A teller. All of them have one transactional id, and so take it from each other."""
    engine = await client.engine()
    names = _Names(client, "t")
    while not client.stopping.is_set():
        producer = engine.producer(_config("teller"))
        for _ in range(client.rng.randint(5, 30)):
            if client.stopping.is_set():
                break
            number = names.next()
            try:
                rows = transfer(number, f"order-{number}")
                await carry_out(client, producer, "teller", number, rows)
            except ProducerFenced:
                await asyncio.sleep(client.rng.uniform(0.5, 2.0))
                break
            except (Refused, OutcomeUnknown):
                await asyncio.sleep(PAUSE_S)
            await asyncio.sleep(client.rng.uniform(0, 4 * pause_s))
        await producer.close()
    await engine.close()


async def audit(client: Client) -> None:
    """Reads accounts and results from their beginning on, and notes how far it has come."""
    engine = await client.engine()
    reader = client.reader_name()
    positions: dict[str, dict[int, int]] = {}

    async def follow(topic: str) -> None:
        async with Subscribed(engine, SubscribeConfig(start=Offset.EARLIEST), topic) as subscriber:
            while not client.ends.done():
                try:
                    messages = await subscriber.poll(timeout=POLL_S)
                except (Refused, OutcomeUnknown):
                    await asyncio.sleep(PAUSE_S)
                    continue
                rows = [(one.partition, one.offset, one.payload) for one in messages]
                client.recorder.note("seen", reader=reader, topic=topic, rows=rows)
                positions[topic] = {p: max(o for q, o, _ in rows if q == p) + 1 for p, _, _ in rows}
                client.recorder.note("round", reader=reader, topic=topic, at=positions[topic])

    async with asyncio.TaskGroup() as tasks:
        for topic in account_topics():
            tasks.create_task(follow(topic))
        tasks.create_task(_watch_positions(client, engine))
    await engine.close()


async def _watch_positions(client: Client, engine: StreamingEngine) -> None:
    while not client.ends.done():
        asked = now_us()
        try:
            found = await engine.group(BANK).positions(timeout=POLL_S)
        except AegisError:
            pass
        else:
            places = sorted((p.partition, offset) for p, offset in found.items())
            client.recorder.note("position", asked=asked, places=places)
        await asyncio.sleep(POLL_S)
