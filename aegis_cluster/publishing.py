"""Many messages at once: how inputs become batches, and what becomes of each of them.

The idea: inputs are taken in chunks. A chunk of bare payloads of one kind is packed as columns, in
one pass; anything else goes one message at a time, which is also how the one that is refused is
found. Either way every input keeps its number, so that a failure can be told exactly.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aegis_cluster import arguments
from aegis_cluster.client.producer import RECORD_OVERHEAD_BYTES, Columns
from aegis_cluster.errors import AegisError, Misuse, OutcomeUnknown, PartlyPublished
from aegis_cluster.message import BatchReceipt, Message, Receipt, now_ms, to_row
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.payload import encode_keys, encode_payloads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aegis_cluster.client.producer import Producer as Lanes
    from aegis_cluster.client.producer import Row
    from aegis_cluster.client.stored import Stored, StoredFuture
    from aegis_cluster.wire.descriptions import TopicInfo

_Part: TypeAlias = "tuple[int | None, Sequence[int], Columns]"
"""Partition (None: wherever the next batch goes), numbers of the inputs, and their records."""

CHUNK: Final = 2_500
"""Inputs that are packed without giving others a turn: half a millisecond for small values, and
about what fills one batch."""


@dataclass(slots=True)
class _Run:
    """Inputs that stand next to each other in one batch, from `place` on."""

    numbers: Sequence[int]
    place: int


@dataclass(slots=True)
class Outcomes:
    """What has become of the inputs of one call; `refused` never got into a batch."""

    batches: defaultdict[StoredFuture, list[_Run]] = field(
        default_factory=lambda: defaultdict(list)
    )
    refused: dict[int, AegisError] = field(default_factory=dict)

    async def receipts(self) -> list[BatchReceipt]:
        """Wait for all. Raises the one reason when nothing was stored, else `PartlyPublished`."""
        if self.batches:
            await asyncio.wait(self.batches)
        receipts: list[BatchReceipt] = []
        failed: list[int] = list(self.refused)
        unknown: list[int] = []
        first: BaseException | None = next(iter(self.refused.values()), None)
        for batch, runs in self.batches.items():
            error = batch.exception()
            if error is None:
                receipts.extend(_receipts(batch.result(), runs))
                continue
            first = first or error
            ended = unknown if isinstance(error, OutcomeUnknown) else failed
            for run in runs:
                ended.extend(run.numbers)
        if first is None:
            return receipts
        if not receipts and not unknown and isinstance(first, AegisError):
            raise first
        raise _partly(first, receipts, failed, unknown) from first


class Publication:
    """One call of `publish_many`. partition: where all of it goes; None: by the keys."""

    def __init__(
        self, lanes: Lanes, info: TopicInfo, deadline: float, partition: int | None = None
    ) -> None:
        self._partition = partition
        self.outcomes = Outcomes()
        self._lanes = lanes
        self._info = info
        self._deadline = deadline
        self._at_ms = now_ms()

    async def add(self, messages: Iterable[Any], keys: Iterable[Any] | None) -> None:
        """Put all inputs into batches, which leave meanwhile."""
        hint = "give a list, or anything else to step through; publish() takes one message"
        messages = arguments.many(messages, "messages", hint)
        if keys is not None:
            keys = arguments.many(keys, "keys", "give a list with a key for each message")
        for start, chunk, names in _chunks(messages, keys):
            if not await self._add_columns(start, chunk, names):
                await self._add_each(start, chunk, names)
            await asyncio.sleep(0)  # full batches leave, and answers come in

    # ---- in columns

    async def _add_columns(
        self, start: int, chunk: Sequence[Any], names: Sequence[Any] | None
    ) -> bool:
        """False: they have nothing in common, or one is refused; nothing was added."""
        packed = encode_payloads(chunk)
        if packed is None:
            return False
        values, headers = packed
        if names is None and self._info.settings.compacts:
            return False
        encoded = None if names is None else encode_keys(names)
        if names is not None and encoded is None:
            return False
        columns = Columns(self._at_ms, encoded, values, headers)
        if self._may_be_too_large(columns):
            return False
        for partition, numbers, part in self._parts(start, columns):
            await self._add_part(partition, numbers, part)
        return True

    async def add_encoded(self, columns: Columns) -> None:
        """Put records into batches that are encoded already."""
        if (columns.keys is None and self._info.settings.compacts) or self._may_be_too_large(
            columns
        ):
            await self._add_rows(columns)
        else:
            for partition, numbers, part in self._parts(0, columns):
                await self._add_part(partition, numbers, part)

    def _may_be_too_large(self, columns: Columns) -> bool:
        """The longest key and the largest value need not be of one record."""
        limit = self._info.settings.max_message_bytes + RECORD_OVERHEAD_BYTES
        return columns.largest > limit

    def _parts(self, start: int, columns: Columns) -> list[_Part]:
        """By partition."""
        count = len(self._info.partitions)
        partition = self._partition
        if partition is None and columns.keys is not None and count == 1:
            partition = 0
        if partition is not None or columns.keys is None:
            return [(partition, range(start, start + len(columns.values)), columns)]
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, key in enumerate(columns.keys):
            places[partition_for(key, count)].append(place)
        return [
            (to, [start + place for place in mine], columns.chosen(mine))
            for to, mine in places.items()
        ]

    async def _add_part(
        self, partition: int | None, numbers: Sequence[int], columns: Columns
    ) -> None:
        """partition None: wherever the next batch goes."""
        lanes, info = self._lanes, self._info
        done = 0
        while done < len(numbers):
            to = lanes.choose_partition(info) if partition is None else partition
            added = lanes.try_add_columns(info, to, columns, done, self._deadline)
            if added is None:
                try:
                    await lanes.wait_for_room(self._deadline)
                except AegisError as error:
                    self.outcomes.refused.update(dict.fromkeys(numbers[done:], error))
                    return
                continue
            batch, place, count = added
            self.outcomes.batches[batch].append(_Run(numbers[done : done + count], place))
            done += count
            if lanes.batch_filled and done < len(numbers):
                lanes.batch_filled = False
                await asyncio.sleep(0)  # it leaves

    # ---- one by one

    async def _add_each(
        self, start: int, chunk: Sequence[Any], names: Sequence[Any] | None
    ) -> None:
        for number, message in enumerate(_messages(chunk, names), start):
            try:
                row = to_row(message, self._at_ms)
            except AegisError as error:
                self.outcomes.refused[number] = error  # those before it are under way already
            else:
                await self._add_row(number, row)

    async def _add_rows(self, columns: Columns) -> None:
        for number, row in enumerate(columns.rows()):
            await self._add_row(number, row)

    async def _add_row(self, number: int, row: Row) -> None:
        try:
            partition = self._partition
            if partition is None:
                partition = partition_of(self._lanes, self._info, row[1])
            batch, place = await self._lanes.add(self._info, partition, row, self._deadline)
        except AegisError as error:
            self.outcomes.refused[number] = error
        else:
            self.outcomes.batches[batch].append(_Run((number,), place))


def _chunks(
    messages: Iterable[Any], keys: Iterable[Any] | None
) -> Iterator[tuple[int, Sequence[Any], Sequence[Any] | None]]:
    """(number of the first, inputs, their keys). Raises `Misuse` unless there is a key for each."""
    start = 0
    if keys is None:
        inputs = iter(messages)
        while chunk := list(islice(inputs, CHUNK)):
            yield start, chunk, None
            start += len(chunk)
        return
    values, names = list(messages), list(keys)
    if len(values) != len(names):
        raise Misuse(f"{len(values)} messages came with {len(names)} keys; give one for each.")
    for start in range(0, len(values), CHUNK):
        yield start, values[start : start + CHUNK], names[start : start + CHUNK]


def _messages(chunk: Sequence[Any], names: Sequence[Any] | None) -> Iterator[Message]:
    """Messages from messages or bare payloads, with keys beside them."""
    if names is None:
        return (m if isinstance(m, Message) else Message(payload=m) for m in chunk)
    return (
        replace(m, key=key) if isinstance(m, Message) else Message(key=key, payload=m)
        for m, key in zip(chunk, names, strict=True)
    )


def partition_of(lanes: Lanes, info: TopicInfo, key: bytes | None) -> int:
    """By the key; without one, batch by batch."""
    if key is None:
        return lanes.choose_partition(info)
    return partition_for(key, len(info.partitions))


def partition_in(info: TopicInfo, partition: int | None) -> int | None:
    """A partition that a caller has named. Raises `Misuse` if the topic has none of that number."""
    if partition is None or 0 <= partition < len(info.partitions):
        return partition
    raise Misuse(
        f"{info.name} has partitions 0 to {len(info.partitions) - 1}; {partition} is none of them."
    )


def all_or_partly(results: list[Receipt | BaseException]) -> list[Receipt]:
    """Receipts in the order of the inputs.

    Raises the one reason when none was stored, else `PartlyPublished`.
    """
    errors = {n: result for n, result in enumerate(results) if isinstance(result, BaseException)}
    receipts = [result for result in results if isinstance(result, Receipt)]
    if not errors:
        return receipts
    first = next(iter(errors.values()))
    if not isinstance(first, AegisError):
        raise first
    unknown = [n for n, error in errors.items() if isinstance(error, OutcomeUnknown)]
    failed = [n for n in errors if n not in unknown]
    if not receipts and (not unknown or not failed):
        raise first
    raise _partly(first, receipts, failed, unknown) from first


def _partly(
    first: BaseException, receipts: list[Any], failed: list[int], unknown: list[int]
) -> PartlyPublished:
    return PartlyPublished(
        f"{len(failed)} messages were refused and of {len(unknown)} the outcome is unknown, the"
        f" others were stored. First reason: {first}",
        receipts=receipts,
        failed=sorted(failed),
        unknown=sorted(unknown),
    )


def _receipts(stored: Stored, runs: list[_Run]) -> Iterator[BatchReceipt]:
    """One receipt for each run of neighbours: others may have records between ours."""
    place, count = runs[0].place, 0
    for run in runs:
        if run.place != place + count:
            yield BatchReceipt(stored.partition, stored.offset_at(place), count)
            place, count = run.place, 0
        count += len(run.numbers)
    yield BatchReceipt(stored.partition, stored.offset_at(place), count)
