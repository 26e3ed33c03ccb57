"""Keys for a local cluster that is made with them: `aegis cluster up --secure`.

Everything is written once, before the node files that name it: a pair for each node and one for
the first client, and the lists of who is accepted. `./aegis.toml` tells commands and programs of
this directory to connect with the client's pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aegis_cluster.config import DEFAULT_FILE, load_streaming_config
from aegis_cluster.errors import ConfigError
from aegis_cluster.keys import PUBLIC_SUFFIX, load_pair, new_pair, write_new_pair, write_public

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KEYS: Final = "keys"
CLIENT: Final = "client"

NODE_LINES: Final = """\

[node.security]             # made by `aegis cluster up --secure`
key = "keys/{name}.key"     # relative to this file
peers = "keys/peers"
clients = "keys/clients"
"""
CLIENT_LINES: Final = """\
[streaming.security]
key = "nodes/keys/client.key"
servers = "nodes/keys/peers"
"""


def write_keys(directory: Path, folder: Path, names: Sequence[str]) -> None:
    """Make what is missing of the keys in `folder`, and `aegis.toml` in `directory`.

    Raises `ConfigError` where that file is there and names no keys.
    """
    _write_client_file(directory)
    keys = folder / KEYS
    for name, accepted in [*((name, "peers") for name in names), (CLIENT, "clients")]:
        secret = keys / f"{name}.key"
        if secret.exists():
            pair = load_pair(secret)
        else:
            pair = new_pair(name)
            write_new_pair(pair, keys)
        (keys / accepted).mkdir(exist_ok=True)
        write_public(pair, keys / accepted / f"{name}{PUBLIC_SUFFIX}")


def _write_client_file(directory: Path) -> None:
    file = directory / DEFAULT_FILE
    if not file.exists():
        file.write_text(CLIENT_LINES, encoding="utf-8")
    elif load_streaming_config(file).security.key is None:
        raise ConfigError(
            f"{file} names no keys, and the cluster is to have some. Add these lines:\n\n"
            f"{CLIENT_LINES}",
            file=str(file),
            key="streaming.security",
        )
