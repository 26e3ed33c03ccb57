"""A node of a run: the product's own, whose shards start in this room (`shard`)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aegis_cluster.cli.connection import step_down
from aegis_cluster.node import run
from aegis_cluster.node.orphans import die_with_parent

if TYPE_CHECKING:
    from aegis_cluster.ids import ShardId
    from aegis_cluster.keys import PublicKey


def shard_command(
    config_file: Path, shard: ShardId, boot_id: str, operator: PublicKey | None = None
) -> list[str]:
    """As the product's, but for the module; the clusters of runs have no keys."""
    assert operator is None
    return [
        sys.executable, "-m", "chaos.processes.shard",
        "--config", str(config_file),
        "--shard", str(shard),
        "--boot-id", boot_id,
        "--parent-pid", str(os.getpid()),
    ]  # fmt: skip


def main() -> int:
    """Run until SIGTERM, or until the run is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    run.shard_command = shard_command
    return 0 if run.run_node(options.config, step_down=step_down) else 1


if __name__ == "__main__":
    sys.exit(main())
