"""A connector that believes that it has the lease, whoever has it; two holders at once are what a
lease service may do at its worst.

    python -m chaos.cdc.rogue CONFIG BOOTSTRAP
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegis_cluster.cdc import CDCEngine, connector
from aegis_cluster.cdc.configuration import load_connector
from aegis_cluster.client.feeds import FeedLog
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.node.orphans import die_with_parent

if TYPE_CHECKING:
    from aegis_cluster.client.cluster import ClusterClient


class _Granted:
    """A lease that never ends."""

    def __init__(self, token: int) -> None:
        self.token = token

    async def __aenter__(self) -> _Granted:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def check(self) -> None: ...

    async def lost(self) -> None:
        await asyncio.Event().wait()


class _EveryoneHasIt:
    """Grants whatever is asked for, with a token above that of whoever writes now."""

    def __init__(self, cluster: ClusterClient) -> None:
        self._cluster = cluster

    async def acquire(self, name: str, **_: Any) -> _Granted:
        deadline = self._cluster.deadline(10.0)
        info = await self._cluster.topic(name.removeprefix("cdc/"), deadline)
        points = await FeedLog(self._cluster, info).read(deadline)
        return _Granted(max(point.epoch for point in points) + 1)


async def main() -> None:
    """Until it is killed."""
    connector.Leases = _EveryoneHasIt  # type: ignore[attr-defined,assignment]
    config = load_connector(Path(sys.argv[1]))
    async with (
        StreamingEngine.connect(sys.argv[2]) as engine,
        CDCEngine(engine, config.source, topic=config.topic, tables=config.tables) as capture,
    ):
        await capture.stopped()


if __name__ == "__main__":
    die_with_parent(os.getppid())
    asyncio.run(main())
