"""What `await processor.start()` returns: a processor at work in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aegis_cluster.stream.questions import Question

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from aegis_cluster.stream.changelog import Progress
    from aegis_cluster.stream.worker import Worker, WorkerStats


class Running:
    """A processor at work, until `stop`; also an async context manager, which stops at its end."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Commit what is done, give the partitions back, and end.

        Raises what the processor had stopped at by itself, such as `ProcessingFailed`.
        """
        await self._worker.stop()

    async def wait(self) -> None:
        """Until it has ended, by `stop` or by itself. Raises what it stopped at."""
        await self._worker.wait()

    async def pause(self) -> None:
        """Read nothing more until `resume`; what is read is committed. It stays in its group."""
        await self._worker.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._worker.resume()

    async def query(
        self, key: Any, step: str | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """What the steps that keep state have for a key, by step: a table's value, an aggregate so
        far, the results so far of open windows by their start in milliseconds.

        step: only this one's. All processes of the application are asked. Nothing of it is
        committed yet for sure. Raises `RequestTimeout`, which names tasks that did not answer.
        """
        found: dict[str, Any] = {}
        for part in await self._worker.ask(Question("key", [key], step), timeout):
            found |= part
        return found

    async def range(
        self,
        low: Any = None,
        high: Any = None,
        step: str | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, dict[Any, Any]]:
        """What tables and aggregates without windows have for all keys from `low` to `high`, both
        included, in order, by step; None: without an end. It looks at every key. Else as `query`.
        """
        found: dict[str, list[Any]] = {}
        for part in await self._worker.ask(Question("range", [low, high], step), timeout):
            for name, rows in part.items():
                found.setdefault(name, []).extend(rows)
        return {name: dict(sorted(rows)) for name, rows in found.items()}

    @property
    def standbys(self) -> tuple[str, ...]:
        """Tasks of other processes whose state is copied here (`standby_replicas`)."""
        return self._worker.copies

    @property
    def stats(self) -> WorkerStats:
        """Numbers of this process."""
        return self._worker.stats()

    @property
    def restoring(self) -> Mapping[str, Progress]:
        """Tasks whose state is being rebuilt from its changelog, and how far that is."""
        return dict(self._worker.restoring)
