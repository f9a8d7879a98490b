"""Finding a balancer, being let in, and what is said when that fails."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lb.admin.client import MAX_ANSWER, Client, UnreachableError, Where
from lb.keys import AdminConfig
from tests.admin.fake import Running, running
from tests.commands.conftest import Quiclb
from tests.files import write_key, write_keys
from tests.test_config import GOOD

READER, WRITER = "a-token-to-read-with", "a-token-to-write-with"
NEVER = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
ONCE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


def certificate(directory: Path, name: str, issuer: str | None = None) -> Path:
    """NAME.pem and NAME.key, signed by `issuer`'s or by itself; good for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, signed_by = key, subject
    if issuer is not None:
        loaded = serialization.load_pem_private_key((directory / f"{issuer}.key").read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer, signed_by = loaded, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(ONCE)
        .not_valid_after(NEVER)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    private = serialization.PrivateFormat.PKCS8
    pem = serialization.Encoding.PEM
    write_key(directory / f"{name}.key", key.private_bytes(pem, private, serialization.NoEncryption()).decode())
    (directory / f"{name}.pem").write_bytes(made.public_bytes(pem))
    return directory / f"{name}.pem"


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A port where each connection gets the same octets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    talk, _ = listener.accept()
                except OSError:
                    return
                with talk:
                    talk.recv(65536)
                    talk.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("unix:/run/x.sock", Where(Path("/run/x.sock"))),
        ("127.0.0.1:9101", Where(None, "127.0.0.1", 9101)),
        ("[::1]:9101", Where(None, "::1", 9101)),
        ("lb.example:9101", Where(None, "lb.example", 9101)),
        ("https://lb.example:9101", Where(None, "lb.example", 9101, is_tls=True)),
    ],
)
def test_addresses(text: str, where: Where) -> None:
    assert Where.parse(text) == where
    assert str(where) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "unix:", "host", "host:", "host:0", "host:65536", "host:\u0661"),
        *(":1", "http://a:1", "a b:1", "a/b:1"),
        *("host:0000011111111", f"{'a' * 64}:1", "b\u00fc..x:1"),  # of which a resolver says what is no OSError
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Where.parse(text)


def test_the_configuration_says_where_its_balancer_is(quiclb: Quiclb, tmp_path: Path) -> None:
    write_keys(tmp_path)
    path = tmp_path / "admin.sock"
    config = tmp_path / "quiclb.yaml"
    config.write_text(f"admin: {{listen: ['127.0.0.1:9', 'unix:{path}']}}\n{GOOD}")
    with running(addresses=[path]):
        assert quiclb("status", "-c", config)[0] == 0
    assert quiclb("status", "-c", config) == (1, "", f"quiclb: unix:{path}: no balancer is there\n")


def test_a_configuration_without_an_api_says_so(quiclb: Quiclb, tmp_path: Path) -> None:
    write_keys(tmp_path)
    config = tmp_path / "quiclb.yaml"
    config.write_text(f"admin: {{listen: []}}\n{GOOD}")
    assert quiclb("status", "-c", config) == (
        2, "", f"quiclb: {config}: admin.listen is empty: this balancer serves no API\n",
    )  # fmt: skip


