"""Follow several topics by a pattern, without asyncio, and handle a message again that failed.

    python tail.py

Two threads share one engine on ./tail-data: one publishes, the other follows every topic that is
called app.… and tries a message that it could not handle a second time.
"""

from __future__ import annotations

import sys
import threading

from aegis_cluster import Message
from aegis_cluster.sync import StreamingEngine

TOPICS = ("app.login", "app.payment")


def publish(engine: StreamingEngine) -> None:
    for number in range(5):
        for topic in TOPICS:
            engine.publish(topic, Message(payload={"number": number}))


with StreamingEngine.open("./tail-data") as engine:
    for topic in TOPICS:
        engine.create_topic(topic, exist_ok=True)
    handled = 0
    failed_once: set[int] = set()
    with engine.subscribe("app.*") as events:
        writer = threading.Thread(target=publish, args=(engine,))
        writer.start()
        while handled < 5 * len(TOPICS):
            for message in events.poll(max_records=1, timeout=5):
                number = message.payload["number"]
                if number == 3 and message.offset not in failed_once:
                    failed_once.add(message.offset)
                    events.nack(message)  # again, before any later one of its partition
                    continue
                handled += 1
                sys.stdout.write(f"{message.topic}: {number}\n")
        writer.join()
