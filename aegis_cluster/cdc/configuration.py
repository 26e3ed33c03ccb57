"""A connector as a file, for `aegis cdc run CONFIG`.

    [cdc]
    source = "sqlite:shop.db"       # or "postgresql://user@host/shop"
    name = "shop"                   # of the feed; default: the database's name
    tables = ["users", "orders"]    # default: all
    partitions = 1                  # of a feed that is not there yet
    replication_factor = 3
    [cdc.table.users]               # what of it comes into the feed; see `CDCEngine(tables=…)`
    columns = ["id", "name"]
    masks = { name = "***" }
    operations = ["insert", "update", "delete", "truncate"]
    old_values = true

Paths are relative to the file. An unknown key or a bad value is an error that names it.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.cdc.events import Operation
from aegis_cluster.cdc.postgres import PostgresSource
from aegis_cluster.cdc.sqlite import SQLiteSource
from aegis_cluster.cdc.subscription import CDCConfig
from aegis_cluster.errors import ConfigError
from aegis_cluster.topics import TopicConfig

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.cdc.source import Source

SQLITE: Final = "sqlite:"
POSTGRES: Final = ("postgresql://", "postgres://")
_KEYS: Final[dict[str, tuple[type[Any], str]]] = {
    "source": (str, 'a database: "sqlite:shop.db" or "postgresql://user@host/shop"'),
    "name": (str, "the feed's name, in quotes"),
    "tables": (list, 'a list of tables: ["users", "orders"]'),
    "partitions": (int, "a number, 1 or more"),
    "replication_factor": (int, "a number, 1 or more"),
    "table": (dict, "tables of settings: [cdc.table.users]"),
}
_TABLE_KEYS: Final[dict[str, tuple[type[Any], str]]] = {
    "columns": (list, 'a list of columns: ["id", "name"]'),
    "masks": (dict, 'a text for each column: { mail = "***" }'),
    "operations": (list, "some of: insert, update, delete, truncate"),
    "old_values": (bool, "true or false"),
}


_OPERATIONS: Final = {one.name.lower(): one for one in Operation}


class ConnectorConfig(NamedTuple):
    """What to capture, and how to make the feed where it is not there."""

    source: Source
    topic: TopicConfig
    tables: dict[str, CDCConfig]


def load_connector(file: Path) -> ConnectorConfig:
    """Raises `ConfigError`, naming the file, the key and what is allowed."""
    values = _values(file)
    if "source" not in values:
        raise ConfigError(f"{file}: `cdc.source` is missing; allowed: {_KEYS['source'][1]}.")
    topic = TopicConfig(
        partitions=values.get("partitions"), replication_factor=values.get("replication_factor")
    )
    tables = {
        name: _table(file, name, settings) for name, settings in values.get("table", {}).items()
    }
    return ConnectorConfig(_source(file, values), topic, tables)


def _table(file: Path, name: str, settings: Any) -> CDCConfig:
    """What of one table comes into the feed."""
    place = f"cdc.table.{name}"
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: `{place}` is {settings!r}; allowed: {_KEYS['table'][1]}.")
    for key, value in settings.items():
        if key not in _TABLE_KEYS:
            allowed = ", ".join(_TABLE_KEYS)
            raise ConfigError(f"{file}: `{place}.{key}` is unknown; allowed: {allowed}.")
        kind, allowed = _TABLE_KEYS[key]
        texts = value.values() if isinstance(value, dict) else value if kind is list else ()
        known = key != "operations" or (kind is type(value) and {*value} <= _OPERATIONS.keys())
        if type(value) is not kind or not known or not all(isinstance(t, str) for t in texts):
            raise ConfigError(f"{file}: `{place}.{key}` is {value!r}; allowed: {allowed}.")
    operations = settings.get("operations")
    return CDCConfig(
        columns=settings.get("columns"),
        masks=settings.get("masks", {}),
        operations=None if operations is None else [_OPERATIONS[one] for one in operations],
        include_old_values=settings.get("old_values", True),
    )


def _values(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not a TOML file: {error}.") from error
    other = sorted(set(content) - {"cdc"})
    if other or not isinstance(content.get("cdc"), dict):
        raise ConfigError(f"{file}: `{(other or ['cdc'])[0]}`; allowed: one table, [cdc].")
    values: dict[str, Any] = content["cdc"]
    for key, value in values.items():
        if key not in _KEYS:
            raise ConfigError(f"{file}: `cdc.{key}` is unknown; allowed: {', '.join(_KEYS)}.")
        kind, allowed = _KEYS[key]
        fits = type(value) is kind and (kind is not int or value > 0)
        if not fits or (kind is list and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{file}: `cdc.{key}` is {value!r}; allowed: {allowed}.")
    return values


def _source(file: Path, values: dict[str, Any]) -> Source:
    wanted = values["source"]
    name, tables = values.get("name"), values.get("tables")
    if wanted.startswith(SQLITE):
        path = file.parent / wanted.removeprefix(SQLITE)
        return SQLiteSource(path, tables=tables, name=name)
    if wanted.startswith(POSTGRES):
        return PostgresSource(wanted, tables=tables, name=name)
    raise ConfigError(f"{file}: `cdc.source` is {wanted!r}; allowed: {_KEYS['source'][1]}.")