def test_the_environment_says_it_too(quiclb: Quiclb, balancer: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/nonexistent")
    assert quiclb("status") == (1, "", "quiclb: unix:/nonexistent/admin.sock: no balancer is there\n")
    monkeypatch.setenv("QUICLB_ADMIN", f"unix:{balancer.server.addresses[0]}")
    assert quiclb("status")[0] == 0
    monkeypatch.setenv("QUICLB_ADMIN", "nonsense")
    status, _, err = quiclb("status")
    assert (status, err) == (
        2, "quiclb: $QUICLB_ADMIN: 'nonsense': expected unix:PATH, HOST:PORT or https://HOST:PORT\n",
    )  # fmt: skip


def test_tokens_open_what_they_are_for(quiclb: Quiclb, tmp_path: Path) -> None:
    read, write = write_key(tmp_path / "read", READER), write_key(tmp_path / "write", WRITER)
    wrong = write_key(tmp_path / "wrong", "another-token-than-those")
    with running(AdminConfig(read_token_file=read, write_token_file=write)) as there:
        at = ["--admin", there.address]
        status, out, err = quiclb("status", *at)
        assert (status, out) == (1, "")
        assert err.endswith("; --token-file names a token\n")
        assert quiclb("status", *at, "--token-file", wrong)[0] == 1
        assert quiclb("status", *at, "--token-file", read)[0] == 0
        status, out, err = quiclb("drain", "b3", *at, "--token-file", read)
        assert (status, out) == (1, "")
        assert "only look" in err
        assert there.balancer.changes == []
        assert quiclb("drain", "b3", *at, "--token-file", write)[0] == 0
        assert not any(secret in err + out for secret in (READER, WRITER))


def test_the_configurations_own_token_is_used_over_tcp(quiclb: Quiclb, tmp_path: Path) -> None:
    write_keys(tmp_path)
    write = write_key(tmp_path / "write", WRITER)
    with running(AdminConfig(write_token_file=write)) as there:
        config = tmp_path / "quiclb.yaml"
        config.write_text(f"admin: {{listen: ['{there.address}'], write-token-file: {write}}}\n{GOOD}")
        assert quiclb("undrain", "b3", "-c", config)[::2] == (0, "")


def test_a_token_file_that_cannot_be_used(quiclb: Quiclb, tmp_path: Path) -> None:
    (tmp_path / "open").write_text(WRITER)
    (tmp_path / "open").chmod(0o644)
    assert quiclb("status", "--token-file", tmp_path / "none")[0] == 2
    status, _, err = quiclb("status", "--token-file", tmp_path / "open")
    assert (status, err) == (2, f"quiclb: {tmp_path}/open: mode 0644 lets everybody at it: expected 0600 or 0640\n")


def test_tls_both_ways(quiclb: Quiclb, tmp_path: Path) -> None:
    ca = certificate(tmp_path, "ca")
    pairs = {name: certificate(tmp_path, name, "ca") for name in ("server", "boss", "guest")}
    config = AdminConfig(
        certificate_file=pairs["server"],
        key_file=tmp_path / "server.key",
        client_ca_file=ca,
        writers=("boss",),
    )
    with running(config) as there:
        at = ["--admin", f"https://{there.address}", "--ca-file", ca]

        def shown(name: str) -> list[object]:
            return [*at, "--certificate-file", pairs[name], "--key-file", tmp_path / f"{name}.key"]

        assert quiclb("drain", "b3", *shown("boss"))[::2] == (0, "")
        assert quiclb("status", *shown("guest"))[::2] == (0, "")
        status, _, err = quiclb("drain", "b3", *shown("guest"))
        assert (status, "only look" in err) == (1, True)
        assert quiclb("status", *at)[0] == 1
        status, _, err = quiclb("status", *at[:2])
        assert status == 1
        assert "its certificate is not trusted: " in err
        status, _, err = quiclb("status", "--admin", there.address)
        assert status == 1
        assert err.startswith(f"quiclb: {there.address}: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--admin", "127.0.0.1:1", "--ca-file", "x"], "--ca-file: of no use without https: 127.0.0.1:1 is not"),
        (["--admin", "https://127.0.0.1:1", "--ca-file", "/nonexistent"], "--ca-file: No such file or directory"),
        (["--admin", "https://127.0.0.1:1", "--key-file", "x"], "--key-file: expected --certificate-file as well"),
        (["--admin", "https://127.0.0.1:1", "--ca-file", "/dev/null"], "--ca-file: "),
    ],
)
def test_tls_arguments_that_make_no_sense(quiclb: Quiclb, argv: list[str], message: str) -> None:
    status, out, err = quiclb("status", *argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"quiclb: {message}")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the connection was ended without an answer"),
        (b"220 mail.example ESMTP\r\n", "it does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "answers with status 200, and not as a balancer does"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 2\r\n\r\n[]", "answers with status 502, and not as a balancer does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "answers with status 200, and not as a balancer does"),
    ],
)
def test_what_is_no_balancer(quiclb: Quiclb, answer: bytes, why: str) -> None:
    with answering(answer) as port:
        status, out, err = quiclb("status", "--admin", f"127.0.0.1:{port}")
    assert (status, out) == (1, "")
    assert err == f"quiclb: 127.0.0.1:{port}: {why}\n"


def test_what_an_answer_says_does_not_command_the_terminal(quiclb: Quiclb) -> None:
    body = b'{"error": "no\\u001b[2J\\n", "reasons": ["\\u001b]0;x\\u0007"]}'
    with answering(b"HTTP/1.1 422 No\r\n\r\n" + body) as port:
        assert quiclb("status", "--admin", f"127.0.0.1:{port}") == (2, "", "quiclb: no?[2J?\n?]0;x?\n")


def test_patience_has_an_end(balancer: Running) -> None:
    balancer.loop.call_soon_threadsafe(balancer.balancer.hold.clear)
    path = Path(str(balancer.server.addresses[0]))
    try:
        with pytest.raises(UnreachableError, match=r"no answer within 0\.2s"):
            Client(Where(path), patience=0.2).state()
    finally:
        balancer.loop.call_soon_threadsafe(balancer.balancer.hold.set)


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ANSWER == 64 << 20
    monkeypatch.setattr("lb.admin.client.MAX_ANSWER", 1000)
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2000) as port:
        client = Client(Where(None, "127.0.0.1", port))
        with pytest.raises(UnreachableError, match="its answer is too long"):
            client.state()


def test_a_file_that_is_named_is_stronger_than_the_environment(
    quiclb: Quiclb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever types `fence a -c FILE` means the balancer of that file, and no other."""
    write_keys(tmp_path)
    path = tmp_path / "admin.sock"
    config = tmp_path / "quiclb.yaml"
    config.write_text(f"admin: {{listen: ['unix:{path}']}}\n{GOOD}")
    monkeypatch.setenv("QUICLB_ADMIN", "unix:/the/other")
    assert quiclb("status", "-c", config) == (1, "", f"quiclb: unix:{path}: no balancer is there\n")
