"""What servers seal with a shared key: its format, its keys and their rolling, and whatever else may come instead."""

from __future__ import annotations

import hmac
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from backend.seal import OVERHEAD, Broken, Kind, Seal
from lb.keyfile import MAX_TOKEN_KEYS, read_token_keys

OLD, NEW, OTHER = bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96))
MOST = 100


def seal(*keys: bytes) -> Seal:
    return Seal(keys or [NEW], random.Random(1).randbytes)


def test_the_format_is_as_it_is_written_down() -> None:
    """Opened here by the words of docs/tokens.md, not by the code that is tested."""
    sealed = seal(NEW, OLD).seal(Kind.NEW_TOKEN, b"within")
    assert len(sealed) == OVERHEAD + len(b"within")
    kind, key_id, salt, nonce, rest = sealed[:1], sealed[1:5], sealed[5:17], sealed[17:29], sealed[29:]
    assert kind == b"\x81"
    assert hmac.digest(NEW, b"quiclb token key id\x01", "sha256")[:4] == key_id
    of_kind = hmac.digest(NEW, b"quiclb NEW_TOKEN\x01", "sha256")
    once = hmac.digest(of_kind, salt + b"\x01", "sha256")
    assert AESGCM(once).decrypt(nonce, rest, kind + key_id) == b"within"


@given(st.sampled_from(Kind), st.binary(max_size=MOST))
def test_what_is_sealed_comes_out_again_under_every_key_that_is_known(kind: Kind, octets: bytes) -> None:
    sealed = seal(OLD).seal(kind, octets)
    assert seal(NEW, OLD).open(kind, sealed, MOST) == octets
    assert seal(NEW).open(kind, sealed, MOST) is Broken.UNKNOWN_KEY


def test_nothing_is_sealed_twice_in_the_same_way() -> None:
    sealer = seal()
    sealed = {sealer.seal(Kind.RETRY_TOKEN, b"the same") for _ in range(100)}
    assert len({each[5:29] for each in sealed}) == len({each[29:] for each in sealed}) == 100


