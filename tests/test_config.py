"""Settings: what is read, and what the sentence says when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from aegis_cluster import config, limits
from aegis_cluster.config import (
    NodeAddress,
    load_node_config,
    load_streaming_config,
    parse_duration,
    parse_size,
)
from aegis_cluster.errors import ConfigError

AEGIS_TOML = """
[streaming]
max_message_size = "1MB"
default_retention = "7d"

[streaming.consumer]
max_poll_records = 500
auto_commit = false
session_timeout = "30s"

[streaming.cdc]
enabled = true
buffer_size = 10000
"""

NODE_TOML = """
[node]
name = "node-1"
host = "127.0.0.1"
base_port = 7100
data = "../data/node-1"
shards = 1
peers = ["127.0.0.1:7100", "127.0.0.1:7200", "127.0.0.1:7300"]
durability = "fsync"        # or "memory"
insecure = false            # true: bind beyond loopback without keys
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1MB", 1024 * 1024),
        ("1MiB", 1024 * 1024),
        ("256KB", 256 * 1024),
        ("2 gb", 2 * 1024**3),
        ("1.5k", 1536),
        ("17", 17),
        ("17B", 17),
        (42, 42),
        (0, 0),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5ms", 5),
        ("30s", 30_000),
        ("0.5s", 500),
        ("10m", 600_000),
        ("12h", 43_200_000),
        ("7d", 604_800_000),
        ("1w", 604_800_000),
    ],
)
def test_durations(text: str, expected: int) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    "value", ["", "MB", "-1MB", "1XB", "1e3", "0.1B", "1 000", True, 1.5, None, -1, [], "9" * 40]
)
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(value)


@pytest.mark.parametrize("value", ["", "30", 30, "0.5ms", "-1s", "s", "1 year", True, None])
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(value)


def test_the_default_message_size_is_what_one_megabyte_says() -> None:
    assert parse_size("1MB") == limits.MESSAGE_BYTES_DEFAULT


