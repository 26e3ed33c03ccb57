"""A supervisor of fake shards in a process of its own, so that it can be killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aegis_cluster import limits
from aegis_cluster.node.log import NodeLog
from aegis_cluster.node.supervisor import Supervisor

if TYPE_CHECKING:
    from aegis_cluster.ids import ShardId


def main() -> None:
    """`DIRECTORY MODE [never-aside]`: two shards of that mode, which hand over at once or never.

    Exit code 0 when the end was wished for.
    """
    directory, mode = Path(sys.argv[1]), sys.argv[2]

    def command(_shard: ShardId, _boot_id: str) -> list[str]:
        return [sys.executable, "-m", "tests.node.fake_shard", mode, str(os.getpid())]

    vars(limits)["SHARD_STOP_MS"] = 300  # so that a test of a stubborn shard is short
    never_aside = "never-aside" in sys.argv
    log = NodeLog(directory)

    def step_aside(shard: ShardId, seconds: float) -> None:
        log.write("aside", f"asked {shard}")
        if never_aside:
            time.sleep(seconds)

    supervisor = Supervisor(
        shards=2,
        command=command,
        step_aside=step_aside,
        log=log,
    )
    wished = supervisor.run()
    log.close()
    sys.exit(0 if wished else 3)


if __name__ == "__main__":
    main()
