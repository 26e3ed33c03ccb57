"""`python -m aegis_cluster.cli`: the same program as `aegis`, without needing it on the PATH."""

from aegis_cluster.cli import main

main()
