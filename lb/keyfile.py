"""Key files, one line of hexadecimal digits, and token files, one line of text: nobody but the operator may read them.

Nothing here ever repeats what is in the file.
"""

from __future__ import annotations

import stat
from pathlib import Path

from lb.document import shown_file

OTHERS = stat.S_IRWXO
MIN_TOKEN, MAX_TOKEN = 16, 200  # characters
_MAX_FILE = 256  # octets; a key takes 64 at most


def read_key(path: Path, length: int) -> bytes:
    """The key of `length` octets in a file. Raises ValueError with the path and what was expected."""
    name = shown_file(path)
    expected = f"{2 * length} hex digits"
    octets = _read(path, expected)
    digits = octets.strip()
    if len(octets) > _MAX_FILE or len(digits) != 2 * length:
        found = f"more than {_MAX_FILE}" if len(octets) > _MAX_FILE else len(digits)
        raise ValueError(f"{name}: holds {found} characters: expected {expected} ({length} octets)")
    if not all(digit in b"0123456789abcdefABCDEF" for digit in digits):
        raise ValueError(f"{name}: holds something else than hex digits: expected {2 * length} of them")
    return bytes.fromhex(digits.decode())


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


def _read(path: Path, expected: str) -> bytes:
    """The first octets of a file that is nobody else's. Raises ValueError."""
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
            return file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
