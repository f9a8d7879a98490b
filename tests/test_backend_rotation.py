"""The reference server changes its CID configuration while it runs: clients move over, and resets stay right."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from backend.app import Http3Protocol
from lb.cid import CidConfig, Codec, ConfigId, ServerId, config_id_of
from lb.reset import reset_token
from tests.test_backend import (
    CID_KEY,
    DEADLINE,
    RESET_KEY,
    SERVER_ID,
    SINGLE_PASS,
    Program,
    Wire,
    connect,
    files,
    identity,
    own_cid,
    quic_client,
    running,
    scenario,
    serve,
    short,
    until,
)

__all__ = ["files"]  # a fixture

pytestmark = pytest.mark.e2e

NEXT = CidConfig(ConfigId(4), 5, 11, bytes(range(16)))
NEXT_ID = ServerId(b"later")
NEXT_RESET_KEY = bytes(range(100, 132))


def config_ids(cids: Iterable[bytes]) -> set[int | None]:
    return {config_id_of(cid) for cid in cids}


@pytest.mark.parametrize("limit", [2, 3, 8])
@scenario
async def test_clients_move_to_new_cids_in_mid_download_and_retire_the_old_ones(limit: int) -> None:
    who = identity()
    async with serve(who) as backend, connect(backend.address, quic_client(cid_limit=limit)) as client:
        await until(lambda: len(client.cids()) == limit)
        old = client.cids()
        _, download = client.start("GET", "/slow/0.5")
        who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
        backend.server.renew_cids()
        await until(lambda: len(client.cids()) == limit and not old.keys() & client.cids().keys())
        await until(lambda: len(backend.connection.cids) == limit)
        assert config_ids(client.cids()) == config_ids(backend.connection.cids) == {4}
        for cid, token in client.cids().items():
            decoded = Codec(NEXT).decode(cid)
            assert decoded is not None
            assert decoded.server_id == NEXT_ID
            assert reset_token(NEXT_RESET_KEY, cid) == token
        await until(lambda: download.is_complete)
        assert (await client.request("GET", "/whoami")).json["config_id"] == 4


@scenario
async def test_a_switch_during_the_handshake_takes_effect_at_its_end() -> None:
    who = identity()
    issued_before: list[bytes] = []

    class Switching(Http3Protocol):
        """A connection whose first datagram is followed by a switch."""

        def datagram_received(self, data: bytes | str, addr: Any) -> None:
            super().datagram_received(data, addr)
            if not issued_before:
                assert not backend.connection._handshake_complete
                issued_before.extend(backend.connection.cids)
                who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
                backend.server.renew_cids()

    async with serve(who, Switching) as backend, connect(backend.address) as client:
        await until(lambda: config_ids(client.cids()) == {4} and len(client.cids()) == 8)
        assert config_ids(issued_before) == {SINGLE_PASS.config_id}


@scenario
async def test_one_switch_after_the_other_loses_nobody() -> None:
    who = identity()
    codecs = [(Codec(CidConfig(ConfigId(i % 7), 4, 12, bytes([i]) * 16)), ServerId(bytes([i]) * 4)) for i in range(30)]
    async with serve(who) as backend, connect(backend.address) as client:
        for codec, server_id in codecs:
            who.switch(codec, server_id, None)
            backend.server.renew_cids()
            await client.ping()
        await until(lambda: config_ids(client.cids()) == {29 % 7} and len(client.cids()) == 8)
        assert (await client.request("GET", "/whoami")).status == 200
        await until(lambda: len(backend.connection.cids) == 8)


@scenario
async def test_resets_are_right_for_cids_of_before_and_after() -> None:
    who = identity()
    async with serve(who) as backend:
        who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
        before, after = own_cid(), Codec(NEXT).encode(NEXT_ID, bytes(11))
        with Wire(backend.address) as wire:
            for cid, key in ((before, RESET_KEY), (after, NEXT_RESET_KEY)):
                [reset] = await wire.ask(short(cid))
                assert reset[-16:] == reset_token(key, cid)
            assert await wire.ask(short(Codec(NEXT).encode(ServerId(b"other"), bytes(11)))) == []


@scenario
async def test_cids_of_another_length_take_a_restart() -> None:
    who = identity()
    with pytest.raises(ValueError, match="connection IDs of 12 octets: this process has some of 17; a restart"):
        who.switch(Codec(CidConfig(ConfigId(1), 4, 7)), SERVER_ID, None)
    assert config_id_of(who.new_cid()) == SINGLE_PASS.config_id


@pytest.fixture
def another_half(files: Path) -> str:
    """A server's file with another configuration, whose keys are there."""
    for name, octets in (("cid-4.key", bytes(range(16))), ("reset-4.key", NEXT_RESET_KEY)):
        descriptor = os.open(files / name, os.O_WRONLY | os.O_CREAT, 0o600)
        with open(descriptor, "w") as file:
            file.write(octets.hex() + "\n")
    text = (files / "server.yaml").read_text()
    for old, new in (
        ("config-id: 2", "config-id: 4"),
        ("cid.key", "cid-4.key"),
        ("reset.key", "reset-4.key"),
        (SERVER_ID.hex(), "0badcafe"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def test_sighup_has_it_read_its_file_again(files: Path, another_half: str) -> None:
    async def until_logged(program: Program, event: str) -> str:
        assert program.process.stderr is not None
        while f"event={event}" not in (line := await asyncio.to_thread(program.process.stderr.readline)):
            assert line, "it ended"
        return line

    async def talk(program: Program) -> None:
        path = files / "server.yaml"
        async with connect(program.addresses[0], trusting()) as client:
            first = (await client.request("GET", "/whoami")).json
            good = path.read_text()
            for bad, reason in (
                (good.replace("nonce-length: 12", "nonce-length: 7"), "connection IDs of 12 octets"),
                (good.replace("nonces", "other"), "nonce-file"),
                ("][", "not YAML"),
                (good.replace("cid.key", "none.key"), "none.key"),
            ):
                path.write_text(bad)
                program.process.send_signal(signal.SIGHUP)
                assert reason in await until_logged(program, "reload-refused")
            assert (await client.request("GET", "/whoami")).json["config_id"] == 2

            path.write_text(another_half)
            program.process.send_signal(signal.SIGHUP)
            assert "config_id=4 connections=1" in await until_logged(program, "reloaded")
            await until(lambda: config_ids(client.cids()) == {4})
            now = (await client.request("GET", "/whoami")).json
            assert (now["config_id"], now["connection"]) == (4, first["connection"])
        async with connect(program.addresses[0], trusting()) as client:
            assert (await client.request("GET", "/whoami")).json["server_id"] == "0badcafe"

    def trusting() -> QuicConnection:
        trust = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost")
        trust.load_verify_locations(cafile=str(files / "cert.pem"))
        return QuicConnection(configuration=trust)

    with running(files, "--write-cert", "cert.pem") as program:
        asyncio.run(asyncio.wait_for(talk(program), DEADLINE))
        program.process.send_signal(signal.SIGTERM)
        _, log = program.process.communicate(timeout=DEADLINE)
        assert program.process.returncode == 0
        for secret in (CID_KEY.hex(), NEXT_RESET_KEY.hex(), "0badcafe"):
            assert secret not in log
