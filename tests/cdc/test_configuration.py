"""A connector's file: what is in it, and a sentence for what may not be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.cdc import Operation, SQLiteSource
from aegis_cluster.cdc.configuration import load_connector
from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
[cdc]
source = "sqlite:shop.db"
name = "shop"
partitions = 2
[cdc.table.users]
columns = ["id"]
masks = { mail = "***" }
operations = ["insert", "delete"]
old_values = false
"""


def test_a_file_says_it_all(tmp_path: Path) -> None:
    file = tmp_path / "shop.toml"
    file.write_text(GOOD)
    found = load_connector(file)
    assert isinstance(found.source, SQLiteSource)
    assert (found.source.name, found.topic.partitions) == ("shop", 2)
    users = found.tables["users"]
    assert users.columns == ["id"]
    assert users.operations == {Operation.INSERT, Operation.DELETE}
    assert not users.include_old_values


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('name = "x"', "`cdc.source` is missing"),
        ('source = "mysql://x"', r"allowed: a database"),
        ('source = "sqlite:x"\nparts = 1', "`cdc.parts` is unknown"),
        ('source = "sqlite:x"\npartitions = 0', "`cdc.partitions` is 0"),
        ('source = "sqlite:x"\ntable.users = 1', r"`cdc.table.users` is 1"),
        ('source = "sqlite:x"\n[cdc.table.u]\nmask = 1', "`cdc.table.u.mask` is unknown"),
        ('source = "sqlite:x"\n[cdc.table.u]\noperations = ["drop"]', "insert, update"),
        ('source = "sqlite:x"\n[cdc.table.u]\nmasks = { a = 1 }', "a text for each column"),
        ('source = "sqlite:x"\n[cdc.table.u]\ncolumns = [1]', "a list of columns"),
    ],
)
def test_what_may_not_be_there_is_said(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "shop.toml"
    file.write_text(f"[cdc]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_connector(file)
    assert said in str(caught.value)
