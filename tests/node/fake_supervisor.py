"""A supervisor of fake shards in a process of its own, so that it can be killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aegis_cluster import limits
from aegis_cluster.node.log import NodeLog
from aegis_cluster.node.supervisor import Supervisor

if TYPE_CHECKING:
    from aegis_cluster.ids import ShardId


def main() -> None:
    """`DIRECTORY MODE`: two shards of that mode; exit code 0 when the end was wished for."""
    directory, mode = Path(sys.argv[1]), sys.argv[2]

    def command(_shard: ShardId, _boot_id: str) -> list[str]:
        return [sys.executable, "-m", "tests.node.fake_shard", mode, str(os.getpid())]

    vars(limits)["SHARD_STOP_MS"] = 300  # so that a test of a stubborn shard is short
    log = NodeLog(directory)
    supervisor = Supervisor(
        shards=2,
        command=command,
        step_aside=lambda shard, _seconds: log.write("aside", f"asked {shard}"),
        log=log,
    )
    wished = supervisor.run()
    log.close()
    sys.exit(0 if wished else 3)


if __name__ == "__main__":
    main()
