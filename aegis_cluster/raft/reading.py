"""Read index: prove that this replica still leads, then serve from its own state (thesis §6.4).

The idea: one round of heartbeats proves leadership for all reads that came before it.

The rule it protects: no read is served from a state older than the newest acknowledged write; a
deposed leader gathers no majority, and a new one waits for its own no-op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.raft.core import Role
from aegis_cluster.raft.leading import LeaderChapter
from aegis_cluster.raft.quorum import majority_value

if TYPE_CHECKING:
    from aegis_cluster.ids import LogIndex


class _ReadRound(NamedTuple):
    number: int
    index: LogIndex  # type: ignore[assignment] # hides tuple.index
    contexts: tuple[int, ...]


class ReadChapter(LeaderChapter):
    """Reads that wait for a round to begin, and rounds that wait for a majority."""

    def _init_outbox(self) -> None:
        super()._init_outbox()
        self._reads_waiting: list[int] = []
        self._read_rounds: list[_ReadRound] = []
        self._read_round = 0

    def _start_leading(self) -> None:
        self._read_round = 0
        super()._start_leading()

    def _stop_leading(self) -> None:
        super()._stop_leading()
        for round_ in self._read_rounds:
            self._read_failed.extend(round_.contexts)
        self._read_failed.extend(self._reads_waiting)
        self._read_rounds.clear()
        self._reads_waiting.clear()

    def read_index(self, context: int) -> None:
        """Ask for the index that a strict read has to wait for; raises NotLeader.

        The answer comes in `Effects.read_ready`, or in `read_failed` if leadership is lost.
        """
        if self.role is not Role.LEADER:
            raise self._not_leader()
        self._reads_waiting.append(context)
        self._active()

    def _may_be_quiet(self) -> bool:
        return not self._reads_waiting and not self._read_rounds and super()._may_be_quiet()

    def _before_effects(self) -> None:
        super()._before_effects()
        if self._reads_waiting and self._is_established():
            self._start_read_round()

    def _start_read_round(self) -> None:
        self._read_round += 1
        contexts = tuple(self._reads_waiting)
        self._reads_waiting.clear()
        self._read_rounds.append(_ReadRound(self._read_round, self.commit_index, contexts))
        for progress in self._voter_progress:
            self._say_heartbeat(progress, is_quiet=False)
        self._read_round_heard()  # a single voter needs nobody else

    def _newest_read_round(self) -> int:
        return self._read_round

    def _read_round_heard(self) -> None:
        """Serve every round that a majority of voters has answered."""
        if not self._read_rounds:
            return
        confirmed = self._confirmed_round()
        while self._read_rounds and self._read_rounds[0].number <= confirmed:
            round_ = self._read_rounds.pop(0)
            self._read_ready.extend((context, round_.index) for context in round_.contexts)

    def _confirmed_round(self) -> int:
        answered = [progress.read_round for progress in self._voter_progress]
        if self._is_voter:
            answered.append(self._read_round)
        return majority_value(answered)
