"""The tables and triggers that a captured SQLite database carries, as SQL.

The idea: triggers write each change into one log table, in the transaction of whoever makes it, so
every writing process is seen and a change that is rolled back never was. The log's columns have no
type, so each value stands there exactly as it is: `o0, o1, …` before, `n0, n1, …` after the change.

`INSERT OR REPLACE` and `UPDATE OR REPLACE` delete rows without a delete trigger (unless a writer
has `recursive_triggers` on). So a BEFORE trigger writes down which rows the new one could replace,
as *candidates* (`x`); the AFTER trigger makes those a delete whose row is gone, and drops the rest.
Candidates that stay behind (an insert that was ignored) are no changes, and readers skip them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

PREFIX: Final = "_aegis_cdc"
LOG: Final = f"{PREFIX}_log"
SCHEMAS: Final = f"{PREFIX}_schemas"
SNAPSHOTS: Final = f"{PREFIX}_snapshots"
STATE: Final = f"{PREFIX}_state"

SETUP: Final = (
    f"CREATE TABLE IF NOT EXISTS {LOG} (id INTEGER PRIMARY KEY AUTOINCREMENT, schema INTEGER,"
    " op TEXT, ts_ms INTEGER, o_rowid, n_rowid)",
    f"CREATE INDEX IF NOT EXISTS {LOG}_candidates ON {LOG} (schema) WHERE op = 'x'",
    f"CREATE TABLE IF NOT EXISTS {SCHEMAS} (id INTEGER PRIMARY KEY, name TEXT, body TEXT)",
    f"CREATE TABLE IF NOT EXISTS {SNAPSHOTS} (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT,"
    " schema INTEGER, started INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0)",
    f"CREATE TABLE IF NOT EXISTS {STATE} (key TEXT PRIMARY KEY, value)",
)
_NOW_MS: Final = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
_ROWID_NAMES: Final = ("rowid", "_rowid_", "oid")


def quoted(name: str) -> str:
    """An identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A literal."""
    return "'" + value.replace("'", "''") + "'"


@dataclass(frozen=True, slots=True)
class Table:
    """How one table looks now.

    key: its primary key's columns; empty where it has none. rowid: a name for the row's number, or
    None in a table without one. unique: the columns, each with its collation, of everything that a
    row may collide by.
    """

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    rowid: str | None
    unique: tuple[tuple[tuple[str, str], ...], ...]

    def body(self) -> str:
        """As it is kept beside the log, for the changes of this schema."""
        return json.dumps([self.columns, self.key, self.rowid, self.unique])

    @classmethod
    def from_body(cls, name: str, body: str) -> Table:
        columns, key, rowid, unique = json.loads(body)
        return cls(
            name,
            tuple(columns),
            tuple(key),
            rowid,
            tuple(tuple((column, collation) for column, collation in one) for one in unique),
        )


def user_tables(connection: sqlite3.Connection) -> list[str]:
    """Ordinary tables, by name; not views, virtual tables, their shadows, or our own."""
    rows = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table'"
    )
    return sorted(name for (name,) in rows if not name.startswith(("sqlite_", PREFIX)))


def describe(connection: sqlite3.Connection, name: str) -> Table:
    """One table as it is now."""
    rows = connection.execute(f"PRAGMA table_xinfo({quoted(name)})").fetchall()
    columns = tuple(row[1] for row in rows if row[6] != 1)
    key = tuple(row[1] for row in sorted(rows, key=lambda row: row[5]) if row[5])
    (without_rowid,) = connection.execute(
        "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (name,)
    ).fetchone()
    rowid = None
    if not without_rowid:
        taken = {column.lower() for column in columns}
        rowid = next((alias for alias in _ROWID_NAMES if alias not in taken), None)
    return Table(name, columns, key, rowid, tuple(_unique(connection, name)))


def _unique(connection: sqlite3.Connection, name: str) -> Sequence[tuple[tuple[str, str], ...]]:
    found = []
    for _, index, is_unique, *_ in connection.execute(f"PRAGMA index_list({quoted(name)})"):
        rows = connection.execute(f"PRAGMA index_xinfo({quoted(index)})").fetchall()
        columns = tuple((row[2], row[4]) for row in rows if row[5])
        if is_unique and all(column is not None for column, _ in columns):
            found.append(columns)
    return sorted(found)


def trigger_names(table: str) -> dict[str, str]:
    """By what they are for."""
    return {kind: f"{PREFIX}_{kind}_{table}" for kind in ("bi", "ai", "bu", "au", "ad")}


def trigger_sql(table: Table, schema: int) -> dict[str, str]:
    """The triggers of a table, by name."""
    names, target = trigger_names(table.name), quoted(table.name)
    bodies = {
        "bi": ("BEFORE INSERT", [_forget(schema), _candidates(table, schema, update=False)]),
        "ai": ("AFTER INSERT", [*_settle(table, schema), _note(table, schema, "c")]),
        "bu": ("BEFORE UPDATE", [_forget(schema), _candidates(table, schema, update=True)]),
        "au": ("AFTER UPDATE", [*_settle(table, schema), _note(table, schema, "u")]),
        "ad": ("AFTER DELETE", [_note(table, schema, "d")]),
    }
    return {
        names[kind]: f"CREATE TRIGGER {quoted(names[kind])} {when} ON {target} BEGIN"
        f" {'; '.join(statements)}; END"
        for kind, (when, statements) in bodies.items()
    }


def _note(table: Table, schema: int, op: str) -> str:
    """Write the change down."""
    places, values = ["schema", "op", "ts_ms"], [str(schema), text(op), _NOW_MS]
    for letter, side in (("o", "OLD"), ("n", "NEW")):
        if (op, letter) in (("c", "o"), ("d", "n")):
            continue
        names = [*table.columns]
        places += [f"{letter}{number}" for number in range(len(names))]
        values += [f"{side}.{quoted(column)}" for column in names]
        if table.rowid is not None:
            places.append(f"{letter}_rowid")
            values.append(f"{side}.{table.rowid}")
    return f"INSERT INTO {LOG} ({', '.join(places)}) VALUES ({', '.join(values)})"


def _forget(schema: int) -> str:
    return f"DELETE FROM {LOG} WHERE op = 'x' AND schema = {schema}"


def _candidates(table: Table, schema: int, *, update: bool) -> str:
    """Write down the rows that the new one collides with."""
    target = quoted(table.name)
    unique = [
        " AND ".join(f"t.{quoted(c)} = NEW.{quoted(c)} COLLATE {quoted(coll)}" for c, coll in one)
        for one in table.unique
    ]
    if table.rowid is not None:
        unique.append(f"t.{table.rowid} = NEW.{table.rowid}")
    where = " OR ".join(f"({one})" for one in unique)
    if update:
        where = f"({where}) AND NOT ({_same_row(table, 't', 'OLD')})"
    places = ["schema", "op", "ts_ms", *(f"o{number}" for number in range(len(table.columns)))]
    values = [str(schema), "'x'", _NOW_MS, *(f"t.{quoted(column)}" for column in table.columns)]
    if table.rowid is not None:
        places.append("o_rowid")
        values.append(f"t.{table.rowid}")
    return (
        f"INSERT INTO {LOG} ({', '.join(places)}) SELECT {', '.join(values)}"
        f" FROM {target} AS t WHERE {where}"
    )


def _settle(table: Table, schema: int) -> list[str]:
    """Make the candidates that were replaced deletes, unless a trigger has noted that already."""
    target, mine = quoted(table.name), f"op = 'x' AND schema = {schema}"
    still_there = (
        f"SELECT 1 FROM {target} AS t WHERE {_same_as_logged(table, 't', LOG)}"
        f" AND NOT ({_same_row(table, 't', 'NEW')})"
    )
    noted = (
        f"SELECT 1 FROM {LOG} AS later WHERE later.id > {LOG}.id AND later.op = 'd'"
        f" AND later.schema = {schema} AND {_logged_twice(table, 'later', LOG)}"
    )
    return [
        f"UPDATE {LOG} SET op = 'd' WHERE {mine} AND NOT EXISTS ({still_there})"
        f" AND NOT EXISTS ({noted})",
        f"DELETE FROM {LOG} WHERE {mine}",
    ]


def _same_row(table: Table, left: str, right: str) -> str:
    if table.rowid is not None:
        return f"{left}.{table.rowid} IS {right}.{table.rowid}"
    return " AND ".join(f"{left}.{quoted(c)} IS {right}.{quoted(c)}" for c in table.key)


def _same_as_logged(table: Table, row: str, logged: str) -> str:
    if table.rowid is not None:
        return f"{row}.{table.rowid} = {logged}.o_rowid"
    places = {column: number for number, column in enumerate(table.columns)}
    return " AND ".join(f"{row}.{quoted(c)} = {logged}.o{places[c]}" for c in table.key)


def _logged_twice(table: Table, left: str, right: str) -> str:
    if table.rowid is not None:
        return f"{left}.o_rowid = {right}.o_rowid"
    places = {column: number for number, column in enumerate(table.columns)}
    return " AND ".join(f"{left}.o{places[c]} IS {right}.o{places[c]}" for c in table.key)


def log_columns(connection: sqlite3.Connection) -> int:
    """For how many columns of a table the log has room."""
    rows = connection.execute(f"PRAGMA table_info({LOG})").fetchall()
    return sum(1 for row in rows if row[1][0] == "n" and row[1][1:].isdigit())


def widen_log(connection: sqlite3.Connection, columns: int) -> None:
    """Have room for so many."""
    for number in range(log_columns(connection), columns):
        connection.execute(f"ALTER TABLE {LOG} ADD COLUMN o{number}")
        connection.execute(f"ALTER TABLE {LOG} ADD COLUMN n{number}")


def triggers_on(connection: sqlite3.Connection, table: str) -> dict[str, Any]:
    """Our triggers on a table as they are, whatever table they were made for."""
    rows = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?", (table,)
    )
    return {name: sql for name, sql in rows if name.startswith(PREFIX)}
