"""Key files, lines of hexadecimal digits, and token files, one line of text: nobody but the operator may read them.

Nothing here ever repeats what is in the file.
"""

from __future__ import annotations

import stat
from pathlib import Path

from lb.document import shown_file

OTHERS = stat.S_IRWXO
MIN_TOKEN, MAX_TOKEN = 16, 200  # characters
TOKEN_KEY_LENGTH = 32  # octets
MAX_TOKEN_KEYS = 8  # in one file
_MAX_FILE = 256  # octets; a key takes 200 at most
_HEX_DIGITS = b"0123456789abcdefABCDEF"


def read_key(path: Path, length: int, longest: int | None = None) -> bytes:
    """The key of `length` octets in a file, or of so many up to `longest`. Raises ValueError with the path and what was
    expected."""
    name = shown_file(path)
    octets_wanted, digits_wanted = f"{length}", f"{2 * length}"
    longest = longest or length
    if longest != length:
        octets_wanted, digits_wanted = f"{length} to {longest}", f"{2 * length} to {2 * longest}"
    expected = f"{digits_wanted} hex digits"
    octets = _read(path, expected)
    digits = octets.strip()
    if len(octets) > _MAX_FILE or not 2 * length <= len(digits) <= 2 * longest or len(digits) % 2:
        found = f"more than {_MAX_FILE}" if len(octets) > _MAX_FILE else len(digits)
        raise ValueError(f"{name}: holds {found} characters: expected {expected} ({octets_wanted} octets)")
    if not all(digit in _HEX_DIGITS for digit in digits):
        raise ValueError(f"{name}: holds something else than hex digits: expected {digits_wanted} of them")
    return bytes.fromhex(digits.decode())


def read_token_keys(path: Path) -> list[bytes]:
    """The keys of servers' tokens and tickets, newest first: one per line, all different; empty lines do not count.

    Raises ValueError with the path, the line and what was expected.
    """
    name = shown_file(path)
    expected = f"1 to {MAX_TOKEN_KEYS} lines of {2 * TOKEN_KEY_LENGTH} hex digits"
    limit = (MAX_TOKEN_KEYS + 1) * (2 * TOKEN_KEY_LENGTH + 2)
    octets = _read(path, expected, limit)
    if len(octets) > limit:
        raise ValueError(f"{name}: holds more than {limit} characters: expected {expected}")
    keys: list[bytes] = []
    for number, line in enumerate(octets.splitlines(), 1):
        digits = line.strip()
        if not digits:
            continue
        if len(digits) != 2 * TOKEN_KEY_LENGTH or not all(digit in _HEX_DIGITS for digit in digits):
            raise ValueError(f"{name}: line {number} holds something else than a key: expected {expected}")
        key = bytes.fromhex(digits.decode())
        if key in keys:
            raise ValueError(f"{name}: line {number} holds a key that is there already: expected different ones")
        keys.append(key)
    if not 1 <= len(keys) <= MAX_TOKEN_KEYS:
        raise ValueError(f"{name}: holds {len(keys)} keys: expected {expected}")
    return keys


def read_token(path: Path) -> str:
    """The bearer token in a file. Raises ValueError with the path and what was expected."""
    name = shown_file(path)
    expected = f"a token of {MIN_TOKEN} to {MAX_TOKEN} visible ASCII characters"
    token = _read(path, expected).strip()
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN:
        raise ValueError(f"{name}: holds {len(token)} characters: expected {expected}")
    if not all(0x21 <= octet <= 0x7E for octet in token):  # what an Authorization header can carry
        raise ValueError(f"{name}: holds something else: expected {expected}")
    return token.decode()


def _read(path: Path, expected: str, limit: int = _MAX_FILE) -> bytes:
    """The first octets of a file that is nobody else's, one more than `limit` at most. Raises ValueError."""
    name = shown_file(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{name}: a directory: expected a file with {expected}")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ValueError(f"{name}: not a regular file: expected a file with {expected}")
        if status.st_mode & OTHERS:
            mode = stat.S_IMODE(status.st_mode)
            raise ValueError(f"{name}: mode {mode:04o} lets everybody at it: expected 0600 or 0640")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
