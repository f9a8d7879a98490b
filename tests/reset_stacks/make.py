"""Makes tests/data/reset-vectors.json: asks real server stacks for their stateless resets, and looks at the tokens.

    python -m tests.reset_stacks.make --nginx OLD-BINARY BINARY --msquic DIRECTORY --aiopquic DIRECTORY

quic-go and quinn are built from the programs beside this file, with go and cargo. The sources of nginx are in the
crate nginx-src (configured with --with-http_v3_module --with-http_ssl_module), once from before 1.28.3; those of msquic
are in the crate msquic (built with cmake in its directory `build`). A picoquic is in the wheel of aiopquic, unpacked;
it is for another Python than ours (`--python`). What cannot be run here, HAProxy and mvfst, is calculated from its
formula by other code than ours, and marked so.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

HERE = Path(__file__).parent
FILE = HERE.parent / "data" / "reset-vectors.json"
LENGTHS = (1, 8, 16, 17, 20)  # of CIDs
PICOQUIC = """
import ctypes, glob, sys
for library in ("libcrypto", "libssl"):
    ctypes.CDLL(glob.glob(f"{sys.argv[1]}/aiopquic.libs/{library}*")[0], ctypes.RTLD_GLOBAL)
picoquic = ctypes.CDLL(glob.glob(f"{sys.argv[1]}/aiopquic/_binding/_transport*.so")[0])
class Cid(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint8 * 20), ("id_len", ctypes.c_uint8)]
text, pointer = ctypes.c_char_p, ctypes.c_void_p
picoquic.picoquic_create.restype = pointer
picoquic.picoquic_create.argtypes = [
    ctypes.c_uint32, text, text, text, text, pointer, pointer, pointer, pointer, text, ctypes.c_uint64, pointer, text,
    text, ctypes.c_size_t,
]
picoquic.picoquic_create_cnxid_reset_secret.argtypes = [pointer, ctypes.POINTER(Cid), text]
for line in sys.stdin:
    seed, octets = map(bytes.fromhex, line.split())
    quic = picoquic.picoquic_create(8, *(None,) * 3, b"h3", *(None,) * 4, seed, 0, None, None, None, 0)
    cid, token = Cid(), ctypes.create_string_buffer(16)
    cid.id[:len(octets)], cid.id_len = octets, len(octets)
    assert quic and picoquic.picoquic_create_cnxid_reset_secret(quic, ctypes.byref(cid), token) == 0
    print(token.raw.hex())
