"""Stream processing on the client library alone: read topics, keep state, write topics.

In goes a topology (`StreamProcessor`, `topology`), a plain value. A `Task` does it for one
partition and is plain too. `runtime` puts tasks on the partitions of a consumer group, keeps their
state in changelog topics, and commits results, state and positions together.

The rule: this room knows the public client only, no broker. `topology`, `task`, `steps` and their
neighbours touch no clock, socket or file.
"""

from __future__ import annotations

from aegis_cluster.stream.aggregates import Aggregator, Avg, Count, Max, Min, Reduce, Sum
from aegis_cluster.stream.database import DatabaseSink
from aegis_cluster.stream.errors import ProcessingFailed, TopologyChanged, WindowTooLarge
from aegis_cluster.stream.event_time import PROCESSING_TIME
from aegis_cluster.stream.processor import Stream, StreamProcessor, Table, WindowedStream
from aegis_cluster.stream.settings import ProcessorSettings
from aegis_cluster.stream.special import changes, events
from aegis_cluster.stream.topology import Topology
from aegis_cluster.stream.windows import Hopping, Session, Sliding, Tumbling, Window

__all__ = [
    "PROCESSING_TIME",
    "Aggregator",
    "Avg",
    "Count",
    "DatabaseSink",
    "Hopping",
    "Max",
    "Min",
    "ProcessingFailed",
    "ProcessorSettings",
    "Reduce",
    "Session",
    "Sliding",
    "Stream",
    "StreamProcessor",
    "Sum",
    "Table",
    "Topology",
    "TopologyChanged",
    "Tumbling",
    "Window",
    "WindowTooLarge",
    "WindowedStream",
    "changes",
    "events",
]