@given(st.binary(max_size=MOST), st.integers(0, 8 * (OVERHEAD + MOST) - 1))
def test_one_bit_is_enough_to_make_it_unreadable(octets: bytes, bit: int) -> None:
    sealed = bytearray(seal().seal(Kind.SESSION_TICKET, octets))
    sealed[bit // 8 % len(sealed)] ^= 1 << bit % 8
    assert isinstance(seal().open(Kind.SESSION_TICKET, bytes(sealed), MOST), Broken)


@given(st.sampled_from(Kind), st.binary(max_size=2 * (OVERHEAD + MOST)), st.booleans())
def test_any_octets_at_all_get_a_verdict(kind: Kind, octets: bytes, looks_right: bool) -> None:
    if looks_right:
        octets = seal().seal(kind, b"")[:5] + octets
    assert isinstance(seal().open(kind, octets, MOST), Broken)


def test_one_kind_does_not_pass_for_another() -> None:
    sealed = {kind: seal().seal(kind, b"x") for kind in Kind}
    for kind in Kind:
        for other in set(Kind) - {kind}:
            assert seal().open(other, sealed[kind], MOST) is Broken.FOREIGN
            renamed = bytes([other]) + sealed[kind][1:]
            assert seal().open(other, renamed, MOST) is Broken.FORGED


def test_what_is_too_short_or_too_long_is_not_even_tried() -> None:
    sealed = seal().seal(Kind.NEW_TOKEN, bytes(MOST))
    assert seal().open(Kind.NEW_TOKEN, sealed[: OVERHEAD - 1], MOST) is Broken.TRUNCATED
    assert seal().open(Kind.NEW_TOKEN, sealed[:-1], MOST) is Broken.FORGED
    assert seal().open(Kind.NEW_TOKEN, sealed + b"\0", MOST) is Broken.OVERSIZED
    assert seal().open(Kind.NEW_TOKEN, sealed + bytes(60_000), MOST) is Broken.OVERSIZED


STEPS = ((OLD,), (OLD, NEW), (NEW, OLD), (NEW,))


@pytest.mark.parametrize("step", range(len(STEPS) - 1))
def test_while_a_key_is_rolled_every_server_reads_what_any_other_makes(step: int) -> None:
    """Some servers have taken a step and others have not: at none of them does a client lose what it has."""
    before, after = seal(*STEPS[step]), seal(*STEPS[step + 1])
    for maker in (before, after):
        for reader in (before, after):
            opened = reader.open(Kind.NEW_TOKEN, maker.seal(Kind.NEW_TOKEN, b"x"), MOST)
            # The last step comes when everything that the old key has made is over.
            assert opened == b"x"


def test_a_seal_switches_keys_and_keeps_those_it_has_if_the_new_ones_are_wrong() -> None:
    sealer = seal(OLD)
    token = sealer.seal(Kind.NEW_TOKEN, b"x")
    for wrong in ([], [OLD[1:]], [OLD, OLD], [bytes([i]) * 32 for i in range(MAX_TOKEN_KEYS + 1)]):
        with pytest.raises(ValueError, match="token key"):
            sealer.switch(wrong)
        assert sealer.open(Kind.NEW_TOKEN, token, MOST) == b"x"
    sealer.switch([NEW])
    assert sealer.open(Kind.NEW_TOKEN, token, MOST) is Broken.UNKNOWN_KEY


def test_keys_do_not_print() -> None:
    sealer = seal(OLD, NEW)
    shown = repr(vars(sealer))
    for key in (OLD, NEW):
        for secret in (key, hmac.digest(key, b"quiclb NEW_TOKEN\x01", "sha256")):
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown


# The file.


def keygen(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lb", "keygen", "token-key", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def test_keygen_makes_a_file_and_adds_keys_second_until_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "token.keys"
    assert keygen("-o", path).returncode == 0
    path.chmod(0o640)
    [first] = read_token_keys(path)
    assert keygen("--add", path).returncode == 0
    assert path.stat().st_mode & 0o777 == 0o640
    keys = read_token_keys(path)
    assert (len(keys), keys[0]) == (2, first)
    assert keygen("--add", path).returncode == 0
    assert read_token_keys(path)[2:] == keys[1:]
    assert Seal(read_token_keys(path), os.urandom)

    path.write_text("".join(f"{os.urandom(32).hex()}\n" for _ in range(MAX_TOKEN_KEYS)))
    full = path.read_text()
    done = keygen("--add", path)
    assert (done.returncode, "holds 8 keys" in done.stderr, path.read_text()) == (2, True, full)
    assert sorted(tmp_path.iterdir()) == [path]


def test_keygen_adds_nothing_to_a_file_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "token.keys"
    assert keygen("--add", path).returncode == 2
    path.write_text(OLD.hex() + "\n")
    path.chmod(0o644)
    done = keygen("--add", path)
    assert (done.returncode, "0644" in done.stderr) == (2, True)
    path.chmod(0o600)
    assert keygen("--add", path, "-o", tmp_path / "other").returncode == 2
    assert path.read_text() == OLD.hex() + "\n"


WRONG = {
    "empty": ("", "holds 0 keys"),
    "nine keys": ("".join(f"{bytes([i]).hex() * 32}\n" for i in range(9)), "holds 9 keys"),
    "a short one": (OLD.hex() + "\n" + NEW.hex()[2:] + "\n", "line 2"),
    "no hex": ("z" * 64 + "\n", "line 1"),
    "a line cut off": (OLD.hex() + "\n" + NEW.hex()[:10], "line 2"),
    "the same twice": (OLD.hex() + "\n\n" + OLD.hex().upper() + "\n", "line 3"),
    "much too long": ("0" * 100_000, "more than"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_file_is_refused_by_its_line_and_not_repeated(case: str, tmp_path: Path) -> None:
    text, reason = WRONG[case]
    path = tmp_path / "token.keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=reason) as error:
        read_token_keys(path)
    assert str(path) in str(error.value)
    assert OLD.hex() not in str(error.value)
