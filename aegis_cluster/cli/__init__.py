"""The command line: `aegis cluster`, `node`, `topic`, `publish`, `consume`, `log`.

In: words that a person or a script typed. Out: what was asked for on standard output, errors as
sentences on standard error, exit code 0, 1 (failed) or 2 (wrong usage). It stands on the public
engine like any user's program and on `node` for the processes of this machine; it decides nothing
about the cluster itself.
"""

from __future__ import annotations


def main() -> None:
    """The `aegis` program."""
    # Imported late: a node's supervisor starts through here too, and should stay small.
    import signal
    import sys

    # Until there is something to tidy up, and once there is nothing left, Ctrl-C just ends us.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from aegis_cluster.cli.app import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run(sys.argv[1:])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
