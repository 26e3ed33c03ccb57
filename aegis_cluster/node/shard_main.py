"""The shard process: `python -m aegis_cluster.node.shard_main`, started by a node's supervisor.

Exit codes tell the supervisor what to do: 0 asked to stop; 3 its settings or ports are wrong, so
another start would fail too; 4 the disk failed; anything else is a crash.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.broker.context import ShardContext
from aegis_cluster.broker.loop import CHECKPOINT, COMPACT, READ, SYNC, ShardLoop, monotonic_ms
from aegis_cluster.broker.sockets import Sockets
from aegis_cluster.broker.supervisor_line import SupervisorLine
from aegis_cluster.broker.transport import Listener
from aegis_cluster.broker.workers import Workers
from aegis_cluster.config import (
    NodeConfig,
    control_endpoint,
    data_endpoint,
    load_node_config,
    peers_endpoint,
)
from aegis_cluster.errors import AegisError, ConfigError, Refused, StorageFailed
from aegis_cluster.ids import ShardId
from aegis_cluster.keys import PublicKey
from aegis_cluster.node.compaction_child import ChildCompactor
from aegis_cluster.node.exit_codes import EXIT_CONFIG, EXIT_STORAGE
from aegis_cluster.node.identity import load_identity
from aegis_cluster.node.node_security import listening_host, node_keys
from aegis_cluster.node.orphans import die_with_parent
from aegis_cluster.storage.disk import RealDisk
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.types import StoreLimits

if TYPE_CHECKING:
    from aegis_cluster.node.identity import Identity

SWITCH_INTERVAL_S: Final = 0.0005
"""How long a helper thread that has finished a sync may wait for the interpreter."""

GC_THRESHOLD: Final = 50_000
"""New objects between two looks for cycles: a table that is folded makes millions that stay."""

log = logging.getLogger(__name__)


def context_of(
    config: NodeConfig, identity: Identity, shard: ShardId, boot_id: str
) -> ShardContext:
    """Who this shard is, from its node's settings and identity."""
    return ShardContext(
        cluster_id=identity.cluster_id,
        me=identity.member,
        name=config.name,
        address=config.address,
        shard=shard,
        shards=config.shards,
        boot_id=boot_id,
        founders=tuple(founder.member for founder in identity.founders or ()),
        peers=config.peers,
        in_memory=config.durability == "memory",
        event_index=str(config.data / "index" / f"streams-{shard}.sqlite"),
    )


def run(
    config: NodeConfig,
    shard: ShardId,
    boot_id: str,
    supervisor: SupervisorLine | None,
    operator: PublicKey | None = None,
) -> None:
    """Serve until SIGTERM.

    operator: the public key of the supervisor, where there are keys.
    """
    disk = RealDisk()
    identity = load_identity(disk, config)
    keys = node_keys(config, operator)
    host, port = listening_host(config), config.base_port
    sockets = Sockets(
        {
            Listener.PEERS: peers_endpoint(host, port, shard),
            Listener.CONTROL: control_endpoint(host, port, shard),
            Listener.DATA: data_endpoint(host, port, shard),
        },
        keys=keys,
        insecure=config.insecure,
    )
    workers = Workers(SYNC, CHECKPOINT, READ, COMPACT)
    compactor = ChildCompactor()
    limits = StoreLimits(page_cache_bytes=config.page_cache_bytes)
    store = ShardStore(disk, str(config.data), shard, clock_ms=monotonic_ms, limits=limits)
    loop = ShardLoop(
        context=context_of(config, identity, shard, boot_id),
        store=store,
        sockets=sockets,
        workers=workers,
        rng=random.Random(),
        supervisor=supervisor,
        compact=compactor,
    )
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
    log.info(
        "Shard %s of %s serves at %s, %s.", shard, config.name, control_endpoint(host, port, shard),
        f"with the public key {keys.own.public}" if keys else "without keys",
    )  # fmt: skip
    loop.run()
    compactor.stop()
    workers.close()
    sockets.close()
    store.close()


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and turn failures into exit codes and sentences."""
    parser = argparse.ArgumentParser(prog="aegis-shard", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--boot-id", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--supervisor-fd", type=int)
    parser.add_argument("--operator")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _raise_file_limit()
    try:
        die_with_parent(options.parent_pid)
        run(
            load_node_config(options.config),
            ShardId(options.shard),
            options.boot_id,
            _supervisor_line(options.supervisor_fd),
            options.operator and PublicKey(options.operator),
        )
    except ConfigError as error:
        log.error("%s", error)  # noqa: TRY400 - people get the sentence
        return EXIT_CONFIG
    except StorageFailed as error:
        log.error("%s", error)  # noqa: TRY400 - people get the sentence
        return EXIT_STORAGE
    except AegisError as error:
        # Whoever reads the log of a node must see where something came from that nobody awaited.
        log.error("%s", error, exc_info=not isinstance(error, Refused))  # noqa: TRY400
        return 1
    return 0


def _supervisor_line(descriptor: int | None) -> SupervisorLine | None:
    return None if descriptor is None else SupervisorLine(socket.socket(fileno=descriptor))


def _raise_file_limit() -> None:
    """Many partitions keep many segments open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
