"""`aegis log inspect | salvage` on directories that an embedded engine has written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from aegis_cluster import Message, StreamingEngine, TopicConfig
from aegis_cluster.cli.app import run
from aegis_cluster.storage import store
from aegis_cluster.storage.sparse_index import HEADER_BYTES
from aegis_cluster.storage.types import StoreLimits

RECORDS = 60
SEGMENT_BYTES = 4_096


def written(path: Path, *, checkpointed: bool) -> Path:
    """A node's directory with records 0 to RECORDS - 1 in orders/0.

    checkpointed: opened and closed once more, so that the journal holds nothing of it.
    """

    async def write() -> None:
        async with StreamingEngine.open(path) as engine:
            await engine.create_topic("orders", TopicConfig(retention="unlimited"))
            for number in range(RECORDS):
                message = Message(f"key-{number}", {"n": number}, {"source": "web"})
                await engine.publish("orders", message)

    async def again() -> None:
        async with StreamingEngine.open(path):
            pass

    asyncio.run(write())
    if checkpointed:
        asyncio.run(again())
    return path


@pytest.fixture(scope="module")
def originals(module_path: Path) -> dict[bool, Path]:
    with pytest.MonkeyPatch.context() as patch:
        small = StoreLimits(segment_bytes=SEGMENT_BYTES)
        patch.setattr(store, "StoreLimits", lambda: small)
        return {
            flag: written(module_path / f"data-{flag}", checkpointed=flag) for flag in (False, True)
        }


@pytest.fixture
def data(originals: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged, whose journal holds nothing more."""
    monkeypatch.chdir(tmp_path)
    return copy(originals[True], tmp_path / "data")


def copy(source: Path, target: Path) -> Path:
    """All but the empty halves of the journals: they are large."""
    for file in source.rglob("*"):
        to = target / file.relative_to(source)
        if file.is_dir():
            to.mkdir(parents=True, exist_ok=True)
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        to.write_bytes(content[: 1 << 20] if file.name.startswith("journal") else content)
    return target


def partition(data: Path) -> Path:
    (found,) = (data / "partitions").glob("orders-0-g*")
    return found


