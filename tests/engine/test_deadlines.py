"""Every public call has one deadline and ends by it, however the other side is dead.

A cluster that dies while it is used is in `test_dead_cluster.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import click
import pytest

from aegis_cluster import Message, StreamingEngine, sync
from aegis_cluster.cli import app
from aegis_cluster.errors import OutcomeUnknown, Refused
from aegis_cluster.wire.protocol import Api
from tests.client.fake_node import fake_node, run, topic_info
from tests.engine.dead_places import CALLS, CLASSES, DEATHS, LOCAL, greets_and_babbles, surface

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from tests.engine.dead_places import Call

    Death = Callable[[], AbstractContextManager[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT_S = 0.5
SLACK_S = 3.0
"""Beyond the deadline: all calls run at once, on a machine that does other things too."""

deaths = pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.__name__)


def test_every_public_call_is_tried_here() -> None:
    missing = surface() - set(CALLS)
    assert not missing, f"add {sorted(missing)} to CALLS, or to LOCAL if they ask nobody anything"
    assert not set(CALLS) - surface(), "these are gone"


def test_every_public_call_takes_a_timeout() -> None:
    owners = {owner.__name__: owner for owner in CLASSES}
    without = set()
    for name in surface():
        owner, _, method = name.partition(".")
        parameters = inspect.signature(getattr(owners[owner], method)).parameters
        if not {"timeout", "deadline"} & set(parameters):
            without.add(name)
    assert not without


def test_blocking_classes_have_the_same_calls() -> None:
    """They hand over to the others, whose deadlines hold for them too."""
    for owner in CLASSES:
        twin = getattr(sync, owner.__name__)
        wanted = {
            name.partition(".")[2]
            for name in surface() | LOCAL
            if name.startswith(f"{owner.__name__}.")
        }
        inner = {
            "started", "forget", "hand_out_again", "publish", "publish_many", "background",
            "deadline", "begin", "handled", "stop", "go_back", "go_back_for", "is_committed_by",
            "committed_within", "commit_within", "positions_in_hand",
        }  # fmt: skip
        missing = {name for name in wanted if not hasattr(twin, name)} - inner
        assert not missing, owner


async def _ends_in_time(engine: StreamingEngine, name: str, call: Call) -> None:
    began = time.monotonic()
    try:
        found = await call(engine, TIMEOUT_S)
    except (Refused, OutcomeUnknown):
        pass
    else:
        assert found == [], f"{name} gave {found!r}"  # a poll, of nothing
    took = time.monotonic() - began
    assert took < 2 * TIMEOUT_S + SLACK_S, f"{name} took {took:.1f} s"


@deaths
def test_entering_an_engine_ends_in_time(death: Death) -> None:
    async def work(address: str) -> None:
        began = time.monotonic()
        with pytest.raises((Refused, OutcomeUnknown)):
            async with StreamingEngine.connect(address, request_timeout=TIMEOUT_S):
                pass
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S

    with death() as address:
        asyncio.run(work(address))


NONSENSE: tuple[list[Any], ...] = ([], ["x"], [[["x"]]], [None, None, None, None, None], [[[999]]])


@pytest.mark.parametrize("kind", ["mute", "gone", *range(len(NONSENSE))])
def test_every_call_ends_in_time_once_the_only_node_is_dead(kind: str | int) -> None:
    """It served, and the engine knows topics and leaders; then it is mute, gone, or talks rot."""

    async def test() -> None:
        topics = topic_info("t"), topic_info("u", first_group=5)
        async with (
            fake_node(*topics) as node,
            StreamingEngine.connect(node.endpoint, request_timeout=10) as engine,
        ):
            await engine.publish("t", Message(payload="before"))
            if kind == "gone":
                await node.close()
            for api in Api:
                if api is not Api.HELLO:
                    rot = None if isinstance(kind, str) else NONSENSE[kind]
                    node.answers[api] = lambda _, rot=rot: rot  # type: ignore[misc]
            await asyncio.gather(
                *(_ends_in_time(engine, name, call) for name, call in CALLS.items())
            )

    run(test())


@deaths
def test_blocking_calls_end_in_time(death: Death) -> None:
    with death() as address:
        began = time.monotonic()
        with (
            pytest.raises((Refused, OutcomeUnknown)),
            sync.StreamingEngine.connect(address, request_timeout=TIMEOUT_S) as engine,
        ):
            engine.list_topics()
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S


# ---- the command line


def _asking_commands() -> dict[str, click.Command]:
    """Every command that talks to a cluster, found by its `--bootstrap`."""
    found: dict[str, click.Command] = {}

    def walk(command: click.Command, name: str) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for inner in command.list_commands(context):
                child = command.get_command(context, inner)
                assert child is not None
                walk(child, f"{name} {inner}".strip())
        elif any("--bootstrap" in option.opts for option in command.params):
            found[name] = command

    walk(app.app, "")
    return found


ARGUMENTS: dict[str, list[str]] = {
    "group delete": ["g"],
    "group describe": ["g"],
    "group reset": ["g", "--to", "earliest"],
    "event append": ["s", "--type", "Happened"],
    "event load": ["s"],
    "event project": ["views:view", "--file", "views.sqlite"],
    "explain group": ["g"],
    "explain partition": ["t/0"],
    "explain subscription": ["t/s"],
    "explain txn": ["x"],
    "publish": ["t", "--file", "input.txt"],
    "subscription delete": ["t", "s"],
    "subscription describe": ["t", "s"],
    "subscription parked": ["t", "s"],
    "subscription replay": ["t", "s"],
    "subscription reset": ["t", "s", "--to", "earliest"],
    "cdc run": ["feed.toml"],
    "cdc snapshot": ["users"],
    "stream run": ["processor:processor"],
    "txn abort": ["x"],
    "txn describe": ["x"],
    "consume": ["t", "--count", "1", "--from", "earliest"],
    "topic create": ["t"],
    "topic describe": ["t"],
    "topic alter": ["t", "--retention", "1d"],
    "topic delete": ["t", "--yes"],
}


PROCESSOR = """
from aegis_cluster.stream import StreamProcessor

processor = StreamProcessor(None, "app").source("t").sink("u")
"""
VIEW = """
from aegis_cluster import Projection

class View(Projection):
    name, streams = "view", "*"

    def create(self, db): ...
    def drop(self, db): ...
    def apply(self, event, db): ...

view = View()
"""


@pytest.mark.parametrize("name", sorted(_asking_commands()))
def test_commands_end_in_time_with_a_sentence(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = _asking_commands()[name]
    assert any("--timeout" in option.opts for option in command.params), f"{name} has no --timeout"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("a line\n")
    (tmp_path / "feed.toml").write_text('[cdc]\nsource = "sqlite:shop.db"\n')
    (tmp_path / "processor.py").write_text(PROCESSOR)
    (tmp_path / "views.py").write_text(VIEW)
    sqlite3.connect(tmp_path / "shop.db").executescript("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    for death in (DEATHS[0], DEATHS[1], greets_and_babbles):
        with death() as address:
            began = time.monotonic()
            arguments = [*name.split(), *ARGUMENTS.get(name, [])]
            code = app.run([*arguments, "--bootstrap", address, "--timeout", "500ms"])
            took = time.monotonic() - began
        captured = capfd.readouterr()
        said = captured.out + captured.err
        assert code == 1, (code, said)
        assert "Traceback" not in said
        assert took < TIMEOUT_S + SLACK_S, f"{name} took {took:.1f} s"
        assert said.strip(), f"{name} says nothing"
