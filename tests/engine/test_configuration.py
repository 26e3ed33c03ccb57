"""`aegis.toml` and the environment are the defaults of an engine; arguments stand above them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aegis_cluster import ProducerConfig, StreamingEngine, TopicConfig
from aegis_cluster.config import StreamingConfig
from aegis_cluster.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FILE = """
[streaming]
default_retention = "2d"
max_message_size = "10KB"
request_timeout = "7s"
[streaming.consumer]
max_poll_records = 3
[streaming.producer]
linger = "9ms"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_gives_the_defaults(directory: Path) -> None:
    (directory / "aegis.toml").write_text(FILE)

    async def work() -> None:
        async with StreamingEngine.open("data") as engine:
            assert engine.request_timeout == 7.0
            await engine.create_topic("t")
            await engine.create_topic("u", TopicConfig(retention="unlimited", max_message_size=99))
            settings = (await engine.describe_topic("t")).settings
            assert (settings.retention_ms, settings.max_message_bytes) == (2 * 86_400_000, 10_240)
            settings = (await engine.describe_topic("u")).settings
            assert (settings.retention_ms, settings.max_message_bytes) == (None, 99)
            await engine.publish_many("t", range(10))
            past = await engine.history("t", 10)
            async with engine.subscribe("t") as subscriber:
                await subscriber.seek(0, past[0].offset)
                assert len(await subscriber.poll()) == 3

    asyncio.run(work())


def test_the_environment_and_arguments_stand_above(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "aegis.toml").write_text(FILE)
    monkeypatch.setenv("AEGIS_STREAMING__REQUEST_TIMEOUT", "8s")
    monkeypatch.setenv("AEGIS_STREAMING__PRODUCER__BATCH_SIZE", "1KB")
    engine = StreamingEngine.connect("tcp://127.0.0.1:1")
    assert engine.request_timeout == 8.0
    assert engine.settings.producer.batch_bytes == 1024
    options = ProducerConfig().options(engine.settings)
    assert (options.batch_bytes, options.bulk_batch_bytes) == (1024, 1024)
    options = ProducerConfig(batch_size="2KB").options(engine.settings)
    assert (options.batch_bytes, options.linger_s) == (2048, 0.009)
    assert StreamingEngine.connect("tcp://127.0.0.1:1", request_timeout=1.5).request_timeout == 1.5
    plain = StreamingEngine.connect("tcp://127.0.0.1:1", config=StreamingConfig())
    assert plain.request_timeout == 30.0


def test_a_mistake_in_the_file_is_told_at_once(directory: Path) -> None:
    (directory / "aegis.toml").write_text("[streaming]\nretention = '1d'\n")
    with pytest.raises(ConfigError, match="is not a setting"):
        StreamingEngine.open("data")
    (directory / "aegis.toml").write_text("[streaming.producer]\nacks = 'all'\n")
    with pytest.raises(ConfigError, match="acks"):
        StreamingEngine.connect("tcp://127.0.0.1:1")


def test_fewer_acks_are_not_idempotent(directory: Path) -> None:
    (directory / "aegis.toml").write_text("[streaming.producer]\nacks = 'leader'\n")
    settings = StreamingEngine.connect("tcp://127.0.0.1:1").settings
    assert not ProducerConfig().options(settings).idempotent
    assert ProducerConfig(acks="quorum").options(settings).idempotent
    for config in (ProducerConfig(idempotent=True), ProducerConfig(acks="none", idempotent=True)):
        with pytest.raises(ConfigError, match="idempotent = True with acks"):
            config.options(settings)


@pytest.mark.parametrize("bootstrap", ["", "127.0.0.1:7101", "udp://127.0.0.1:1", " , "])
def test_what_is_no_list_of_addresses(bootstrap: str) -> None:
    with pytest.raises(ConfigError, match="no list of addresses"):
        StreamingEngine.connect(bootstrap)


@pytest.mark.parametrize(
    "config",
    [
        TopicConfig(retention="soon"),
        TopicConfig(max_message_size="big"),
        TopicConfig(retention_bytes="-1"),
    ],
)
def test_what_no_topic_can_have(config: TopicConfig) -> None:
    with pytest.raises(ConfigError, match="is not a"):
        config.settings()
