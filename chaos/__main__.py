"""`tools/soak`: which of the two kinds of runs a command line asks for."""

from __future__ import annotations

import sys
from typing import Final

from chaos import soak
from chaos.processes import soak as processes

ON_PROCESSES: Final = ("--processes", "--recheck", "--minutes")
SIMULATED: Final = ("--simulator", "--seeds", "--jobs")


def main() -> int:
    """`--minutes` alone is both kinds, in turn; `--simulator` or `--processes` is one of them."""
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if given & set(ON_PROCESSES) and not given & set(SIMULATED):
        return processes.main()
    sys.argv = [argument for argument in sys.argv if argument != "--simulator"]
    return soak.main()


if __name__ == "__main__":
    sys.exit(main())
