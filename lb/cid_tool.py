"""Connection IDs by hand: encode and decode; for one at a time or for lines of JSON.

What goes in and out are mappings with the fields `config_id, key, server_id_length, nonce_length, server_id, nonce,
cid, appended, encodes_length, low_bits`: integers, booleans, and octets as hex digits. null means the same as no field
at all; unknown fields do not matter. A key goes in and never comes out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO, TextIO, TypeAlias

from lb.cid import KEY_LENGTH, LENGTH_BITS, UNROUTABLE, CidConfig, Codec, ConfigId, config_id_of
from lb.explain import UNROUTABLE_WHY
from lb.routing import Unroutable

Fields: TypeAlias = Mapping[str, Any]

MAX_LINE = 1 << 18  # octets; a datagram in hex takes half of it


def encode(fields: Fields) -> dict[str, Any]:
    """Fill in `cid` for a server ID and a nonce. The lengths follow from these. Raises ValueError."""
    server_id = _octets(fields, "server_id")
    nonce = _octets(fields, "nonce")
    appended = _octets(fields, "appended", b"")
    for name, octets in (("server_id", server_id), ("nonce", nonce)):
        stated = _integer(fields, f"{name}_length", 0, 255, len(octets))
        if stated != len(octets):
            raise ValueError(f"{name}: {len(octets)} octets, but {name}_length is {stated}")
    encodes_length = fields.get("encodes_length")
    if not isinstance(encodes_length, bool | None):
        raise ValueError("encodes_length: expected true or false")  # noqa: TRY004 - a line is wrong, not a caller
    config = CidConfig(
        ConfigId(_integer(fields, "config_id", 0, 6)),
        len(server_id),
        len(nonce),
        _key(fields),
        encodes_length is not False,
        len(appended),
    )
    low_bits = _integer(fields, "low_bits", 0, LENGTH_BITS, 0)
    cid = _codec(config).encode(server_id, nonce, low_bits=low_bits, appended=appended)
    return _filled(config, server_id, nonce, cid, appended)


def decode(fields: Fields) -> dict[str, Any]:
    """Fill in `server_id` and `nonce` of a CID, and `config_id` where it was not known. Raises ValueError."""
    cid = _octets(fields, "cid")
    found = config_id_of(cid)
    if found is None:
        raise ValueError(f"unroutable: {UNROUTABLE_WHY[Unroutable.NO_CID]}")
    if found == UNROUTABLE:
        raise ValueError(f"unroutable: {UNROUTABLE_WHY[Unroutable.CODEPOINT_7]}")
    if _integer(fields, "config_id", 0, 6, found) != found:
        raise ValueError(f"unroutable: its config ID is {found}, not {fields['config_id']}")
    lengths = _integer(fields, "server_id_length", 1, 15), _integer(fields, "nonce_length", 4, 18)
    config = CidConfig(found, *lengths, _key(fields))
    decoded = _codec(config).decode(cid)
    if decoded is None:
        raise ValueError(f"unroutable: {len(cid)} octets, too short: expected at least {config.cid_length}")
    return _filled(config, decoded.server_id, decoded.nonce, cid, cid[config.cid_length :])


def json_lines(answer: Callable[[Fields], Fields], given: Fields, lines: BinaryIO, out: TextIO) -> int:
    """Answer each line, one line for one line, at once. Returns 1 if any could not be answered, else 0.

    `given` holds what lines need not say. A line that is empty gets no answer.
    """
    if lines.isatty():
        print("quiclb: reading JSON lines from the terminal; --help says more", file=sys.stderr)
    status = 0
    for line in _lines(lines):
        if line is not None and not line.strip():
            continue
        try:
            answered = answer({**given, **_object(line)})
        except ValueError as error:
            answered, status = {"error": str(error)}, 1
        out.write(json.dumps(answered) + "\n")
        out.flush()  # a script may wait for this answer before it asks on
    return status


def _filled(config: CidConfig, server_id: bytes, nonce: bytes, cid: bytes, appended: bytes) -> dict[str, Any]:
    filled = {
        "config_id": config.config_id,
        "server_id_length": config.server_id_length,
        "nonce_length": config.nonce_length,
        "server_id": server_id.hex(),
        "nonce": nonce.hex(),
        "cid": cid.hex(),
    }
    return filled | ({"appended": appended.hex()} if appended else {})


@lru_cache(maxsize=64)
def _codec(config: CidConfig) -> Codec:
    return Codec(config)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is too long."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
        yield None


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"line: longer than {MAX_LINE} octets")
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # not repeated: there may be a key in it
        raise ValueError("line: not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("line: expected a JSON object")  # noqa: TRY004
    return {name: inner for name, inner in value.items() if inner is not None}


def _octets(fields: Fields, name: str, default: bytes | None = None) -> bytes:
    text = fields.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(f"{name}: missing")
    if not isinstance(text, str) or not text.isascii() or (text and not text.isalnum()):
        raise ValueError(f"{name}: expected hex digits")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{name}: expected hex digits, two for each octet") from None


def _integer(fields: Fields, name: str, low: int, high: int, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{name}: missing")
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}: expected an integer, {low} to {high}")
    return value


def _key(fields: Fields) -> bytes | None:
    if fields.get("key") is None:
        return None
    key = _octets(fields, "key")
    if len(key) != KEY_LENGTH:
        raise ValueError(f"key: {len(key)} octets: expected {KEY_LENGTH}")
    return key
