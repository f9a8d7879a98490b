"""Beyond the contract: other clients than aioquic, and the unit tests that an adapter has in its own language."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, ClassVar

import pytest

from backend.adapters.registry import Feature
from backend.clients import gtlsclient
from backend.clients.aioquic_client import AioquicClient
from backend.clients.gtlsclient import GtlsClient
from backend.clients.qh3_client import Qh3Client
from backend.clients.relay import NatRelay
from backend.clients.transfer import Move, Transfer
from tests.adapters.contract import DOWNLOAD, BuiltContract, Scene, body
from tests.adapters.stand import Stand, until

UPLOAD = 20_000_000  # octets: what takes some tenths of a second at least
ATTEMPTS = 5
UNIT_TESTS_TIMEOUT = 300.0  # seconds; they take one, if build.sh has compiled them


class SeveralClients(BuiltContract):
    """The contract, and more. `unit_tests` is a command to be run in the adapter's directory."""

    unit_tests: ClassVar[Sequence[str]]

    def test_its_unit_tests_pass(self) -> None:
        if self.adapter.missing:
            pytest.skip(self.adapter.missing)
        if shutil.which(self.unit_tests[0]) is None:
            pytest.skip(f"no {self.unit_tests[0]}")
        assert self.adapter.build is not None
        done = subprocess.run(
            self.unit_tests,
            cwd=self.adapter.build.parent,
            capture_output=True,
            text=True,
            timeout=UNIT_TESTS_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_early_data_is_for_any_server_of_the_fleet_and_for_what_changes_nothing(
        self, play: Callable[[Scene], None]
    ) -> None:
        async def scene(on: Stand) -> None:
            tickets: list[Any] = []
            async with await AioquicClient.connect(on.servers["a"].address, tickets=tickets) as client:
                await client.whoami()
                await until(lambda: tickets)
            begun: list[Transfer] = []

            def at_once(client: AioquicClient) -> None:
                begun.extend((client.begin("/whoami"), client.begin("/upload", b"x")))

            other = on.servers["b"]
            for _ in range(ATTEMPTS):
                begun.clear()
                async with await AioquicClient.connect(other.address, tickets=tickets[-1:], at_once=at_once) as client:
                    answer = json.loads(await begun[0].complete())
                    assert answer["name"] == other.name
                    assert client._quic.tls.session_resumed
                    is_refused = await too_early(begun[1])
                    assert client.early == (Feature.EARLY_DATA_ELSEWHERE not in self.adapter.cannot)
                    if not client.early:
                        assert not is_refused
                        return
                if answer["early"] and is_refused:
                    return
                # The server looked at one of them when the handshake was over: then nothing is early any more.
            raise AssertionError(f"{ATTEMPTS} connections, and no request was early")

        play(scene)

    def test_qh3_downloads_through_a_nat_that_rebinds_and_a_migration(self, play: Callable[[Scene], None]) -> None:
        async def scene(on: Stand) -> None:
            async with (
                await NatRelay.open(on.fronts["web"]) as nat,
                await Qh3Client.connect(nat.address) as client,
            ):
                before = await client.whoami()
                transfer = client.begin(f"/bytes/{DOWNLOAD}")
                await transfer.reached(DOWNLOAD // 3)
                await nat.rebind()
                client.ping()
                await transfer.reached(2 * DOWNLOAD // 3)
                await client.migrate()
                assert await transfer.complete() == body(DOWNLOAD)
                after = await client.whoami()
            assert (after["name"], after["server_id"]) == (before["name"], before["server_id"])
            assert after["client"] != before["client"]

        play(scene)

    @pytest.mark.parametrize("move", Move)
    def test_gtlsclient_moves_in_mid_upload(self, play: Callable[[Scene], None], move: Move) -> None:
        # It does so by itself after a while; in a download it might have nothing to say from its new address.
        if not gtlsclient.available():
            pytest.skip("no gtlsclient")
        sent = body(UPLOAD)

        async def scene(on: Stand) -> None:
            before = await on.moves()
            async with await GtlsClient.start(
                on.fronts["web"], "/upload", body=sent, move=move, move_after=0.05
            ) as client:
                answer = json.loads(await client.transfers[0].complete())
                assert answer == {"octets": UPLOAD, "sha256": sha256(sent).hexdigest()}
                assert client.reset_at is None
            assert await on.moves() > before

        play(scene)


async def too_early(upload: Transfer) -> bool:
    """Whether an upload of one octet was refused because somebody who saw it could send it again (RFC 8470)."""
    try:
        assert json.loads(await upload.complete())["octets"] == 1
    except ValueError as error:
        if "425" not in str(error):
            raise
        return True
    return False
