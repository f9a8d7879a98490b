# ruff: noqa: E501 - one mistake, one line
"""A server's file: what a good one means, and what is said about each bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lb.cid import CidConfig, ConfigId, ServerId
from lb.config import load_config
from lb.errors import ConfigError, ConfigErrors
from lb.reset import server_reset_key
from lb.server_config import ServerConfig, load_server_config
from tests.files import CID_KEY, RESET_KEY, examples, write_keys

GOOD = """\
name: a
cid-config:
  config-id: 2
  server-id-length: 4
  nonce-length: 10
  key-file: secrets/cid-0.key
  appended-length: 3
server-id: "3fa91c02"
reset-key-file: secrets/reset-0.key
nonce-file: nonces
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    return tmp_path


def load(directory: Path, text: str) -> ServerConfig:
    path = directory / "server.yaml"
    path.write_text(text)
    return load_server_config(path)


def test_every_key_of_a_file_means_what_the_documents_say(directory: Path) -> None:
    assert load(directory, GOOD) == ServerConfig(
        name="a",
        cid_config=CidConfig(ConfigId(2), 4, 10, bytes.fromhex(CID_KEY), True, 3),
        server_id=ServerId(bytes.fromhex("3fa91c02")),
        reset_key=bytes.fromhex(RESET_KEY),
        nonce_file=directory / "nonces",
    )


def test_a_server_without_a_configuration_needs_a_name_only(directory: Path) -> None:
    assert load(directory, "name: a") == ServerConfig(name="a")


def test_a_servers_file_and_the_balancers_agree(tmp_path: Path) -> None:
    """config/server.yaml is server a of config/quiclb.yaml, with a reset key that follows from the master key."""
    directory = examples(tmp_path)
    server = load_server_config(directory / "server.yaml")
    (section,) = load_config(directory / "quiclb.yaml").services
    (slot,) = section.service.cid_slots
    assert section.service.backends[0].server_ids == {ConfigId(0): frozenset([server.server_id])}
    assert slot.config == server.cid_config
    assert slot.reset_key is not None
    assert server.reset_key == server_reset_key(slot.reset_key, ConfigId(0), server.server_id)


def test_keys_do_not_print(directory: Path) -> None:
    config = load(directory, GOOD)
    assert repr(config.reset_key) not in repr(config)
    assert CID_KEY not in repr(config)


MISTAKES = {
    "no name": ("name: a\n", "", "name", "missing: expected a name"),
    "unknown key": ("server-id:", "server-ids:", ["server-id", "server-ids"], "missing"),
    "no server ID": ('server-id: "3fa91c02"\n', "", "server-id", "missing: expected one, since there is a cid-config"),
    "server ID of the wrong length": ('"3fa91c02"', '"3fa91c"', "server-id", "3fa91c: 3 octets, but cid-config.server-id-length is 4"),
    "server ID that is an integer": ('"3fa91c02"', "11223344", "server-id", "11223344: YAML takes this for an integer; put it in quotes"),
    "server ID that is empty": ('"3fa91c02"', '""', "server-id", '"": expected 1 to 15 octets'),
    "config ID 7": ("config-id: 2", "config-id: 7", "cid-config.config-id", "7: expected an integer, 0 to 6"),
    "CID over 20": ("appended-length: 3", "appended-length: 6", "cid-config", "6 appended octets: a CID holds at most 20"),
    "key file": ("secrets/cid-0.key", "secrets/none.key", "cid-config.key-file", "none.key: cannot be read: No such file"),
    "reset key file": ("secrets/reset-0.key", "secrets/cid-0.key", "reset-key-file", "holds 32 characters: expected 64"),
    "a balancer's key": ("nonce-file: nonces", "listen: []", "listen", "unknown key"),
    "no moment": ("name: a\n", "name: a\nmade: yesterday\n", "made", 'yesterday: expected a moment as "2026-11-21T09:42:25Z"'),
    "a moment that YAML knows": ("name: a\n", "name: a\nmade: 2026-11-21T09:42:25Z\n", "made", "YAML takes this for a date; put it in quotes"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_with_its_path(
    directory: Path, old: str, new: str, path: str | list[str], message: str
) -> None:
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new)
    with pytest.raises(ConfigErrors) as caught:
        load(directory, text)
    found = [(error.path, error.message) for error in caught.value.exceptions if isinstance(error, ConfigError)]
    assert [p for p, _ in found] == ([path] if isinstance(path, str) else path)
    assert message in found[0][1]


def test_a_file_that_everybody_may_write_is_refused_with_its_other_mistakes(directory: Path) -> None:
    path = directory / "server.yaml"
    path.write_text(GOOD.replace("config-id: 2", "config-id: 7"))
    path.chmod(0o646)
    with pytest.raises(ConfigErrors) as caught:
        load_server_config(path)
    assert [str(error).replace(f"{directory}/", "") for error in caught.value.exceptions] == [
        "server.yaml: mode 0646 lets everybody write it: expected 0600 or 0640",
        "cid-config.config-id: 7: expected an integer, 0 to 6",
    ]


def test_a_file_says_when_it_was_made_and_which_key_files_were_read(directory: Path) -> None:
    config = load(directory, GOOD + 'made: "2026-11-21T09:42:25Z"\n')
    assert config.made == "2026-11-21T09:42:25Z"
    assert config.key_files == (directory / "secrets/cid-0.key", directory / "secrets/reset-0.key")


def test_a_server_id_without_a_configuration_is_a_mistake(directory: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(directory, 'name: a\nserver-id: "3fa91c02"\n')
    assert [str(error) for error in caught.value.exceptions] == [
        "server-id: a server ID without a cid-config: expected both or neither"
    ]


def test_all_mistakes_are_found_at_once(directory: Path) -> None:
    text = GOOD.replace("nonce-length: 10", "nonce-length: 2").replace("3fa91c02", "3f").replace("nonces", '""')
    with pytest.raises(ConfigErrors) as caught:
        load(directory, text)
    assert [str(error) for error in caught.value.exceptions] == [
        "cid-config.nonce-length: 2: expected an integer, 4 to 18",
        "server-id: 3f: 1 octet, but cid-config.server-id-length is 4",
        'nonce-file: "": expected the name of a file',
    ]