class TestStreaming:
    def write(self, tmp_path: Path, content: str) -> Path:
        file = tmp_path / "aegis.toml"
        file.write_text(content, encoding="utf-8")
        return file

    def test_defaults_need_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        settings = load_streaming_config(environ={})
        assert settings == config.StreamingConfig()
        assert settings.consumer.max_poll_records == 500

    def test_the_sample_says_the_defaults(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, AEGIS_TOML)
        assert load_streaming_config(file, environ={}) == config.StreamingConfig()

    def test_a_file_in_the_working_directory_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path, '[streaming]\ndefault_retention = "unlimited"\n')
        monkeypatch.chdir(tmp_path)
        assert load_streaming_config(environ={}).default_retention_ms is None

    def test_environment_over_file_and_arguments_over_both(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "[streaming.consumer]\nmax_poll_records = 1\n")
        environ = {
            "AEGIS_STREAMING__CONSUMER__MAX_POLL_RECORDS": "2",
            "AEGIS_STREAMING__CONSUMER__AUTO_COMMIT": "true",
            "AEGIS_STREAMING__MAX_MESSAGE_SIZE": "2MB",
            "AEGIS_BOOTSTRAP": "tcp://127.0.0.1:7101",
        }
        of_environment = load_streaming_config(file, environ=environ)
        assert of_environment.consumer.max_poll_records == 2
        assert of_environment.consumer.auto_commit is True
        assert of_environment.max_message_bytes == 2 * limits.MIB
        arguments: dict[str, object] = {
            "streaming.consumer.max_poll_records": 3,
            "streaming.max_message_size": None,
        }
        of_arguments = load_streaming_config(file, environ=environ, arguments=arguments)
        assert of_arguments.consumer.max_poll_records == 3
        assert of_arguments.max_message_bytes == 2 * limits.MIB

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("[streaming]\nmax_message_siez = 1\n", "did you mean `streaming.max_message_size`"),
            ('[streaming]\nmax_message_size = "1XB"\n', '`streaming.max_message_size` is "1XB"'),
            ('[streaming]\nmax_message_size = "1TB"\n', "from 1 to 8388608 bytes"),
            ("[streaming.consumer]\nauto_commit = 1\n", "is 1; allowed: true or false"),
            ('[streaming.consumer]\nauto_commit = "yes"\n', 'is "yes"; allowed: true or false'),
            ("[streaming.consumer]\nmax_poll_records = true\n", "is true; allowed: a whole number"),
            ("[streaming.consumer]\nmax_poll_records = 0\n", "from 1 to 100000"),
            ("[streaming.consumer]\nsession_timeout = 30\n", 'a duration such as "5ms"'),
            ("[streaming]\nconsumer = 5\n", "`streaming.consumer` = 5 is not a setting"),
            ("[streaming]\ndefault_retention = 'x'\n", 'or "unlimited"'),
            ('[streaming.producer]\nacks = "all"\n', 'allowed: "quorum" or "leader" or "none"'),
            ("[stream]\nx = 1\n", "`stream.x` = 1 is not a setting"),
            ("streaming = [\n", "is not a TOML file"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: str, says: str) -> None:
        file = self.write(tmp_path, content)
        with pytest.raises(ConfigError) as caught:
            load_streaming_config(file, environ={})
        assert says in str(caught.value)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("AEGIS_STREAMING__CONSUMER__MAX_POLL", "1", "is not a setting"),
            ("AEGIS_STREAMING__CONSUMER__MAX_POLL_RECORDS", "many", 'is "many"'),
            ("AEGIS_STREAMING__CONSUMER__AUTO_COMMIT", "maybe", "true or false"),
        ],
    )
    def test_a_bad_variable_names_itself(self, name: str, value: str, says: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_streaming_config(environ={name: value})
        assert says in str(caught.value)
        assert f"environment: `{name}`" in str(caught.value)

    def test_a_named_file_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            load_streaming_config(tmp_path / "none.toml", environ={})


class TestNode:
    def write(self, tmp_path: Path, content: str = NODE_TOML) -> Path:
        file = tmp_path / "nodes" / "node-1.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return file

    def test_the_sample(self, tmp_path: Path) -> None:
        node = load_node_config(self.write(tmp_path))
        assert node.name == "node-1"
        assert node.address == NodeAddress("127.0.0.1", 7100)
        assert node.node_id == 1
        assert node.endpoint == "tcp://127.0.0.1:7101"
        assert node.data == tmp_path / "data" / "node-1"
        assert node.shards == 1
        assert node.durability == "fsync"
        assert node.insecure is False
        assert [str(peer) for peer in node.peers] == [
            "127.0.0.1:7100",
            "127.0.0.1:7200",
            "127.0.0.1:7300",
        ]

    def test_the_node_id_is_the_place_among_the_peers(self, tmp_path: Path) -> None:
        content = NODE_TOML.replace("base_port = 7100", "base_port = 7300")
        assert load_node_config(self.write(tmp_path, content)).node_id == 3

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ('name = "node-1"\n', "", "`node.name` is missing"),
            ('"node-1"', '"node 1"', '`node.name` is "node 1"'),
            ("base_port = 7100", "base_port = 80", "a whole number from 1024 to 65535"),
            ("base_port = 7100", 'base_port = "7100"', '`node.base_port` is "7100"'),
            ("base_port = 7100", "base_port = 7150", "own address in it, 127.0.0.1:7150"),
            ('host = "127.0.0.1"', 'host = "127.0.0.256"', '`node.host` is "127.0.0.256"'),
            ('host = "127.0.0.1"', 'host = "a b"', "`node.host`"),
            ('host = "127.0.0.1"', 'bind = "node-1"', '`node.bind` is "node-1"'),
            ('host = "127.0.0.1"', 'bind = "10.0.0.1"', "this node has no keys"),
            ('host = "127.0.0.1"', 'bind = "::"', "this node has no keys"),
            ('"127.0.0.1:7200"', '"10.0.0.1:7200"', '`node.peers` is "10.0.0.1:7200"; allowed'),
            ('"127.0.0.1:7200"', '"::1:7200"', "`node.peers`"),
            ("insecure = false", '[node.security]\nkey = "k"', "`node.security.peers`, `node.sec"),
            ("insecure = false", '[node.security]\nkeys = "k"', "mean `node.security.key`?"),
            ("insecure = false", "[node.security]\nkey = 1", "`node.security.key` is 1; allowed"),
            ('"127.0.0.1:7200"', '"127.0.0.1"', "`node.peers`"),
            ('"127.0.0.1:7200"', '"127.0.0.1:7100"', "once each"),
            ('"127.0.0.1:7200"', '"127.0.0.1:7101"', "at least 4 away from 127.0.0.1:7101"),
            ("shards = 1", "shards = 11", "at least 104 away from 127.0.0.1:7200"),
            ("shards = 1", "shards = 0", "`node.shards` is 0"),
            ('"fsync" ', '"maybe" ', 'allowed: "fsync" or "memory"'),
            ("insecure = false", "insecure = 0", "`node.insecure` is 0; allowed: true or false"),
            ("shards = 1", "shard = 1", "did you mean `node.shards`?"),
            ('"../data/node-1"', '""', '`node.data` is ""'),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, old: str, new: str, says: str) -> None:
        assert old in NODE_TOML
        file = self.write(tmp_path, NODE_TOML.replace(old, new))
        with pytest.raises(ConfigError) as caught:
            load_node_config(file)
        assert says in str(caught.value)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "example.org", "fe80::1", "::"])
    def test_beyond_this_machine_only_with_keys_or_by_order(
        self, tmp_path: Path, host: str
    ) -> None:
        shown = f"[{host}]" if ":" in host else host
        content = NODE_TOML.replace('host = "127.0.0.1"', f'host = "{host}"')
        content = content.replace('"127.0.0.1:7100"', f'"{shown}:7100"')
        with pytest.raises(ConfigError) as caught:
            load_node_config(self.write(tmp_path, content))
        assert f'`node.host` is "{host}"; allowed: an address in 127.0.0.0/8' in str(caught.value)
        assert "`insecure = true`" in str(caught.value)
        allowed = content.replace("insecure = false", "insecure = true")
        node = load_node_config(self.write(tmp_path, allowed))
        assert node.endpoint == f"tcp://{shown}:7101"
        secure = content + '[node.security]\nkey = "k/n.key"\npeers = "../p"\nclients = "/c"\n'
        node = load_node_config(self.write(tmp_path, secure))
        assert node.has_keys
        assert node.security.key == tmp_path / "nodes" / "k" / "n.key"
        assert node.security.peers == tmp_path / "p"
        assert node.security.clients == Path("/c")

    @pytest.mark.parametrize("host", ["127.9.8.7", "::1", "localhost"])
    def test_what_stays_on_this_machine_needs_no_keys(self, tmp_path: Path, host: str) -> None:
        shown = f"[{host}]" if ":" in host else host
        content = NODE_TOML.replace('host = "127.0.0.1"', f'host = "{host}"')
        content = content.replace('"127.0.0.1:7100"', f'"{shown}:7100"')
        assert not load_node_config(self.write(tmp_path, content)).has_keys

    def test_the_last_port_of_all_shards_must_exist(self, tmp_path: Path) -> None:
        content = NODE_TOML.replace("7100", "65530").replace("shards = 1", "shards = 2")
        with pytest.raises(ConfigError, match="2 shards take 14 ports"):
            load_node_config(self.write(tmp_path, content))


def test_ports_are_counted_from_the_base() -> None:
    assert config.control_endpoint("127.0.0.1", 7200) == "tcp://127.0.0.1:7201"
    assert config.data_endpoint("127.0.0.1", 7200, 1) == "tcp://127.0.0.1:7212"
    assert config.peers_endpoint("127.0.0.1", 7200, 2) == "tcp://127.0.0.1:7223"
