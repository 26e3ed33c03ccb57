"""`aegis log inspect | salvage`: a node's files, looked at; and what is left of a damaged replica.

The rule it protects: the files are never changed, not even by mistake: everything is read through
a disk that cannot write, and salvage refuses a directory that a node uses.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import json_option, run_async, timeout_option
from aegis_cluster.cli.log_report import print_report
from aegis_cluster.errors import Corruption
from aegis_cluster.node import log_files
from aegis_cluster.node.log_files import Loss, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster import Message, ReceivedMessage, StreamingEngine

PUBLISH_CHUNK: Final = 1_000

_data_option = click.option(
    "--data",
    "directories",
    metavar="DIRECTORY",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A node's data directory; may be repeated.  [default: those of ./nodes]",
)


@click.group()
def log() -> None:
    """Look into a node's files, and save what can be read of damaged ones."""


@log.command()
@click.argument("what", metavar="PATH|TOPIC/PARTITION")
@_data_option
@click.option("--frames", is_flag=True, help="List every frame.")
@json_option
def inspect(what: str, directories: tuple[Path, ...], frames: bool, as_json: bool) -> None:
    """Show what a node's directory, a partition or a segment holds, and what is wrong with it.

    Everything is read and checked: segments, frames, terms, indexes, offsets, times, checksums, the
    journal and the checkpoints. Nothing is changed. A directory in use can be looked at, but its
    newest end may be a moment old.

    \b
    Examples:
      aegis log inspect ./data/node-1
      aegis log inspect orders/0
      aegis log inspect orders/0 --frames --json
    """
    with _reading():
        reports = [log_files.inspect(one, frames=frames) for one in _find(what, directories)]
    if as_json:
        click.echo(json.dumps(reports[0] if len(reports) == 1 else reports))
        return
    for report in reports:
        print_report(report)


