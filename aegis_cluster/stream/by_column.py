"""A batch of values by column: for functions that work on whole columns, such as Arrow's.

Records are dicts; a field that one of them lacks is None there. Arrow is used where pyarrow is
installed, and looked for only when somebody asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMS: Final = ("list", "dict", "arrow")


def check_form(form: str) -> None:
    """Raises `ConfigError` for one that is none, or that cannot be had here."""
    if form not in FORMS:
        raise ConfigError(
            f"columns = {form!r}; allowed: {', '.join(map(repr, FORMS))}.", key="columns"
        )
    if form == "arrow" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "columns = 'arrow' needs pyarrow, which is not installed: pip install pyarrow.",
            key="columns",
        )


def as_columns(values: list[Any], form: str) -> Any:
    """Values as a list, a dict of lists, or a `pyarrow.Table`."""
    if form == "list":
        return values
    if form == "dict":
        names = dict.fromkeys(name for value in values for name in value)
        return {name: [value.get(name) for value in values] for name in names}
    return importlib.import_module("pyarrow").Table.from_pylist(values)


def from_columns(found: Any, form: str) -> Sequence[Any]:
    """The values again."""
    if form == "list":
        return found  # type: ignore[no-any-return]  # the caller counts them
    if form == "dict":
        rows = zip(*found.values(), strict=True)
        return [dict(zip(found, row, strict=True)) for row in rows]
    rows_of_table: list[Any] = found.to_pylist()
    return rows_of_table
