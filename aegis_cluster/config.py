"""Settings as people write them, as typed values, or a sentence that says what is wrong.

The idea: every table of a file is a frozen dataclass whose fields carry the *kind* of value they
take, so that reading, checking, the list of allowed keys and the defaults all come from one place.
Layers (defaults, file, environment, arguments) are flattened to dotted keys and laid over each
other; each value remembers where it was written.

The rule it protects: nothing is guessed. An unknown key or a bad value is a `ConfigError` that
names the place, the key, the value and what is allowed; a misspelt setting never falls back to a
default in silence.

Sizes are binary whichever way they are written ("1MB" = "1MiB" = 1,048,576 bytes), as in Kafka
and PostgreSQL and as in `limits`: so "1MB" names the default limit of a message exactly, and two
spellings of one setting cannot differ by 5 %.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aegis_cluster import limits
from aegis_cluster.errors import ConfigError
from aegis_cluster.ids import NodeId, ShardId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DEFAULT_FILE: Final = Path("aegis.toml")
ENVIRONMENT_PREFIX: Final = "AEGIS_STREAMING__"

Table = TypeVar("Table")


# Sizes and durations

_SIZE_UNITS: Final = {"": 1, "b": 1} | {
    spelling: 1024**power
    for power, letter in enumerate("kmgt", start=1)
    for spelling in (letter, f"{letter}b", f"{letter}ib")
}

_DURATION_UNITS_MS: Final = {
    "ms": 1,
    "s": 1_000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
}

_QUANTITY: Final = re.compile(r"\s*(\d{1,15})(?:\.(\d{1,6}))?\s*([a-zA-Z]*)\s*")
_QUANTITY_MAX: Final = 2**62

SIZE_ALLOWED: Final = 'a size such as "512KB", "1MB" or "2GB" (1 KB = 1024 bytes)'
DURATION_ALLOWED: Final = 'a duration such as "5ms", "30s", "10m", "12h" or "7d"'


def parse_size(value: object) -> int:
    """Bytes from "1MB" or from a plain number of bytes; ValueError on anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _QUANTITY_MAX:
        return value
    return _quantity(value, _SIZE_UNITS, SIZE_ALLOWED)


def parse_duration(value: object) -> int:
    """Milliseconds from "30s"; ValueError on anything else, a bare number included.

    A number without its unit is refused because half of all systems would read it as seconds and
    the other half as milliseconds.
    """
    return _quantity(value, _DURATION_UNITS_MS, DURATION_ALLOWED)


def _quantity(value: object, units: Mapping[str, int], allowed: str) -> int:
    """Whole units from a number and its unit; no float is involved, so nothing is rounded."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    unit = units.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{_shown(value)} is not {allowed}")
    decimals = match[2] or ""
    whole, rest = divmod(int(match[1] + decimals) * unit, int("1" + "0" * len(decimals)))
    if rest or whole > _QUANTITY_MAX:
        raise ValueError(f"{_shown(value)} is not {allowed}, in whole units")
    return whole


# Kinds of values


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting takes: the words that tell a person, and the function that checks."""

    allowed: str
    parse: Callable[[Any], Any]
    """From a TOML value or an argument; raises ValueError or TypeError when it is not allowed."""
    from_text: Callable[[str], Any] = str
    """From an environment variable to what TOML would have given."""


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _boolean_from_text(text: str) -> object:
    return {"true": True, "false": False}.get(text.lower(), text)


def _int_from_text(text: str) -> object:
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value


def _retention(value: object) -> int | None:
    return None if value == "unlimited" else parse_duration(value)


def _within(parse: Callable[[Any], int], low: int, high: int) -> Callable[[Any], int]:
    def bounded(value: object) -> int:
        number = parse(value)
        if not low <= number <= high:
            raise ValueError(value)
        return number

    return bounded


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(value)
    return value


