"""Functions that take long, in processes of their own, so that the worker goes on.

The idea: one pool for the whole process, made when it is first needed. A batch is cut into a few
parts for each process; what fails in a part fails for its record only.

The rule it protects: results come back in the order of the records, whoever was quicker.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import ConfigError, Misuse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PARTS: Final = 4
"""Of a batch, for each process: so that a slow part does not keep the others waiting."""
PROCESSES_MAX: Final = 64

Outcome = tuple[Any, Exception | None]


def check_pooled(function: Callable[..., Any], processes: int) -> None:
    """Raises `ConfigError` for what cannot run in another process."""
    if not 1 <= processes <= PROCESSES_MAX:
        raise ConfigError(
            f"processes = {processes}; allowed: 1 to {PROCESSES_MAX}.", key="processes"
        )
    try:
        pickle.dumps(function)
    except Exception as error:
        raise ConfigError(
            f"map(…, processes={processes}): {function!r} cannot be sent to another process"
            f" ({error}); give a function of a module, no lambda.",
            key="processes",
        ) from error


async def mapped(
    function: Callable[[Any], Any], values: Sequence[Any], processes: int
) -> list[Outcome]:
    """(result, None) or (None, what was raised) for each value, in order."""
    if not values:
        return []
    size = -(-len(values) // (processes * PARTS))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    loop = asyncio.get_running_loop()
    pool = _pool(processes)
    work = [loop.run_in_executor(pool, partial(_each, function, part)) for part in parts]
    try:
        done = await asyncio.gather(*work)
    except BrokenProcessPool as error:
        _pool.cache_clear()
        raise Misuse(
            "A process of map(…, processes=…) died while it worked on a record; the others of its"
            " batch are not done either."
        ) from error
    return [outcome for part in done for outcome in part]


def _each(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Outcome]:
    """In the other process."""
    found: list[Outcome] = []
    for value in values:
        try:
            found.append((function(value), None))
        except Exception as error:  # noqa: BLE001 - whatever the user's function raises
            found.append((None, _sendable(error)))
    return found


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - some exceptions cannot be made from their arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@cache
def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
