"""Reports on a node's files as text for people; scripts take `--json`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.console import Console

_BAD = {"damaged": "red", "torn tail": "yellow", "mendable": "yellow"}


def print_report(report: dict[str, Any]) -> None:
    """Print what `log_files.inspect` gives."""
    console = Console(soft_wrap=True)
    if "segment" in report:
        _segments(console, [report["segment"]])
        return
    if "directory" in report:
        used = " (in use: the newest end may be a moment old)" if report["in_use"] else ""
        _line(console, f"{report['directory']}{used}")
    if report.get("identity"):
        who = report["identity"]
        text = f"cluster {who['cluster_id']}, node {who['node']}, incarnation {who['incarnation']}"
        _line(console, text)
    for problem in report.get("problems", []):
        _line(console, problem, style="red")
    for shard in report.get("shards", []):
        _shard(console, shard)
    for partition in report["partitions"]:
        _partition(console, partition)


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False)


def _shard(console: Console, shard: dict[str, Any]) -> None:
    _line(console, f"\nshard {shard['shard']}", style="bold")
    for slot in shard["checkpoints"]:
        told = ", ".join(f"{name} {slot[name]}" for name in _SLOT if name in slot)
        _line(console, f"  {slot['file']}: {slot['state']}  {told}", _BAD.get(slot["state"]))
    for journal in shard["journals"]:
        told = f"generation {journal['generation']}, rounds {journal['first_round']} to"
        told += f" {journal['last_round']}, {journal['rounds_to_replay']} to replay"
        bad = journal["unreadable_rounds"]
        _line(console, f"  {journal['file']}: {told}" + (f", {bad} unreadable" if bad else ""))
    for problem in shard["problems"]:
        _line(console, f"  {problem}", style="red")


_SLOT = ("sequence", "generation", "round", "groups", "reason")


def _partition(console: Console, report: dict[str, Any]) -> None:
    name = f"{report['topic']}/{report['partition']}"
    _line(console, f"\n{name}  {report['state']}", _BAD.get(report["state"], "bold"))
    _line(console, f"  {report['directory']}")
    offsets = f"offsets {_shown(report['start_offset'])} to {_shown(report['end_offset'])}"
    indexes = f"index {_shown(report['first_index'])} to {_shown(report['last_index'])}"
    durable = f"synced up to index {report['durable_index']}"
    _line(console, f"  {report['records']} records, {offsets}; {indexes}, {durable}")
    journal = report["journal"]
    if journal["frames"]:
        span = f"index {journal['first_index']} to {journal['last_index']}"
        _line(console, f"  the journal holds {journal['frames']} frames more or again: {span}")
    if report["snapshot"]:
        _line(console, f"  snapshot at index {report['snapshot']['index']}")
    for problem in report["problems"]:
        _line(console, f"  {problem}", style="red")
    _segments(console, report["segments"])


def _segments(console: Console, segments: list[dict[str, Any]]) -> None:
    for one in segments:
        index = f"index {_shown(one['first_index'])} to {_shown(one['last_index'])}"
        offsets = f"offsets {_shown(one['base_offset'])} to {_shown(one['end_offset'])}"
        terms = "terms " + (" ".join(map(str, one["terms"])) or "-")
        counts = f"{one['bytes']} bytes, {one['frames']} frames, {one['records']} records"
        if one.get("compactions"):
            counts += f", {one['rewritten']} of them compacted"
        times = f"{_time(one['first_time_ms'])} to {_time(one['last_time_ms'])}"
        sparse = f"sparse index {one['index']['state']} ({one['index']['entries']} entries)"
        _line(console, f"  {one['file']}: {counts}; {index}, {offsets}, {terms}; {times}; {sparse}")
    for one in segments:
        for problem in one["problems"]:
            place = f"  {one['file']}, byte {problem['position']}, {problem['bytes']} bytes"
            _line(console, f"{place}: {problem['reason']}", style="red")
        if one["leftover_bytes"]:
            text = f"{one['leftover_bytes']} bytes from before a truncation follow the end"
            _line(console, f"  {one['file']}: {text}")
        for frame in one.get("frame_list", []):
            _line(console, "    " + "  ".join(f"{name}={value}" for name, value in frame.items()))


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def _time(time_ms: int | None) -> str:
    if time_ms is None:
        return "-"
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
