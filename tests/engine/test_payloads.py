"""What goes in comes out equal, whatever it is: through a producer, the log and a reader."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aegis_cluster import Message, StreamingEngine

if TYPE_CHECKING:
    from pathlib import Path

texts = st.text(st.characters(codec="utf-8"), max_size=40)
numbers = st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False)
json_like = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)
times = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1))  # noqa: DTZ001 - zone below
messages = st.builds(
    Message,
    key=st.none() | texts | st.binary(max_size=40),
    payload=json_like | st.binary(max_size=100),
    headers=st.dictionaries(
        texts.filter(lambda name: name not in ("aegis", "aegis-key")), texts, max_size=3
    ),
    timestamp=times.map(
        lambda time: time.replace(tzinfo=UTC, microsecond=time.microsecond // 1000 * 1000)
    ),
)


def same(one: Any, other: Any) -> bool:
    """Equal and of the same types all the way down (1 == 1.0 == True otherwise)."""
    return bool(one == other) and repr(one) == repr(other)


@pytest.mark.slow
@pytest.mark.timeout(120)  # an engine is opened for every example
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sent=st.lists(messages, min_size=1, max_size=30))
def test_what_goes_in_comes_out_equal(embedded_directory: Path, sent: list[Message]) -> None:
    async def work() -> None:
        async with StreamingEngine.open(embedded_directory, request_timeout=10) as engine:
            await engine.create_topic("payloads", exist_ok=True)
            first = (await engine.offsets("payloads"))[0].high_watermark
            await engine.publish_many("payloads", sent)
            async with engine.subscribe("payloads") as subscriber:
                await subscriber.seek(0, first)
                for message in sent:
                    received = await anext(subscriber)
                    assert same(received.payload, message.payload)
                    assert same(received.key, message.key)
                    assert received.headers == message.headers
                    assert received.timestamp == message.timestamp

    asyncio.run(work())
