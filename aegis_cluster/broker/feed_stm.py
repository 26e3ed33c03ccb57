"""Where the source of a change feed stands, folded over the feed's own frames.

The idea: a connector copies changes of a database into a feed, and each of its frames says in its
annotation up to where in the source it reaches. The leader refuses a frame whose *position* is not
above the one folded so far, whoever sends it; so a connector that dies and begins again before
what it had already sent neither loses a change nor writes one twice. A connector begins with a
*fence*: a frame without records that carries its epoch, after which everything of an older one is
refused. As with producers (`producer_stm`), the leader decides on what is committed plus what it
has appended ahead, and an answer that rests on the latter waits for its commit.

The rule it protects: positions in one partition of a feed only rise, and only the newest holder of
the fence moves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster.errors import CorruptLog, FeedFenced, Refused, StalePosition, invariant
from aegis_cluster.ids import LogIndex

if TYPE_CHECKING:
    from collections.abc import Iterator

FEED_KEY: Final = "feed"
"""The key of a feed's values in an annotation, where other folds may have their own."""


_KEY_BYTES: Final = FEED_KEY.encode()


class FeedPoint(NamedTuple):
    """How far one partition of a feed has come.

    epoch, writer: the connector that holds the fence; a later holder has a higher epoch, and the
    writer tells two apart that were given the same one.
    position: two numbers, compared in order; what they count is the source's own business.
    mark: whatever else the source wants to find again, as of the newest frame that had one.
    """

    epoch: int = 0
    writer: str = ""
    position: tuple[int, int] = (0, 0)
    mark: bytes = b""

    def encode(self) -> bytes:
        """As it stands in an annotation, and in a frame of kind POSITION."""
        values = [self.epoch, self.writer, *self.position, self.mark]
        data: bytes = msgpack.packb({FEED_KEY: values})
        return data


class FeedDecision(NamedTuple):
    """What to do with a frame: append it (`error` and `known` absent), refuse it, or answer that
    it is there; the answer may leave once `wait_for` is committed (0: at once)."""

    error: Refused | None = None
    known: bool = False
    wait_for: LogIndex = LogIndex(0)


class FeedTable:
    """One partition's point: `decide…` and `appended` on a leader, `apply` on every replica."""

    def __init__(self) -> None:
        self.committed = FeedPoint()
        self._ahead: tuple[FeedPoint, LogIndex] | None = None

    @property
    def _current(self) -> FeedPoint:
        return self.committed if self._ahead is None else self._ahead[0]

    @property
    def _ahead_index(self) -> LogIndex:
        return LogIndex(0) if self._ahead is None else self._ahead[1]

    def decide_fence(self, epoch: int, writer: str) -> FeedDecision:
        """Judge the fence of a connector that takes over."""
        have = self._current
        if (epoch, writer) == (have.epoch, have.writer):
            return FeedDecision(known=True, wait_for=self._ahead_index)
        if epoch <= have.epoch:
            return FeedDecision(_fenced(have, epoch), wait_for=self._ahead_index)
        return FeedDecision()

    def decide(self, epoch: int, writer: str, position: tuple[int, int]) -> FeedDecision:
        """Judge a frame that moves the feed on to `position`."""
        have = self._current
        if (epoch, writer) != (have.epoch, have.writer):
            return FeedDecision(_fenced(have, epoch), wait_for=self._ahead_index)
        if position <= have.position:
            stale = StalePosition(
                f"The feed is at position {have.position} here; {position} is not above it.",
                have=list(have.position),
                got=list(position),
            )
            return FeedDecision(stale, wait_for=self._ahead_index)
        return FeedDecision()

    def fenced(self, epoch: int, writer: str) -> FeedPoint:
        """The point after a fence."""
        return self._current._replace(epoch=epoch, writer=writer)

    def moved(self, position: tuple[int, int], mark: bytes | None) -> FeedPoint:
        """The point after a frame; mark: None leaves the old one."""
        have = self._current
        return have._replace(position=position, mark=have.mark if mark is None else mark)

    def appended(self, point: FeedPoint, index: LogIndex) -> None:
        """Note a frame that the leader has appended and not committed yet."""
        self._ahead = (point, index)

    def apply(self, data: memoryview | bytes, index: LogIndex) -> None:
        """Fold what a committed frame says; annotations of other folds say nothing here."""
        if _KEY_BYTES not in bytes(data):
            return  # most are of event stores, and these are many
        values = msgpack.unpackb(data).get(FEED_KEY)
        if values is None:
            return
        point = _point_from(values)
        have = self.committed
        rises = point.epoch >= have.epoch and point.position >= have.position
        invariant(rises, "a feed's position fell", at=index, have=have, got=point)
        self.committed = point
        if self._ahead_index <= index:
            self._ahead = None

    def drop_ahead(self) -> None:
        """Forget what is not committed: leadership is lost, or the entries were truncated."""
        self._ahead = None

    def slices(self) -> Iterator[list[Any]]:
        """The committed point; nothing where there never was a fence."""
        point = self.committed
        pieces = [] if point == FeedPoint() else [_values(point)]
        return iter(pieces)

    def add(self, piece: list[Any]) -> None:
        """Take in a piece of a snapshot."""
        self.committed = _point_from(piece)

    def take_over(self, other: FeedTable) -> None:
        """Become what another table is."""
        self.committed, self._ahead = other.committed, None


def _values(point: FeedPoint) -> list[Any]:
    return [point.epoch, point.writer, *point.position, point.mark]


def _point_from(values: Any) -> FeedPoint:
    """Raises `CorruptLog` for what no leader wrote."""
    try:
        epoch, writer, major, minor, mark = values
        if type(mark) is not bytes or type(writer) is not str:
            raise TypeError("a writer is text and a mark is bytes")
        return FeedPoint(int(epoch), writer, (int(major), int(minor)), mark)
    except (TypeError, ValueError) as error:
        raise CorruptLog(f"The position of a feed is malformed: {error}.") from error


def _fenced(have: FeedPoint, epoch: int) -> FeedFenced:
    return FeedFenced(
        f"Another connector holds this feed, with epoch {have.epoch}; one with epoch {epoch} may"
        " not write. Stop, and take it over with a newer epoch if it has to be.",
        have=have.epoch,
        got=epoch,
    )
