"""A producer that does not wait for each receipt, and what comes back when it asks.

    python fast_producer.py

Sends 20,000 messages through a buffer of bounded size into ./fast-data, waits for all, and reads
them back as columns, which is the fastest way to read.
"""

from __future__ import annotations

import asyncio
import sys
import time

from aegis_cluster import (
    Message,
    Offset,
    ProducerConfig,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
)

COUNT = 20_000


async def main() -> None:
    async with StreamingEngine.open("./fast-data") as engine:
        await engine.create_topic("clicks", TopicConfig(partitions=3), exist_ok=True)
        before = {n: found.high_watermark for n, found in (await engine.offsets("clicks")).items()}

        began = time.monotonic()
        async with engine.producer(ProducerConfig(compression="lz4")) as producer:
            for number in range(COUNT):
                await producer.send("clicks", Message(key=f"user-{number % 100}", payload=number))
        seconds = time.monotonic() - began  # leaving the block has waited for every receipt
        sys.stdout.write(f"sent {COUNT:,} messages in {seconds:.1f} s\n")

        found = 0
        async with engine.subscribe("clicks", SubscribeConfig(start=Offset.EARLIEST)) as clicks:
            for partition, offset in before.items():
                await clicks.seek(partition, offset)
            async for batch in clicks.batches():
                found += len(batch)
                if found >= COUNT:
                    break
        sys.stdout.write(f"read {found:,} of them back\n")
        if found != COUNT:
            sys.exit("that is not what was sent")


asyncio.run(main())
