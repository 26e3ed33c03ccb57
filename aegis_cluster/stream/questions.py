"""Questions about state that other processes hold: asked and answered through a topic.

The idea: whoever asks publishes the question; every worker that reads it answers with what its
tasks have, and names those tasks; once all tasks have answered, the answer is whole. The topic is
soft: nothing in it outlives the question.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import AegisError, Misuse, RequestTimeout
from aegis_cluster.message import Message, Offset
from aegis_cluster.stream.codec import pack, unpack
from aegis_cluster.subscribe_config import SubscribeConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from aegis_cluster.engine import StreamingEngine

RETRY_S: Final = 0.5


class Question(NamedTuple):
    """kind: `"key"` or `"range"`; arguments: key, or low and high; step: None: all."""

    kind: str
    arguments: list[Any]
    step: str | None


class Answer(NamedTuple):
    """tasks: those that have been asked. found: by step."""

    tasks: list[str]
    found: dict[str, Any]


class Desk:
    """Of one worker: answers others, and asks them."""

    def __init__(
        self,
        engine: StreamingEngine,
        topic: str,
        name: str,
        answer: Callable[[Question], Answer],
    ) -> None:
        """name: of this worker. answer: from the tasks here."""
        self._engine = engine
        self._topic = topic
        self._name = name
        self._answer = answer
        self._open: dict[str, asyncio.Queue[Answer]] = {}
        self.listens = asyncio.Event()

    async def ask(self, question: Question, tasks: Collection[str], timeout_s: float) -> list[Any]:
        """What all tasks have, one entry for each worker. tasks: names of those that have to
        answer. Raises `RequestTimeout`, which names those that did not."""
        mine = self._answer(question)
        answers = [mine.found]
        missing = set(tasks) - set(mine.tasks)
        if not missing:
            return answers
        number = uuid.uuid4().hex
        told = Message(payload=pack(["?", number, self._name, list(question)]))
        queue = self._open[number] = asyncio.Queue()
        try:
            async with asyncio.timeout(timeout_s):
                await self.listens.wait()
                await self._engine.publish(self._topic, told)
                while missing:
                    answer = await self._next(queue, told)
                    if missing & set(answer.tasks):
                        missing -= set(answer.tasks)
                        answers.append(answer.found)
        except TimeoutError:
            raise RequestTimeout(
                f"No answer within {timeout_s} s from {', '.join(sorted(missing)[:5])}; a task that"
                " is restored, or has no worker, cannot tell. Ask again."
            ) from None
        finally:
            del self._open[number]
        return answers

    async def _next(self, queue: asyncio.Queue[Answer], told: Message) -> Answer:
        """Asks again while nobody answers: a task may be on its way to another worker."""
        while True:
            try:
                async with asyncio.timeout(RETRY_S):
                    return await queue.get()
            except TimeoutError:
                await self._engine.publish(self._topic, told)

    async def serve(self) -> None:
        """Answer until cancelled."""
        while True:
            try:
                await self._serve()
            except Misuse:
                return  # the engine is closed
            except AegisError:
                self.listens.clear()
                await asyncio.sleep(RETRY_S)

    async def _serve(self) -> None:
        config = SubscribeConfig(start=Offset.LATEST)
        async with self._engine.subscribe(self._topic, config) as subscriber:
            self.listens.set()
            async for message in subscriber:
                kind, number, who, content = unpack(message.payload)
                if kind == "?" and who != self._name:
                    answer = self._answer(Question(*content))
                    if answer.tasks:
                        reply = pack(["!", number, self._name, list(answer)])
                        await self._engine.publish(self._topic, Message(payload=reply))
                elif kind == "!" and number in self._open:
                    self._open[number].put_nowait(Answer(*content))
