"""The root command, and how every command ends: exit codes and sentences, never a traceback.

The rule it protects: 0 means done, 1 means it failed and standard error says why, 2 means that the
words or the settings were wrong, 130 that a person pressed Ctrl-C. AEGIS_DEBUG=1 adds where in the
program an error arose.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

import click

from aegis_cluster.errors import AegisError, ConfigError, InvariantBroken, Misuse

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
DEBUG_VARIABLE: Final = "AEGIS_DEBUG"
PROGRAM: Final = "aegis"


class CommandFailed(click.ClickException):
    """The command ends with exit code 1 and this sentence."""

    exit_code = FAILED


class OutputClosed(Exception):
    """Whoever read our output has had enough (`| head`): that is their good right."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that each starts quickly."""

    def __init__(self, *args: Any, lazy: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy
        """Name of a command, and the module and variable where it is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, variable = self._lazy[cmd_name].split(":")
        command = getattr(importlib.import_module(module), variable)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        # Here, because further up click itself would turn it into a failure.
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise OutputClosed from error
        return result


@click.group(
    cls=LazyGroup,
    lazy={
        "cluster": "aegis_cluster.cli.cluster_commands:cluster",
        "node": "aegis_cluster.cli.node_commands:node",
        "topic": "aegis_cluster.cli.topic_commands:topic",
        "keys": "aegis_cluster.cli.keys_commands:keys",
        "group": "aegis_cluster.cli.group_commands:group",
        "txn": "aegis_cluster.cli.txn_commands:txn",
        "explain": "aegis_cluster.cli.explain_commands:explain",
        "cdc": "aegis_cluster.cli.cdc_commands:cdc",
        "subscription": "aegis_cluster.cli.subscription_commands:subscription",
        "publish": "aegis_cluster.cli.publish:publish",
        "consume": "aegis_cluster.cli.consume:consume",
        "stream": "aegis_cluster.cli.stream_commands:stream",
        "bench": "aegis_cluster.cli.bench:bench",
        "event": "aegis_cluster.cli.event_commands:event",
        "log": "aegis_cluster.cli.log_commands:log",
        "completion": "aegis_cluster.cli.completion:completion",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="aegis-cluster", prog_name=PROGRAM)
def app() -> None:
    """Aegis Cluster: topics, replicated by Raft, that survive kill -9.

    \b
    Example, in an empty directory:
      aegis cluster up --nodes 3
      aegis topic create orders --partitions 4
      echo hello | aegis publish orders
      aegis consume orders --from earliest --to-end
      aegis cluster down
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    try:
        result = app.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except OutputClosed:
        # What is still buffered has nowhere to go; the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except click.ClickException as error:
        return _refused(error)
    except AegisError as error:
        return _told(error, WRONG_USAGE if isinstance(error, ConfigError | Misuse) else FAILED)
    except OSError as error:
        return _told(error, FAILED, said=_of_the_system(error))
    except (Exception, InvariantBroken) as error:  # noqa: BLE001 - the top of the program
        return _told(error, FAILED, prefix=f"internal error ({type(error).__name__}): ")
    return result if isinstance(result, int) else 0


def _refused(error: click.ClickException) -> int:
    if isinstance(error, click.UsageError):
        error.show()
        return WRONG_USAGE
    return _told(error, error.exit_code)


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, as a sentence."""
    if error.filename is None:
        return f"A file or a connection failed: {error.strerror or error}."
    hint = ""
    if isinstance(error, PermissionError):
        hint = " Change who may use it, or run this as the user that owns it."
    elif error.errno == errno.ENOSPC:
        hint = " Make room on that disk."
    return f"{error.filename} cannot be used: {error.strerror}.{hint}"


def _told(error: BaseException, code: int, prefix: str = "", said: str | None = None) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    text = error.message if isinstance(error, click.ClickException) else str(error)
    click.echo(f"aegis: {prefix}{said or text}", err=True)
    return code
