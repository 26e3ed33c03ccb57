"""Key files and lists: what is written, what is read back, and what is never shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aegis_cluster.config import StreamingConfig, load_streaming_config
from aegis_cluster.errors import ConfigError
from aegis_cluster.keys import (
    ClientKeys,
    KeyList,
    KeyPair,
    NodeKeys,
    configured_keys,
    load_client_keys,
    load_pair,
    load_public,
    new_pair,
    replace_pair,
    write_new_pair,
    write_public,
)


def written(directory: Path, name: str) -> KeyPair:
    pair = new_pair(name)
    write_new_pair(pair, directory)
    return pair


def test_a_pair_reads_back_and_its_secret_is_its_owners_only(tmp_path: Path) -> None:
    pair = new_pair("node-1")
    secret, public = write_new_pair(pair, tmp_path / "deep" / "keys")
    assert load_pair(secret) == pair
    assert load_public(public) == ("node-1", pair.public)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert pair.secret not in public.read_text()
    assert pair.public_file() == public.read_text()


def test_pairs_differ() -> None:
    assert new_pair("a").secret != new_pair("a").secret


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    pair = written(tmp_path, "a")
    (tmp_path / "b.pub").write_text("mine")
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match="exists and is left as it is"):
            write_new_pair(new_pair(name), tmp_path)
    assert load_pair(tmp_path / "a.key") == pair
    assert not (tmp_path / "b.key").exists()


@pytest.mark.parametrize("name", ["", "a b", "../a", ".hidden", "a/b", "x" * 64, 'a"b'])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a key"):
        new_pair(name)


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    pair = written(tmp_path, "a")
    for mode in (0o640, 0o604, 0o660):
        (tmp_path / "a.key").chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600") as caught:
            load_pair(tmp_path / "a.key")
        assert pair.secret not in str(caught.value)
    (tmp_path / "a.key").chmod(0o400)
    assert load_pair(tmp_path / "a.key") == pair


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("secret = ", "secrets = ", "does not hold just"),
        ('name = "a"', 'name = "a b"', "`name` is not letters"),
        ('name = "a"', "name = 1", "`name` is not letters"),
        ('public = "', 'public = "x', "`public` is not 40 signs of Z85"),
        ('secret = "', 'secret = "~', "`secret` is not 40 signs of Z85"),
        ("# Secret", "Secret", "is not a key file"),
        ("# Secret", "#" * 5_000, "is not a key file"),
    ],
)
def test_a_broken_file_is_said_without_its_secret(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    pair = written(tmp_path, "a")
    file = tmp_path / "a.key"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_pair(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    told = f"{caught.value}{caught.value.details}{caught.value.__cause__}"
    assert pair.secret not in told


def test_two_halves_of_different_pairs_are_no_pair(tmp_path: Path) -> None:
    one, other = new_pair("a"), new_pair("a")
    write_new_pair(KeyPair("a", one.public, other.secret), tmp_path)
    with pytest.raises(ConfigError, match="are no pair"):
        load_pair(tmp_path / "a.key")


def test_a_secret_among_public_keys_is_told(tmp_path: Path) -> None:
    pair = new_pair("a")
    replace_pair(pair, tmp_path / "a.pub")
    with pytest.raises(ConfigError, match=r"use the \.pub file") as caught:
        KeyList(tmp_path)
    assert pair.secret not in str(caught.value)


def test_no_secret_in_a_repr(tmp_path: Path) -> None:
    pair = written(tmp_path, "a")
    keys = load_client_keys(ClientKeys(tmp_path / "a.key", tmp_path))
    assert pair.secret not in f"{pair!r}{pair}{keys!r}{vars(keys)}"


class TestLists:
    def test_it_follows_the_directory(self, tmp_path: Path) -> None:
        one, two = new_pair("one"), new_pair("two")
        write_public(one, tmp_path / "one.pub")
        (tmp_path / "README").write_text("not a key")
        accepted = KeyList(tmp_path)
        assert dict(accepted.names) == {one.public: "one"}
        assert accepted.read() is None, "nothing has changed"
        write_public(two, tmp_path / "two.pub")
        reading = accepted.read()
        assert reading is not None
        assert not accepted.take(reading), "nobody was withdrawn"
        assert set(accepted.names.values()) == {"one", "two"}
        (tmp_path / "one.pub").unlink()
        reading = accepted.read()
        assert reading is not None
        assert accepted.take(reading)
        assert dict(accepted.names) == {two.public: "two"}

    def test_a_key_that_is_replaced_in_its_file(self, tmp_path: Path) -> None:
        write_public(new_pair("one"), tmp_path / "one.pub")
        accepted = KeyList(tmp_path)
        later = new_pair("one")
        write_public(later, tmp_path / "one.pub")
        accepted.refresh()
        assert dict(accepted.names) == {later.public: "one"}

    def test_a_broken_file_costs_its_own_key_only(self, tmp_path: Path) -> None:
        one = new_pair("one")
        write_public(one, tmp_path / "one.pub")
        accepted = KeyList(tmp_path)
        (tmp_path / "two.pub").write_text("half a fi")
        reading = accepted.read()
        assert reading is not None
        assert [str(tmp_path / "two.pub") in problem for problem in reading.problems] == [True]
        assert dict(reading.names) == {one.public: "one"}
        with pytest.raises(ConfigError, match=r"two\.pub is not a key file"):
            KeyList(tmp_path)

    def test_a_list_that_is_gone_accepts_nobody(self, tmp_path: Path) -> None:
        directory = tmp_path / "clients"
        directory.mkdir()
        write_public(new_pair("one"), directory / "one.pub")
        accepted = KeyList(directory)
        (directory / "one.pub").unlink()
        os.rmdir(directory)
        accepted.refresh()
        assert not accepted.names
        assert accepted.read() is None, "which is told once"
        directory.mkdir()
        accepted.refresh()
        assert accepted.read() is None, "an empty one is no news for ever either"

    def test_one_file_is_a_list_too(self, tmp_path: Path) -> None:
        one = written(tmp_path, "one")
        assert dict(KeyList(tmp_path / "one.pub").names) == {one.public: "one"}

    def test_a_path_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            KeyList(tmp_path / "nowhere")


class TestNodeKeys:
    def keys(self, tmp_path: Path) -> tuple[NodeKeys, dict[str, KeyPair]]:
        pairs = {name: new_pair(name) for name in ("own", "peer", "client", "operator")}
        for name in ("peer", "client"):
            (tmp_path / name).mkdir()
            write_public(pairs[name], tmp_path / name / f"{name}.pub")
        keys = NodeKeys(
            pairs["own"],
            peers=KeyList(tmp_path / "peer"),
            clients=KeyList(tmp_path / "client"),
            operator=pairs["operator"].public,
        )
        return keys, pairs

    def test_peers_and_clients_are_apart(self, tmp_path: Path) -> None:
        keys, pairs = self.keys(tmp_path)
        as_peer = {name for name, pair in pairs.items() if keys.peer(pair.public)}
        as_client = {name for name, pair in pairs.items() if keys.client(pair.public)}
        assert as_peer == {"own", "peer"}
        assert as_client == {"client", "operator"}
        assert keys.links.servers == sorted([pairs["own"].public, pairs["peer"].public])

    def test_no_key_is_in_both_lists(self, tmp_path: Path) -> None:
        keys, pairs = self.keys(tmp_path)
        write_public(pairs["peer"], tmp_path / "client" / "peer.pub")
        with pytest.raises(ConfigError, match="never to both"):
            NodeKeys(
                pairs["own"],
                peers=KeyList(tmp_path / "peer"),
                clients=KeyList(tmp_path / "client"),
            )
        keys.clients.refresh()
        assert keys.client(pairs["peer"].public) is None, "also when it gets there later"


class TestClientSettings:
    def test_from_a_file_its_paths_beside_it(self, tmp_path: Path) -> None:
        file = tmp_path / "etc" / "aegis.toml"
        file.parent.mkdir()
        file.write_text('[streaming.security]\nkey = "me.key"\nservers = "/nodes"\n')
        config = load_streaming_config(file, environ={})
        assert configured_keys(config) == ClientKeys(tmp_path / "etc" / "me.key", Path("/nodes"))
        assert configured_keys(StreamingConfig()) is None

    def test_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        environ = {
            "AEGIS_STREAMING__SECURITY__KEY": str(tmp_path / "me.key"),
            "AEGIS_STREAMING__SECURITY__SERVERS": str(tmp_path),
            "AEGIS_STREAMING__SECURITY__INSECURE": "true",
        }
        config = load_streaming_config(environ=environ)
        assert configured_keys(config) == ClientKeys(tmp_path / "me.key", tmp_path)
        assert config.security.insecure

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ('key = "me.key"', "belong together"),
            ('servers = "."', "belong together"),
            ("key = 1", "`streaming.security.key` is 1; allowed: a path"),
            ('keys = "me.key"', "did you mean `streaming.security.key`?"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: str, says: str) -> None:
        file = tmp_path / "aegis.toml"
        file.write_text(f"[streaming.security]\n{content}\n")
        with pytest.raises(ConfigError) as caught:
            load_streaming_config(file, environ={})
        assert says in str(caught.value)

    def test_nobody_to_talk_to(self, tmp_path: Path) -> None:
        written(tmp_path, "me")
        (tmp_path / "servers").mkdir()
        with pytest.raises(ConfigError, match="nobody to talk to"):
            load_client_keys(ClientKeys(tmp_path / "me.key", tmp_path / "servers"))