def segments(data: Path) -> list[Path]:
    return sorted(partition(data).glob("*.log"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def fingerprint(data: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(data.rglob("*"))
        if file.is_file()
    }


class Tool:
    """The commands on one directory, which they must not change."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data = data
        self._capsys = capsys

    def _run(self, *arguments: str, code: int = 0) -> Any:
        before = fingerprint(self.data)
        assert run(["log", *arguments]) == code, self._capsys.readouterr().err
        assert fingerprint(self.data) == before
        return self._capsys.readouterr()

    def inspect(self, *options: str) -> dict[str, Any]:
        printed = self._run("inspect", "orders/0", "--data", str(self.data), "--json", *options)
        (found,) = json.loads(printed.out)["partitions"]
        assert isinstance(found, dict)
        return found

    def salvage(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Messages and what is told of them."""
        printed = self._run("salvage", "orders/0", "--data", str(self.data), "--json")
        return [json.loads(line) for line in printed.out.splitlines()], json.loads(printed.err)

    def refused(self, *arguments: str, code: int = 2) -> str:
        return str(self._run(*arguments, code=code).err)


@pytest.fixture
def tool(data: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(data, capsys)


def assert_right(messages: list[dict[str, Any]]) -> None:
    """Each message is the one that was written at its offset, and they rise."""
    offsets = [message["offset"] for message in messages]
    assert offsets == sorted(set(offsets))
    for message in messages:
        number = message["offset"]
        assert message["payload"] == {"n": number}
        assert message["key"] == f"key-{number}"
        assert message["headers"] == {"source": "web"}
        assert (message["topic"], message["partition"]) == ("orders", 0)


def assert_accounted_for(messages: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """Every offset was saved or is told as lost; none is both."""
    assert_right(messages)
    assert told["records"] == len(messages)
    lost: set[int] = set()
    for loss in told["lost"]:
        start = loss["start_offset"] or 0
        end = RECORDS if loss["end_offset"] is None else loss["end_offset"]
        assert not lost & set(range(start, end))
        lost |= set(range(start, end))
    assert lost | {message["offset"] for message in messages} == set(range(RECORDS))
    assert len(lost) + len(messages) == RECORDS


def test_a_whole_log(tool: Tool) -> None:
    found = tool.inspect("--frames")
    assert found["state"] == "ok"
    assert (found["records"], found["start_offset"], found["end_offset"]) == (RECORDS, 0, RECORDS)
    assert found["problems"] == []
    assert len(found["segments"]) >= 2
    frames = [frame for segment in found["segments"] for frame in segment["frame_list"]]
    assert [frame["index"] for frame in frames] == list(range(1, len(frames) + 1))
    assert [f["base_offset"] for f in frames if f["kind"] == "data"] == list(range(RECORDS))
    assert {segment["index"]["state"] for segment in found["segments"]} == {"ok"}
    assert found["checkpoint"]["durable_offset"] == RECORDS
    messages, told = tool.salvage()
    assert len(messages) == RECORDS
    assert_accounted_for(messages, told)


def test_the_whole_node(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["log", "inspect", str(tool.data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["in_use"] is False
    assert report["identity"]["node"] == 1
    (shard,) = report["shards"]
    assert {slot["state"] for slot in shard["checkpoints"]} == {"ok"}
    assert {journal["file"] for journal in shard["journals"]} == {"journal-a", "journal-b"}
    assert [one["topic"] for one in report["partitions"]] == ["__cluster", "orders"]
    assert run(["log", "inspect", str(tool.data)]) == 0
    printed = capsys.readouterr().out
    for word in ("checkpoint-a", "journal-b", "orders/0  ok", "sparse index ok", "terms 1"):
        assert word in printed
    assert run(["log", "inspect", str(segments(tool.data)[0])]) == 0
    assert "offsets 0 to" in capsys.readouterr().out


def test_a_flipped_byte_costs_one_batch(tool: Tool) -> None:
    file = segments(tool.data)[0]
    flip(file, file.stat().st_size // 2)
    found = tool.inspect()
    assert found["state"] == "damaged"
    (problem,) = found["segments"][0]["problems"]
    assert 0 < problem["bytes"] < 300
    messages, told = tool.salvage()
    assert len(messages) == RECORDS - 1
    assert_accounted_for(messages, told)


def test_a_truncated_segment_costs_what_stood_there(tool: Tool) -> None:
    file = segments(tool.data)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert tool.inspect()["state"] == "damaged"
    messages, told = tool.salvage()
    assert 0 < len(messages) < RECORDS - 1
    assert messages[-1]["offset"] == RECORDS - 1
    assert_accounted_for(messages, told)


def test_a_truncated_end_is_told_by_what_was_durable_once(tool: Tool) -> None:
    file = segments(tool.data)[-1]
    file.write_bytes(file.read_bytes()[:-200])
    assert tool.inspect()["state"] == "damaged"
    messages, told = tool.salvage()
    assert len(messages) < RECORDS
    assert told["lost"][-1]["end_offset"] == RECORDS
    assert_accounted_for(messages, told)


def test_a_missing_segment(tool: Tool) -> None:
    segments(tool.data)[1].unlink()
    found = tool.inspect()
    assert found["state"] == "damaged"
    assert "are missing" in found["problems"][0]
    messages, told = tool.salvage()
    assert_accounted_for(messages, told)


def test_a_damaged_segment_header_costs_no_record(tool: Tool) -> None:
    flip(segments(tool.data)[1], 20)
    assert tool.inspect()["state"] == "damaged"
    messages, told = tool.salvage()
    assert len(messages) == RECORDS
    assert told["lost"] == []


@pytest.mark.parametrize("how", ["wiped", "gone", "flipped"])
def test_a_sparse_index_that_is_gone_costs_nothing(tool: Tool, how: str) -> None:
    file = segments(tool.data)[0].with_suffix(".index")
    if how == "gone":
        file.unlink()
    elif how == "wiped":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        flip(file, HEADER_BYTES + 3)
    found = tool.inspect()
    assert found["state"] == "ok"
    state = found["segments"][0]["index"]["state"]
    assert state == ("missing" if how == "gone" else "damaged")
    messages, told = tool.salvage()
    assert (len(messages), told["lost"]) == (RECORDS, [])


@pytest.mark.parametrize("lost", ["manifest", "shards", "identity"])
def test_files_beside_the_log_that_are_gone(tool: Tool, lost: str) -> None:
    if lost == "manifest":
        for file in (tool.data / "manifest").iterdir():
            flip(file, file.stat().st_size - 1)
    elif lost == "shards":
        for file in (tool.data / "shards" / "0").iterdir():
            file.unlink()
    else:
        (tool.data / "identity").unlink()
    tool.inspect()
    messages, told = tool.salvage()
    assert (len(messages), told["lost"]) == (RECORDS, [])


def test_what_the_journal_holds_is_saved_too(
    originals: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Tool(copy(originals[False], tmp_path / "data"), capsys)
    found = tool.inspect()
    assert found["journal"]["frames"] > 0
    last = segments(tool.data)[-1]
    last.write_bytes(last.read_bytes()[:70])
    assert tool.inspect()["state"] == "mendable"
    messages, told = tool.salvage()
    assert_accounted_for(messages, told)
    assert len(messages) == RECORDS


@pytest.mark.parametrize("seed", range(8))
def test_whatever_rots_every_record_is_saved_or_told_as_lost(tool: Tool, seed: int) -> None:
    rng = random.Random(seed)
    for file in segments(tool.data):
        content = bytearray(file.read_bytes())
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([1, 8, 300])] = rng.randbytes(rng.choice([1, 8, 300]))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        file.write_bytes(content)
    messages, told = tool.salvage()
    assert_accounted_for(messages, told)
    found = tool.inspect("--frames")
    if told["lost"]:
        assert found["state"] == "damaged"


def test_into_a_file_and_into_a_topic(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(segments(tool.data)[0], segments(tool.data)[0].stat().st_size // 2)
    where = str(partition(tool.data))
    assert run(["log", "salvage", where, "--output", "saved.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert f"saved {RECORDS - 1} records of orders/0" in printed
    assert "lost: offset" in printed
    lines = [json.loads(line) for line in Path("saved.jsonl").read_text().splitlines()]
    assert_right(lines)
    assert "exists already" in tool.refused("salvage", where, "--output", "saved.jsonl")
    inside = str(tool.data / "x.jsonl")
    assert "write elsewhere" in tool.refused("salvage", where, "--output", inside)
    assert run(["log", "salvage", where, "--into", "rescued", "--topic", "again"]) == 0
    with_stamps = [(line["key"], line["payload"], line["timestamp"]) for line in lines]

    async def read() -> list[Any]:
        async with StreamingEngine.open(tmp_path / "rescued") as engine:
            return [
                (m.key, m.payload, m.timestamp.isoformat(timespec="milliseconds"))
                for m in await engine.history_after("again", datetime_of_1970())
                if m.timestamp is not None
            ]

    rescued = asyncio.run(read())
    assert [(k, p, t.replace("+00:00", "Z")) for k, p, t in rescued] == with_stamps


def datetime_of_1970() -> Any:
    from aegis_cluster.message import EPOCH

    return EPOCH


def test_a_directory_in_use(tool: Tool) -> None:
    async def work() -> None:
        async with StreamingEngine.open(tool.data):
            found = await asyncio.to_thread(run, ["log", "inspect", str(tool.data), "--json"])
            assert found == 0
            code = await asyncio.to_thread(run, ["log", "salvage", str(partition(tool.data))])
            assert code == 1

    asyncio.run(work())
    printed = tool._capsys.readouterr()
    assert json.loads(printed.out)["in_use"] is True
    assert "in use" in printed.err
    assert "Stop it first" in printed.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nothing/0"], "no ./nodes"),
        (["inspect", "nothing"], "no file or directory nothing"),
        (["inspect", "other/0", "--data", "data"], "No replica of other/0"),
        (["inspect", "data/identity"], "is no segment"),
        (["inspect", "data/manifest"], "neither a node's directory nor"),
        (["salvage", "data"], "not one partition"),
        (["salvage", "orders/0", "--data", "data", "--data", "data"], "name one of them by --data"),
        (["salvage", "orders/0", "--data", "data", "--topic", "t"], "--into"),
        (["salvage", "orders/0", "--data", "data", "--into", "x", "--output", "y"], "not by both"),
    ],
)
def test_wrong_usage(tool: Tool, arguments: list[str], says: str) -> None:
    assert says in " ".join(tool.refused(*arguments).split())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tool: Tool) -> None:
    segments(tool.data)[0].chmod(0)
    assert "Permission denied" in tool.refused("inspect", "orders/0", "--data", "data", code=1)


def test_a_stranger_to_the_log_is_named(tool: Tool) -> None:
    """A segment of another log in this one's place proves nothing and is not handed out."""
    (other,) = (tool.data / "partitions").glob("__cluster-0-g*")
    segments(tool.data)[0].write_bytes(next(other.glob("*.log")).read_bytes())
    found = tool.inspect()
    assert found["state"] == "damaged"
    messages, told = tool.salvage()
    assert_accounted_for(messages, told)
