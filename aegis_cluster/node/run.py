"""`aegis node run`: what one node does from its start to its end.

The idea: in the order in which a mistake costs least. The settings are read, the directory is
locked, its identity is checked, and only then is anything in it touched: journals of the last run
are replayed into segments (so the number of shards may change between runs), then the shards start.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import TYPE_CHECKING, TypeAlias

from aegis_cluster.config import load_node_config
from aegis_cluster.node.identity import load_identity, lock_directory
from aegis_cluster.node.log import NodeLog
from aegis_cluster.node.node_security import new_operator, operator_links
from aegis_cluster.node.processes import mark_of
from aegis_cluster.node.run_file import remove_run_file, write_run_file
from aegis_cluster.node.supervisor import Supervisor
from aegis_cluster.node.view_host import ViewHost
from aegis_cluster.storage.disk import RealDisk
from aegis_cluster.storage.recovery import prepare_node_dir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aegis_cluster.config import NodeConfig
    from aegis_cluster.ids import ShardId
    from aegis_cluster.keys import LinkKeys, PublicKey
    from aegis_cluster.node.identity import Identity


StepDown: TypeAlias = "Callable[[str, float, LinkKeys | None], None]"
"""Asks the shard at a control endpoint to hand over what it leads, within so many seconds. Handed
in, because this room knows no client."""


def run_node(config_file: Path, *, step_down: StepDown) -> bool:
    """Run the node until it is told to stop; return whether that was why it ended."""
    config = load_node_config(config_file)
    disk = RealDisk()
    identity = load_identity(disk, config)
    lock = lock_directory(disk, str(config.data))
    log = NodeLog(config.data)
    try:
        return _run_locked(config, config_file, identity, log, step_down)
    except BaseException as error:
        log.write("supervisor", f"ends: {error}")
        raise
    finally:
        log.close()
        lock.release()


def _run_locked(
    config: NodeConfig,
    config_file: Path,
    identity: Identity,
    log: NodeLog,
    step_down: StepDown,
) -> bool:
    boot_id = uuid.uuid4().hex
    log.write("supervisor", f"{config.name} starts: pid {os.getpid()}, boot {boot_id}")
    write_run_file(config.data, mark_of(os.getpid(), str(config_file)), boot_id=boot_id)
    operator = new_operator(config)
    links = operator_links(config, operator)
    prepare_node_dir(RealDisk(), str(config.data), config.shards)
    view = ViewHost(
        config,
        identity.node,
        identity.cluster_id,
        boot_id=boot_id,
        tell=lambda text: log.write("supervisor", text),
    )
    supervisor = Supervisor(
        shards=config.shards,
        command=lambda shard, shard_boot_id: shard_command(
            config_file, shard, shard_boot_id, operator.public if operator else None
        ),
        step_aside=lambda shard, seconds: step_down(config.control_endpoint(shard), seconds, links),
        log=log,
        watch=view,
    )
    view.start()
    try:
        wished = supervisor.run()
    finally:
        view.stop()
    remove_run_file(config.data)
    log.write("supervisor", f"{config.name} has ended")
    return wished


def shard_command(
    config_file: Path, shard: ShardId, boot_id: str, operator: PublicKey | None = None
) -> list[str]:
    """The command line of a shard's process; a boot id names one start of one process."""
    return [
        sys.executable, "-m", "aegis_cluster.node.shard_main",
        "--config", str(config_file),
        "--shard", str(shard),
        "--boot-id", boot_id,
        "--parent-pid", str(os.getpid()),
        *([] if operator is None else [f"--operator={operator}"]),
    ]  # fmt: skip
