"""A node of one shard on a thread of the caller's process: what embedded mode runs.

The idea: it is the node that `aegis node run` starts, with the same files, the same loop and the
same requests; only the listeners are `inproc://` addresses of a ZeroMQ context that it shares with
the client in the same process. So a directory can be used either way, one after the other.

The rule it protects: the directory is locked for as long as its files are open, and a shard that
breaks down stops for good and says so; it never goes on with files that it cannot trust.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

import zmq

from aegis_cluster.broker.loop import CHECKPOINT, COMPACT, READ, SYNC, ShardLoop, monotonic_ms
from aegis_cluster.broker.sockets import Sockets
from aegis_cluster.broker.transport import Listener
from aegis_cluster.broker.workers import Workers
from aegis_cluster.config import NodeAddress, NodeConfig
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    CorruptLog,
    InvariantBroken,
    NotReady,
)
from aegis_cluster.ids import METADATA_GROUP, NodeId, ShardId
from aegis_cluster.node.compaction_child import ChildCompactor
from aegis_cluster.node.identity import (
    Founder,
    Identity,
    lock_directory,
    read_identity,
    write_identity,
)
from aegis_cluster.node.shard_main import context_of
from aegis_cluster.storage.disk import RealDisk, make_dir_durable
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.store import ShardStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.disk import Lock

CONTROL_ENDPOINT: Final = "inproc://aegis-control"
DATA_ENDPOINT: Final = "inproc://aegis-data"
_PEERS_ENDPOINT: Final = "inproc://aegis-peers"
"""Nobody connects to it: this node has no peers."""
NODE_NAME: Final = "node-1"
FIRST_ADDRESS: Final = NodeAddress("127.0.0.1", 7100)
"""What a directory that was formatted here says of its node's address, until a node file says
otherwise. Nothing listens there."""
CATCH_UP_MS: Final = 30_000
"""From a recovered directory to a node that serves; it takes a few syncs."""

log = logging.getLogger(__name__)


class InProcessNode:
    """One node of one shard; `start` and `close` block and may be called from any one thread."""

    def __init__(
        self,
        directory: Path,
        *,
        durability: str = "fsync",
        on_failed: Callable[[BaseException], None],
    ) -> None:
        """durability: `"fsync"` or `"memory"`, as in a node's file. on_failed: called once, on the
        shard's thread, when the shard has broken down."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._directory = Path(os.path.abspath(directory))
        self._durability = durability
        self._on_failed = on_failed
        self._lock: Lock | None = None
        self._workers: Workers | None = None
        self._loop: ShardLoop | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Lock and recover the directory (made when missing), then serve.

        Raises `NotReady` when another process or engine uses it; `ConfigError` when it belongs to
        a node of a larger cluster; `Corruption`; `StorageFailed`.
        """
        try:
            config, identity = self._take_directory()
            prepare_node_dir(RealDisk(), str(config.data), config.shards)
            self._thread = threading.Thread(
                target=self._run, args=(config, identity), name="aegis-shard", daemon=True
            )
            self._thread.start()
            self._started.wait()
            if self._failure is not None and self._loop is None:
                raise self._failure
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop serving, and let go of the directory; what was acknowledged is on disk already."""
        if self._thread is not None:
            loop, workers = self._loop, self._workers
            if loop is not None and workers is not None and self._thread.is_alive():
                loop.stop()
                workers.submit(READ, _nothing, _ignore)  # wakes the loop up
            self._thread.join()
            self._thread = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self.context.term()

    # ---- the directory

    def _take_directory(self) -> tuple[NodeConfig, Identity]:
        disk = RealDisk()
        directory = str(self._directory)
        try:
            _make_directory(disk, directory)
            self._lock = lock_directory(disk, directory)
        except NotReady as error:
            raise NotReady(
                f"{directory} is in use by another engine or node; one at a time may have it open."
                " Close that one, or connect to the cluster that runs there.",
                path=directory,
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{directory} cannot be used: {error.strerror}. Choose a directory that this user"
                " may write to.",
                path=directory,
            ) from error
        identity = read_identity(disk, directory)
        if identity is None:
            identity = _new_identity()
            write_identity(disk, directory, identity)
        _require_alone(identity, directory)
        address = NodeAddress(identity.founders[0].host, identity.founders[0].base_port)
        config = NodeConfig(
            name=NODE_NAME,
            base_port=address.base_port,
            data=self._directory,
            peers=(address,),
            host=address.host,
            durability=self._durability,
        )
        return config, identity

    # ---- the thread

    def _run(self, config: NodeConfig, identity: Identity) -> None:
        """Everything that the shard owns is made, used and closed here."""
        sockets: Sockets | None = None
        store: ShardStore | None = None
        loop: ShardLoop | None = None
        compactor = ChildCompactor()
        try:
            sockets = Sockets(
                {
                    Listener.PEERS: _PEERS_ENDPOINT,
                    Listener.CONTROL: CONTROL_ENDPOINT,
                    Listener.DATA: DATA_ENDPOINT,
                },
                context=self.context,
            )
            self._workers = Workers(SYNC, CHECKPOINT, READ, COMPACT)
            store = ShardStore(RealDisk(), str(config.data), ShardId(0), clock_ms=monotonic_ms)
            loop = ShardLoop(
                context=context_of(config, identity, ShardId(0), uuid.uuid4().hex),
                store=store,
                sockets=sockets,
                workers=self._workers,
                rng=random.Random(),
                compact=compactor,
            )
            _require_no_others(loop, str(config.data))
            _lead(loop)
            _catch_up(loop, str(config.data))
            self._loop = loop
            self._started.set()
            loop.run()
        except (Exception, InvariantBroken) as error:  # noqa: BLE001 - top of a thread
            self._broke_down(error)
        finally:
            compactor.stop()
            if self._workers is not None:
                self._workers.close()
            if loop is not None:
                loop.shard.events.close()
            if sockets is not None:
                sockets.close()
            if store is not None:
                store.close()
            self._started.set()

    def _broke_down(self, error: BaseException) -> None:
        self._failure = error
        if self._loop is None:
            return  # `start` tells
        log.error("The node in %s has stopped: %s", self._directory, error)
        self._on_failed(error)


