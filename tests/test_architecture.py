"""Holds the tree to its rules, read as data: who may import whom, and what no module may do.

The tables at the top are the rules; a new room is a new line. Nothing is imported to be checked.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aegis_cluster"

BELOW_ALL = {"errors", "arguments", "ids", "limits", "config", "keys", "curve", "doorkeeper",
    "read_ahead", "wall_clock",
}  # fmt: skip
MACHINE = {"wire", "raft", "storage", "cluster", "broker"}
FRONT = {
    "engine", "message", "topics", "channel", "filters", "history", "producer", "publishing",
    "subscriber", "sync", "embedded", "cdc", "event", "stream", "gateway", "integrations",
    "testing", "subscribe_config", "group", "membership", "handled", "persistent", "transaction",
    "explain", "transactional_ids",
}  # fmt: skip

MAY_IMPORT: dict[str, set[str]] = {
    # Room: the other rooms it may import, besides those below all. Imports run one way.
    "errors": set(),
    "arguments": set(),
    "ids": set(),
    "limits": set(),
    "config": set(),
    "keys": set(),
    "curve": set(),
    "doorkeeper": set(),
    "read_ahead": set(),
    "wall_clock": set(),
    "wire": set(),
    "storage": {"wire"},  # storage and raft do not know each other
    "raft": {"wire"},
    "cluster": {"wire", "raft", "storage"},
    "broker": {"wire", "raft", "storage", "cluster"},
    "node": MACHINE,
    "client": {"wire"},  # what stands on the client has no back door into the machine
    **{room: {"client", "wire"} | FRONT for room in FRONT - {"testing"}},
    "testing": {"client", "node"} | MACHINE | FRONT,
    "bench": {"client", "node", "wire"} | FRONT,  # measures what users have
    "cli": {"", "bench", "client", "node", "wire"} | FRONT,
    "": {"client"} | FRONT,  # aegis_cluster/__init__.py, which users import
}

# A file that may import what its room may not, and the room it may import.
EXCEPTIONS = {("embedded", "broker"), ("embedded", "node"), ("engine", "embedded")}

# Plain objects that decide: nothing of the outside world reaches them but what is handed in.
CORES = (
    "raft/*.py",
    "cluster/metadata*.py",
    "cluster/view/frames.py",
    "cluster/view/leases.py",
    "cluster/view/table.py",
    "broker/*_stm.py",
    "broker/events/event_stm.py",
    "broker/groups/assignor.py",
    "broker/groups/commands.py",
    "broker/groups/coordinator.py",
    "broker/groups/group_stm.py",
    "broker/groups/group_table.py",
    "broker/groups/membership.py",
    "broker/subscriptions/commands.py",
    "broker/subscriptions/dispatcher.py",
    "broker/subscriptions/lanes.py",
    "broker/subscriptions/ranges.py",
    "broker/subscriptions/subscription_stm.py",
    "broker/subscriptions/subscription_table.py",
    "broker/transactions/commands.py",
    "broker/transactions/decisions.py",
    "broker/transactions/transaction_stm.py",
    "broker/transactions/transaction_table.py",
    "node/supervision.py",
    "handled.py",
    "stream/aggregates.py",
    "stream/columns.py",
    "stream/describe.py",
    "stream/state.py",
    "stream/*steps.py",
    "stream/task.py",
    "stream/topology.py",
)
OUTSIDE_WORLD = {
    "asyncio", "concurrent", "datetime", "io", "multiprocessing", "os", "pathlib", "psutil",
    "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "ssl",
    "subprocess", "tempfile", "threading", "time", "uuid", "zmq",
}  # fmt: skip

# Why: fork after threads and sockets deadlocks (multiprocessing's default); the others turn bytes
# from a disk or a peer into code that runs.
FORBIDDEN_MODULES = {"multiprocessing", "pickle", "marshal", "shelve", "yaml", "dill"}
ALLOWED_MODULES = {"aegis_cluster/stream/pool.py": {"multiprocessing", "pickle"}}
"""Talks to processes that it has started itself, over pipes that nobody else has."""
FORBIDDEN_CALLS = {
    "print": "the library talks through return values, errors and logs",
    "eval": "it runs what it reads",
    "exec": "it runs what it reads",
    "hash": "it differs between processes for texts; use the partitioner or a checksum",
    "breakpoint": "it waits for nobody",
    "input": "it waits for nobody",
}


class Module(NamedTuple):
    """One file of the package, parsed."""

    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first name below `aegis_cluster`; "" for its `__init__`."""
        first = self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        return "" if first == "__init__" else first

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


