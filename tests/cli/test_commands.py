"""What commands print, and how they end, on an engine without a cluster."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from typing import TYPE_CHECKING, Any

import click
import pytest

from aegis_cluster import Message, TopicConfig
from aegis_cluster.cli import app, cluster_commands, connection, consume, publish, topic_commands
from aegis_cluster.cli.app import run
from aegis_cluster.errors import (
    InvariantBroken,
    OutcomeUnknown,
    PartlyPublished,
    TopicNotFound,
    Unavailable,
)
from aegis_cluster.node.node_files import Wanted, write_nodes
from tests.cli.fake_engine import FakeEngine, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from aegis_cluster.cli.records import Row


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    engine = FakeEngine()
    for module in (publish, consume, topic_commands):
        monkeypatch.setattr(module, "connect", lambda *_: engine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AEGIS_BOOTSTRAP", raising=False)
    return engine


@pytest.fixture
def flights(engine: FakeEngine) -> FakeEngine:
    engine.topics["flights"] = [[], []]
    return engine


class OneChunk:
    """A feed that has read everything before the first chunk is taken."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = list(rows)

    async def chunks(self) -> AsyncIterator[list[Row]]:
        yield self._rows


def all_commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(app.app)
    for name in app.app.list_commands(context):
        command = app.app.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                yield f"{name} {inner}", found
        else:
            yield name, command


ALL_COMMANDS = list(all_commands())


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS, ids=[name for name, _ in ALL_COMMANDS])
def test_every_command_shows_an_example_that_names_it(name: str, command: click.Command) -> None:
    assert command.help is not None
    _, _, examples = command.help.partition("Example")
    assert f"aegis {name}" in examples


