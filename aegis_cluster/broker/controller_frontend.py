"""Commands to the metadata log: decide on the table ahead, append, answer once committed.

Runs where this shard leads `__cluster/0`; everywhere else a caller is told who does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.cluster.metadata import encode_command
from aegis_cluster.errors import AegisError, NotLeader, Refused
from aegis_cluster.ids import LogIndex
from aegis_cluster.wire.batch import batch_header, encode_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.broker.metadata_stm import MetadataFold
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.cluster.metadata import Command
    from aegis_cluster.cluster.metadata_table import MetadataTable

    Decide = Callable[[MetadataTable], Command | None]
    Answer = Callable[[Command | AegisError | None, LogIndex], None]


class _Outcome:
    """Answers a caller once the index that its answer rests on is committed."""

    def __init__(
        self, result: Command | AegisError | None, index: LogIndex, *, own: bool, answer: Answer
    ) -> None:
        self._result = result
        self._index = index
        self._own = own
        self._answer = answer

    def committed(self) -> None:
        self._answer(self._result, self._index)

    def lost(self, error: AegisError) -> None:
        if not self._own:
            error = NotLeader("The controller has changed; ask the new one.")
        self._answer(error, self._index)


class ControllerFrontend:
    """One per shard that holds a replica of `__cluster/0`."""

    def __init__(
        self, partition: Partition, fold: MetadataFold, wall_ms: Callable[[], int]
    ) -> None:
        self._partition = partition
        self._fold = fold
        self._wall_ms = wall_ms

    def submit(self, decide: Decide, answer: Answer) -> None:
        """Decide on one request; `answer` gets the command, None for no change, or why not."""
        if not self._partition.serving:
            answer(self._partition.not_leader(), LogIndex(0))
            return
        ahead = self._fold.ahead
        try:
            command = decide(ahead)
        except Refused as refusal:
            self._wait(ahead.index, _Outcome(refusal, ahead.index, own=False, answer=answer))
            return
        if command is None:
            self._wait(ahead.index, _Outcome(None, ahead.index, own=False, answer=answer))
            return
        try:
            index = self._append(command)
        except Refused as refusal:  # leadership is being handed over, or too much is waiting
            answer(refusal, LogIndex(0))
            return
        self._wait(index, _Outcome(command, index, own=True, answer=answer))

    def _append(self, command: Command) -> LogIndex:
        batch = encode_batch([(self._wall_ms(), None, encode_command(command), [])])
        placed = self._partition.append(batch, batch_header(batch))
        self._fold.appended(placed.index, command)
        return placed.index

    def _wait(self, index: LogIndex, outcome: _Outcome) -> None:
        self._partition.wait_for(index, outcome)
