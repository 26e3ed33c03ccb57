"""`aegis completion bash | zsh | fish`: what a shell needs to complete commands and options.

It is click's own script: at each Tab the shell calls `aegis` itself, so it never gets old.
"""

from __future__ import annotations

import shutil
from typing import Final

import click
from click.shell_completion import get_completion_class

from aegis_cluster.cli.app import PROGRAM, CommandFailed

_VARIABLE: Final = f"_{PROGRAM.upper()}_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete the commands and options of `aegis`.

    \b
    Examples, for this session and for all later ones:
      source <(aegis completion bash)
      aegis completion bash >> ~/.bashrc
      aegis completion zsh >> ~/.zshrc
      aegis completion fish > ~/.config/fish/completions/aegis.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise CommandFailed(f"click has no completion for {shell}; install a newer click")
    if shell == "bash" and shutil.which("bash") is None:
        raise CommandFailed("there is no bash on this machine, so its version cannot be checked")
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, PROGRAM, _VARIABLE).source())
