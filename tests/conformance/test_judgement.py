"""What the checks say of what was seen: those cases that no server here shows, and what is shown of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.conformance.judgement import CHECKS, Finding, Status
from lb.conformance.observed import (
    Kind,
    LiveConnection,
    MoveRecord,
    Observations,
    Origin,
    PoolRecord,
    RotationRecord,
    SeenCid,
    SeenRetry,
    Trigger,
)
from lb.conformance.stale import StaleFourPass
from lb.conformance.subject import Subject, tokens_of
from lb.reset import reset_token
from lb.reset_scheme import ResetRule, Scheme, server_token_key
from tests.conformance import servers

SUBJECT = servers.subject()
PLAIN = servers.subject(servers.PLAINTEXT)
GOOD = SUBJECT.craft(os.urandom)


def found(name: str, seen: Observations, subject: Subject = SUBJECT) -> Finding:
    [check] = [check for check in CHECKS if check.name == name]
    return check.judge(subject, seen)


def seen(*cids: bytes, origin: Origin = Origin.HANDSHAKE) -> Observations:
    return Observations([SeenCid(cid, origin, i) for i, cid in enumerate(cids)])


def test_names_of_checks_are_unique_and_in_the_documentation() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    text = (servers.ROOT / "docs" / "conformance.md").read_text()
    assert [name for name in names if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize(
    ("cid", "reason"),
    [
        (b"", "zero-length: nothing to route by"),
        (b"\xf0" + GOOD[1:], "config ID 7: marked as unroutable (0b111)"),
        (b"\x30" + GOOD[1:], "config ID 1: expected 0"),
        (GOOD[:16], "16 octets: too short for server ID and nonce, 17"),
        (SUBJECT.codec.encode(b"\xc0\xff\xee\x02", bytes(12)), "server ID c0ffee02: expected c0ffee01"),
    ],
)
def test_a_cid_that_is_not_routable(cid: bytes, reason: str) -> None:
    finding = found("routable", seen(GOOD, cid))
    assert finding.status is Status.FAILED
    assert finding.detail == "1 of 2 CIDs are not routable to this server"
    assert finding.evidence == (f"{cid.hex() or 'none'} (Initial of connection 1): {reason}",)


def test_the_cipher_of_older_drafts_is_known() -> None:
    """By the CIDs that were published with them."""
    vectors = json.loads((servers.ROOT / "tests" / "data" / "test-vectors.json").read_text())["stale_peer_fingerprints"]
    for vector in vectors:
        server_id, nonce, key, cid = (bytes.fromhex(vector[name]) for name in ("server_id", "nonce", "key", "cid"))
        assert StaleFourPass(key, len(cid) - 1).encrypt(server_id + nonce) == cid[1:], vector["id"]
        config = CidConfig(ConfigId(vector["config_id"]), len(server_id), len(nonce), key)
        subject = Subject("a", config, ServerId(server_id))
        finding = found("routable", seen(cid), subject)
        assert finding.detail.endswith("; 1 were made by the cipher of drafts -15 to -18")
        assert found("routable", seen(subject.craft(os.urandom)), subject).status is Status.PASSED
    assert len(vectors) == 3


def test_one_length() -> None:
    finding = found("cid-length", seen(GOOD, GOOD + b"\0", GOOD + b"\1"))
    assert (finding.status, finding.detail) == (Status.FAILED, "expected 17 octets, found 1 of 17, 2 of 18")


def test_low_bits_without_the_appended_octets_are_not_the_length() -> None:
    subject = servers.subject(servers.APPENDED)
    cid = subject.craft(os.urandom)
    assert found("first-octet", seen(cid), subject).status is Status.PASSED
    assert found("first-octet", seen(bytes((cid[0] - 2,)) + cid[1:]), subject).status is Status.FAILED


@pytest.mark.parametrize("name", ["first-octet", "cid-pattern"])
def test_a_few_cids_say_nothing_about_chance(name: str) -> None:
    subject = servers.subject(servers.RANDOM_LOW_BITS)
    finding = found(name, seen(*(subject.craft(os.urandom) for _ in range(29))), subject)
    assert finding.status is Status.SKIPPED


def test_a_cid_that_comes_twice_on_one_connection_is_a_nonce_that_comes_twice() -> None:
    cids = [SeenCid(GOOD, origin, 0) for origin in (Origin.HANDSHAKE, Origin.NEW_CONNECTION_ID)]
    finding = found("nonce-unique", Observations(cids))
    assert (finding.status, finding.evidence) == (Status.FAILED, (f"{GOOD.hex()}: connections 0 and 0",))


def test_a_token_that_serves_two_cids() -> None:
    cids = [SeenCid(SUBJECT.craft(os.urandom), Origin.NEW_CONNECTION_ID, 0, bytes(16)) for _ in range(2)]
    assert found("token-unique", Observations(cids)).status is Status.FAILED
    assert found("token-unique", Observations(cids[:1])).status is Status.PASSED


def test_tokens_are_never_shown() -> None:
    secret = os.urandom(16)
    cids = [SeenCid(SUBJECT.craft(os.urandom), Origin.NEW_CONNECTION_ID, 0, secret) for _ in range(2)]
    answer = os.urandom(24) + secret
    observations = Observations(cids, triggers=[Trigger(Kind.OWN, GOOD, 100, (answer, answer))])
    shown = repr([found(check.name, observations) for check in CHECKS]) + repr(observations) + repr(SUBJECT)
    for octets in (secret, servers.RESET_KEY, servers.CID_KEY):
        assert octets.hex() not in shown
        assert repr(octets)[2:-1] not in shown


def test_without_a_reset_key_tokens_are_nobodys_business() -> None:
    subject = servers.subject(reset_key=None)
    observations = Observations([SeenCid(GOOD, Origin.NEW_CONNECTION_ID, 0, os.urandom(16))])
    for name in ("reset-tokens", "reset"):
        finding = found(name, observations, subject)
        assert finding.status is Status.SKIPPED
        assert finding.detail.startswith("no reset-key-file")


def test_a_plaintext_server_may_issue_one_cid_for_each_connection() -> None:
    """Section 9 of the draft; with a key it may not."""
    observations = Observations(pools=[PoolRecord(8, most_active=1)], migration=MoveRecord(is_answered=True))
    for name in ("cid-pool", "active-migration"):
        assert found(name, observations, PLAIN).status is Status.SKIPPED
        assert found(name, observations).status is Status.FAILED


def test_retries() -> None:
    def with_retry(scid: bytes, dcid: bytes) -> Finding:
        return found("retry", Observations(retries=[SeenRetry(scid, dcid)]))

    assert with_retry(GOOD, b"whatever").status is Status.PASSED
    assert with_retry(b"whatever", b"else").status is Status.FAILED
    assert with_retry(GOOD, GOOD).detail == "1 of 1 Retry packets have the client's DCID for an SCID"


def test_lost_handshakes() -> None:
    assert found("handshake", Observations(handshakes=2000, unanswered=20)).status is Status.PASSED
    assert found("handshake", Observations(handshakes=2000, unanswered=21)).status is Status.FAILED


def reset(size: int, first: int = 0x40) -> bytes:
    return bytes((first,)) + os.urandom(size - 17) + reset_token(servers.RESET_KEY, GOOD)


@pytest.mark.parametrize(
    ("size", "answers", "evidence"),
    [
        (100, [reset(100)], "100 octets to 100"),
        (60, [reset(100)], "100 octets to 60"),
        (60, [reset(20)], "20 octets: too short"),
        (60, [reset(50, 0x00)], "first octet 00000000"),
        (60, [reset(50, 0xC1)], "first octet 11000001"),
        (60, [reset(50), reset(49)], "2 to one packet"),
    ],
)
def test_resets_of_the_wrong_size_or_form(size: int, answers: Sequence[bytes], evidence: str) -> None:
    finding = found("reset-size", Observations(triggers=[Trigger(Kind.OWN, GOOD, size, tuple(answers))]))
    assert (finding.status, finding.evidence) == (Status.FAILED, (evidence,))


@pytest.mark.parametrize("size", [99, 60, 24])
def test_small_packets_need_no_reset(size: int) -> None:
    triggers = [Trigger(Kind.OWN, GOOD, 100, (reset(60),)), Trigger(Kind.OWN, GOOD, size)]
    assert found("reset", Observations(triggers=triggers)).status is Status.PASSED


def rotated(*live: LiveConnection, later: Sequence[bytes] = ()) -> Finding:
    record = RotationRecord(5.0, live, tuple(SeenCid(cid, Origin.HANDSHAKE, 0) for cid in later), True)
    subject = replace(SUBJECT, rotated=servers.subject(servers.NEW, servers.NEW_RESET_KEY))
    return found("rotation", Observations(rotation=record), subject)


def test_rotation() -> None:
    new = Codec(servers.NEW).encode(servers.SERVER_ID, bytes(12))
    good = LiveConnection(8, old=8, active=(new,), moved_after=0.5, retire_prior_to=8)
    assert rotated(good, later=[new]).status is Status.PASSED
    assert rotated(good, later=[new, GOOD]).evidence == (
        "1 of 2 CIDs issued later are not under the new one: config ID 0: expected 5",
    )
    assert rotated(replace(good, retire_prior_to=7)).evidence == ("Retire Prior To 7: expected 8 at least",)
    assert rotated(replace(good, active=(new, GOOD))).status is Status.FAILED
    assert rotated(replace(good, error="closed: idle")).evidence == ("a live connection: closed: idle",)


@pytest.mark.parametrize("scheme", Scheme)
def test_tokens_of_other_makes_of_servers(scheme: Scheme) -> None:
    """What a balancer makes of a master key, and a server of its own, are the same tokens."""
    rule, master = ResetRule(scheme), os.urandom(32)
    server = servers.SINGLE_PASS.config_id, servers.SERVER_ID, "192.0.2.1"
    secret = rule.secret(master, *server[:2])
    assert tokens_of(scheme, secret, "192.0.2.1")(GOOD) == server_token_key(rule, master, *server).token(GOOD)
