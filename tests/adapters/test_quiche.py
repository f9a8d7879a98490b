"""A server on quiche does what every server behind a balancer has to do, and reads what HTTP/3 clients write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from pylsqpack import Encoder

from backend.adapters.registry import ADAPTERS, BUILT
from lb.server_half import SERVER_FILE
from tests.adapters.contract import WRONG, BuiltContract
from tests.adapters.stand import Stand

pytestmark = pytest.mark.e2e

SEED = 5
DEADLINE = 20.0  # seconds
# Answers a list of [function, octets as hex digits] with what comes out, or with what is thrown.
ASK = """
import { readFileSync } from 'node:fs';
import { decodeFields, decodeHuffman, RequestReader } from './h3.mjs';
import { Server } from './quiclb.mjs';
const asks = {
  file: (octets) => new Server(octets.toString()).name,
  huffman: (octets) => decodeHuffman(octets).toString('hex'),
  fields: (octets) => decodeFields(octets),
  request: (octets) => {
    const seen = [];
    const reader = new RequestReader((fields) => seen.push(fields), (body) => seen.push(body.toString('hex')));
    for (const octet of octets) reader.read(Buffer.from([octet]));
    return seen;
  },
};
const answers = JSON.parse(readFileSync(0)).map(([name, digits]) => {
  try {
    return asks[name](Buffer.from(digits, 'hex'));
  } catch (error) {
    return error.lines ?? error.constructor.name;
  }
});
console.log(JSON.stringify(answers));
"""


class TestQuiche(BuiltContract):
    adapter = ADAPTERS["quiche"]
    takes_others_retries = False
    wrong = ("unknown key", "config ID 7", "readable key", "not there")  # all of them: below, in one process


def ask(*questions: tuple[str, bytes]) -> list[Any]:
    """What the modules make of octets."""
    if ADAPTERS["quiche"].missing:
        pytest.skip(str(ADAPTERS["quiche"].missing))
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", ASK],
        cwd=BUILT / "quiche",
        input=json.dumps([(name, octets.hex()) for name, octets in questions]).encode(),
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_every_wrong_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    server = Stand(ADAPTERS["quiche"], tmp_path).servers["a"]
    files = []
    for i, (spoil, _) in enumerate(WRONG.values()):
        directory = tmp_path / f"wrong-{i}"
        shutil.copytree(server.directory, directory)
        files.append(directory / SERVER_FILE)
        spoil(files[-1])
    answers = ask(*(("file", str(file).encode()) for file in files))
    for (name, (_, reason)), lines in zip(WRONG.items(), answers, strict=True):
        assert any(re.search(reason, line) for line in lines), (name, lines)
    good = server.file.read_text()
    assert ask(("file", str(server.file).encode())) == ["a"]
    for wrong, reason in {
        good.replace("config-id: 0", "config-id: !!int 0"): "tag",
        good.replace('name: "a"', "name: &a b").replace("nonce-file: ", "nonce-file: *a # "): "alias",
        good + "---\n": "second document",
        good.replace("config-id: 0", 'config-id: "0"'): "config-id",
    }.items():
        assert wrong != good
        server.file.write_text(wrong)
        (lines,) = ask(("file", str(server.file).encode()))
        assert any(reason in line for line in lines), (reason, lines)


def test_huffman_codes_are_those_of_others() -> None:
    random = Random(SEED)
    texts = [bytes((octet,)) for octet in range(256)] + [random.randbytes(length) for length in range(1, 60)]
    encoder = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    encoded = [encoder.encode(text) for text in texts]
    assert ask(*(("huffman", each) for each in encoded)) == [text.hex() for text in texts]


def test_what_is_no_huffman_code_is_refused() -> None:
    end = b"\xff\xff\xff\xff"  # the code of the end, and more
    too_much_padding = b"\x1f\xff"  # "a" with more than seven bits behind it
    zeros = b"\x18"  # "a", padded with zeros
    assert ask(("huffman", end), ("huffman", too_much_padding), ("huffman", zeros)) == ["Http3Error"] * 3


def test_requests_are_read_octet_by_octet_as_others_write_them() -> None:
    encoder = Encoder()
    headers = [
        (b":method", b"PUT"),
        (b":scheme", b"https"),
        (b":authority", b"localhost"),
        (b":path", b"/upload?a=b"),
        (b"x-long", b"v" * 300),
        (b"cookie", b"\x80\xff"),
    ]
    _, fields = encoder.encode(0, headers)
    length = (0x4000 | len(fields)).to_bytes(2)
    grease = b"\x21\x03abc"
    request = grease + b"\x01" + length + fields + b"\x00\x02hi" + grease + b"\x00\x00" + b"\x00\x01!"
    (seen,) = ask(("request", request))
    assert seen[0] == {"method": "PUT", "path": "/upload?a=b"}
    assert bytes.fromhex("".join(seen[1:])) == b"hi!"


def test_what_is_no_request_ends_the_connection() -> None:
    _, fields = Encoder().encode(0, [(b":method", b"GET"), (b":path", b"/")])
    wrong = {
        "DATA before HEADERS": ("request", b"\x00\x01a"),
        "SETTINGS": ("request", b"\x04\x00"),
        "too many fields": ("request", b"\x01\x80\x01\x00\x00"),
        "a dynamic table": ("fields", b"\x02\x00\x80"),
        "an entry that there is not": ("fields", b"\x00\x00\xff\x24"),
        "a post-base index": ("fields", b"\x00\x00\x10"),
        "a string cut off": ("fields", b"\x00\x00\x51\x05/a"),
        "a length without end": ("fields", b"\x00\x00\x51\x7f\xff\xff\xff\xff\xff\xff"),
        "nothing": ("fields", b""),
        "a field cut off": ("fields", fields[:1]),
    }
    assert dict(zip(wrong, ask(*wrong.values()), strict=True)) == dict.fromkeys(wrong, "Http3Error")
