"""lb/admin/server.py: where it listens, whom it lets in over real sockets, and how little a client can take from it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lb.address import Address
from lb.admin import connection, server
from lb.admin.access import Peer
from lb.admin.http import Request, Response
from lb.admin.openapi import OPERATIONS
from lb.keys import AdminConfig
from lb.operations import Operations
from tests.admin.certificates import Authority, Pair
from tests.admin.client import DEADLINE, ask, connect, raw, status_of
from tests.admin.fake import LOOPBACK, Running, running

READ, WRITE = "a token to read".replace(" ", "-"), "a token to write".replace(" ", "-")
GET = b"GET /v1/state HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def tokens(tmp_path: Path) -> AdminConfig:
    """A configuration with both tokens."""
    config = AdminConfig(read_token_file=tmp_path / "read", write_token_file=tmp_path / "write")
    for path, token in ((config.read_token_file, READ + "-"), (config.write_token_file, WRITE)):
        assert path is not None
        path.write_text(token + "\n")
        path.chmod(0o600)
    return config


@pytest.fixture(scope="module")
def open_server() -> Iterator[Running]:
    """One that nobody needs proof for, on loopback."""
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("localhost")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


# Where it listens.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_serves_at_addresses_of_either_family(host: str) -> None:
    with running(addresses=[Address(host, 0)]) as made:
        assert made.address.host == host
        assert made.address.port != 0
        assert ask(made.address, "GET", "/livez").body == b"ok\n"


def test_a_unix_socket_is_for_its_owner_alone_from_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "admin.sock"
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.add(stat.S_IMODE(path.stat().st_mode))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = os.umask(0)
    try:
        with running(addresses=[path]) as made:
            assert made.server.addresses == (path,)
            assert ask(path, "GET", "/v1/state").json["rights"] == "write"
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            eventually(lambda: bool(seen))
    finally:
        os.umask(before)
        stop.set()
        watcher.join()
    assert seen == {0o600}
    assert not path.exists()


def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with running(addresses=[path]):
        assert ask(path, "GET", "/livez").status == 200


def test_a_socket_that_somebody_listens_at_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with running(addresses=[path]), pytest.raises(OSError, match=f"unix:{path}: Address already in use") as raised:
        Running(addresses=[path])
    assert raised.value.errno == errno.EADDRINUSE


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match=f"unix:{path}: "):
        Running(addresses=[path])
    assert path.read_text() == "precious"


def test_a_port_in_use_is_named_and_nothing_stays_behind(tmp_path: Path, open_server: Running) -> None:
    path = tmp_path / "admin.sock"
    with pytest.raises(OSError, match=re.escape(f"{open_server.address}: Address already in use")):
        Running(addresses=[path, open_server.address])
    assert not path.exists()


def test_an_address_that_becomes_free_in_time_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with running(addresses=[path, LOOPBACK]) as first:
        second = Running(addresses=[path, first.address], start=False)
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(second.start, DEADLINE)
            assert ask(path, "GET", "/livez").status == 200
            first.stop()
            starting.result(DEADLINE)
        try:
            assert ask(path, "GET", "/livez").status == 200
            assert second.server.addresses == (path, second.address)
        finally:
            second.stop()


def test_released_addresses_go_to_a_successor_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with running(addresses=[path, LOOPBACK]) as first:
        address = first.address
        first.balancer.hold.clear()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, path, "POST", "/v1/reload", {})  # as an upgrade would be
            eventually(lambda: first.balancer.waiting > 0)
            call(first, first.server.release())
            assert not path.exists()
            assert first.server.addresses == ()
            with running(addresses=[path, address]):
                assert ask(path, "GET", "/livez").status == 200
            assert not path.exists()
            first.loop.call_soon_threadsafe(first.balancer.hold.set)
            assert asked.result(DEADLINE).status == 200
        call(first, first.server.start())
        assert ask(path, "GET", "/livez").status == 200


def test_stop_answers_who_is_waiting_and_cuts_off_the_others(tmp_path: Path) -> None:
    path, before = tmp_path / "admin.sock", admin_threads()
    with running(addresses=[path]) as made, connect(path) as idle, ThreadPoolExecutor(1) as pool:
        idle.sendall(b"GET /v1/st")
        made.balancer.hold.clear()
        asked = pool.submit(ask, path, "POST", "/v1/reload", {})
        eventually(lambda: made.balancer.waiting > 0)
        made.loop.call_soon_threadsafe(made.loop.call_later, 0.3, made.balancer.hold.set)
        made.stop()

        assert asked.result(DEADLINE).status == 200
        assert idle.recv(1) == b""
    assert admin_threads() == before


def test_a_connection_that_comes_while_it_stops_is_closed_too(pair: Pair) -> None:
    """pytest fails on sockets that are left to the garbage collector."""
    for config in (AdminConfig(), AdminConfig(certificate_file=pair.certificate, key_file=pair.key)):
        for _ in range(5):
            with running(config) as made, contextlib.ExitStack() as stack:
                address = made.address
                stopping = threading.Thread(target=made.stop)
                for number in range(40):
                    if number == 10:
                        stopping.start()
                    with contextlib.suppress(OSError):
                        sock = stack.enter_context(connect(address))
                        sock.sendall(GET + b"\r\n" * (number % 3))
                stopping.join()
    gc.collect()


def test_stop_may_be_repeated_and_come_before_the_start() -> None:
    made = Running(start=False)
    call(made, made.server.stop())
    made.start()
    call(made, made.server.stop())
    made.stop()


def admin_threads() -> int:
    return sum(thread.name == "admin" for thread in threading.enumerate())


def call(made: Running, coroutine: object) -> None:
    asyncio.run_coroutine_threadsafe(coroutine, made.loop).result(DEADLINE)  # type: ignore[arg-type]


def test_operations_are_called_on_the_balancers_own_loop() -> None:
    with running() as made:
        ask(made.address, "GET", "/v1/state")
        assert made.balancer.called_on == {made.loop}
        operations: Operations = made.balancer
        assert operations


# Who gets in.


@pytest.mark.parametrize(
    ("token", "reads", "writes"), [(None, 401, 401), ("x" * 16, 401, 401), (READ + "-", 200, 403), (WRITE, 200, 200)]
)
def test_over_tcp_tokens_decide(tokens: AdminConfig, token: str | None, reads: int, writes: int) -> None:
    headers = {} if token is None else bearer(token)
    with running(tokens) as made:
        assert ask(made.address, "GET", "/v1/state", headers=headers).status == reads
        assert ask(made.address, "POST", "/v1/reload", {}, headers=headers).status == writes
        assert ask(made.address, "POST", "/v1/explain", {"cid": ""}, headers=headers).status == reads
        assert [who for who, _ in made.balancer.changes] == ["127.0.0.1 by write token"] * (writes == 200)


def test_over_a_unix_socket_nobody_needs_a_token(tokens: AdminConfig, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with running(tokens, addresses=[path]) as made:
        assert ask(path, "GET", "/v1/state").json["rights"] == "write"
        assert ask(path, "POST", "/v1/reload", {}).status == 200
        assert made.balancer.changes == [(f"uid {os.getuid()} by unix socket", "reload")]


def test_with_a_read_token_only_nobody_writes_over_tcp(tokens: AdminConfig) -> None:
    with running(AdminConfig(read_token_file=tokens.read_token_file)) as made:
        assert ask(made.address, "POST", "/v1/reload", {}, headers=bearer(READ + "-")).status == 403
        assert ask(made.address, "POST", "/v1/reload", {}, headers=bearer(WRITE)).status == 401
        assert ask(made.address, "POST", "/v1/reload", {}).status == 401


def test_a_token_that_is_changed_or_deleted_counts_at_once(
    tokens: AdminConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = tokens.read_token_file
    assert path is not None
    with running(tokens) as made:

        def status(token: str) -> int:
            return ask(made.address, "GET", "/v1/state", headers=bearer(token)).status

        assert status(READ + "-") == 200
        path.write_text("another token indeed".replace(" ", "-"))
        assert status(READ + "-") == 401
        assert status("another-token-indeed") == 200
        path.chmod(0o644)
        assert status("another-token-indeed") == 401  # everybody knows it
        path.chmod(0o600)
        assert status("another-token-indeed") == 200
        path.unlink()
        assert status("another-token-indeed") == 401
        assert status(WRITE) == 200
    told = [record.__dict__["fields"]["reason"] for record in caplog.records if record.msg == "admin-file-unusable"]
    assert ["mode 0644" in told[0], "cannot be read" in told[1]] == [True, True]
    assert len(told) == 2


def test_a_token_file_that_cannot_be_read_is_named_at_the_start(tokens: AdminConfig) -> None:
    assert tokens.write_token_file is not None
    tokens.write_token_file.unlink()
    with pytest.raises(OSError, match=re.escape(str(tokens.write_token_file))):
        Running(tokens)


def test_who_is_not_let_in_learns_nothing(tokens: AdminConfig, caplog: pytest.LogCaptureFixture) -> None:
    """The same octets, whatever is asked for and however."""
    caplog.set_level(logging.INFO)
    paths = [operation.path.replace("{", "").replace("}", "") for operation in OPERATIONS]
    paths += ["/nowhere", "/v1/", "//", "/v1/state/", "/v1/services/web/backends/b0", "/../etc/passwd", "/?query"]
    answers = set()
    with running(tokens) as made:
        for path in paths:
            for method in ("GET", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", "TRACE"):
                for extra in (b"", b"Authorization: Bearer wrong-wrong-wrong-wrong\r\n", b"Origin: null\r\n"):
                    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + extra
                    answers.add(re.sub(rb"Date: .*\r\n", b"", raw(made.address, head + b"\r\n")))
        assert made.balancer.changes == []
        assert made.balancer.called_on == set()
    assert len(answers) == 1
    (answer,) = answers
    assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert answer.endswith(b'\r\n\r\n{"error":"unauthorised"}\n')
    assert b"WWW-Authenticate: Bearer\r\n" in answer
    assert b"aiohttp" not in answer
    refused = [record.__dict__["fields"] for record in caplog.records if record.msg == "admin-refused"]
    assert refused[0] == {"peer": refused[0]["peer"], "reason": "no token and no certificate"}
    assert str(refused[0]["peer"]) == "127.0.0.1"
    assert len(refused) <= 60, "the log is not the attacker's"
    assert "wrong-wrong" not in caplog.text


def test_a_page_of_another_site_is_told_nothing(open_server: Running) -> None:
    headers = {"Origin": "https://evil.example"}
    for path in ("/v1/reload", "/v1/upgrade", "/nowhere"):
        answer = ask(open_server.address, "POST", path, {}, headers=headers)
        assert (answer.status, answer.json) == (403, {"error": "forbidden"})
    answer = ask(open_server.address, "GET", "/v1/state", headers={"Host": "evil.example"})
    assert (answer.status, answer.json) == (403, {"error": "forbidden"})


# TLS.


def test_certificates_decide_who_reads_and_who_writes(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    config = AdminConfig(
        certificate_file=pair.certificate, key_file=pair.key, client_ca_file=authority.file, writers=("ops",)
    )
    stranger = Authority(tmp_path, "stranger").issue("ops")
    with running(config) as made:
        for names, reads, writes in (
            (("ops",), 200, 200),
            (("intern",), 200, 403),
            (("ops", "intern"), 401, 401),  # whose is it?
            (None, 401, 401),
        ):
            tls = authority.client(None if names is None else authority.issue(*names))
            assert ask(made.address, "GET", "/v1/state", tls=tls).status == reads
            assert ask(made.address, "POST", "/v1/reload", {}, tls=tls).status == writes
        assert made.balancer.changes == [("127.0.0.1 by certificate of ops", "reload")]

        tls = authority.client(stranger)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(made.address, "GET", "/v1/state", tls=tls)
        assert raw(made.address, GET + b"\r\n") == b""  # not without TLS


def test_certificates_may_be_renewed_while_it_runs(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    mine = Pair(tmp_path / "lb.pem", tmp_path / "lb.key")
    for source, target in zip(pair, mine, strict=True):
        target.write_bytes(source.read_bytes())
    with running(AdminConfig(certificate_file=mine.certificate, key_file=mine.key)) as made:

        def serial() -> str:
            with authority.client().wrap_socket(connect(made.address), server_hostname="localhost") as sock:
                certificate = sock.getpeercert()
                assert certificate is not None
                return str(certificate["serialNumber"])

        first = serial()
        mine.certificate.write_text("half of a certificate")
        assert serial() == first  # no use: the one that was good stays
        for source, target in zip(authority.issue("renewed"), mine, strict=True):
            target.write_bytes(source.read_bytes())
        assert serial() != first


def test_a_certificate_that_cannot_be_used_is_named_at_the_start(pair: Pair, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(OSError, match=re.escape(str(broken))):
        Running(AdminConfig(certificate_file=broken, key_file=pair.key))


def test_a_handshake_that_is_not_finished_is_cut_off(pair: Pair, authority: Authority) -> None:
    with (
        running(AdminConfig(certificate_file=pair.certificate, key_file=pair.key), client_patience=0.3) as made,
        connect(made.address) as sock,
    ):
        sock.sendall(b"\x16\x03\x01")
        assert sock.recv(1) == b""
        assert ask(made.address, "GET", "/livez", tls=authority.client()).status == 200


# What a client can take.


def test_who_does_not_finish_a_request_is_cut_off() -> None:
    post = b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(client_patience=0.3) as made:
        for octets in (b"", b"GET", GET, GET + b"X: y", post + b"Content-Length: 10\r\n\r\n{"):
            assert raw(made.address, octets) == b""
        chunked = post + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
        assert raw(made.address, chunked) == b""
        assert made.balancer.changes == []
        assert ask(made.address, "GET", "/livez").status == 200


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n"
        b"Content-Type: application/json\r\n\r\n",
    ],
)
def test_who_drips_is_cut_off(beginning: bytes) -> None:
    """An octet now and then does not buy more time, neither in the head nor in the body."""
    with running(client_patience=0.5) as made, connect(made.address) as sock:
        began = time.monotonic()
        sock.sendall(beginning)
        sock.settimeout(0.02)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + DEADLINE:
                sock.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    assert sock.recv(1) == b""
                    break
        assert time.monotonic() < began + DEADLINE / 2


def test_who_does_not_take_the_answer_is_cut_off() -> None:
    async def large(_request: Request) -> Response:
        return Response(200, bytes(64 << 20))

    async def story() -> None:
        loop = asyncio.get_running_loop()
        connections = connection.Connections(large, 0.3)
        with socket.create_server(LOOPBACK) as listener, socket.create_connection(listener.getsockname()) as client:
            listener.setblocking(False)
            accepted, _ = await loop.sock_accept(listener)
            client.sendall(GET + b"\r\n")
            await asyncio.wait_for(connections.serve(accepted, Peer(LOOPBACK), None), DEADLINE)

    asyncio.run(story())


def test_a_slow_answer_of_the_balancer_is_no_reason_to_cut_off() -> None:
    with running(client_patience=0.2) as made:
        made.balancer.hold.clear()
        made.loop.call_soon_threadsafe(made.loop.call_later, 0.6, made.balancer.hold.set)
        assert ask(made.address, "POST", "/v1/reload", {}).status == 200


def test_connections_are_bounded_at_each_address_and_more_are_turned_away(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with running(addresses=[path, LOOPBACK]) as made, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(made.address)) for _ in range(server.MAX_CONNECTIONS)]
        eventually(lambda: status_of(raw(made.address, b"")) == 503)
        assert ask(path, "GET", "/livez").status == 200
        held[0].close()
        eventually(lambda: ask(made.address, "GET", "/livez").status == 200)


HUGE = 3 * connection.MAX_HEAD


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (GET + b"\r\n", 200),
        (b"GET /" + b"a" * HUGE + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (GET + b"X: " + b"a" * HUGE + b"\r\n\r\n", 431),
        (GET + b"X: y\r\n" * 2000 + b"\r\n", 431),
        (GET + b"X: " + b"a" * HUGE, 431),
        (b"a" * HUGE, 431),
        (GET + b"X: " + b"a" * (connection.MAX_HEAD - len(GET) - 3) + b"\r\n\r\n", 200),
        (GET + b"X: " + b"a" * (connection.MAX_HEAD - len(GET) - 2) + b"\r\n\r\n", 431),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"no HTTP at all\r\n\r\n", 400),
        (b"\x16\x03\x01\xff\xfe\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n: nothing\r\n\r\n", 400),
        (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (GET + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (GET + b"Content-Length: -1\r\n\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
    ],
)
def test_what_is_too_large_or_no_http_is_answered_so(
    open_server: Running, caplog: pytest.LogCaptureFixture, octets: bytes, status: int
) -> None:
    answer = raw(open_server.address, octets)

    assert status_of(answer) == status
    assert b"\r\nServer: quiclb\r\n" in answer
    assert answer.startswith(b"HTTP/1.0 ") or b"\r\nConnection: close\r\n" in answer
    if status != 200:
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}
    assert caplog.records == []
    assert ask(open_server.address, "GET", "/livez").status == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/v1/reload", 65_536, 200),
        ("/v1/reload", 65_537, 413),
        ("/v1/reload", 5_000_000, 413),
        ("/v1/explain", 262_144, 200),
        ("/v1/explain", 262_145, 413),
        ("/v1/nowhere", 5_000_000, 404),
    ],
)
def test_bodies_have_a_limit(open_server: Running, path: str, size: int, status: int, chunked: bool) -> None:
    body = b'{"cid":""' if path == "/v1/explain" else b"{"
    body = body.ljust(size - 1) + b"}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    if chunked:
        pieces = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
        sent = head + b"Transfer-Encoding: chunked\r\n\r\n"
        sent += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        sent = head + f"Content-Length: {size}\r\n\r\n".encode() + body

    assert status_of(raw(open_server.address, sent)) == status


def test_only_one_request_is_answered_per_connection(open_server: Running) -> None:
    answer = raw(open_server.address, (GET + b"\r\n") * 3)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_who_asks_before_sending_the_body_is_told_to_go_on(open_server: Running) -> None:
    head = b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with connect(open_server.address) as sock:
        sock.sendall(head + b"Content-Length: 2\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    assert status_of(raw(open_server.address, head + b"Content-Length: 99999\r\n\r\n")) == 413


def test_a_client_that_goes_away_costs_nothing(open_server: Running, caplog: pytest.LogCaptureFixture) -> None:
    for octets in (GET, GET + b"\r\n", b"POST /v1/reload HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        for _ in range(50):
            with connect(open_server.address) as sock:
                sock.sendall(octets)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
    eventually(lambda: ask(open_server.address, "GET", "/livez").status == 200)
    assert caplog.records == []


def test_many_at_once_are_all_answered(open_server: Running) -> None:
    def one(number: int) -> int:
        return ask(open_server.address, "GET", ("/v1/state", "/v1/history", "/metrics")[number % 3]).status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(120))) == {200}


def test_out_of_descriptors_it_waits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever accept() says, the server is not lost."""
    with running() as made:
        listener = made.server._listeners[0].socket
        broken = _Failing(listener, [errno.EMFILE])
        call(made, _swap(made, broken))
        with connect(made.address):
            eventually(lambda: bool([r for r in caplog.records if r.msg == "admin-error"]))
        assert ask(made.address, "GET", "/livez").status == 200


class _Failing(socket.socket):
    """A listener whose accept() fails a few times."""

    def __init__(self, of: socket.socket, errors: Sequence[int]) -> None:
        super().__init__(fileno=os.dup(of.fileno()))
        self._errors = list(errors)

    def accept(self) -> tuple[socket.socket, object]:
        if self._errors:
            raise OSError(self._errors.pop(), "as asked")
        return super().accept()


async def _swap(made: Running, listener: socket.socket) -> None:
    """Have the server accept from another socket."""
    (old,) = made.server._listeners
    await made.server.release()
    listener.setblocking(False)
    made.server._listeners = [old._replace(socket=listener)]
    assert made.server._own is not None
    await made.server._own.do(made.server._open(made.server._listeners))
