"""A database as a sink: each batch of records is one statement for many rows, and one commit.

    upsert = "INSERT INTO totals VALUES (?, ?) ON CONFLICT (customer) DO UPDATE SET total = excluded.total"
    stream.sink(DatabaseSink(lambda: sqlite3.connect("totals.db"), upsert, lambda key, v: (key, v)))

The rule it protects: rows are written before the position is committed, so a crash writes some of
them again, and none is missing. A statement that replaces a row makes that harmless.
"""  # noqa: E501 - an example is read best in one line

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(eq=False)
class DatabaseSink:
    """connect: gives a connection as in PEP 249 (`sqlite3`, `psycopg2`, ...), for one batch, in a
    helper thread. statement: with its placeholders; one that may be done again, such as an upsert.
    row: the parameters for a key and a value.
    """

    connect: Callable[[], Any]
    statement: str
    row: Callable[[Any, Any], Sequence[Any]]

    async def write(self, rows: list[Sequence[Any]]) -> None:
        """Write and commit. Raises what the database does; nothing of it is written then."""
        await asyncio.to_thread(self._write, rows)

    def _write(self, rows: list[Sequence[Any]]) -> None:
        connection = self.connect()
        try:
            connection.cursor().executemany(self.statement, rows)
            connection.commit()
        finally:
            connection.close()
