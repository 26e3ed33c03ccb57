"""Keys of nodes and clients: files that hold them, and lists of those who may connect.

The idea: a key pair has a name and two files. `NAME.key` holds the secret and stays with its
owner; `NAME.pub` holds the public half and is copied to whoever shall accept it. A list of accepted
keys is a directory of `.pub` files, so adding somebody is a copy and withdrawing somebody is `rm`.
The keys are those of CurveZMQ (Curve25519), written in Z85, 40 characters.

The rule it protects: a secret is in its file and in memory, nowhere else: never in an error, a log,
a `repr` or on a command line; and a file that other users can read is refused.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NewType

import zmq
from zmq.utils import z85

from aegis_cluster.errors import ConfigError
from aegis_cluster.limits import KEY_FILE_BYTES_MAX, KEYS_PER_LIST_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.config import StreamingConfig

PublicKey = NewType("PublicKey", str)
"""Z85, 40 characters."""

SECRET_SUFFIX: Final = ".key"
PUBLIC_SUFFIX: Final = ".pub"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NAME_ALLOWED: Final = 'letters, digits, ".", "_" and "-", at most 63 of them'
_Z85: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO

_SECRET_CONTENT: Final = """\
# Secret key of {name} (Aegis Cluster). Whoever can read this file can act as {name}: keep it where
# it was made, readable by its owner only. Others get the public key, {name}.pub.
name = "{name}"
public = "{public}"
secret = "{secret}"
"""
_PUBLIC_CONTENT: Final = """\
# Public key of {name} (Aegis Cluster). To be copied to whoever shall accept {name}.
name = "{name}"
public = "{public}"
"""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One end's identity on encrypted links."""

    name: str
    public: PublicKey
    secret: str = field(repr=False)

    def public_file(self) -> str:
        """The content of its `.pub` file."""
        return _PUBLIC_CONTENT.format(name=self.name, public=self.public)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Where a client's keys are: what `StreamingEngine.connect(…, keys=…)` takes.

    key: the client's own pair, as `aegis keys new` writes it.
    servers: the nodes' public keys: a directory of `.pub` files, or one such file.
    """

    key: str | Path
    servers: str | Path


# ---- pairs


def new_pair(name: str) -> KeyPair:
    """A pair that nobody has. Raises `ConfigError` for a name that is not allowed."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key; allowed: {_NAME_ALLOWED}", name=name)
    public, secret = zmq.curve_keypair()
    return KeyPair(name, PublicKey(public.decode()), secret.decode())


def write_new_pair(pair: KeyPair, directory: Path) -> tuple[Path, Path]:
    """Write `NAME.key` (mode 0600) and `NAME.pub`; return both. Nothing is ever overwritten.

    Raises `ConfigError` where one of them exists, or the directory cannot be written.
    """
    secret = directory / f"{pair.name}{SECRET_SUFFIX}"
    public = directory / f"{pair.name}{PUBLIC_SUFFIX}"
    for file in (secret, public):
        if os.path.lexists(file):
            raise ConfigError(
                f"{file} exists and is left as it is. Choose another name or directory, or move"
                " the old pair away.",
                file=str(file),
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(secret, _SECRET_CONTENT.format(**_parts(pair)), 0o600)
        _write(public, pair.public_file(), 0o644)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or directory} cannot be written: {error.strerror}",
            file=str(error.filename or directory),
        ) from error
    return secret, public


def replace_pair(pair: KeyPair, file: Path) -> None:
    """Write a secret key file (mode 0600), in place of one that may be there."""
    temporary = file.with_name(f"{file.name}.new")
    temporary.unlink(missing_ok=True)
    _write(temporary, _SECRET_CONTENT.format(**_parts(pair)), 0o600)
    temporary.replace(file)