def modules() -> list[Module]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
    return [Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported, wherever in the module; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module as it runs: types may be named by a core that never touches their values."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return node.orelse
            return self.generic_visit(node)

    copy = ast.parse(ast.unparse(tree))
    Strip().visit(copy)
    return copy


def rooms_imported(tree: ast.AST) -> set[str]:
    found = set()
    for name in imported_names(tree):
        parts = name.split(".")
        if parts[0] == "aegis_cluster":
            is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
            found.add(parts[1] if is_room else "")
    return found


def is_core(module: Module) -> bool:
    return any(module.path.relative_to(PACKAGE).match(pattern) for pattern in CORES)


@every_module
def test_imports_run_one_way(module: Module) -> None:
    assert module.room in MAY_IMPORT, f"{module.name}: give the room a line in MAY_IMPORT"
    allowed = MAY_IMPORT[module.room] | BELOW_ALL | {module.room}
    excepted = {room for file, room in EXCEPTIONS if file == module.path.stem}
    wrong = rooms_imported(module.tree) - allowed - excepted
    assert not wrong, f"{module.name} may not import {sorted(wrong)}"


def test_the_rooms_have_an_order() -> None:
    """The table itself has no circle, save among the front rooms, which are one layer."""
    above: dict[str, set[str]] = {
        room: set() if room in FRONT else allowed - FRONT for room, allowed in MAY_IMPORT.items()
    }
    while above:
        lowest = {room for room, allowed in above.items() if not allowed & above.keys()}
        assert lowest, f"a circle among {sorted(above)}"
        above = {room: allowed for room, allowed in above.items() if room not in lowest}


@pytest.mark.parametrize("room", sorted(BELOW_ALL))
def test_what_lies_below_all_imports_no_room(room: str) -> None:
    (module,) = [module for module in MODULES if module.room == room]
    assert rooms_imported(module.tree) <= BELOW_ALL


@pytest.mark.parametrize(
    "module", [module for module in MODULES if is_core(module)], ids=lambda module: module.name
)
def test_cores_do_not_reach_the_outside_world(module: Module) -> None:
    runs = without_type_checking(module.tree)
    wrong = {name.split(".")[0] for name in imported_names(runs)} & OUTSIDE_WORLD
    assert not wrong, f"{module.name} is a core; it may not import {sorted(wrong)}"
    assert "open" not in calls(runs), f"{module.name} is a core; it may not open files"


def calls(tree: ast.AST) -> set[str]:
    """Plain names that are called."""
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


@every_module
def test_no_module_does_what_none_may(module: Module) -> None:
    called = sorted(calls(module.tree) & FORBIDDEN_CALLS.keys())
    assert not called, f"{module.name}: {[f'{name}: {FORBIDDEN_CALLS[name]}' for name in called]}"
    imported = {name.split(".")[0] for name in imported_names(module.tree)}
    assert not imported & FORBIDDEN_MODULES - ALLOWED_MODULES.get(module.name, set()), module.name


@every_module
def test_every_module_says_what_it_is_for(module: Module) -> None:
    docstring = ast.get_docstring(module.tree)
    assert docstring, f"{module.name} has no docstring"
    first = docstring.splitlines()[0]
    assert first.endswith((".", ":")), f"{module.name}: the first line is a sentence"


@every_module
def test_nothing_is_swallowed(module: Module) -> None:
    bare = [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, f"{module.name} has a bare except in lines {bare}"


def test_there_is_one_place_for_limits() -> None:
    files = [module.name for module in MODULES if module.path.stem == "limits"]
    assert files == ["aegis_cluster/limits.py"]


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# The checks themselves, on trees that break the rules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import aegis_cluster.raft.core", {"raft"}),
        ("from aegis_cluster import limits, errors", {"limits", "errors"}),
        ("from aegis_cluster.wire.frame import x", {"wire"}),
        ("from aegis_cluster import StreamingEngine", {""}),
        ("def f():\n    from aegis_cluster import broker", {"broker"}),
        ("import os, aegis_clusters", set()),
    ],
)
def test_imports_are_found(source: str, expected: set[str]) -> None:
    assert rooms_imported(ast.parse(source)) == expected


def test_what_only_types_see_does_not_run() -> None:
    source = "if TYPE_CHECKING:\n    import random\nelse:\n    import time\nimport zlib"
    assert set(imported_names(without_type_checking(ast.parse(source)))) == {"time", "zlib"}
