"""A shard of a run: what the run wants under it is put there, then the product's own begins."""

from __future__ import annotations

import sys
from pathlib import Path

from aegis_cluster.config import load_node_config
from aegis_cluster.node.shard_main import main
from chaos.processes.injection import install

if __name__ == "__main__":
    install(load_node_config(Path(sys.argv[sys.argv.index("--config") + 1])).name, shard=True)
    sys.exit(main())