def integer(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`, both included."""
    return Kind(f"a whole number from {low} to {high}", _within(_whole, low, high), _int_from_text)


def size(low: int, high: int) -> Kind:
    """Bytes from `low` to `high`, both included."""
    bounds = f"{SIZE_ALLOWED}, from {low} to {high} bytes"
    return Kind(bounds, _within(parse_size, low, high))


def duration(low_ms: int, high_ms: int) -> Kind:
    """Milliseconds from `low_ms` to `high_ms`, both included."""
    bounds = f"{DURATION_ALLOWED}, from {low_ms} ms to {high_ms} ms"
    return Kind(bounds, _within(parse_duration, low_ms, high_ms))


def one_of(*choices: str) -> Kind:
    """One of a few words."""

    def choice(value: object) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return Kind(" or ".join(f'"{word}"' for word in choices), choice)


BOOLEAN: Final = Kind("true or false", _boolean, _boolean_from_text)
TEXT: Final = Kind("text, in quotes", _text)
RETENTION: Final = Kind(f'{DURATION_ALLOWED}, or "unlimited"', _retention)


def setting(kind: Kind, *, default: Any = MISSING, key: str | None = None) -> Any:
    """A field of a settings table; `key` is its name in files when the field's name has a unit."""
    return field(default=default, metadata={"kind": kind, "key": key})


# Tables: aegis.toml


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """`[streaming.consumer]`"""

    max_poll_records: int = setting(integer(1, limits.BATCH_RECORDS_MAX), default=500)
    auto_commit: bool = setting(BOOLEAN, default=False)
    session_timeout_ms: int = setting(
        duration(limits.SESSION_TIMEOUT_MS_MIN, limits.SESSION_TIMEOUT_MS_MAX),
        default=30_000,
        key="session_timeout",
    )


@dataclass(frozen=True, slots=True)
class ProducerSettings:
    """`[streaming.producer]`: what `ProducerConfig` takes where it says `None`."""

    acks: str = setting(one_of("quorum", "leader", "none"), default="quorum")
    linger_ms: int = setting(duration(0, 60_000), default=5, key="linger")
    batch_bytes: int = setting(
        size(1, limits.BATCH_BYTES_MAX), default=limits.BATCH_BYTES_DEFAULT, key="batch_size"
    )
    buffer_bytes: int = setting(
        size(limits.MESSAGE_BYTES_MAX, 4 * 1024 * limits.MIB),
        default=limits.CLIENT_BUFFER_BYTES_DEFAULT,
        key="buffer_size",
    )


@dataclass(frozen=True, slots=True)
class CdcSettings:
    """`[streaming.cdc]`"""

    enabled: bool = setting(BOOLEAN, default=True)
    buffer_size: int = setting(integer(1, 10_000_000), default=10_000)
    """Changes, not bytes, that a connector may hold."""


def _path(value: object) -> Path:
    return value if isinstance(value, Path) else Path(_text(value))


PATH: Final = Kind("a path, in quotes", _path)


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """`[streaming.security]`: with which keys a client connects. Paths are relative to the file."""

    key: Path | None = setting(PATH, default=None)  # noqa: RUF009 - it is `dataclasses.field`
    """The client's own key pair, a `.key` file."""
    servers: Path | None = setting(PATH, default=None)  # noqa: RUF009 - it is `dataclasses.field`
    """The nodes' public keys: a directory of `.pub` files, or one of them."""
    insecure: bool = setting(BOOLEAN, default=False)
    """Connect beyond this machine without keys."""


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """`[streaming]` of `aegis.toml`: the configured defaults of topics and clients."""

    max_message_bytes: int = setting(
        size(1, limits.MESSAGE_BYTES_MAX),
        default=limits.MESSAGE_BYTES_DEFAULT,
        key="max_message_size",
    )
    default_retention_ms: int | None = setting(
        RETENTION, default=7 * 86_400_000, key="default_retention"
    )
    """None: kept for ever."""
    request_timeout_ms: int = setting(
        duration(1, 86_400_000), default=limits.REQUEST_TIMEOUT_MS_DEFAULT, key="request_timeout"
    )
    consumer: ConsumerSettings = field(
        default_factory=ConsumerSettings, metadata={"table": ConsumerSettings}
    )
    producer: ProducerSettings = field(
        default_factory=ProducerSettings, metadata={"table": ProducerSettings}
    )
    cdc: CdcSettings = field(default_factory=CdcSettings, metadata={"table": CdcSettings})
    security: SecuritySettings = field(
        default_factory=SecuritySettings, metadata={"table": SecuritySettings}
    )


def load_streaming_config(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    arguments: Mapping[str, object] | None = None,
) -> StreamingConfig:
    """`[streaming]` from a file, the environment and arguments, the later over the earlier.

    file: None takes `./aegis.toml` if it exists; a file that is named must exist.
    arguments: dotted keys as in the file ("streaming.consumer.max_poll_records"); None values
    are left out, so that a caller can pass its options as they are.
    """
    layers: dict[str, _Written] = {}
    if file is not None or DEFAULT_FILE.exists():
        layers |= _with_paths_of(file or DEFAULT_FILE, _written_in_file(file or DEFAULT_FILE))
    layers |= _written_in_environment(os.environ if environ is None else environ)
    layers |= {
        key: _Written(value, "arguments", key)
        for key, value in (arguments or {}).items()
        if value is not None
    }
    config = _build(StreamingConfig, "streaming", layers)
    if (config.security.key is None) != (config.security.servers is None):
        raise ConfigError(
            "`streaming.security.key` and `streaming.security.servers` belong together: the"
            " client's own key pair, and the public keys of the nodes. One of them is missing.",
            key="streaming.security",
        )
    return config


def _with_paths_of(file: Path, written: dict[str, _Written]) -> dict[str, _Written]:
    """A path in a file is relative to that file, wherever the program runs."""
    kinds = _kinds(StreamingConfig, "streaming")
    return {
        key: found._replace(value=str(file.parent / found.value))
        if kinds.get(key) is PATH and isinstance(found.value, str) and found.value.strip()
        else found
        for key, found in written.items()
    }


# Tables: nodes/node-1.toml


class NodeAddress(NamedTuple):
    """Where a node is: its host and the port from which all of its ports are counted."""

    host: str
    base_port: int

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.base_port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


PORTS_PER_SHARD: Final = 10
_VIEW, _CONTROL, _DATA, _PEERS = 0, 1, 2, 3
BASE_PORT_MIN: Final = 1_024
PORT_MAX: Final = 65_535


def view_endpoint(host: str, base_port: int) -> str:
    """Where a node's supervisor hears the cluster view of other nodes."""
    return _endpoint(host, base_port, 0, _VIEW)


def control_endpoint(host: str, base_port: int, shard: int = 0) -> str:
    """Where a shard answers metadata, topics, status; that of shard 0 is the node's endpoint."""
    return _endpoint(host, base_port, shard, _CONTROL)


def data_endpoint(host: str, base_port: int, shard: int = 0) -> str:
    """Where a shard answers produce and fetch."""
    return _endpoint(host, base_port, shard, _DATA)


def peers_endpoint(host: str, base_port: int, shard: int = 0) -> str:
    """Where a shard hears the shards of other nodes."""
    return _endpoint(host, base_port, shard, _PEERS)


def _endpoint(host: str, base_port: int, shard: int, kind: int) -> str:
    return f"tcp://{_bracketed(host)}:{base_port + kind + PORTS_PER_SHARD * shard}"


def port_span(shards: int) -> int:
    """Ports that a node of so many shards takes: its base port and all up to the last of these."""
    return _PEERS + PORTS_PER_SHARD * (shards - 1) + 1


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether nothing that is sent to this host leaves the machine: 127.0.0.0/8, ::1, localhost.

    Any other name counts as one of another machine, whatever it stands for at the moment.
    """
    address = _ip(host)
    return host == "localhost" if address is None else address.is_loopback


def host_of(endpoint: str) -> str | None:
    """The host of a `tcp://` endpoint; None for other transports, which stay in the process."""
    if not endpoint.startswith("tcp://"):
        return None
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


_HOST_NAME: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
HOST_ALLOWED: Final = (
    "an address of this machine, such as 127.0.0.1, ::1 or 10.0.0.5, or a name that leads to one"
)


def _host(value: object) -> str:
    text = _text(value)
    address = _ip(text)
    if address is None:
        # Four numbers that are no address are a slip of the pen and no name.
        if not _HOST_NAME.fullmatch(text) or text.replace(".", "").isdecimal():
            raise ValueError(value)
    elif address.is_multicast:
        raise ValueError(value)
    return text


def _bind_address(value: object) -> str:
    address = _ip(_text(value))
    if address is None or address.is_multicast:
        raise ValueError(value)
    return str(address)


def _address(value: object) -> NodeAddress:
    host, _, port = _text(value).rpartition(":")
    if not port.isdecimal() or not BASE_PORT_MIN <= int(port) <= PORT_MAX:
        raise ValueError(value)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(value)
    return NodeAddress(_host(host), int(port))


def _addresses(value: object) -> tuple[NodeAddress, ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    found = tuple(_address(item) for item in value)
    if not found or len(set(found)) != len(found):
        raise ValueError(value)
    return found


def _node_name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError(value)
    return value


NODE_NAME: Final = Kind('letters, digits, ".", "_" and "-", at most 63 of them', _node_name)
HOST: Final = Kind(HOST_ALLOWED, _host)
BIND: Final = Kind('an address, such as "10.0.0.5", or "0.0.0.0" for all of them', _bind_address)
PEERS: Final = Kind(
    'the base address of every node, this one included, once each: ["127.0.0.1:7100", …] or '
    '["[::1]:7100", …]',
    _addresses,
)


@dataclass(frozen=True, slots=True)
class NodeSecurity:
    """`[node.security]`: a node's keys, all three or none. Paths are relative to the file."""

    key: Path | None = setting(PATH, default=None)  # noqa: RUF009 - it is `dataclasses.field`
    """The node's own key pair, a `.key` file."""
    peers: Path | None = setting(PATH, default=None)  # noqa: RUF009 - it is `dataclasses.field`
    """Public keys of the other nodes: a directory of `.pub` files, or one of them."""
    clients: Path | None = setting(PATH, default=None)  # noqa: RUF009 - it is `dataclasses.field`
    """Public keys of the clients that may connect."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`[node]` of a node's file. Paths in it are relative to the file."""

    name: str = setting(NODE_NAME)
    base_port: int = setting(integer(BASE_PORT_MIN, PORT_MAX))
    data: Path = setting(PATH)  # noqa: RUF009 - it is `dataclasses.field`
    peers: tuple[NodeAddress, ...] = setting(PEERS)
    """Base addresses of all nodes in the order of their ids, this one included; the same list
    in every file."""
    host: str = setting(HOST, default="127.0.0.1")
    """Where others reach this node."""
    bind: str | None = setting(BIND, default=None)
    """Where it listens; None: at `host`."""
    shards: int = setting(integer(1, limits.SHARDS_PER_NODE_MAX), default=1)
    durability: str = setting(one_of("fsync", "memory"), default="fsync")
    page_cache_bytes: int = setting(
        size(0, 1 << 50), default=limits.PAGE_CACHE_BYTES_DEFAULT, key="page_cache"
    )
    """Of each log, behind its end: older pages are given back while it grows."""
    insecure: bool = setting(BOOLEAN, default=False)
    """Be reachable beyond this machine without keys."""
    security: NodeSecurity = field(default_factory=NodeSecurity, metadata={"table": NodeSecurity})

    @property
    def address(self) -> NodeAddress:
        """This node's place in `peers`."""
        return NodeAddress(self.host, self.base_port)

    @property
    def listens_at(self) -> str:
        """The host whose ports it takes."""
        return self.host if self.bind is None else self.bind

    @property
    def has_keys(self) -> bool:
        """Whether its links are encrypted."""
        return self.security.key is not None

    @property
    def node_id(self) -> NodeId:
        """1 + the position of our own address in `peers`."""
        return NodeId(1 + self.peers.index(self.address))

    @property
    def endpoint(self) -> str:
        """The node's endpoint: the control endpoint of its shard 0."""
        return control_endpoint(self.host, self.base_port)

    def control_endpoint(self, shard: ShardId) -> str:
        """Where that shard of this node answers control requests."""
        return control_endpoint(self.host, self.base_port, shard)


def load_node_config(file: Path) -> NodeConfig:
    """A node's file; its paths come back absolute.

    Raises `ConfigError`, also for a node that could be reached from another machine and has
    neither keys nor `insecure = true`.
    """
    written = _written_in_file(file)
    if not written:
        raise ConfigError(f"{file}: there are no settings in it; a node needs `[node]`.")
    config = _build(NodeConfig, "node", written)
    _check_ports(config, file)
    _check_security(config, file)
    found = config.security
    security = NodeSecurity(
        *(_beside(file, path) for path in (found.key, found.peers, found.clients))
    )
    data = Path(os.path.abspath(file.parent / config.data))
    return replace(config, data=data, security=security)


def _beside(file: Path, path: Path | None) -> Path | None:
    return None if path is None else Path(os.path.abspath(file.parent / path))


def _check_security(config: NodeConfig, file: Path) -> None:
    """Keys are whole or absent; without them everything stays on this machine."""
    security = config.security
    given = {"key": security.key, "peers": security.peers, "clients": security.clients}
    missing = [name for name, path in given.items() if path is None]
    if 0 < len(missing) < len(given):
        names = ", ".join(f"`node.security.{name}`" for name in missing)
        raise ConfigError(
            f"{file}: {names} is missing; `[node.security]` takes a key, the peers' and the"
            " clients' public keys together",
            file=str(file),
            key=f"node.security.{missing[0]}",
        )
    if config.has_keys or config.insecure:
        return
    allowed = (
        "an address in 127.0.0.0/8 or ::1, because this node has no keys. To be reached from other"
        " machines give it some (`aegis keys new`, then `[node.security]`), or, where everybody on"
        " the network may read and write everything, say `insecure = true`"
    )
    if not is_loopback(config.listens_at):
        key = "node.host" if config.bind is None else "node.bind"
        raise _refusal(_Written(config.listens_at, str(file), key), allowed)
    for peer in config.peers:
        if not is_loopback(peer.host):
            raise _refusal(_Written(str(peer), str(file), "node.peers"), allowed)


def _check_ports(config: NodeConfig, file: Path) -> None:
    """What single keys cannot know: that this node is among its peers and their ports apart."""
    span = port_span(config.shards)
    if config.address not in config.peers:
        raise _refusal(
            _Written([str(peer) for peer in config.peers], str(file), "node.peers"),
            f"a list with this node's own address in it, {config.address}",
        )
    if config.base_port + span - 1 > PORT_MAX:
        allowed = f"at most {PORT_MAX - span + 1}: {config.shards} shards take {span} ports"
        raise _refusal(_Written(config.base_port, str(file), "node.base_port"), allowed)
    for peer in config.peers:
        if peer.host == config.host and 0 < abs(peer.base_port - config.base_port) < span:
            allowed = f"at least {span} away from {peer}: {config.shards} shards take {span} ports"
            raise _refusal(_Written(config.base_port, str(file), "node.base_port"), allowed)


# Layers


class _Written(NamedTuple):
    """One value as it was written, and where."""

    value: object
    place: str
    """A file's path, "environment" or "arguments"."""
    key: str
    """The key as that place spells it."""


def _written_in_file(file: Path) -> dict[str, _Written]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not a TOML file: {error}", file=str(file)) from error
    return {key: _Written(value, str(file), key) for key, value in _flatten(content, "")}


def _flatten(content: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written_in_environment(environ: Mapping[str, str]) -> dict[str, _Written]:
    """`AEGIS_STREAMING__CONSUMER__MAX_POLL_RECORDS` is `streaming.consumer.max_poll_records`."""
    kinds = _kinds(StreamingConfig, "streaming")
    found = {}
    for name, text in environ.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix("AEGIS_").replace("__", ".").lower()
            value = kinds[key].from_text(text) if key in kinds else text
            found[key] = _Written(value, "environment", name)
    return found


def _key(item: Field[Any]) -> str:
    return item.metadata.get("key") or item.name


def _kinds(of: type[Any], prefix: str) -> dict[str, Kind]:
    """Every dotted key that a table and the tables in it take."""
    found: dict[str, Kind] = {}
    for item in fields(of):
        if inner := item.metadata.get("table"):
            found |= _kinds(inner, f"{prefix}.{item.name}")
        else:
            found[f"{prefix}.{_key(item)}"] = item.metadata["kind"]
    return found


def _build(of: type[Table], prefix: str, written: Mapping[str, _Written]) -> Table:
    kinds = _kinds(of, prefix)
    for key, found in written.items():
        if key not in kinds:
            raise _unknown(found, key, kinds)
    return _fill(of, prefix, written)


def _fill(of: type[Table], prefix: str, written: Mapping[str, _Written]) -> Table:
    assert is_dataclass(of)
    values: dict[str, Any] = {}
    for item in fields(of):
        key = f"{prefix}.{_key(item)}"
        if inner := item.metadata.get("table"):
            values[item.name] = _fill(inner, key, written)
        elif key in written:
            values[item.name] = _checked(written[key], item.metadata["kind"])
        elif item.default is MISSING:
            place = next(iter(written.values())).place if written else "the file"
            allowed = item.metadata["kind"].allowed
            raise ConfigError(
                f"{place}: `{key}` is missing; allowed: {allowed}",
                file=place, key=key, allowed=allowed,
            )  # fmt: skip
    return of(**values)


def _checked(written: _Written, kind: Kind) -> Any:
    try:
        return kind.parse(written.value)
    except (ValueError, TypeError) as error:
        raise _refusal(written, kind.allowed) from error


def _refusal(written: _Written, allowed: str) -> ConfigError:
    return ConfigError(
        f"{written.place}: `{written.key}` is {_shown(written.value)}; allowed: {allowed}",
        file=written.place,
        key=written.key,
        value=written.value,
        allowed=allowed,
    )


def _shown(value: object) -> str:
    """A value as its file has it, cut to what fits a sentence."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"


def _unknown(written: _Written, key: str, kinds: Mapping[str, Kind]) -> ConfigError:
    close = difflib.get_close_matches(key, kinds, n=1)
    guess = f" (did you mean `{close[0]}`?)" if close else ""
    allowed = ", ".join(f"`{name}`" for name in kinds)
    return ConfigError(
        f"{written.place}: `{written.key}` = {_shown(written.value)} is not a setting{guess}; "
        f"allowed: {allowed}",
        file=written.place,
        key=written.key,
        value=written.value,
        allowed=list(kinds),
    )
