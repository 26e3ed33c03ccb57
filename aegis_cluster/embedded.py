"""Embedded mode: a client and the only node of its cluster in one process, without a port.

The one place of the front that reaches into the machine; it is imported by
`StreamingEngine.open` alone, so that a program which only connects never loads a broker.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aegis_cluster.client.cluster import ClusterClient
from aegis_cluster.errors import AegisError, Refused, StorageFailed
from aegis_cluster.node.in_process import CONTROL_ENDPOINT, DATA_ENDPOINT, InProcessNode

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.wire.descriptions import NodeInfo


class _InProcessRoutes:
    """Every request goes to the one shard, whatever address its node has registered."""

    def control(self, _node: NodeInfo, _shard: int = 0) -> str:
        return CONTROL_ENDPOINT

    def data(self, _node: NodeInfo, _shard: int) -> str:
        return DATA_ENDPOINT


class EmbeddedNode:
    """The node behind `StreamingEngine.open`; belongs to one event loop."""

    def __init__(self, directory: Path, durability: str) -> None:
        self._directory = directory
        self._asyncio = asyncio.get_running_loop()
        self._node = InProcessNode(directory, durability=durability, on_failed=self._tell)
        self._cluster: ClusterClient | None = None

    async def start(self) -> ClusterClient:
        """Recover the directory and serve it. Raises what `InProcessNode.start` does.

        Recovery reads what the last run left in its journal and is not bound to a deadline: half
        a recovery would be of no use to anybody.
        """
        starting = self._asyncio.run_in_executor(None, self._node.start)
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            if starting.exception() is None:
                await self.close()
            raise
        self._cluster = self.another_client()
        return self._cluster

    def another_client(self) -> ClusterClient:
        """A client of this node, for the event loop that calls; to be closed before the node."""
        return ClusterClient(
            [CONTROL_ENDPOINT], context=self._node.context, routes=_InProcessRoutes()
        )

    async def close(self) -> None:
        """Close the node's files, after the client's own links."""
        if self._cluster is not None:
            await self._cluster.close()
            self._cluster = None
        await asyncio.shield(self._asyncio.run_in_executor(None, self._node.close))

    def _tell(self, error: BaseException) -> None:
        """From the shard's thread: everything that waits must end."""
        self._asyncio.call_soon_threadsafe(self._failed, error)

    def _failed(self, error: BaseException) -> None:
        if self._cluster is not None:
            self._cluster.fail(_failure(self._directory, error))


def _failure(directory: Path, error: BaseException) -> AegisError:
    kind = StorageFailed if isinstance(error, StorageFailed) else Refused
    return kind(
        f"The node in {directory} has stopped: {error} Close the engine and open the directory"
        " again; what was acknowledged is kept.",
    )