@pytest.mark.parametrize("name", [name for name, _ in ALL_COMMANDS])
def test_help_is_no_failure(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    assert f"aegis {name}" in capsys.readouterr().out


class TestEnds:
    def test_an_error_is_a_sentence(
        self, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["topic", "delete", "none", "--yes"]) == 1
        printed = capsys.readouterr()
        assert printed.err == "aegis: there is no topic none\n"
        assert printed.out == ""

    def test_where_it_arose_is_shown_on_wish(
        self,
        engine: FakeEngine,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("AEGIS_DEBUG", "1")
        assert run(["topic", "delete", "none", "--yes"]) == 1
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            ["topic", "create"],
            ["topic", "create", "x", "--partitions", "0"],
            ["topic", "create", "x", "--retention", "7 parsecs"],
            ["publish", "x", "--format", "xml"],
            ["publish", "x", "--format", "lines", "--key", "k"],
            ["consume", "x", "--from", "yesterday"],
            ["consume", "x", "--timeout", "30"],
            ["completion", "tcsh"],
            ["cluster", "up", "--nodes", "0"],
            ["node", "run"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage(
        self, flights: FakeEngine, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(arguments) == 2
        assert capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "says"),
        [
            (KeyboardInterrupt(), 130, ""),
            (Unavailable("no node answers"), 1, "aegis: no node answers\n"),
            (ZeroDivisionError("x"), 1, "aegis: internal error (ZeroDivisionError): x\n"),
            (InvariantBroken("x"), 1, "aegis: internal error (InvariantBroken): x\n"),
            (
                PermissionError(13, "Permission denied", "/data/identity"),
                1,
                "aegis: /data/identity cannot be used: Permission denied. Change who may use it, or"
                " run this as the user that owns it.\n",
            ),
            (
                OSError(28, "No space left on device", "/data"),
                1,
                "aegis: /data cannot be used: No space left on device. Make room on that disk.\n",
            ),
            (
                ConnectionResetError(104, "Connection reset by peer"),
                1,
                "aegis: A file or a connection failed: Connection reset by peer.\n",
            ),
        ],
        ids=["ctrl-c", "refused", "bug", "invariant", "permission", "full", "reset"],
    )
    def test_exit_codes(
        self,
        engine: FakeEngine,
        error: BaseException,
        code: int,
        says: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        async def fail() -> None:
            raise error

        monkeypatch.setattr(engine, "list_topics", fail)
        assert run(["topic", "list"]) == code
        assert capsys.readouterr().err.lstrip("\n") == says

    def test_without_a_cluster_it_says_where_one_could_be(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("AEGIS_BOOTSTRAP", raising=False)
        assert run(["topic", "list"]) == 2
        assert "or name the cluster's address with --bootstrap" in capsys.readouterr().err


class TestTopics:
    def test_create_list_delete(
        self, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        create = ["topic", "create", "flights", "--partitions", "6", "--replication-factor", "3"]
        assert run(create) == 0
        assert engine.configs["flights"].partitions == 6
        assert engine.configs["flights"].replication_factor == 3
        assert run(create) == 1
        assert run([*create, "--if-not-exists"]) == 0
        capsys.readouterr()
        assert run(["topic", "list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == ["flights"]
        assert run(["topic", "delete", "flights"]) == 0
        assert run(["topic", "list"]) == 0
        assert capsys.readouterr().out == "deleted flights\n"

    def test_alter(self, flights: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
        wanted = ["--retention", "1d", "--partitions", "12"]
        assert run(["topic", "alter", "flights", *wanted]) == 0
        assert capsys.readouterr().out == "altered flights\n"
        assert flights.configs["flights"] == TopicConfig(retention="1d", partitions=12)
        assert run(["topic", "alter", "none", *wanted]) == 1
        assert run(["topic", "alter", "flights"]) == 2
        assert "--retention 1d" in capsys.readouterr().err
        assert run(["topic", "alter", "flights", "--retention", "soon"]) == 2

    def test_describe(
        self,
        flights: FakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        asked = []

        def probe(bootstrap: str, timeout: float) -> dict[str, Any]:
            asked.append((bootstrap, timeout))
            return status("flights", "orders")

        monkeypatch.setattr(topic_commands, "cluster_status", probe)
        flights.topics |= {"orders": [[], []], "new": [[]]}
        where = ["--bootstrap", "tcp://127.0.0.1:7101"]
        assert run(["topic", "describe", "orders", "--json", "--timeout", "2s", *where]) == 0
        assert json.loads(capsys.readouterr().out) == status("orders")["topics"][0]
        assert asked == [("tcp://127.0.0.1:7101", 2.0)]
        assert run(["topic", "describe", "orders", *where]) == 0
        assert "2 of 3" in capsys.readouterr().out
        assert run(["topic", "describe", "none", *where]) == 1
        assert "no topic none" in capsys.readouterr().err
        assert run(["topic", "describe", "new", *where]) == 1
        assert "not told yet where new is" in capsys.readouterr().err


class TestStatus:
    def test_for_scripts_and_for_people(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("AEGIS_BOOTSTRAP", "tcp://127.0.0.1:7101")
        monkeypatch.setattr(cluster_commands, "cluster_status", lambda *_: status("flights"))
        assert run(["cluster", "status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == status("flights")
        assert run(["cluster", "status"]) == 0
        printed = capsys.readouterr().out
        assert "tcp://127.0.0.1:7301" in printed
        assert "42" in printed


class TestPublish:
    def test_a_csv_file_with_keys(
        self, flights: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "f.csv.gz"
        file.write_bytes(gzip.compress(b"tail,dep\nN1,517\nNA,533\n,542\nN2,\n"))
        options = ["--key", "tail", "--no-key-value", "NA", "--json"]
        assert run(["publish", "flights", "--file", str(file), *options]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["records"] == 4
        assert result["partitions"] == {"0": 4}
        assert [(m.key, m.payload) for m in flights.messages("flights")] == [
            ("N1", {"tail": "N1", "dep": "517"}),
            (None, {"tail": "NA", "dep": "533"}),
            (None, {"tail": "", "dep": "542"}),
            ("N2", {"tail": "N2", "dep": ""}),
        ]

    def test_nothing_for_a_topic_that_is_not_there_is_a_failure(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.txt").write_text("")
        assert run(["publish", "nowhere", "--file", "empty.txt"]) == 1
        assert "there is no topic nowhere" in capsys.readouterr().err

    def test_nothing_for_a_topic_that_is_there(
        self, flights: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.csv").write_text("")
        assert run(["publish", "flights", "--file", "empty.csv"]) == 0
        assert "published 0 records to flights" in capsys.readouterr().out

    def test_json_lines_and_plain_lines(self, flights: FakeEngine, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"id": 1}\n[2]\n')
        (tmp_path / "b.txt").write_text("three\n")
        assert run(["publish", "flights", "--file", "a.jsonl"]) == 0
        assert run(["publish", "flights", "--file", "b.txt"]) == 0
        assert [m.payload for m in flights.messages("flights")] == [{"id": 1}, [2], "three"]

    def test_a_large_file_goes_in_bounded_chunks(self, flights: FakeEngine, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("".join(f"{n}\n" for n in range(10_000)))
        assert run(["publish", "flights", "--file", "a.txt"]) == 0
        assert sum(flights.chunks) == 10_000
        assert max(flights.chunks) <= 2_000
        assert [m.payload for m in flights.messages("flights")] == [
            str(number) for number in range(10_000)
        ]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("a,b\n1,2\n3\n", "line 3: has 1 fields, the header has 2"),
            ("a,b\n1,2\n3,4\n", "line 2: has no field 'k' for the key; its fields: a, b"),
        ],
    )
    def test_what_does_not_read_is_told_with_what_was_published(
        self,
        flights: FakeEngine,
        tmp_path: Path,
        content: str,
        says: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "a.csv").write_text(content)
        key = ["--key", "k"] if "'k'" in says else []
        assert run(["publish", "flights", "--file", "a.csv", *key]) == 1
        published = len(flights.messages("flights"))
        printed = capsys.readouterr().err
        assert printed == f"aegis: a.csv: {says}; {published} records were published before\n"

    @pytest.mark.parametrize(
        ("failure", "says"),
        [
            (TopicNotFound("it is gone"), "0 records were published before, none from line 1 on"),
            (OutcomeUnknown("silence"), "0 records were published before; of lines 1 to 3 it is"),
            (
                PartlyPublished("only a part", failed=[0], unknown=[1, 2]),
                "1 not published (lines 1); 2 may or may not have been published (lines 2, 3)",
            ),
            (KeyboardInterrupt(), "stopped; 0 records were published before; of lines 1 to 3"),
        ],
        ids=["refused", "unknown", "partly", "ctrl-c"],
    )
    def test_after_a_failure_every_line_is_accounted_for(
        self,
        flights: FakeEngine,
        tmp_path: Path,
        failure: BaseException,
        says: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(publish, "RowFeed", OneChunk)
        (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
        flights.fail_at, flights.failure = 0, failure
        code = run(["publish", "flights", "--file", "a.txt"])
        assert code == (130 if isinstance(failure, KeyboardInterrupt) else 1)
        assert says in capsys.readouterr().err

    def test_a_missing_file(self, flights: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["publish", "flights", "--file", "none.csv"]) == 1
        assert "none.csv: cannot be opened" in capsys.readouterr().err


class TestConsume:
    @pytest.fixture
    def filled(self, flights: FakeEngine) -> FakeEngine:
        messages = [
            Message("a", {"n": 1}, {"source": "web"}),
            Message("b", "text"),
            Message("a", b"\x00"),
            Message(None, None),
        ]
        asyncio.run(flights.publish_many("flights", messages))
        return flights

    def test_json_has_all_fields(
        self, filled: FakeEngine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--from", "earliest", "--to-end", "--format", "json"]
        assert run(["consume", "flights", *arguments]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        time = "2026-01-31T12:00:00.000Z"
        assert {"topic": "flights", "partition": 1, "offset": 0, "key": "a", "payload": {"n": 1},
                "headers": {"source": "web"}, "timestamp": time} in lines  # fmt: skip
        assert {"base64": "AA=="} in [line["payload"] for line in lines]
        assert len(lines) == 4

    def test_text(self, filled: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["consume", "flights", "--from", "earliest", "--to-end"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert "0/0\tb\ttext" in printed
        assert '1/0\ta\t{"n": 1}' in printed
        assert "0/1\t-\tnull" in printed

    @pytest.mark.parametrize(
        ("arguments", "count"),
        [
            (["--from", "earliest", "--count", "3"], 3),
            (["--from", "earliest", "--count", "9", "--to-end"], 4),
            (["--from", "1", "--to-end"], 2),
            (["--from", "7", "--to-end"], 0),
            (["--to-end"], 0),
            (["--from", "2026-01-31T12:00:00Z", "--to-end"], 4),
            (["--from", "2026-01-31T12:00:00", "--to-end"], 4),
            (["--from", "2026-01-31T12:00:01Z", "--to-end"], 0),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
    )
    def test_where_to_start_and_end(
        self,
        filled: FakeEngine,
        arguments: list[str],
        count: int,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(["consume", "flights", *arguments]) == 0
        assert len(capsys.readouterr().out.splitlines()) == count

    def test_a_reader_that_has_had_enough_is_no_failure(
        self, filled: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def closed(_message: object) -> str:
            raise BrokenPipeError

        monkeypatch.setattr(consume, "as_text", closed)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        assert run(["consume", "flights", "--from", "earliest", "--to-end"]) == 0


class TestAddress:
    def test_option_then_environment_then_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_nodes(tmp_path, Wanted(nodes=2))
        assert connection.cluster_address(None) == "tcp://127.0.0.1:7101,tcp://127.0.0.1:7201"
        assert connection.cluster_address("tcp://127.0.0.1:9101") == "tcp://127.0.0.1:9101"
