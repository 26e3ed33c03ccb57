"""`tools/fuzz`: hostile bytes for every decoder, or hostile strangers for a live cluster.

    ./tools/fuzz --minutes 5 --seed 7         decoders, each in turn, from that seed on
    ./tools/fuzz --live --minutes 10          a cluster of three nodes of its own, under siege

Exit codes: 0 nothing found, 1 something, with what it takes to see it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from aegis_cluster.cli.connection import cluster_status
from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.local import LocalCluster
from aegis_cluster.node.node_files import Wanted, bootstrap_of
from chaos.decoders import DECODERS, try_one
from chaos.fuzz_live import Siege


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--live", action="store_true", help="attack a cluster of its own")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"SEED {seed}", flush=True)
    if options.live:
        return live(seed, options.minutes * 60)
    return decoders(seed, options.minutes * 60)


def decoders(seed: int, seconds: float) -> int:
    """Every decoder in turn, until the time is over; each case has a seed of its own."""
    tried = 0
    until = time.monotonic() + seconds
    number = seed
    while time.monotonic() < until:
        for name in DECODERS:
            try:
                try_one(name, random.Random(f"{name}/{number}"))
            except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
                traceback.print_exc()
                print(f"FOUND in {name}: ./tools/fuzz --minutes 0.01 --seed {number}")
                return 1
            tried += 1
        number += 1
    print(f"{tried} inputs for {len(DECODERS)} decoders, nothing found.")
    return 0


def live(seed: int, seconds: float) -> int:
    """A cluster of three nodes in a directory that is thrown away."""
    with tempfile.TemporaryDirectory() as name:
        local = LocalCluster(Path(name), probe=cluster_status, tell=print)
        try:
            running = local.up(Wanted(3, 1, free_base_port()), seconds=60)
            report = Siege(Path(name), bootstrap_of(running), seed=seed).run(seconds=seconds)
        finally:
            local.down()
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
