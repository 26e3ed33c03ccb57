"""Many wait for a batch: each hears of its outcome, and one who gives up disturbs nobody."""

from __future__ import annotations

import asyncio

import pytest

from aegis_cluster.client.stored import Stored, StoredFuture
from aegis_cluster.errors import OutcomeUnknown

OUTCOME = Stored(partition=0, base_offset=7, count=2, time_ms=1)


def test_all_hear_of_it_and_those_who_come_later() -> None:
    async def main() -> None:
        batch = StoredFuture(asyncio.get_running_loop())
        waiters = [batch.waiter(), batch.waiter()]
        batch.set_result(OUTCOME)
        assert await asyncio.gather(*waiters, batch, batch.waiter()) == [OUTCOME] * 4

    asyncio.run(main())


def test_one_who_is_cancelled_cancels_nobody_else() -> None:
    async def main() -> None:
        batch = StoredFuture(asyncio.get_running_loop())

        async def wait() -> Stored:
            return await batch.waiter()

        given_up, patient = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert not batch.done()
        batch.set_result(OUTCOME)
        assert await patient is OUTCOME

    asyncio.run(main())


def test_all_hear_why_there_is_none() -> None:
    async def main() -> None:
        batch = StoredFuture(asyncio.get_running_loop())
        waiter = batch.waiter()
        batch.set_exception(OutcomeUnknown("nobody answered"))
        for one in (waiter, batch, batch.waiter()):
            with pytest.raises(OutcomeUnknown, match="nobody answered"):
                await one

    asyncio.run(main())
