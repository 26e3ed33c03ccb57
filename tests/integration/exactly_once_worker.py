"""A consumer in a process of its own, which ends itself with SIGKILL at the step it is told.

    python -m tests.integration.exactly_once_worker ADDRESS MODE TOPIC NAME [STEP]

It hands on what it reads, to the topic `<TOPIC>-out` in transactions (exactly_once), or to its
standard output (the other modes), and ends when the group has read everything.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

from aegis_cluster import (
    DeliveryMode,
    Message,
    Offset,
    ProducerConfig,
    ReceivedMessage,
    StreamingEngine,
    SubscribeConfig,
    Subscriber,
)
from aegis_cluster.errors import AegisError, ProducerFenced

POLL = 20


class Worker:
    """One process's life."""

    def __init__(self, engine: StreamingEngine, topic: str, name: str, step: str) -> None:
        self.engine = engine
        self.topic = topic
        self.name = name
        self.step = step

    def reach(self, step: str) -> None:
        """Die here, if this is the step."""
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    async def run(self, mode: DeliveryMode) -> None:
        config = SubscribeConfig(
            group_id=f"{self.topic}-group",
            start=Offset.EARLIEST,
            delivery_mode=mode,
            session_timeout="2s",
            max_poll_records=POLL,
        )
        async with self.engine.subscribe(self.topic, config) as subscriber:
            work = self.in_transactions if mode is DeliveryMode.EXACTLY_ONCE else self.plainly
            await work(subscriber)

    async def plainly(self, subscriber: Subscriber) -> None:
        while messages := await self.poll(subscriber):
            for message in messages:
                self.reach("before handling")
                os.write(1, f"{message.payload}\n".encode())
                self.reach("handled")
                await message.ack()
                self.reach("acknowledged")
            await subscriber.commit()
            self.reach("committed")

    async def in_transactions(self, subscriber: Subscriber) -> None:
        config = ProducerConfig(transactional_id=self.name, transaction_timeout="3s")
        async with self.engine.producer(config) as producer:
            while messages := await self.poll(subscriber):
                try:
                    async with producer.transaction(subscriber) as tx:
                        for message in messages:
                            out = Message(payload=message.payload, key=message.key)
                            pending = await tx.send(f"{self.topic}-out", out)
                            self.reach("sent")
                        if self.step:
                            await pending
                        self.reach("stored")
                        await tx.send_offsets(subscriber)
                        self.reach("positions sent")
                    self.reach("committed")
                except ProducerFenced:
                    raise
                except AegisError as error:
                    sys.stderr.write(f"{type(error).__name__}: {error}\n")

    async def poll(self, subscriber: Subscriber) -> list[ReceivedMessage]:
        """Something to do, or nothing once the group has come to the end."""
        while True:
            with suppress(AegisError):
                messages = await subscriber.poll(POLL, timeout=0.5)
                self.reach("polled")
                if messages:
                    return messages
                lag = await self.engine.group(f"{self.topic}-group").lag()
                if lag and not any(lag.values()):
                    return []


async def main(address: str, mode: str, topic: str, name: str, step: str = "") -> None:
    async with StreamingEngine.connect(address) as engine:
        await Worker(engine, topic, name, step).run(DeliveryMode(mode))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
