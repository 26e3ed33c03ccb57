"""Orders in one process: keyed messages, a running total, and a restart that goes on where it was.

    python orders.py

Keeps its data in ./orders-data, and the place up to which it has read in ./orders-position.json:
without a consumer group that is left to the program. What was counted before a crash is not
counted again, because total and place are written together.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from aegis_cluster import Message, Offset, StreamingEngine, SubscribeConfig

POSITION = Path("orders-position.json")


def load() -> tuple[int, dict[str, float]]:
    if not POSITION.exists():
        return 0, {}
    content = json.loads(POSITION.read_text())
    return content["offset"], content["totals"]


def save(offset: int, totals: dict[str, float]) -> None:
    aside = POSITION.with_suffix(".tmp")
    aside.write_text(json.dumps({"offset": offset, "totals": totals}))
    aside.replace(POSITION)


async def main() -> None:
    async with StreamingEngine.open("./orders-data") as engine:
        await engine.create_topic("orders", exist_ok=True)
        for number in range(100):
            customer = f"customer-{number % 3}"
            await engine.publish("orders", Message(key=customer, payload={"amount": number}))

        offset, totals = load()
        async with engine.subscribe("orders", SubscribeConfig(start=Offset.at(offset))) as orders:
            while messages := await orders.poll(timeout=0.5):
                for message in messages:
                    key = str(message.key)
                    totals[key] = totals.get(key, 0.0) + message.payload["amount"]
                offset = messages[-1].offset + 1
                save(offset, totals)

    for customer, total in sorted(totals.items()):
        sys.stdout.write(f"{customer}: {total:.0f}\n")
    runs = offset // 100
    if sum(totals.values()) != runs * sum(range(100)):
        sys.exit("the totals do not add up")


asyncio.run(main())
