"""The documentation's tables say what the program does: settings, errors, and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aegis_cluster
import aegis_cluster.sync
from aegis_cluster import config, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[1] / "docs"


def tables(name: str) -> dict[str, list[list[str]]]:
    """Rows of the tables of a page, by the heading above them; the first two lines are none."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (DOCS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(heading, []).append(cells)
    return {heading: rows[2:] for heading, rows in found.items()}


# ---- settings


def settings(table: type[Any], name: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key with its table, such as "streaming.consumer max_poll_records"."""
    for field in dataclasses.fields(table):
        inner = field.metadata.get("table")
        if inner is not None:
            yield from settings(inner, f"{name}.{field.name}")
        else:
            yield f"{name} {field.metadata.get('key') or field.name}", field


SETTINGS = dict(settings(config.StreamingConfig, "streaming")) | dict(
    settings(config.NodeConfig, "node")
)


def documented() -> dict[str, str]:
    """The default of every key in docs/configuration.md, as it is written there."""
    found: dict[str, str] = {}
    for heading, rows in tables("configuration.md").items():
        table = re.match(r"`\[(.+)\]`", heading)
        if table is not None:
            found |= {f"{table[1]} {row[0].strip('`')}": row[1].strip("`") for row in rows}
    return found


def test_every_setting_is_documented_and_no_other() -> None:
    assert sorted(documented()) == sorted(SETTINGS), "docs/configuration.md lists every key once"


@pytest.mark.parametrize("key", SETTINGS)
def test_the_documented_default_is_the_default(key: str) -> None:
    field = SETTINGS[key]
    written = documented()[key]
    if field.default is dataclasses.MISSING or field.default is None:
        assert written == "none", f"{key} has no default"
        return
    value = tomllib.loads(f"value = {written}")["value"]
    assert field.metadata["kind"].parse(value) == field.default


# ---- errors


def all_errors(root: type[errors.AegisError]) -> Iterator[type[errors.AegisError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from all_errors(kind)


BRANCHES = (errors.Refused, errors.OutcomeUnknown, errors.Corruption)


def test_every_error_stands_in_the_table_of_its_branch() -> None:
    rows = {
        (heading.partition(":")[0].strip("`"), row[0].strip("`"), row[1])
        for heading, found in tables("errors.md").items()
        for row in found
    }
    wanted = set()
    for kind in all_errors(errors.AegisError):
        branch = next((b.__name__ for b in BRANCHES if issubclass(kind, b)), "The rest")
        wanted.add((branch, kind.__name__, "yes" if kind.retriable else "no"))
    assert rows == wanted


# ---- docstrings


def public() -> Iterator[tuple[str, Any]]:
    """Every public class and function of the package's face, with the methods of its classes."""
    for module in (aegis_cluster, aegis_cluster.sync):
        names = getattr(module, "__all__", None) or [
            name
            for name, one in vars(module).items()
            if getattr(one, "__module__", None) == module.__name__ and not name.startswith("_")
        ]
        for name in names:
            one = getattr(module, name)
            yield f"{module.__name__}.{name}", one
            if inspect.isclass(one):
                yield from members(f"{module.__name__}.{name}", one)


def members(owner: str, kind: type[Any]) -> Iterator[tuple[str, Any]]:
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_") or not is_ours(member):
            continue
        yield (
            f"{owner}.{name}",
            member.fget if isinstance(member, property) else getattr(kind, name),
        )


def is_ours(member: Any) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    module = getattr(function, "__module__", "") or ""
    return inspect.isroutine(function) and module.startswith("aegis_cluster")


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring(name: str) -> None:
    assert (PUBLIC[name].__doc__ or "").strip(), name


ENGINE_CALLS = [
    name
    for name, one in PUBLIC.items()
    if name.startswith(("aegis_cluster.StreamingEngine.", "aegis_cluster.Producer."))
    and inspect.iscoroutinefunction(one)
    and not name.endswith(".close")
]


@pytest.mark.parametrize("name", ENGINE_CALLS)
def test_calls_that_ask_the_cluster_name_the_errors_they_raise(name: str) -> None:
    """Every call has a deadline, so every one of them raises something."""
    text = PUBLIC[name].__doc__ or ""
    named = set(re.findall(r"`([A-Z]\w+)`", text[text.find("aise") :]))
    known = {kind.__name__ for kind in all_errors(errors.AegisError)}
    assert "aise" in text, f"{name} says nothing of what it raises"
    assert named & known, f"{name} names no error"
