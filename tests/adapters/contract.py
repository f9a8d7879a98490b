"""What every server behind a balancer has to do, whatever it is made of (docs/servers/README.md).

A test file has a class of its own for each adapter:

    class TestNgtcp2(BuiltContract):
        adapter = ADAPTERS["ngtcp2"]

What the adapter's stack cannot do, as `adapter.cannot` says, is tested for not being done, and for doing no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import SessionTicket

from backend.adapters.registry import BUILT, Adapter, Feature
from backend.clients.aioquic_client import AioquicClient
from backend.clients.relay import NatRelay
from backend.clients.transfer import ConnectionEndedError, StatelessResetError, Transfer, slow_body
from lb.address import Address
from lb.cid import UNROUTABLE, CidConfig, Codec, ConfigId, FourPass, ServerId, config_id_of
from lb.generator import NonceMark, _identity
from lb.highwater import HighWaterFile
from lb.reset import MIN_RESET, TOKEN_LENGTH, reset_token, server_reset_key
from lb.server_half import SERVER_FILE
from tests.adapters.stand import CALLED, PATIENCE, Server, Stand, secret, stand, until
from tests.adapters.vectors import FILE

DOWNLOAD = 10_000_000  # octets
CONNECTIONS = 20  # whose connection IDs are looked at
GARBAGE = 300  # datagrams
SEED = 5
SCENE_TIMEOUT = 40.0  # seconds; far above what any of them takes

Scene = Callable[[Stand], Awaitable[None]]


def body(octets: int) -> bytes:
    """What `/bytes/N` is: octets that count up."""
    return (bytes(range(256)) * (octets // 256 + 1))[:octets]


WRONG: dict[str, tuple[Callable[[Path], None], str]]  # how a server's files go wrong, and a word of the reason


class Contract:
    """The tests. Those of one adapter share four servers and a balancer."""

    adapter: ClassVar[Adapter]
    answers_any_cid: ClassVar[bool] = False
    """Whether the stack answers unknown connection IDs of others too; then not with their tokens."""
    keeps_reset_key: ClassVar[bool] = False
    """Whether a running server's tokens are made with the key that it began with, whatever its file says later."""
    takes_others_retries: ClassVar[bool] = True
    """Whether the stack can make a connection of an Initial whose DCID is another server's."""
    gives_tickets: ClassVar[bool] = True
    """Whether clients can resume sessions at all; early data is another matter."""
    wrong: ClassVar[Sequence[str]] = ()
    """The names of the wrong files that it is started with, if not all."""

    @pytest.fixture(scope="class")
    @classmethod
    def play(cls) -> Iterator[Callable[[Scene], None]]:
        """Plays a scene on a stand that all tests of the class share."""
        if cls.adapter.missing:
            pytest.skip(cls.adapter.missing)
        with asyncio.Runner() as runner:
            context = stand(cls.adapter)
            made = runner.run(context.__aenter__())

            async def bounded(scene: Scene) -> None:
                async with asyncio.timeout(SCENE_TIMEOUT):
                    await scene(made)

            try:
                yield lambda scene: runner.run(bounded(scene))
            finally:
                runner.run(context.__aexit__(None, None, None))

    async def is_on_its_way(self, transfer: Transfer, octets: int, feature: Feature) -> None:
        """Wait until a download is in the middle; for a server that cannot do that then, until it is over."""
        if feature in self.adapter.cannot:
            await transfer.complete()
        else:
            await transfer.reached(octets)

    def test_it_says_where_it_listens_who_it_is_and_whom_it_sees(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            for server in on.servers.values():
                for address in server.listens:
                    async with await AioquicClient.connect(address) as client:
                        answer = await client.whoami()
                        assert answer["name"] == CALLED.get(server.name, server.name)
                        assert answer["server_id"] == server.halves[0].server_id.hex()
                        assert answer["client"] == str(client.local)

        play(scene)

    def test_its_resources_are_there_and_no_others(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async with await AioquicClient.connect(on.fronts["web"]) as client:
                assert await client.get("/slow/0.3") == slow_body(0.3)
                assert await client.get("/bytes/0") == b""
                assert await client.get("/bytes/70001") == body(70001)
                for path, status in {"/status/503": 503, "/none": 404, "/": None}.items():
                    transfer = client.begin(path)
                    with contextlib.suppress(ValueError):
                        await transfer.complete()
                    assert transfer.status == status or status is None
                both = client.begin("/slow/0.5"), client.begin("/bytes/100000")
                assert await both[1].complete() == body(100_000)
                assert not both[0].is_over
                assert await both[0].complete() == slow_body(0.5)

        play(scene)

    def test_every_connection_id_is_its_own_and_has_its_token(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            nonces: set[tuple[bytes, bytes]] = set()
            for _ in range(CONNECTIONS):
                async with await AioquicClient.connect(on.fronts["web"]) as client:
                    server = on.servers[(await client.whoami())["name"]]
                    await until(partial(has_spare, client))
                    issued = cids(client)
                for cid, token in issued.items():
                    half = server.half(cid)
                    server_id, nonce = server.decoded(cid)
                    assert (half.config.config_id, server_id) == (0, half.server_id)
                    assert half.reset_key is not None
                    assert token == reset_token(half.reset_key, cid)
                    assert cid[0] == half.config.first_octet()
                    assert (server_id, nonce) not in nonces
                    nonces.add((server_id, nonce))
            assert len(nonces) >= 2 * CONNECTIONS

        play(scene)

    def test_a_download_goes_on_through_nat_rebindings(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async with (
                await NatRelay.open(on.fronts["web"]) as nat,
                await AioquicClient.connect(nat.address) as client,
            ):
                before = await client.whoami()
                transfer = client.begin(f"/bytes/{DOWNLOAD}")
                for third in (1, 2):
                    await self.is_on_its_way(transfer, third * DOWNLOAD // 3, Feature.NAT_REBINDING)
                    await nat.rebind()
                    await client.ping()
                assert await transfer.complete() == body(DOWNLOAD)
                assert await client.get("/bytes/100000") == body(100_000)
                after = await client.whoami()
            assert (after["name"], after["server_id"]) == (before["name"], before["server_id"])
            assert after["client"] != before["client"]

        play(scene)

    def test_a_client_migrates_in_mid_download(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async with await AioquicClient.connect(on.fronts["web"], local="127.0.0.1") as client:
                before = await client.whoami()
                await until(partial(has_spare, client, 2))
                transfer = client.begin(f"/bytes/{DOWNLOAD}")
                for third, local in ((1, "127.0.0.1"), (2, "127.0.0.2")):
                    await self.is_on_its_way(transfer, third * DOWNLOAD // 3, Feature.ACTIVE_MIGRATION)
                    used = client._quic._peer_cid.cid
                    await client.migrate(local)
                    await client.ping()
                    assert client._quic._peer_cid.cid != used
                assert await transfer.complete() == body(DOWNLOAD)
                assert await client.get("/bytes/100000") == body(100_000)
                after = await client.whoami()
            assert (after["name"], after["server_id"]) == (before["name"], before["server_id"])
            assert after["client"] != before["client"]

        play(scene)

    def test_retry_proves_an_address_and_its_connection_id_is_routable(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async with await AioquicClient.connect(on.fronts["retry"]) as client:
                answer = await client.whoami()
                if Feature.RETRY in self.adapter.cannot:
                    assert client._quic._retry_count == 0
                    return
                source = client._quic._retry_source_connection_id
                assert client._quic._retry_count == 1
                assert source is not None
                server = next(each for each in on.servers.values() if each.name in answer["name"][:1])
                assert server.decoded(source)[0] == server.half(source).server_id

        play(scene)

    def test_a_retry_token_is_good_for_every_server_of_the_fleet_and_for_one_address(
        self, play: Callable[[Scene], None]
    ) -> None:
        async def scene(on: Stand) -> None:
            one, other = on.servers["c"].address, on.servers["d"].address
            if Feature.RETRY in self.adapter.cannot:
                return  # there is none
            if self.takes_others_retries:
                async with await going_on_to(other).connect(one) as client:
                    assert (await client.whoami())["name"] == CALLED["d"]
                    assert client._quic._retry_count == 1
            else:
                with pytest.raises(ConnectionEndedError, match=r"0x2$"):  # CONNECTION_REFUSED
                    await going_on_to(other).connect(one)
            with pytest.raises((ConnectionEndedError, TimeoutError)):
                async with await going_on_to(other, local="127.0.0.2").connect(one, local="127.0.0.1"):
                    pass

        play(scene)

    def test_a_session_ticket_is_good_for_every_server_of_the_fleet(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            tickets: list[SessionTicket] = []
            async with await AioquicClient.connect(on.servers["a"].address, tickets=tickets) as client:
                await client.whoami()
                if not self.gives_tickets:
                    assert not tickets
                    return
                await until(lambda: tickets)
            for name in ("b", "d"):
                one = tickets[-1:]
                async with await AioquicClient.connect(on.servers[name].address, tickets=one) as client:
                    assert (await client.whoami())["name"] == CALLED.get(name, name)
                    assert client._quic.tls.session_resumed

        play(scene)

    def test_quic_version_2(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            only = speaking(QuicProtocolVersion.VERSION_2)
            if Feature.QUIC_V2 in self.adapter.cannot:
                with pytest.raises(ConnectionEndedError, match="version"):
                    await only.connect(on.fronts["web"])
                return
            async with await only.connect(on.fronts["web"]) as client:
                assert client._quic._version == QuicProtocolVersion.VERSION_2
                assert await client.get("/bytes/100000") == body(100_000)

        play(scene)

    def test_it_resets_what_it_forgot_and_nothing_else(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            server = on.servers["b"]
            half = server.halves[0]
            assert half.reset_key is not None
            codec = Codec(half.config)
            foreign_id = ServerId(bytes(each ^ 0x55 for each in half.server_id))
            master = bytes.fromhex((on.directory / "reset.key").read_text())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(server.address)
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                for size in (41, 200, 1200):
                    foreign = codec.encode(foreign_id, os.urandom(half.config.nonce_length))
                    forgotten = codec.encode(half.server_id, os.urandom(half.config.nonce_length))
                    foreign_key = server_reset_key(master, half.config.config_id, foreign_id)
                    answer = b""
                    while answer[-TOKEN_LENGTH:] != reset_token(half.reset_key, forgotten):
                        for cid in (foreign, forgotten):
                            sock.send(short_header(cid, size))
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(1.0):
                                answer = await loop.sock_recv(sock, 65536)
                                assert MIN_RESET <= len(answer) < size
                                assert answer[0] & 0b1100_0000 == 0b0100_0000
                                assert answer[-TOKEN_LENGTH:] != reset_token(foreign_key, foreign)
                                is_own = answer[-TOKEN_LENGTH:] == reset_token(half.reset_key, forgotten)
                                assert is_own or self.answers_any_cid
                # Too small to be answered by something smaller; and what follows is answered.
                probe = codec.encode(half.server_id, os.urandom(half.config.nonce_length))
                small = codec.encode(half.server_id, os.urandom(half.config.nonce_length))
                while answer[-TOKEN_LENGTH:] != reset_token(half.reset_key, probe):
                    sock.send(short_header(small, MIN_RESET))
                    sock.send(short_header(probe, 100))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            answer = await loop.sock_recv(sock, 65536)
                            assert answer[-TOKEN_LENGTH:] != reset_token(half.reset_key, small)

        play(scene)

    def test_after_a_restart_old_connections_are_reset_and_no_nonce_comes_again(
        self, play: Callable[[Scene], None]
    ) -> None:
        async def scene(on: Stand) -> None:
            server = on.servers["a"]
            async with placed(on, server) as client:
                await until(partial(has_spare, client))
                before = set(cids(client))
                await server.child.kill()
                await on.restart(server)
                while not client.ended.done():
                    client.ping()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(client.ended), 0.1)
                assert isinstance(client.ended.result(), StatelessResetError)
            assert await on.resets() == 0
            async with placed(on, server) as client:
                await until(partial(has_spare, client))
                after = set(cids(client))
            assert not {server.decoded(cid)[1] for cid in before} & {server.decoded(cid)[1] for cid in after}
            # A block of nonces was skipped: counters of one key, if they are not hidden, would show it.
            marks = json.loads((server.directory / "nonces").read_text())["marks"]
            assert all(mark["reserved"] > len(before) + len(after) for mark in marks.values())

        play(scene)

    def test_garbage_is_survived(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            random = Random(SEED)
            for name in ("a", "c"):
                server = on.servers[name]
                async with await AioquicClient.connect(server.address) as client:
                    await until(partial(has_spare, client))
                    cid = next(iter(cids(client)))
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                        for _ in range(GARBAGE):
                            sock.sendto(garbage(random, cid), server.address)
                    assert (await client.whoami())["server_id"] == server.halves[0].server_id.hex()
                async with await AioquicClient.connect(server.address) as client:
                    assert await client.get("/bytes/100000") == body(100_000)

        play(scene)

    def test_wrong_files_are_refused_with_the_reason(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async def refused(i: int, spoil: Callable[[Path], None], reason: str) -> None:
                directory = on.directory / f"wrong-{i}"
                shutil.copytree(on.servers["a"].directory, directory, ignore=shutil.ignore_patterns("log", "nonces*"))
                spoil(directory / SERVER_FILE)
                async with slots:
                    errors = await refuses(on, directory / SERVER_FILE, reason)
                for key in directory.glob("*.key"):
                    assert key.read_text().strip()[:16] not in errors

            slots = asyncio.Semaphore(4)
            await asyncio.gather(*(refused(i, *WRONG[name]) for i, name in enumerate(self.wrong or WRONG)))

        play(scene)

    def test_a_wrong_file_leaves_a_running_server_as_it_is(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            server = on.servers["b"]
            good = server.file.read_text()
            async with placed(on, server) as client:
                cut_off = (_written("name: b\nnonce-file: nonces\n"), "cid-config.*missing")
                for spoil, reason in (WRONG["unknown key"], WRONG["config ID 7"], WRONG["readable key"], cut_off):
                    spoil(server.file)
                    server.child.signal(signal.SIGHUP)
                    await until(partial(has_said, server, reason))
                    key = server.directory / server.halves[0]._key_name
                    key.chmod(0o600)
                    server.file.write_text(good)
                assert (await client.whoami())["name"] == "b"
                async with placed(on, server) as another:
                    assert all(server.half(cid) is server.halves[0] for cid in cids(another))

        play(scene)

    def test_a_new_configuration_takes_over(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            server = on.servers["b"]
            old, new = server.halves
            async with placed(on, server) as client:
                await until(partial(has_spare, client, 2))
                before = cids(client)
                transfer = client.begin("/slow/1.5")
                await transfer.reached(10)
                replace(new, made="2026-11-21T00:00:01Z").write(server.directory)
                server.child.signal(signal.SIGHUP)
                if Feature.ROTATION in self.adapter.cannot:
                    # The client keeps what it has, and what it gets in place of that is of the new configuration.
                    await until_new_connections(on, server, under=1)
                    assert cids(client).keys() == before.keys()
                    for _ in range(2):  # some servers do not replace the first one of all
                        await client.migrate()
                        await client.ping()
                    await until(lambda: any(server.half(cid) is new for cid in cids(client)))
                else:
                    await until(lambda: not cids(client).keys() & before.keys())
                    assert all(server.half(cid) is new for cid in cids(client))
                for cid, token in cids(client).items():
                    half = server.half(cid)
                    assert server.decoded(cid)[0] == half.server_id
                    reset_key = (old if self.keeps_reset_key else half).reset_key
                    assert reset_key is not None
                    assert token == reset_token(reset_key, cid)
                assert await transfer.complete() == slow_body(1.5)
                assert (await client.whoami())["name"] == "b"
            await until_new_connections(on, server, under=1)
            # Back again, which a file has to mean; with nonces that go on where they were.
            replace(old, made="2026-11-21T00:00:02Z").write(server.directory)
            server.child.signal(signal.SIGHUP)
            await until_new_connections(on, server, under=0)
            async with placed(on, server) as client:
                nonces = {server.decoded(cid)[1] for cid in cids(client)}
            assert not nonces & {server.decoded(cid)[1] for cid in before}
            # What comes too late, or says nothing about it, is not taken.
            for made, reason in (("2026-11-21T00:00:01Z", "made"), (None, "config")):
                replace(new, made=made).write(server.directory)
                server.child.signal(signal.SIGHUP)
                await until(partial(has_said, server, rf"{reason}.*(older|left)"))
            await until_new_connections(on, server, under=0)

        play(scene)

    def test_sigterm_closes_connections_and_ends_it(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            server = on.servers["c"]
            async with await AioquicClient.connect(server.address) as client:
                transfer = client.begin("/slow/0.1")
                await transfer.reached(1)
                assert await server.child.stop() == 0
                await until(client.ended.done)
                assert not isinstance(client.ended.result(), StatelessResetError)
            await on.restart(server)

        play(scene)


class BuiltContract(Contract):
    """The tests of a program that makes connection IDs by code of its own."""

    def test_it_computes_what_the_vectors_say(self) -> None:
        if self.adapter.missing:
            pytest.skip(self.adapter.missing)
        program = BUILT / self.adapter.name / "vectors"
        done = subprocess.run(
            [program], input=FILE.read_bytes(), capture_output=True, timeout=SCENE_TIMEOUT, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        computed, expected = json.loads(done.stdout), json.loads(FILE.read_text())
        for section in ("cids", "tokens", "identities", "permutations"):
            assert computed[section] == expected[section]

    def test_nonce_files_are_those_of_quiclb_itself(self, tmp_path: Path) -> None:
        if self.adapter.missing:
            pytest.skip(self.adapter.missing)
        asyncio.run(self.nonces(Stand(self.adapter, tmp_path)))

    async def nonces(self, on: Stand) -> None:
        """Run a server with one nonce file after the other."""
        server = on.servers["a"]
        half = replace(server.halves[0], config=CidConfig(ConfigId(0), 4, 4, bytes(range(16))), made=None)
        codec = Codec(half.config)
        identity = _identity(half.config, half.server_id)
        other = NonceMark(2**143 + 12345, 2**140, bytes(range(16)))
        path = server.directory / "nonces"
        half.write(server.directory)

        # Another process has the file.
        with HighWaterFile(path) as marks:
            marks.save("ff" * 16, other)
            await refuses(on, server.file, "in use")
        # It goes on where a predecessor may have been, and, when there is no nonce left, with 0b111.
        start, left = 2**32 - 2, 3
        with HighWaterFile(path) as marks:
            marks.save(identity, NonceMark(start, 2**32 - left))
        await on.restart(server)
        try:
            async with await AioquicClient.connect(server.address) as client:
                await until(partial(has_spare, client, left))
                issued = sorted((each.sequence_number, each.cid) for each in known(client))
        finally:
            assert await server.child.stop() == 0
        assert {len(cid) for _, cid in issued} == {half.config.cid_length}
        decoded = [codec.decode(cid) for _, cid in issued]
        first = start + 2**32 - left
        expected = [(half.server_id, ((first + i) % 2**32).to_bytes(4)) for i in range(left)]
        assert decoded[:left] == expected
        assert [config_id_of(cid) for _, cid in issued[left:]] == [UNROUTABLE] * (len(issued) - left)
        assert all(cid[0] == UNROUTABLE << 5 | half.config.cid_length - 1 for _, cid in issued[left:])
        with HighWaterFile(path) as marks:
            assert marks.load(identity) == NonceMark(start, 2**32)
            assert marks.load("ff" * 16) == other
        # Others might read it; it is damaged.
        path.chmod(0o644)
        await refuses(on, server.file, r"nonces.*0644")
        path.chmod(0o600)
        path.write_text(path.read_text().replace('"reserved": 4294967296', '"reserved": 4294967295'))
        await refuses(on, server.file, r"nonces.*damaged")
        # Without a key a mark has one that hides the counter.
        path.unlink()
        plaintext = replace(half, config=replace(half.config, key=None))
        plaintext.write(server.directory)
        await on.restart(server)
        try:
            async with await AioquicClient.connect(server.address) as client:
                await until(partial(has_spare, client))
                issued = sorted((each.sequence_number, each.cid) for each in known(client))
        finally:
            await server.child.stop()
        with HighWaterFile(path) as marks:
            mark = marks.load(_identity(plaintext.config, plaintext.server_id))
        assert mark is not None
        hide = FourPass(mark.permutation_key, 4).encrypt
        counters = [hide(((mark.start + i) % 2**32).to_bytes(4)) for i in range(len(issued))]
        assert [Codec(plaintext.config).decode(cid) for _, cid in issued] == [
            (plaintext.server_id, counter) for counter in counters
        ]


async def refuses(on: Stand, file: Path, reason: str) -> str:
    """Start a server that is to say why it does not start. Returns all that it says."""
    process = await asyncio.create_subprocess_exec(
        *on.command(file, "--listen", "127.0.0.1:0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    except TimeoutError:
        process.kill()
        raise
    assert (process.returncode, output) == (2, b""), (reason, output, errors)
    lines = errors.decode().splitlines()
    assert any(re.search(rf"^\S+: .*{reason}", line) for line in lines), (reason, lines)
    return errors.decode()


def known(client: AioquicClient) -> list[Any]:
    """What aioquic knows of each connection ID that it may use."""
    return [client._quic._peer_cid, *client._quic._peer_cid_available]


def cids(client: AioquicClient) -> dict[bytes, bytes]:
    """The connection IDs that a client may use, that of now first, and their tokens."""
    return {each.cid: each.stateless_reset_token for each in known(client)}


def has_spare(client: AioquicClient, how_many: int = 1) -> bool:
    """Whether a client may change its connection ID."""
    return len(cids(client)) > how_many


def has_said(server: Server, reason: str) -> bool:
    return re.search(reason, server.child.last_words()) is not None


@cache
def initial() -> bytes:
    """The first datagram of a client."""
    quic = QuicConnection(configuration=QuicConfiguration(alpn_protocols=["h3"]))
    quic.connect(("192.0.2.1", 443), now=0.0)
    return quic.datagrams_to_send(now=0.0)[0][0]


def garbage(random: Random, cid: bytes) -> bytes:
    """A datagram that somebody has spoilt: a client's first one, one of a connection, or octets."""
    datagram = bytearray(
        random.choice(
            (
                initial(),
                short_header(cid, random.randint(len(cid) + 1, 1300)),
                random.randbytes(random.randint(1, 1500)),
            )
        )
    )
    for _ in range(random.choice((0, 1, 1, 4))):
        datagram[random.randrange(min(len(datagram), 60))] = random.randrange(256)
    return bytes(datagram[: random.choice((len(datagram), random.randint(0, len(datagram))))])


def short_header(cid: bytes, size: int) -> bytes:
    """What might be a packet of a connection that has lasted for a while."""
    return b"\x40" + cid + os.urandom(size - 1 - len(cid))


@contextlib.asynccontextmanager
async def placed(on: Stand, server: Server) -> AsyncIterator[AioquicClient]:
    """A client that came to a given server through the balancer. One that was started just now is DOWN for a while."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while loop.time() < deadline:
        async with await AioquicClient.connect(on.fronts["web"]) as client:
            if (await client.whoami())["name"] == server.name:
                yield client
                return
    raise AssertionError(f"no connection on {server.name}")


async def until_new_connections(on: Stand, server: Server, under: int) -> None:
    """Wait until what a new client gets is of that configuration."""
    async with asyncio.timeout(PATIENCE):
        while True:
            async with await AioquicClient.connect(server.address) as client:
                await until(partial(has_spare, client))
                if all(server.half(cid) is server.halves[under] for cid in cids(client)):
                    return


def speaking(*versions: int) -> type[AioquicClient]:
    """Clients that speak these versions of QUIC, and begin with the first."""

    class Special(AioquicClient):
        stack = AioquicClient.stack._replace(
            configuration=partial(QuicConfiguration, supported_versions=list(versions), original_version=versions[0])
        )

    return Special


def going_on_to(other: Address, local: str | None = None) -> type[AioquicClient]:
    """Clients that go to another server when they are sent a Retry, from another address if `local` is given."""

    class Detour(AioquicClient):
        def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
            if data[0] & 0b1111_0000 == 0b1111_0000:  # a Retry of version 1
                self._quic._network_paths[0].addr = addr = tuple(other)
                if local is not None:
                    self._moving = asyncio.ensure_future(self._open(local))
                    self._moving.add_done_callback(lambda _: super(Detour, self).datagram_received(data, addr))
                    return
            super().datagram_received(data, addr)

    return Detour


def _replaced(old: str, new: str) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        text = file.read_text()
        assert re.search(old, text)
        file.write_text(re.sub(old, new, text, count=1))

    return spoil


def _written(text: str) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        file.write_text(text)

    return spoil


def _truncated(file: Path) -> None:
    file.write_text(file.read_text()[:90])


def _readable_key(file: Path) -> None:
    next(file.parent.glob("cid-0-*.key")).chmod(0o644)


def _short_key(file: Path) -> None:
    secret(next(file.parent.glob("cid-0-*.key")), secrets.token_hex(15))


def _no_reset_key(file: Path) -> None:
    next(file.parent.glob("reset-0-*.key")).unlink()


WRONG = {
    "unknown key": (_replaced("server-id:", "serverid: x\nserver-id:"), "serverid"),
    "config ID 7": (_replaced("config-id: 0", "config-id: 7"), "config-id"),
    "server ID of another length": (_replaced('server-id: "..', 'server-id: "'), "server-id"),
    "no hex digits": (_replaced('server-id: "..', 'server-id: "zz'), "server-id"),
    "no server ID": (_replaced('server-id: ".*"', ""), "server-id"),
    "too short a nonce": (_replaced("nonce-length: 12", "nonce-length: 3"), "nonce-length"),
    "twenty-one octets": (_replaced("nonce-length: 12", "nonce-length: 17"), "cid-config"),
    "neither true nor false": (_replaced("encodes-length: true", "encodes-length: yes"), "encodes-length"),
    "given twice": (_replaced("server-id:", "name: b\nserver-id:"), "name"),
    "no moment": (_replaced("made: .*", "made: yesterday"), "made"),
    "no name": (_replaced("name: .*", ""), "name"),
    "not YAML": (_written("name: [\n"), SERVER_FILE),
    "truncated": (_truncated, "cid-config|not YAML"),
    "empty": (_written(""), SERVER_FILE),
    "not there": (Path.unlink, SERVER_FILE),
    "readable key": (_readable_key, r"cid-0-.*\.key.* 0644"),
    "short key": (_short_key, r"cid-0-.*\.key"),
    "no reset key": (_no_reset_key, r"reset-0-.*\.key"),
}