def write_public(pair: KeyPair, file: Path) -> None:
    """Publish a pair's public half; a file that is there is replaced as a whole."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    _write(temporary, pair.public_file(), 0o644)
    temporary.replace(file)


def _parts(pair: KeyPair) -> dict[str, str]:
    return {"name": pair.name, "public": pair.public, "secret": pair.secret}


def _write(file: Path, content: str, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def load_pair(file: Path) -> KeyPair:
    """A pair from its `.key` file. Raises `ConfigError`, which never shows what the file holds."""
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"The key file {file} cannot be read: {error.strerror}. `aegis keys new` makes one.",
            file=str(file),
        ) from error
    if mode & _OTHERS:
        raise ConfigError(
            f"The key file {file} can be read or written by other users (mode"
            f" {stat.S_IMODE(mode):04o}). Run `chmod 600 {file}`, and make a new key if it has been"
            " so for long.",
            file=str(file),
        )
    values = _values(content, file, ("name", "public", "secret"))
    if not _fits(values["secret"], values["public"]):
        raise ConfigError(f"{file}: its public and secret key are no pair.", file=str(file))
    return KeyPair(values["name"], PublicKey(values["public"]), values["secret"])


def _fits(secret: str, public: str) -> bool:
    try:
        return bool(zmq.curve_public(secret.encode()).decode() == public)
    except zmq.ZMQError:
        return False


def load_public(file: Path) -> tuple[str, PublicKey]:
    """(name, key) from a `.pub` file. Raises `ConfigError`."""
    try:
        with file.open("rb") as opened:
            content = opened.read(KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"The key file {file} cannot be read: {error.strerror}", file=str(file)
        ) from error
    values = _values(content, file, ("name", "public"))
    return values["name"], PublicKey(values["public"])


def _values(content: bytes, file: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    """Exactly these keys, checked; what is wrong is named by its key, never by its value."""
    try:
        if len(content) > KEY_FILE_BYTES_MAX:
            raise ValueError
        found = tomllib.loads(content.decode())
    except ValueError:
        raise ConfigError(f"{file} is not a key file.", file=str(file)) from None
    if set(found) != set(wanted):
        hint = " It is a secret key; use the .pub file." if "secret" in found else ""
        names = ", ".join(f"`{name}`" for name in wanted)
        raise ConfigError(f"{file} does not hold just {names}.{hint}", file=str(file))
    for key, value in found.items():
        pattern, allowed = (_NAME, _NAME_ALLOWED) if key == "name" else (_Z85, "40 signs of Z85")
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ConfigError(f"{file}: `{key}` is not {allowed}.", file=str(file), key=key)
    return dict(found)


# ---- lists


_MISSING: Final = ("missing",)
"""The signature of a list that is not there."""


class Reading(NamedTuple):
    """What a list holds at one moment."""

    signature: tuple[object, ...]
    """Changes whenever a file is added, removed or written."""
    names: Mapping[PublicKey, str]
    problems: tuple[str, ...]
    """Files that hold no key, in words; their keys are not accepted."""


class KeyList:
    """A directory of `.pub` files, or one such file, that may change while it is used.

    `read` touches the disk and may run in any thread; `take` installs what it found.
    """

    def __init__(self, path: Path) -> None:
        """Raise `ConfigError` when the path is missing, or a file in it holds no key."""
        self.path = path
        if not path.exists():
            raise ConfigError(
                f"{path}, the list of accepted public keys, does not exist. Make the directory and"
                " copy .pub files into it.",
                path=str(path),
            )
        first = self._read(None)
        if first is None or first.problems:
            raise ConfigError(
                first.problems[0] if first else f"{path} cannot be read", path=str(path)
            )
        self._reading = first

    @property
    def names(self) -> Mapping[PublicKey, str]:
        """The accepted keys, and whose each is."""
        return self._reading.names

    def read(self) -> Reading | None:
        """The list as it is on disk now; None when nothing has changed, or it cannot be read."""
        return self._read(self._reading.signature)

    def take(self, reading: Reading) -> bool:
        """Go on with this; return whether a key was withdrawn."""
        withdrawn = set(self._reading.names) - set(reading.names)
        self._reading = reading
        return bool(withdrawn)

    def refresh(self) -> None:
        """Read and take, for those who may touch the disk."""
        reading = self.read()
        if reading is not None:
            self.take(reading)

    def _read(self, known: tuple[object, ...] | None) -> Reading | None:
        try:
            files = self._files()
            found = [(file, file.stat()) for file in files]
        except FileNotFoundError:
            # A list that was removed accepts nobody; a file that went just now is seen next time.
            is_news = not self.path.exists() and known != _MISSING
            return Reading(_MISSING, {}, ()) if is_news else None
        except OSError:
            return None
        signature = tuple((str(file), s.st_mtime_ns, s.st_size, s.st_ino) for file, s in found)
        if signature == known:
            return None
        return self._parse(signature, files)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        with os.scandir(self.path) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.name.endswith(PUBLIC_SUFFIX) and not entry.name.startswith(".")
            )
        return [self.path / name for name in names]

    def _parse(self, signature: tuple[object, ...], files: list[Path]) -> Reading:
        names: dict[PublicKey, str] = {}
        problems = []
        for file in files[:KEYS_PER_LIST_MAX]:
            try:
                name, public = load_public(file)
                names[public] = name
            except ConfigError as error:
                problems.append(str(error))
        if len(files) > KEYS_PER_LIST_MAX:
            problems.append(f"{self.path} holds more than {KEYS_PER_LIST_MAX} keys.")
        return Reading(signature, names, tuple(problems))


# ---- both ends of a link


class LinkKeys:
    """What it takes to open links: our own pair, and the keys of those whom we mean to reach."""

    def __init__(
        self, own: KeyPair, servers: KeyList | None, also: tuple[PublicKey, ...] = ()
    ) -> None:
        self.own = own
        self._servers = servers
        self._also = also

    @property
    def servers(self) -> list[PublicKey]:
        """Any of these may be at the other end; one that fits is found by trying."""
        listed = self._servers.names if self._servers is not None else ()
        return sorted({*listed, *self._also})

    def refresh(self) -> None:
        """See keys that were added or withdrawn since."""
        if self._servers is not None:
            self._servers.refresh()


class NodeKeys:
    """What a node needs: its own pair, whom it accepts as peers, and whom as clients.

    operator: one more client, the supervisor of this very node, by a pair of its own.
    """

    def __init__(
        self, own: KeyPair, *, peers: KeyList, clients: KeyList, operator: PublicKey | None = None
    ) -> None:
        """Raise `ConfigError` when a key is in both lists."""
        both = set(peers.names) & set(clients.names)
        if both:
            name = peers.names[min(both)]
            raise ConfigError(
                f"The key of {name} is in {peers.path} and in {clients.path}; a key belongs to a"
                " node or to a client, never to both. Make another one with `aegis keys new`.",
                name=name,
            )
        self.own = own
        self.peers = peers
        self.clients = clients
        self.operator = operator
        self.links = LinkKeys(own, peers, (own.public,))

    def peer(self, key: PublicKey) -> str | None:
        """Whose key this is among the nodes, this one included; None: it is no peer's."""
        return self.own.name if key == self.own.public else self.peers.names.get(key)

    def client(self, key: PublicKey) -> str | None:
        """Whose key this is among the clients; None also for a key that is a node's."""
        if self.peer(key) is not None:
            return None
        return "operator" if key == self.operator else self.clients.names.get(key)


def load_node_keys(
    *, key: Path, peers: Path, clients: Path, operator: PublicKey | None = None
) -> NodeKeys:
    """Raise `ConfigError` when a file is missing, broken, or open to others."""
    return NodeKeys(
        load_pair(key), peers=KeyList(peers), clients=KeyList(clients), operator=operator
    )


def configured_keys(config: StreamingConfig) -> ClientKeys | None:
    """The keys that `[streaming.security]` names, None where it names none."""
    found = config.security
    if found.key is None or found.servers is None:
        return None
    return ClientKeys(found.key, found.servers)


def load_client_keys(keys: ClientKeys) -> LinkKeys:
    """Raise `ConfigError` when a file is missing, broken, or open to others."""
    servers = KeyList(Path(keys.servers))
    if not servers.names:
        raise ConfigError(
            f"{keys.servers} holds no .pub file of a node, so there is nobody to talk to.",
            path=str(keys.servers),
        )
    return LinkKeys(load_pair(Path(keys.key)), servers)


def to_z85(key: bytes) -> PublicKey:
    """The 32 bytes of a public key, as people and files write it."""
    return PublicKey(z85.encode(key).decode())
