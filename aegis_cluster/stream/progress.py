"""How far event time has come in the partitions that other processes have.

The idea: workers tell each other through a topic of the application, every second. It is soft: what
is old or missing only keeps idle partitions waiting, and nothing else reads it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import AegisError
from aegis_cluster.ids import TopicPartition
from aegis_cluster.message import Message, Offset
from aegis_cluster.subscribe_config import SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aegis_cluster.engine import StreamingEngine

TELL_S: Final = 1.0
FRESH_S: Final = 5.0
"""What was heard longer ago counts for nothing."""


class Standing(NamedTuple):
    """Of a source partition: its watermark, and whether it is idle."""

    mark: int
    is_idle: bool


class Board:
    """What this worker tells, and what it has heard of others."""

    def __init__(self, engine: StreamingEngine, topic: str, name: str) -> None:
        """name: of this worker, so that it does not listen to itself."""
        self._engine = engine
        self._topic = topic
        self._name = name
        self._heard: dict[TopicPartition, tuple[float, Standing]] = {}

    def of_others(self, now: float) -> dict[TopicPartition, Standing]:
        """What is fresh at the loop's time `now`."""
        return {p: standing for p, (at, standing) in self._heard.items() if now - at <= FRESH_S}

    async def share(self, mine: Callable[[], Mapping[TopicPartition, Standing]]) -> None:
        """Tell and hear until cancelled. mine: the standings to tell, at the moment; none of them:
        there is nothing to tell."""
        while True:
            with suppress(AegisError):  # whoever does not hear waits; the next round comes
                await self._share(mine)
            await asyncio.sleep(TELL_S)

    async def _share(self, mine: Callable[[], Mapping[TopicPartition, Standing]]) -> None:
        config = SubscribeConfig(start=Offset.LATEST)
        async with self._engine.subscribe(self._topic, config) as subscriber:
            while True:
                standings = [[*place, *standing] for place, standing in mine().items()]
                if standings:
                    told = {"worker": self._name, "standings": standings}
                    await self._engine.publish(self._topic, Message(payload=told))
                for message in await subscriber.poll(timeout=TELL_S):
                    self._hear(message.payload)
                await asyncio.sleep(TELL_S / 4)

    def _hear(self, told: Any) -> None:
        if told["worker"] == self._name:
            return
        now = asyncio.get_running_loop().time()
        for topic, partition, mark, is_idle in told["standings"]:
            self._heard[TopicPartition(topic, partition)] = now, Standing(mark, is_idle)
