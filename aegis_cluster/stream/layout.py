"""The topics of a running application: looked up, checked, and the inner ones made.

Inner topics are named after the application: `….repartition` (records on their way to the task of
their key), `….changelog` (state), `….progress` (event time of other processes), `….questions`
(about state that other processes hold).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import ConfigError, TopicNotFound
from aegis_cluster.ids import TopicPartition
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.stream.processor import StreamProcessor
    from aegis_cluster.stream.topology import Topology

_REPARTITION: Final = "7d"
"""How long repartitioned records are kept: as long as an application may stand still."""

_PROGRESS: Final = "1h"


@dataclass(frozen=True)
class Layout:
    """partitions: of every topic that tasks read. message_bytes: what a sink's topic takes at most
    in one message."""

    topology: Topology
    partitions: dict[str, int]
    message_bytes: dict[str, int]

    @property
    def sources(self) -> list[tuple[str, int]]:
        """All partitions that others write."""
        return [
            (topic, number)
            for topic in self.topology.source_topics
            for number in range(self.partitions[topic])
        ]

    @property
    def stateful_tasks(self) -> list[TopicPartition]:
        """Those that keep state."""
        return [
            TopicPartition(topic, number)
            for topic, count in self.partitions.items()
            if self.topology.stateful(topic)
            for number in range(count)
        ]

    def writers(self, topic: str) -> list[str]:
        """Names of the tasks that write to a repartition topic."""
        return [
            f"{other}/{number}"
            for other in self.topology.upstream(topic)
            for number in range(self.partitions[other])
        ]


async def laid_out(engine: StreamingEngine, processor: StreamProcessor) -> Layout:
    """Raises `TopicNotFound` for a source or sink that does not exist, `ConfigError` where the
    number of partitions of a topic has changed since its state was begun."""
    topology = processor.topology
    partitions = {}
    for topic in topology.source_topics:
        partitions[topic] = await _partitions(engine, topic, "reads")
    message_bytes = {}
    for topic in topology.sink_topics:
        await _partitions(engine, topic, "writes to")
        info = await engine.cluster.topic(topic, engine.deadline(None))
        message_bytes[topic] = info.settings.max_message_bytes
    if processor.settings.on_error == "dead_letter":
        await engine.create_topic(processor.dead_letter_topic, exist_ok=True)
    if sum(partitions.values()) > 1:
        config = TopicConfig(retention=_PROGRESS)
        await engine.create_topic(topology.progress_topic, config, exist_ok=True)
    most = max(partitions.values())
    for topic in topology.repartitions:
        config = TopicConfig(partitions=most, retention=_REPARTITION)
        await engine.create_topic(topic, config, exist_ok=True)
        partitions[topic] = (await engine.describe_topic(topic)).partitions
    for topic, count in partitions.items():
        if topology.stateful(topic):
            await _make_changelog(engine, topology, topic, count)
    layout = Layout(topology, partitions, message_bytes)
    if len(layout.stateful_tasks) > 1:
        config = TopicConfig(retention=_PROGRESS)
        await engine.create_topic(topology.questions_topic, config, exist_ok=True)
    return layout


async def _partitions(engine: StreamingEngine, topic: str, verb: str) -> int:
    try:
        return (await engine.describe_topic(topic)).partitions
    except TopicNotFound as error:
        raise TopicNotFound(
            f"The processor {verb} topic {topic!r}, which does not exist; create it first, with"
            f" 'await engine.create_topic({topic!r})'.",
            topic=topic,
        ) from error


async def _make_changelog(
    engine: StreamingEngine, topology: Topology, topic: str, count: int
) -> None:
    name = topology.changelog_topic(topic)
    config = TopicConfig(partitions=count, retention="unlimited", cleanup="compact")
    await engine.create_topic(name, config, exist_ok=True)
    kept = (await engine.describe_topic(name)).partitions
    if kept != count:
        raise ConfigError(
            f"Topic {topic} had {kept} partitions when the state of {topology.application_id} was"
            f" begun, and has {count} now: keys have moved, and their state has not. Give the"
            " application another application_id, and it begins anew.",
            key="application_id",
        )
