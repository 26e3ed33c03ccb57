"""`aegis publish`: the rows of a file, or of standard input, become messages of a topic.

The rule it protects: whoever reads the last line knows what is in the topic. Rows go in their
order, one chunk after the other; when anything fails, the sentence says how many were published
and which lines, if any, may or may not have been.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from aegis_cluster.cli.app import CommandFailed
from aegis_cluster.cli.connection import (
    bootstrap_option,
    connect,
    json_option,
    run_async,
    timeout_option,
)
from aegis_cluster.cli.feed import RowFeed
from aegis_cluster.cli.records import (
    FORMATS,
    STANDARD_INPUT,
    BadInput,
    KeyField,
    Row,
    Source,
    format_of,
    open_source,
    read_rows,
)
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    PartlyPublished,
    Refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster import StreamingEngine

LINES_SHOWN: Final = 5


class Tally:
    """What has been published so far, and of which lines that is not known."""

    def __init__(self) -> None:
        self.published = 0
        self.partitions: dict[int, int] = {}
        self._started = time.monotonic()
        self._sending: list[Row] = []

    def sending(self, rows: list[Row]) -> None:
        """These rows are on their way: until they are counted, nobody knows."""
        self._sending = rows

    def count(self, receipts: list[Any]) -> None:
        """The rows on their way arrived, or those of them did that the receipts are for."""
        for receipt in receipts:
            self.published += receipt.count
            had = self.partitions.get(receipt.partition, 0)
            self.partitions[receipt.partition] = had + receipt.count
        self._sending = []

    @property
    def seconds(self) -> float:
        """Since the first moment."""
        return max(time.monotonic() - self._started, 1e-9)

    def summary(self, topic: str) -> str:
        """One sentence for a person."""
        rate = self.published / self.seconds
        return (
            f"published {self.published:,} records to {topic} in {self.seconds:.1f} s "
            f"({rate:,.0f} records/s)"
        )

    def after_failure(self, error: BaseException) -> str:
        """What is known of every line when this error ended the work."""
        done = f"{self.published:,} records were published before"
        if isinstance(error, PartlyPublished):
            parts = [
                _lines_of(self._sending, error.failed, "not published"),
                _lines_of(self._sending, error.unknown, "may or may not have been published"),
            ]
            self.count(error.receipts)
            known = "; ".join(part for part in parts if part)
            return f"{self.published:,} records were published; {known}"
        if not self._sending:
            return done
        first, last = self._sending[0].line, self._sending[-1].line
        if isinstance(error, Refused):
            return f"{done}, none from line {first} on"
        return f"{done}; of lines {first} to {last} it is not known"


def _lines_of(rows: list[Row], positions: list[int], what: str) -> str:
    if not positions:
        return ""
    lines = [str(rows[position].line) for position in positions if position < len(rows)]
    shown = ", ".join(lines[:LINES_SHOWN]) + (" and more" if len(lines) > LINES_SHOWN else "")
    return f"{len(positions):,} {what} (lines {shown})"


@click.command()
@click.argument("topic")
@click.option("--file", "file", default=STANDARD_INPUT, help='A file; "-" is standard input.')
@click.option("--key", "key", metavar="FIELD", help="The field whose value is the record's key.")
@click.option(
    "--no-key-value",
    "none_values",
    metavar="TEXT",
    multiple=True,
    help='A value of that field that means "no key", as an empty one does; may be repeated.',
)
@click.option(
    "--format",
    "kind",
    type=click.Choice([*FORMATS, "auto"]),
    default="auto",
    show_default=True,
    help="auto: by the file's name (.csv, .jsonl), else lines.",
)
@bootstrap_option
@timeout_option()
@json_option
def publish(
    topic: str,
    file: str,
    key: str | None,
    none_values: tuple[str, ...],
    kind: str,
    bootstrap: str | None,
    timeout_ms: int,
    as_json: bool,
) -> None:
    """Publish the rows of a file, or of standard input, to TOPIC.

    CSV (with a header; each row becomes a JSON object, its values stay text), JSON Lines (one value
    a line) or plain lines (each a text); also gzipped. --timeout is for each chunk of rows.

    \b
    Examples:
      aegis publish flights --file flights.csv.gz --key tailnum --no-key-value NA
      tail -f app.log | aegis publish logs
    """
    kind = format_of(file) if kind == "auto" else kind
    if key is not None and kind == "lines":
        raise click.UsageError("--key needs fields: plain lines have none (see --format)")
    tally = Tally()
    try:
        with open_source(file) as source, progress_of(source, quiet=as_json) as advance:
            keys = KeyField(key, none_values)
            rows = read_rows(source, kind)
            engine = connect(bootstrap, timeout_ms / 1000)
            run_async(_publish(engine, topic, rows, keys, tally, advance))
    except ConfigError:
        raise  # nothing was begun
    except BadInput as error:
        raise CommandFailed(f"{file}: {error}; {tally.after_failure(error)}") from error
    except AegisError as error:
        raise CommandFailed(f"{error} ({tally.after_failure(error)})") from error
    except KeyboardInterrupt as error:
        click.echo(f"aegis: stopped; {tally.after_failure(error)}", err=True)
        raise
    if as_json:
        result = {
            "topic": topic,
            "records": tally.published,
            "seconds": round(tally.seconds, 3),
            "partitions": {str(n): count for n, count in sorted(tally.partitions.items())},
        }
        click.echo(json.dumps(result))
    else:
        click.echo(tally.summary(topic))


async def _publish(
    engine: StreamingEngine,
    topic: str,
    rows: Iterator[Row],
    keys: KeyField,
    tally: Tally,
    advance: Callable[[], None],
) -> None:
    from aegis_cluster import Message

    async with engine:
        await engine.describe_topic(topic)  # also with nothing to publish, it has to be there
        async for chunk in RowFeed(rows).chunks():
            messages = [Message(key=keys.of(row), payload=row.value) for row in chunk]
            tally.sending(chunk)
            tally.count(await engine.publish_many(topic, messages))
            advance()


@contextmanager
def progress_of(source: Source, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, by bytes of the file; nothing elsewhere."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(source.name, total=source.size)
        yield lambda: progress.update(task, completed=source.position)