@log.command()
@click.argument("what", metavar="PATH|TOPIC/PARTITION")
@_data_option
@click.option(
    "--output",
    metavar="FILE",
    help='A new file for JSON Lines, one message each; "-" is standard output.  [default: -]',
)
@click.option(
    "--into",
    metavar="WHERE",
    help="Publish to a topic instead: a directory for an embedded engine, or addresses (tcp://…).",
)
@click.option("--topic", metavar="NAME", help="The topic of --into.  [default: as it was called]")
@timeout_option()
@json_option
def salvage(
    what: str,
    directories: tuple[Path, ...],
    output: str | None,
    into: str | None,
    topic: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Save every record of one replica that can still be read, and say what is lost.

    For a partition whose only replica is damaged, or of which no other is left: what other replicas
    have is mended by the cluster itself. The node must be stopped. The files are only read. With
    --into, messages get new offsets, in the same order, and keep their timestamps.

    What was written last may never have been acknowledged; it is saved all the same.

    \b
    Examples:
      aegis log salvage orders/0 --output orders-0.jsonl
      aegis log salvage ./data/node-1/partitions/orders-0-g5 --into ./rescued --topic orders
    """
    if into is not None and output is not None:
        raise click.UsageError(
            "Say where to put the records by --output or by --into, not by both."
        )
    if topic is not None and into is None:
        raise click.UsageError("--topic names the topic of --into; add it, or leave both out.")
    target = _single(what, _find(what, directories))
    tally = _Tally()
    with _reading(), log_files.unused(target.node_dir):
        messages = _messages(target, tally)
        if into is None:
            with _opened(output or "-", target) as file:
                _write(file, messages)
        else:
            name = topic or _replica(target).entry.topic
            run_async(_publish(_engine(into, timeout_ms / 1000), name, messages))
    _tell(tally, target, as_json=as_json, on_stderr=into is None and output in (None, "-"))


def _find(what: str, directories: tuple[Path, ...]) -> list[Target]:
    return log_files.find(what, list(directories))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandFailed(f"{error.filename}: {error.strerror}") from error


def _single(what: str, targets: list[Target]) -> Target:
    """Salvage is for one replica: which of several is worth most is for a person to decide."""
    if len(targets) > 1:
        places = ", ".join(str(target.node_dir) for target in targets)
        raise click.UsageError(
            f"{what} has replicas in {places}; name one of them by --data. (`aegis log inspect"
            f" {what}` shows how well each reads.)"
        )
    if targets[0].replica is None:
        raise click.UsageError(
            f"{what} is not one partition; name its directory or TOPIC/PARTITION."
        )
    return targets[0]


def _replica(target: Target) -> Any:
    return target.replica


# ---- records


@dataclass
class _Tally:
    """What was saved, and what is lost."""

    records: int = 0
    undecodable: int = 0
    first_offset: int | None = None
    last_offset: int | None = None
    losses: list[Loss] = field(default_factory=list)
    bad_batches: list[str] = field(default_factory=list)


def _messages(target: Target, tally: _Tally) -> Iterator[ReceivedMessage]:
    """Every record as a message; what does not decode comes as the bytes that it is."""
    from aegis_cluster.wire.batch import decode_batch

    entry = _replica(target).entry
    for found in log_files.salvage(_replica(target)):
        if isinstance(found, Loss):
            tally.losses.append(found)
            continue
        try:
            records = decode_batch(found.batch)
        except Corruption as error:
            tally.bad_batches.append(f"the batch at index {found.index} does not decode: {error}")
            continue
        for record in records:
            tally.records += 1
            if tally.first_offset is None:
                tally.first_offset = record.offset
            tally.last_offset = record.offset
            yield _message(entry.topic, entry.partition, record, tally)


def _message(topic: str, partition: int, record: Any, tally: _Tally) -> ReceivedMessage:
    from aegis_cluster.message import ReceivedMessage, from_ms, from_record

    try:
        return from_record(topic, partition, record)
    except Corruption:
        tally.undecodable += 1
        return ReceivedMessage(
            key=record.key,
            payload=record.value,
            headers={},
            timestamp=from_ms(record.timestamp_ms),
            topic=topic,
            partition=partition,
            offset=record.offset,
        )


@contextmanager
def _opened(output: str, target: Target) -> Iterator[TextIO]:
    if output == "-":
        yield sys.stdout
        return
    path = Path(output).resolve()
    if target.node_dir is not None and path.is_relative_to(target.node_dir.resolve()):
        raise click.UsageError(
            f"{output} lies in the directory that is to be read; write elsewhere."
        )
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise click.UsageError(f"{output} exists already; name a new file.") from None
    with file:
        yield file


def _write(file: TextIO, messages: Iterator[ReceivedMessage]) -> None:
    from aegis_cluster.cli.consume import as_json

    for message in messages:
        file.write(as_json(message) + "\n")
    file.flush()


def _engine(into: str, timeout: float) -> StreamingEngine:
    from aegis_cluster import StreamingEngine

    if into.startswith("tcp://"):
        return StreamingEngine.connect(into, request_timeout=timeout)
    return StreamingEngine.open(into, request_timeout=timeout)


async def _publish(
    engine: StreamingEngine, topic: str, messages: Iterator[ReceivedMessage]
) -> None:
    """Append to a topic, made where there is none, in the same order."""
    from aegis_cluster import Message

    async with engine:
        await engine.create_topic(topic, exist_ok=True)
        chunk: list[Message] = []
        for found in messages:
            chunk.append(Message(found.key, found.payload, dict(found.headers), found.timestamp))
            if len(chunk) >= PUBLISH_CHUNK:
                await engine.publish_many(topic, chunk)
                chunk = []
        if chunk:
            await engine.publish_many(topic, chunk)


# ---- what is told


def _tell(tally: _Tally, target: Target, *, as_json: bool, on_stderr: bool) -> None:
    entry = _replica(target).entry
    lost = [_lost(loss) for loss in tally.losses] + tally.bad_batches
    if as_json:
        told = {
            "topic": entry.topic,
            "partition": entry.partition,
            "records": tally.records,
            "first_offset": tally.first_offset,
            "last_offset": tally.last_offset,
            "undecodable": tally.undecodable,
            "lost": [loss._asdict() for loss in tally.losses],
            "bad_batches": tally.bad_batches,
        }
        click.echo(json.dumps(told), err=on_stderr)
        return
    name = f"{entry.topic}/{entry.partition}"
    click.echo(f"saved {tally.records:,} records of {name}", err=on_stderr)
    if tally.undecodable:
        click.echo(f"{tally.undecodable:,} of them do not decode and came as bytes", err=on_stderr)
    for sentence in lost or ["nothing is lost of what was written"]:
        click.echo(sentence, err=on_stderr)


def _lost(loss: Loss) -> str:
    frames = f"index {loss.first_index} to {loss.last_index}"
    if loss.start_offset is None and loss.end_offset is None:
        return f"lost: {frames}; how many records, nobody can say"
    if loss.end_offset is None:
        return f"lost: everything from offset {loss.start_offset} on ({frames})"
    if loss.start_offset == loss.end_offset:
        return f"lost: {frames}, no records of users"
    start = "the beginning" if loss.start_offset is None else f"offset {loss.start_offset}"
    return f"lost: {start} to {loss.end_offset - 1} ({frames})"