def _make_directory(disk: RealDisk, directory: str) -> None:
    if not disk.exists(directory):
        _make_directory(disk, os.path.dirname(directory))
        make_dir_durable(disk, directory)


def _new_identity() -> Identity:
    host, base_port = FIRST_ADDRESS
    founder = Founder(NodeId(1), uuid.uuid4().hex, host, base_port)
    return Identity(uuid.uuid4().hex, founder.node, founder.incarnation, (founder,))


def _require_alone(identity: Identity, directory: str) -> None:
    """One node of several holds a part of the data only, and may not decide alone."""
    if [founder.member for founder in identity.founders] != [identity.member]:
        raise _belongs_to_others(directory, identity.node)


def _require_no_others(loop: ShardLoop, directory: str) -> None:
    """The cluster may have grown since it was founded."""
    if set(loop.shard.table.nodes) - {loop.shard.context.me.node}:
        raise _belongs_to_others(directory, loop.shard.context.me.node)


def _belongs_to_others(directory: str, node: NodeId) -> AegisError:
    return ConfigError(
        f"{directory} belongs to node {node} of a cluster of several nodes, which cannot be opened"
        " alone. Start the cluster and connect to it.",
        path=directory,
    )


def _lead(loop: ShardLoop) -> None:
    """Lead everything at once: there is nobody else whose leadership one could disturb."""
    manager = loop.shard.manager
    for partition in list(manager.partitions.values()):
        partition.replica.campaign()
        manager.due(partition)


def _catch_up(loop: ShardLoop, directory: str) -> None:
    """Turn until this start of the node is registered: then the table shows all that was ever
    committed, and nobody is told that a topic is missing which is there."""
    shard = loop.shard
    info = shard.context.node_info
    deadline_ms = monotonic_ms() + CATCH_UP_MS
    loop.run(
        lambda: (
            shard.table.nodes.get(info.node) == info
            or METADATA_GROUP in _damaged(shard)
            or monotonic_ms() > deadline_ms
        )
    )
    if shard.table.nodes.get(info.node) != info:
        raise CorruptLog(
            f"The metadata in {directory} cannot be brought up to date:"
            f" {_damaged(shard).get(METADATA_GROUP, 'it took too long')}. Restore the directory"
            " from a backup, or see what is readable in it.",
            path=directory,
        )


def _damaged(shard: Shard) -> dict[GroupId, str]:
    return {
        group: partition.damage
        for group, partition in shard.manager.partitions.items()
        if partition.damage is not None
    }


def _nothing() -> None:
    """A job that only wakes its owner."""


def _ignore(_: object) -> None:
    """Nobody waits for the result."""
