"""Members of a consumer group that share the queue: each comes, handles for a while, and goes.

The idea: what a member has handled is written down before it is acknowledged, so a committed
position never stands above what the history knows to be handled. Whoever takes a partition over
begins at that position; if it begins later, something was jumped over, and nobody ever gets it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import AegisError, OutcomeUnknown, Refused
from aegis_cluster.message import Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from chaos.processes.workloads import FINISH_S, PAUSE_S, POLL_S, Client, Subscribed

if TYPE_CHECKING:
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.message import ReceivedMessage
    from aegis_cluster.subscriber import Subscriber

GROUP: Final = "workers"
SESSION: Final = "3s"
LIFE_S: Final = (3.0, 9.0)
"""A member leaves the group after so long, for others to take over."""


async def share(client: Client) -> None:
    """One member after another; after healing, until the group has handled everything."""
    engine = await client.engine()
    config = SubscribeConfig(group_id=GROUP, start=Offset.EARLIEST, session_timeout=SESSION)
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    while deadline is None or loop.time() < deadline:
        member = client.member_name()
        until = loop.time() + client.rng.uniform(*LIFE_S)
        async with Subscribed(engine, config) as subscriber:
            while loop.time() < until and not (
                client.ends.done() and await is_done(client, engine, GROUP)
            ):
                await _handle_some(client, subscriber, member)
        if client.ends.done():
            deadline = deadline or loop.time() + FINISH_S
            if await is_done(client, engine, GROUP):
                break
    await engine.close()


async def _handle_some(client: Client, subscriber: Subscriber, member: str) -> None:
    try:
        messages: list[ReceivedMessage] = await subscriber.poll(timeout=POLL_S)
    except (Refused, OutcomeUnknown):
        await asyncio.sleep(PAUSE_S)
        return
    if not messages:
        return
    places = [(found.partition, found.offset) for found in messages]
    client.recorder.note("handled", member=member, places=places)
    for message in messages:
        await message.ack()


async def is_done(client: Client, engine: StreamingEngine, group: str) -> bool:
    """Whether a group's committed positions have reached the ends."""
    try:
        positions = await engine.group(group).positions(timeout=POLL_S)
    except AegisError:
        return False
    ends = client.ends.result()
    reached = {place.partition: offset for place, offset in positions.items()}
    return all(reached.get(partition, 0) >= end for partition, end in ends.items())
