"""gtlsclient, the client of ngtcp2 with GnuTLS (Debian: ngtcp2-client), as a subprocess whose log is read.

It always exits with 0: what it has downloaded, and its log, say how it went. Requests and moves are given when it
starts; for any other move put a `NatRelay` before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from backend.clients.process import DIES_WITH_US
from backend.clients.transfer import ConnectionEndedError, Move, StatelessResetError, Transfer
from lb.address import Address

# Ours.
PROGRAM = "gtlsclient"
CONNECT_TIMEOUT = 5.0  # seconds
POLL = 0.02  # seconds from one look at the downloaded files to the next
LOG_LIMIT = 1 << 20  # octets of a line

# Its words.
_CONNECTED = re.compile(rb"QUIC handshake has been confirmed")
_RESET = re.compile(rb" SR token=")
_ASKED = re.compile(rb"http: stream 0x0 submit request headers")
_HANDSHAKE_DONE = re.compile(rb"QUIC handshake has completed")
_EARLY_REFUSED = re.compile(rb"Early data was rejected by server")
_STATUS = re.compile(rb"http: stream 0x([0-9a-f]+) \[:status: (\d+)\]")
_CLOSED = re.compile(rb"HTTP stream (\d+) closed with error code (\d+)")
_H3_NO_ERROR = 0x100


def available() -> bool:
    """Whether gtlsclient is installed."""
    return shutil.which(PROGRAM) is not None


class GtlsClient:
    """One connection, and one transfer for each path.

    `reset_at` is when a Stateless Reset ended it; `early` whether the server took early data, None if there was none.
    """

    name = "gtlsclient"
    can_speak = False

    def __init__(self, paths: Sequence[str]) -> None:
        self.transfers = [Transfer(path) for path in paths]
        self.reset_at: float | None = None
        self.early: bool | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="gtlsclient-")
        self._process: asyncio.subprocess.Process | None = None
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        server: Address,
        *paths: str,
        body: bytes | None = None,
        move: Move | None = None,
        move_after: float = 0.4,
        wait_connected: bool = True,
        memory: Path | None = None,
    ) -> GtlsClient:
        """Connect and GET each of `paths`, or with a body POST it.

        With `move`, do that `move_after` seconds later. What the server gives for the next time is kept in the
        directory `memory`. The last segments of paths name files, and must differ.
        Raises ConnectionEndedError or TimeoutError if there is no connection.
        """
        client = cls(paths)
        options = ["--no-quic-dump", "--no-http-dump", "--exit-on-all-streams-close"]
        options.append(f"--download={client._downloads}")
        if move is not None:
            options.append(f"--change-local-addr={round(move_after * 1000)}ms")
        if move is Move.NAT_REBINDING:
            options.append("--nat-rebinding")
        if body is not None:
            data = Path(client._directory.name) / "body"
            data.write_bytes(body)
            options += ["--http-method=POST", f"--data={data}"]
        if memory is not None:
            options += [f"--session-file={memory / 'session'}", f"--tp-file={memory / 'transport-parameters'}"]
        client._downloads.mkdir()
        uris = [f"https://localhost:{server.port}{path}" for path in paths]
        client._process = await asyncio.create_subprocess_exec(
            *DIES_WITH_US,
            PROGRAM,
            *options,
            server.host,
            str(server.port),
            *uris,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=LOG_LIMIT,
        )
        client._watching = asyncio.create_task(client._watch(client._process))
        if wait_connected:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await asyncio.shield(client._connected)
            except BaseException:
                await client.close()
                raise
        return client

    async def __aenter__(self) -> GtlsClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def speak(self) -> None:
        """It cannot be told to."""

    async def close(self) -> None:
        """End the process, if it has not ended, and remove its files."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Not Process.kill(): that may reap it behind asyncio's back.
                os.kill(self._process.pid, signal.SIGKILL)
        if self._watching is not None:
            await self._watching
        self._directory.cleanup()

    @property
    def _downloads(self) -> Path:
        return Path(self._directory.name) / "downloads"

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        if process.stderr is None:
            raise RuntimeError("started without a pipe")
        polling = asyncio.create_task(self._poll())
        closed: set[int] = set()
        is_done = False  # with its handshake
        async for line in process.stderr:
            if _RESET.search(line) and self.reset_at is None:
                self.reset_at = time.time()
            elif _CONNECTED.search(line) and not self._connected.done():
                self._connected.set_result(None)
            elif _HANDSHAKE_DONE.search(line):
                is_done = True
            elif _ASKED.search(line) and not is_done:
                self.early = True
            elif _EARLY_REFUSED.search(line):
                self.early = False
            elif status := _STATUS.search(line):
                self.transfers[int(status[1], 16) // 4].status = int(status[2])
            elif (end := _CLOSED.search(line)) and int(end[2]) == _H3_NO_ERROR:
                closed.add(int(end[1]) // 4)
                self._read_files(closed)
        await process.wait()
        polling.cancel()
        self._read_files(closed)
        error = (
            StatelessResetError(self.reset_at)
            if self.reset_at is not None
            else ConnectionEndedError(f"{PROGRAM} has ended its connection")
        )
        for transfer in self.transfers:
            if not transfer.is_over:
                transfer.fail(error)
        if not self._connected.done():
            self._connected.set_exception(error)
            self._connected.exception()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            self._read_files(set())

    def _read_files(self, closed: set[int]) -> None:
        for i, transfer in enumerate(self.transfers):
            if transfer.is_over:
                continue
            new = b""
            with contextlib.suppress(FileNotFoundError), self._file(transfer).open("rb") as file:
                file.seek(len(transfer.body))
                new = file.read()
            transfer.feed(new, is_last=i in closed)

    def _file(self, transfer: Transfer) -> Path:
        return self._downloads / transfer.path.rpartition("/")[2]
