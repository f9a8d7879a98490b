"""Chromium, without a window, told what to fetch over its debugging pipe.

It runs only where there is no network but ours: elsewhere it looks up its vendor's hosts, whatever it is told.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.clients.process import DIES_WITH_US
from backend.clients.transfer import ConnectionEndedError, Transfer
from backend.clients.visitor import Wishes
from lb.address import Address

# Ours.
PROGRAM = "chromium"
SERVER_NAME = "lb.test"  # not localhost, which it takes for ::1
START_TIMEOUT = 10.0  # seconds, until the first page is there
END_TIMEOUT = 5.0  # seconds
MAX_MESSAGE = 1 << 24  # octets
LOOPBACK = "lo"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
TELL = "tell"  # what the page calls

# Fetches one path after the other and tells what comes: [number, status, base64, is it the end, error].
FETCH = """
(async (first, paths) => {
  for (const [i, path] of paths.entries()) {
    const tell = (...what) => globalThis.%(tell)s(JSON.stringify([first + i, ...what]));
    try {
      const response = await fetch(path, {cache: "no-store"});
      const reader = response.body.getReader();
      for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        let text = "";
        for (let at = 0; at < value.length; at += 32768)
          text += String.fromCharCode(...value.subarray(at, at + 32768));
        tell(response.status, btoa(text), false, "");
      }
      tell(response.status, "", true, "");
    } catch (error) {
      tell(0, "", true, String(error));
      return;
    }
  }
})(%(first)d, %(paths)s); 0
"""

SPEAK = 'fetch("/status/200", {cache: "no-store"}).catch(() => 0); 0'


def missing() -> str | None:
    """Why it cannot be used here; None if it can."""
    if shutil.which(PROGRAM) is None:
        return f"{PROGRAM} is not installed (Debian: apt-get install {PROGRAM})"
    if os.geteuid() != 0:
        return f"{PROGRAM} needs a network namespace, and that needs root"
    return None


class ChromiumVisitor:
    """One browser with a profile of its own. Sessions are what its one page fetches."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: _Pipe | None = None
        self._page = ""
        self._transfers: list[Transfer] = []

    async def open(self, server: Address, *paths: str) -> ChromiumSession:
        if self._pipe is None:
            self._pipe = await self._start(server)
        first = len(self._transfers)
        session = ChromiumSession([Transfer(path) for path in paths], self._speak)
        self._transfers += session.transfers
        values = {"tell": TELL, "first": first, "paths": json.dumps(paths)}
        try:
            async with asyncio.timeout(START_TIMEOUT):
                if not self._page:
                    self._page = await self._open_page(self._pipe, f"https://{SERVER_NAME}:{server.port}/status/200")
                await self._pipe.ask("Runtime.evaluate", self._page, expression=FETCH % values)
                await session.transfers[0].reached(1)
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self._profile.cleanup()

    async def _start(self, server: Address) -> _Pipe:
        if _has_way_out():
            raise OSError(f"{PROGRAM} is not started where there is a default route")
        options = [
            *OPTIONS,
            f"--user-data-dir={self._profile.name}",
            f"--host-resolver-rules=MAP {SERVER_NAME} {server.host}, MAP * ~NOTFOUND, EXCLUDE {server.host}",
            f"--origin-to-force-quic-on={SERVER_NAME}:{server.port}",
            f"--ignore-certificate-errors-spki-list={self._wishes.spki}",
        ]
        if self._wishes.quic_v2:
            options.append("--quic-version=RFCv2")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # It reads descriptor 3 and writes 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = await asyncio.create_subprocess_exec(
            *DIES_WITH_US,
            *("bash", "-c", script, PROGRAM, PROGRAM, *options, "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        return await _Pipe.open(ours_in, ours_out, self._told)

    async def _open_page(self, pipe: _Pipe, url: str) -> str:
        """A page of the server's own, so that its scripts may fetch there. Returns its session with the pipe."""
        target = (await pipe.ask("Target.createTarget", url="about:blank"))["targetId"]
        page: str = (await pipe.ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        await pipe.ask("Page.enable", page)
        await pipe.ask("Runtime.enable", page)
        await pipe.ask("Runtime.addBinding", page, name=TELL)
        answer = await pipe.ask("Page.navigate", page, url=url)
        if answer.get("errorText"):
            raise ConnectionEndedError(answer["errorText"])
        await pipe.loaded.wait()
        return page

    def _speak(self) -> None:
        if self._pipe is not None and self._page:
            self._pipe.tell("Runtime.evaluate", self._page, expression=SPEAK)

    def _told(self, payload: str) -> None:
        number, status, encoded, is_last, error = json.loads(payload)
        transfer = self._transfers[number]
        if transfer.is_over:
            return
        if error:
            for other in self._transfers[number:]:
                if not other.is_over:
                    other.fail(ConnectionEndedError(error))
            return
        transfer.status = status
        transfer.feed(base64.b64decode(encoded), is_last=is_last)


class ChromiumSession:
    """What one page has asked for. Which connection that goes by is the browser's affair."""

    can_speak = False  # not at once
    reset_at: float | None = None  # a page is not told why a connection ended
    early: bool | None = None

    def __init__(self, transfers: list[Transfer], speak: Callable[[], None]) -> None:
        self.transfers = transfers
        self._speak = speak

    def speak(self) -> None:
        """Have the page make another request, sooner or later."""
        self._speak()

    async def close(self) -> None:
        for transfer in self.transfers:
            if not transfer.is_over:
                transfer.fail(ConnectionEndedError("closed by ourselves"))


class _Pipe:
    """Chromium's debugging protocol: JSON messages that end in a zero octet."""

    def __init__(self, writer: asyncio.WriteTransport, told: Any) -> None:
        self.loaded = asyncio.Event()
        self._writer = writer
        self._told = told
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._read_transport: asyncio.BaseTransport | None = None

    @classmethod
    async def open(cls, readable: int, writable: int, told: Any) -> _Pipe:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_MESSAGE)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(readable, "rb", 0)
        )
        writer, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(writable, "wb", 0))
        pipe = cls(writer, told)
        pipe._read_transport = transport
        pipe._reading = asyncio.create_task(pipe._read(reader))
        return pipe

    async def ask(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command. Raises ConnectionEndedError if there is no answer, or an error."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self.tell(method, session, **parameters)] = answer
        result: dict[str, Any] = await answer
        return result

    def tell(self, method: str, session: str = "", **parameters: Any) -> int:
        """Send a command. Returns its number."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._writer.write(json.dumps(message).encode() + b"\0")
        return number

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        for transport in (self._writer, self._read_transport):
            if transport is not None:
                transport.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = json.loads((await reader.readuntil(b"\0"))[:-1])
                if message.get("method") == "Runtime.bindingCalled":
                    self._told(message["params"]["payload"])
                elif message.get("method") == "Page.loadEventFired":
                    self.loaded.set()
                elif (waiting := self._waiting.pop(message.get("id"), None)) and not waiting.done():
                    if "error" in message:
                        waiting.set_exception(ConnectionEndedError(str(message["error"])))
                    else:
                        waiting.set_result(message["result"])
        except asyncio.IncompleteReadError:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionEndedError(f"{PROGRAM} has ended"))


def _has_way_out() -> bool:
    """Whether there is a default route: in our namespaces there is none."""
    network = Path("/proc/thread-self/net")  # a namespace is a thread's
    ipv4 = [line.split() for line in (network / "route").read_text().splitlines()]
    ipv6_file = network / "ipv6_route"
    ipv6 = [line.split() for line in ipv6_file.read_text().splitlines()] if ipv6_file.exists() else []
    return any(fields[1] == fields[7] == "0" * 8 for fields in ipv4) or any(
        fields[0] == "0" * 32 and fields[1] == "00" and fields[-1] != LOOPBACK for fields in ipv6
    )
