"""The server's file, read again while the server runs: what is taken, and why everything else is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from backend.reload import ServerFile, identity_of
from backend.routable import Identity
from lb.cid import Codec, ServerId, config_id_of
from lb.highwater import HighWaterFile
from lb.reset import reset_token
from lb.server_config import load_server_config
from tests.test_backend import DEADLINE, Program, connect, running, until, unverified

SERVER_ID = "3fa91c02"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """As whoever delivers a file should: it takes the other one's place as a whole."""
    new = path.with_name(f".{path.name}.new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.chmod(mode)
    new.rename(path)


def text_of(number: int, *, made: str | None = None, server_id: str = SERVER_ID) -> str:
    """A server's file with a configuration of its own for each number."""
    return f"""name: alpha
{f'made: "{made}"' if made else "# no date"}
cid-config:
  config-id: {number % 7}
  server-id-length: 4
  nonce-length: 12
  key-file: cid-{number}.key
server-id: "{server_id}"
reset-key-file: reset-{number}.key
nonce-file: nonces
"""


def at(minute: int) -> str:
    return f"2026-11-21T09:{minute:02}:00Z"


class Log:
    """What a program logs, line by line."""

    def __init__(self, program: Program) -> None:
        assert program.process.stderr is not None
        self._descriptor = program.process.stderr.fileno()
        os.set_blocking(self._descriptor, False)
        self._text = b""

    async def until(self, event: str) -> str:
        """The next line with this event; those before it are gone."""
        while True:
            line, end, rest = self._text.partition(b"\n")
            if end:
                self._text = rest
                if f"event={event}" in line.decode():
                    return line.decode()
                continue
            await asyncio.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                more = os.read(self._descriptor, 65536)
                assert more, "it ended"
                self._text += more


class Place(NamedTuple):
    """A server's file, and a server that has read it."""

    directory: Path
    file: ServerFile
    identity: Identity
    caplog: pytest.LogCaptureFixture

    @property
    def path(self) -> Path:
        return self.file.path

    def reload(self, text: str) -> bool:
        write(self.path, text)
        return self.file.reload()

    def reasons(self) -> list[str]:
        """Why the latest reloads were refused."""
        found = [record.fields["reason"] for record in self.caplog.records if hasattr(record, "fields")]
        self.caplog.clear()
        return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for number in range(10):
        write(tmp_path / f"cid-{number}.key", f"{bytes([number] * 16).hex()}\n")
        write(tmp_path / f"reset-{number}.key", f"{bytes([number] * 32).hex()}\n")
    write(tmp_path / "server.yaml", text_of(2, made=at(10)))
    return tmp_path


@pytest.fixture
def place(directory: Path, caplog: pytest.LogCaptureFixture) -> Place:
    config = load_server_config(directory / "server.yaml")
    assert config.nonce_file is not None
    with HighWaterFile(config.nonce_file) as marks:
        identity = identity_of(config, marks)
    caplog.set_level(logging.ERROR)
    return Place(directory, ServerFile(directory / "server.yaml", config, identity), identity, caplog)


def test_a_new_file_is_in_force_at_once_with_its_reset_key(place: Place) -> None:
    with HighWaterFile(place.directory / "nonces") as marks:
        config = load_server_config(place.path)
        identity = identity_of(config, marks)
        file = ServerFile(place.path, config, identity)
        write(place.path, text_of(3, made=at(11), server_id="0badcafe"))
        assert file.reload()
        cid = identity.new_cid()
        decoded = Codec(file.config.cid_config).decode(cid) if file.config.cid_config else None
        assert decoded is not None
        assert (config_id_of(cid), decoded.server_id) == (3, ServerId(bytes.fromhex("0badcafe")))
        assert identity.reset_token(cid) == reset_token(bytes([3] * 32), cid)
        assert file.reloads == {"taken": 1, "unchanged": 0, "refused": 0}
        assert {path.name for path in file.files} == {"server.yaml", "cid-3.key", "reset-3.key"}


def test_a_file_that_says_the_same_changes_nothing(place: Place) -> None:
    assert not place.reload(text_of(2, made=at(12)))
    assert not place.file.reload()
    assert place.file.reloads == {"taken": 0, "unchanged": 2, "refused": 0}


def world_readable(place: Place) -> str:
    (place.directory / "cid-3.key").chmod(0o644)
    return text_of(3)


def cut_off(place: Place) -> str:
    write(place.directory / "reset-3.key", "00" * 31)
    return text_of(3)


def two_mistakes(place: Place) -> str:
    (place.directory / "reset-3.key").chmod(0o604)
    write(place.directory / "cid-3.key", "ab" * 15)
    return text_of(3).replace("config-id: 3", "config-id: 7")


REFUSED: dict[str, tuple[Callable[[Place], str], list[str]]] = {
    "not YAML": (lambda _: "][", ["not YAML"]),
    "empty": (lambda _: "", ["nothing in it"]),
    "an unknown key": (lambda _: text_of(3) + "colour: blue\n", ["colour: unknown key"]),
    "config ID 7": (
        lambda _: text_of(3).replace("config-id: 3", "config-id: 7"),
        ["cid-config.config-id: 7: expected an integer, 0 to 6"],
    ),
    "a server ID of the wrong length": (
        lambda _: text_of(3, server_id="3fa91c"),
        ["server-id: 3fa91c: 3 octets, but cid-config.server-id-length is 4"],
    ),
    "CIDs of another length": (
        lambda _: text_of(3).replace("nonce-length: 12", "nonce-length: 10"),
        ["cid-config: connection IDs of 15 octets: this process has some of 17; a restart changes it"],
    ),
    "another nonce file": (
        lambda _: text_of(3).replace("nonces", "others"),
        ["nonce-file: .*others: this process has"],
    ),
    "a key that everybody reads": (
        world_readable,
        ["cid-config.key-file: .*cid-3.key: mode 0644 lets everybody at it"],
    ),
    "a key that is cut off": (
        cut_off,
        ["reset-key-file: .*reset-3.key: holds 62 characters: expected 64 hex digits"],
    ),
    "no CID configuration any more": (
        lambda _: "name: alpha\nreset-key-file: reset-3.key\nnonce-file: nonces\n",
        ["cid-config: missing: the configuration in force has one; a restart changes it"],
    ),
    "no reset key any more": (
        lambda _: text_of(3).replace("reset-key-file: reset-3.key\n", ""),
        ["reset-key-file: missing: the configuration in force has one; a restart changes it"],
    ),
    "a file of before": (
        lambda _: text_of(3, made=at(9)),
        [f"made: {at(9)}: older than the configuration in force, which is of {at(10)}"],
    ),
    "a day that does not exist as such": (
        lambda _: text_of(3, made="yesterday"),
        ["made: yesterday: expected a moment"],
    ),
    "several mistakes, all told": (
        two_mistakes,
        [
            "cid-config.config-id: 7: expected an integer, 0 to 6",
            "cid-config.key-file: .*cid-3.key: holds 30 characters",
            "reset-key-file: .*reset-3.key: mode 0604 lets everybody at it",
        ],
    ),
    "several obstacles, all told": (
        lambda _: text_of(3, made=at(9)).replace("nonces", "others").replace("nonce-length: 12", "nonce-length: 13"),
        ["made: ", "nonce-file: ", "cid-config: connection IDs of 18 octets"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_with_every_reason_and_the_old_one_stays(case: str, place: Place) -> None:
    make, expected = REFUSED[case]
    before = place.file.config
    assert not place.reload(make(place))
    found = place.reasons()
    assert len(found) == len(expected), found
    assert [e for e, reason in zip(expected, found, strict=True) if not re.search(e, reason)] == [], found
    assert place.file.config is before
    assert config_id_of(place.identity.new_cid()) in (2, 7)  # 7: the fixture has closed its nonce file
    assert place.file.reloads["refused"] == 1
    for secret in (bytes([n] * 16).hex() for n in (2, 3)):
        assert secret not in "".join(found)


def test_a_file_that_everybody_may_write_is_refused(place: Place) -> None:
    write(place.path, text_of(3), mode=0o602)
    assert not place.file.reload()
    assert [re.sub("^.*/", "", reason) for reason in place.reasons()] == [
        "server.yaml: mode 0602 lets everybody write it: expected 0600 or 0640"
    ]


def test_a_file_that_is_gone_is_refused(place: Place) -> None:
    place.path.unlink()
    assert not place.file.reload()
    assert "cannot be read" in place.reasons()[0]


def test_a_file_without_a_date_never_brings_back_what_was_left(place: Place) -> None:
    """The draft's section 3.1: once there is a new configuration, no CID is generated under an old one."""
    assert place.reload(text_of(3))
    assert place.reload(text_of(4))
    for number in (2, 3):
        assert not place.reload(text_of(number))
        assert "this process has left it for another already: expected a new key" in place.reasons()[0]
    assert not place.reload(text_of(4))  # that is the one it has
    assert place.reasons() == []
    write(place.directory / "cid-3.key", f"{bytes(16).hex()}\n")
    assert place.reload(text_of(3)), "a config ID with a new key is a new configuration"


def test_the_way_back_is_a_newer_file(place: Place) -> None:
    """As `quiclb rotation activate` of a configuration that is retiring, and `quiclb server-config` after it."""
    assert place.reload(text_of(3, made=at(11)))
    assert not place.reload(text_of(2, made=at(10)))
    assert place.reload(text_of(2, made=at(12)))
    assert place.file.config.cid_config is not None
    assert place.file.config.cid_config.config_id == 2


def test_no_beginning_of_a_file_is_taken_for_the_file(place: Place) -> None:
    """Whoever writes in place, or runs out of disk, leaves a file that is cut off anywhere."""
    whole = text_of(3, made=at(11))
    for length in range(len(whole)):
        place.path.write_text(whole[:length])
        assert not place.file.reload() or whole[length:].strip() == "", whole[:length]
    assert place.file.reloads["refused"] > len(whole) - 5


def test_files_that_are_watched_are_read_again_when_they_or_their_keys_change(directory: Path) -> None:
    async def watch(program: Program) -> None:
        log = Log(program)
        async with connect(program.addresses[0], unverified()) as client:
            await until(lambda: len(client.cids()) == 8)
            (directory / "cid-3.key").chmod(0o644)
            write(directory / "server.yaml", text_of(3, made=at(11)))
            assert "mode 0644" in await log.until("reload-refused")
            (directory / "cid-3.key").chmod(0o600)
            write(directory / "server.yaml", text_of(3, made=at(12)))
            assert "config_id=3 connections=1 old_cids=8" in await log.until("reloaded")
            await log.until("rotated")
            assert {config_id_of(cid) for cid in client.cids()} == {3}
            # A key file alone: what it makes is another configuration.
            write(directory / "reset-3.key", f"{bytes(32).hex()}\n")
            await log.until("reloaded")
            await until(lambda: all(reset_token(bytes(32), cid) == token for cid, token in client.cids().items()))

    with running(directory, "--watch") as program:
        asyncio.run(asyncio.wait_for(watch(program), DEADLINE))
        program.process.send_signal(signal.SIGTERM)
        program.process.communicate(timeout=DEADLINE)
        assert program.process.returncode == 0