"""
NGINX = """
worker_processes 3;
daemon off;
pid nginx.pid;
error_log stderr crit;
events {{ worker_connections 64; }}
http {{
    access_log off;
    server {{
        listen 127.0.0.1:{port} quic reuseport;
        quic_host_key host.key;
        ssl_certificate cert.pem;
        ssl_certificate_key key.pem;
    }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nginx", type=Path, required=True, nargs="+")
    parser.add_argument("--msquic", type=Path, required=True)
    parser.add_argument("--aiopquic", type=Path, required=True)
    parser.add_argument("--python", default="python3.13")
    args = parser.parse_args()
    vectors = [
        *_quic_go(),
        *_quinn(),
        *_msquic(args.msquic),
        *_haproxy(),
        *(vector for binary in args.nginx for vector in _nginx(binary)),
        *_mvfst(),
        *_picoquic(args.aiopquic, args.python),
    ]
    FILE.write_text("[\n" + ",\n".join(json.dumps(vector) for vector in vectors) + "\n]\n")
    print(f"{len(vectors)} vectors in {FILE}")


def octets(what: str, length: int) -> bytes:
    return hashlib.shake_256(what.encode()).digest(length)


def _vector(
    scheme: str, source: str, stack: str, secret: bytes, cid: bytes, token: bytes, **more: Any
) -> dict[str, Any]:
    known = {"scheme": scheme, "secret": secret.hex(), "cid": cid.hex(), **more, "token": token.hex()}
    return known | {"source": source, "stack": stack}


def _formula(
    scheme: str, stack: str, length: int, token: Callable[[bytes, bytes], bytes], **more: Any
) -> Iterator[dict[str, Any]]:
    for size in LENGTHS:
        secret, cid = octets(f"{stack} secret {more}", length), octets(f"{stack} cid {size}", size)
        yield _vector(scheme, "formula", stack, secret, cid, token(secret, cid), **more)


def _quic_go() -> Iterator[dict[str, Any]]:
    directory = HERE / "quic-go"
    version = _version(directory / "go.mod", "github.com/quic-go/quic-go ")
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "server"
        subprocess.run(["go", "build", "-o", str(program), "."], cwd=directory, check=True)
        for size in LENGTHS:
            secret, cid = octets("quic-go secret", 32), octets(f"quic-go cid {size}", size)
            with _running([str(program), secret.hex(), str(size)]) as server:
                assert server.stdout is not None
                port = int(server.stdout.readline().rpartition(":")[2])
                token = _reset(("127.0.0.1", 0), port, cid)
            yield _vector("hmac-sha256", "stack", f"quic-go {version}", secret, cid, token)


def _quinn() -> Iterator[dict[str, Any]]:
    directory = HERE / "quinn"
    version = _version(directory / "Cargo.toml", 'quinn-proto = { version = "=').partition('"')[0]
    with tempfile.TemporaryDirectory() as target:
        program = ["cargo", "run", "-q", "--release", "--locked", "--target-dir", target]
        asked = [(octets("quinn secret", 32), octets(f"quinn cid {size}", size)) for size in LENGTHS]
        for (secret, cid), token in zip(asked, _ask(program, asked, directory), strict=True):
            yield _vector("hmac-sha256", "stack", f"quinn-proto {version}", secret, cid, token)


def _msquic(directory: Path) -> Iterator[dict[str, Any]]:
    version = _version(directory / "Cargo.toml", 'name = "msquic"\nversion = "').rstrip('"')
    (library,) = directory.glob("build/**/libmsquic.so")
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "server"
        paths = (f"-I{directory}/src/inc", f"-L{library.parent}", f"-Wl,-rpath,{library.parent}")
        source = HERE / "msquic" / "server.c"
        subprocess.run(["cc", "-Wall", *paths, "-o", str(program), str(source), "-lmsquic"], check=True)
        for number in range(3):  # of CIDs of the one length that it has by itself
            secret, cid = octets(f"msquic secret {number}", 32), octets(f"msquic cid {number}", 9)
            with _running([str(program), secret.hex()]) as server:
                assert server.stdout is not None
                token = _reset(("127.0.0.1", 0), int(server.stdout.readline()), cid)
            yield _vector("hmac-sha256", "stack", f"msquic {version}", secret, cid, token)


def _picoquic(wheel: Path, python: str) -> Iterator[dict[str, Any]]:
    (metadata,) = wheel.glob("aiopquic-*.dist-info/METADATA")
    version = _version(metadata, "\nVersion: ")
    asked = [(octets("picoquic secret", 16), octets(f"picoquic cid {size}", size)) for size in LENGTHS]
    for (secret, cid), token in zip(asked, _ask([python, "-c", PICOQUIC, str(wheel)], asked), strict=True):
        yield _vector("picoquic", "stack", f"picoquic in aiopquic {version}", secret, cid, token)


def _nginx(binary: Path) -> Iterator[dict[str, Any]]:
    shown = subprocess.run([str(binary), "-v"], capture_output=True, text=True, check=True).stderr
    version = shown.strip().rpartition("nginx/")[2]
    secret, cid = octets("nginx secret", 80), octets("nginx cid 20", 20)
    with tempfile.TemporaryDirectory() as temporary, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        directory = Path(temporary)
        directory.chmod(0o755)
        (directory / "logs").mkdir()
        (directory / "host.key").write_bytes(secret)
        request = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost")
        files = ("-keyout", "key.pem", "-out", "cert.pem")
        subprocess.run([*request, *files], cwd=directory, check=True, capture_output=True)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        (directory / "nginx.conf").write_text(NGINX.format(port=port))
        with _running([str(binary), "-p", str(directory), "-c", str(directory / "nginx.conf")]):
            # Whoever the kernel gives the packet to answers; nginx answers each address once in a while.
            found = {_reset((f"127.0.{i}.1", 0), port, cid) for i in range(1, 60)}
    if len(found) == 1:  # all workers have the same
        yield _vector("nginx", "stack", f"nginx {version}", secret, cid, found.pop(), worker=None)
        return
    # Nothing but the formula says which is whose.
    numbers = {_nginx_token(secret, cid, worker): worker for worker in range(3)}
    assert found == numbers.keys()
    for token, worker in sorted(numbers.items(), key=lambda item: item[1]):
        yield _vector("nginx", "stack", f"nginx {version}", secret, cid, token, worker=worker)


def _nginx_token(secret: bytes, cid: bytes, worker: int) -> bytes:
    key = HKDF(SHA256(), 32, b"ngx_quic", b"\0\x20\x0csr_token_key\0").derive(secret)
    return HKDF(SHA256(), 16, cid, b"\0\x10\x0csr_token_key\0").derive(key + worker.to_bytes(8, "little"))


def _haproxy() -> Iterator[dict[str, Any]]:
    def token(secret: bytes, cid: bytes) -> bytes:
        return HKDF(SHA256(), 16, cid, b"stateless token").derive(hashlib.sha1(secret).digest()[:16])  # noqa: S324

    for vector in _formula("haproxy", "HAProxy", 8, token):
        # A text, as it is in a configuration file.
        secret, cid = vector["secret"].encode(), bytes.fromhex(vector["cid"])
        yield vector | {"secret": secret.hex(), "token": token(secret, cid).hex()}


def _mvfst() -> Iterator[dict[str, Any]]:
    for address, text in (
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:0db8:0000:0000:0000:0000:0000:0001"),
        ("::", "0000:0000:0000:0000:0000:0000:0000:0000"),
    ):

        def token(secret: bytes, cid: bytes, text: str = text) -> bytes:
            prk = hmac.new(b"Stateless reset", secret, "sha256").digest()
            return HKDFExpand(SHA256(), 16, cid + text.encode()).derive(prk)

        yield from _formula("mvfst", "mvfst", 32, token, address=address)


def _reset(client: tuple[str, int], port: int, cid: bytes) -> bytes:
    """The last 16 octets of the answer to a short header packet with this CID."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.bind(client)
        asker.connect(("127.0.0.1", port))
        asker.settimeout(0.5)
        for _ in range(20):
            try:
                asker.send((b"\x40" + cid).ljust(100, b"\x5a"))
                return asker.recv(2000)[-16:]
            except OSError:  # it is not there yet
                time.sleep(0.1)
    raise TimeoutError(f"no answer to {cid.hex()}")


def _ask(command: list[str], asked: list[tuple[bytes, bytes]], directory: Path | None = None) -> list[bytes]:
    lines = "".join(f"{secret.hex()} {cid.hex()}\n" for secret, cid in asked)
    done = subprocess.run(command, cwd=directory, input=lines, stdout=subprocess.PIPE, text=True, check=True)
    return [bytes.fromhex(line) for line in done.stdout.split()]


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.terminate()


def _version(file: Path, before: str) -> str:
    return file.read_text().partition(before)[2].partition("\n")[0]


if __name__ == "__main__":
    main()
