"""`aegis keys new` and `aegis keys show`: key pairs of nodes and clients."""

from __future__ import annotations

import json
from pathlib import Path

import click

from aegis_cluster.cli.connection import json_option
from aegis_cluster.keys import load_pair, new_pair, write_new_pair


@click.group()
def keys() -> None:
    """Make and show the key pairs with which nodes and clients know each other."""


@keys.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    help="The directory for both files, made when missing.  [default: this one]",
)
@json_option
def new(name: str, out: Path, as_json: bool) -> None:
    """Make a key pair: NAME.key, the secret, and NAME.pub, to be given to others.

    The secret stays where it is made, and only its owner can read it. Files that exist are never
    overwritten.

    \b
    Examples:
      aegis keys new node-1 --out keys
      aegis keys new billing --json
    """
    pair = new_pair(name)
    secret, public = write_new_pair(pair, out)
    if as_json:
        view = {"name": name, "public": pair.public, "key": str(secret), "pub": str(public)}
        click.echo(json.dumps(view))
        return
    click.echo(f"{secret}  the secret key of {name}; it stays here")
    click.echo(f"{public}  the public key; copy it to whoever shall accept {name}")


@keys.command()
@click.argument("key_file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def show(key_file: Path, as_json: bool) -> None:
    """Print the public half of KEY_FILE, in the form of a .pub file.

    \b
    Example:
      aegis keys show node-1.key > node-1.pub
    """
    pair = load_pair(key_file)
    if as_json:
        click.echo(json.dumps({"name": pair.name, "public": pair.public}))
    else:
        click.echo(pair.public_file(), nl=False)
