"""lb/admin/access.py: who gets in, what for, and who does not."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest

from lb.address import Address
from lb.admin.access import Peer, Policy, Refusal, Rights, Tokens, admit
from lb.keys import AdminConfig

READ, WRITE = "r" * 16, "w" * 16
TOKENS = Tokens(READ, WRITE)
PROOF = Policy(needs_proof=True, writers=frozenset(["ops"]))
OPEN = Policy()
TCP = Peer(Address("127.0.0.1", 50000))
UNIX = Peer(uid=7)
FILE = Path("file")


def bearer(token: str) -> dict[str, str]:
    return {"Host": "127.0.0.1", "Authorization": f"Bearer {token}"}


def basic(text: str) -> dict[str, str]:
    return {"Host": "127.0.0.1", "Authorization": f"Basic {b64encode(text.encode()).decode()}"}


def certified(name: str | None) -> Peer:
    return Peer(Address("192.0.2.9", 50000), tls=True, common_name=name)


@pytest.mark.parametrize(
    ("policy", "peer", "headers", "may_write"),
    [
        (OPEN, UNIX, {}, True),
        (PROOF, UNIX, {}, True),
        (PROOF, UNIX, {"Host": "localhost", "Authorization": "nonsense"}, True),
        (OPEN, TCP, {}, True),
        (OPEN, TCP, bearer("whatever it is"), True),
        (PROOF, TCP, bearer(WRITE), True),
        (PROOF, TCP, bearer(READ), False),
        (PROOF, TCP, {"Authorization": f"bEaReR   {READ} "}, False),
        (PROOF, TCP, basic(f"anybody:{WRITE}"), True),
        (PROOF, TCP, basic(f":{READ}"), False),
        (PROOF, TCP, bearer(WRITE) | {"Host": "lb.example"}, True),
        (PROOF, certified("ops"), {"Host": "lb.example"}, True),
        (PROOF, certified("intern"), {}, False),
        (PROOF, certified("intern"), bearer(WRITE), True),
    ],
)
def test_admitted(policy: Policy, peer: Peer, headers: dict[str, str], may_write: bool) -> None:
    for method in ("GET", "PATCH"):
        rights = admit(policy, TOKENS, peer, method, headers)

        assert isinstance(rights, Rights)
        assert rights.may_write is may_write


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        (TCP, {}),
        (TCP, bearer("x" * 16)),
        (TCP, bearer(READ[:-1])),
        (TCP, bearer(READ + "r")),
        (TCP, bearer("")),
        (TCP, bearer("x" * 2000)),
        (TCP, {"Authorization": READ}),
        (TCP, {"Authorization": f"Digest {READ}"}),
        (TCP, basic(READ)),
        (TCP, basic(f"{READ}:")),
        (TCP, {"Authorization": "Basic ###"}),
        (TCP, {"Authorization": "Basic /w=="}),
        (TCP, {"Authorization": "Bearer \udcff\udcff"}),
        (certified(None), {}),
        (certified("ops"), bearer("x" * 16)),
    ],
)
def test_without_a_good_proof_it_is_401_whatever_is_asked(peer: Peer, headers: dict[str, str]) -> None:
    for method in ("GET", "POST", "BREW"):
        refusal = admit(PROOF, TOKENS, peer, method, headers)

        assert isinstance(refusal, Refusal)
        assert refusal.status == 401


def test_a_token_that_is_not_there_lets_nobody_in() -> None:
    for given in ("", "None", " "):
        assert isinstance(admit(PROOF, Tokens(), TCP, "GET", bearer(given)), Refusal)
        assert isinstance(admit(PROOF, Tokens(), TCP, "GET", basic(f"x:{given}")), Refusal)


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9101", True),
        ("[::1]", True),
        ("[::1]:9101", True),
        ("::1", False),
        ("localhost", True),
        ("LocalHost:9101", True),
        ("lb.localhost", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("localhost:evil", False),
        ("localhost:80:80", False),
        ("[::1]evil", False),
        ("", False),
    ],
)
def test_a_name_that_dns_could_lie_about_is_403_unless_proof_was_given(host: str, admitted: bool) -> None:
    for peer in (TCP, UNIX):
        for headers in ({"Host": host}, {"Host": host, "Authorization": "Bearer of somebody's page"}):
            assert isinstance(admit(OPEN, TOKENS, peer, "GET", headers), Rights) is admitted
    assert isinstance(admit(PROOF, TOKENS, TCP, "GET", bearer(READ) | {"Host": host}), Rights)
    assert isinstance(admit(OPEN, TOKENS, certified(None), "GET", {"Host": host}), Rights)


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("http://127.0.0.1:9101", True),
        ("https://127.0.0.1:9101", True),
        ("http://127.0.0.1", False),
        ("http://evil.example", False),
        ("http://evil.example/127.0.0.1:9101", False),
        ("null", False),
        ("", False),
    ],
)
def test_a_page_of_another_site_may_change_nothing_whoever_looks_at_it(origin: str, admitted: bool) -> None:
    headers = {"Host": "127.0.0.1:9101", "Origin": origin}
    for policy, peer, proof in (
        (OPEN, TCP, {}),
        (OPEN, UNIX, {}),
        (PROOF, TCP, {"Authorization": f"Bearer {WRITE}"}),
        (PROOF, certified("ops"), {}),
    ):
        assert isinstance(admit(policy, TOKENS, peer, "POST", headers | proof), Rights) is admitted
        assert isinstance(admit(policy, TOKENS, peer, "GET", headers | proof), Rights)
    assert isinstance(admit(OPEN, TOKENS, TCP, "POST", {"Origin": origin}), Refusal)


def test_no_reason_and_no_name_holds_a_token() -> None:
    for headers in (bearer(READ), bearer(WRITE), bearer("x" * 16), basic(f"u:{WRITE}")):
        told = str(admit(PROOF, TOKENS, TCP, "GET", headers))
        assert READ not in told
        assert WRITE not in told
        assert "x" * 16 not in told


@pytest.mark.parametrize(
    ("config", "needs_proof"),
    [
        (AdminConfig(), False),
        (AdminConfig(read_token_file=FILE), True),
        (AdminConfig(write_token_file=FILE), True),
        (AdminConfig(client_ca_file=FILE), True),
        (AdminConfig(certificate_file=FILE, key_file=FILE), False),
    ],
)
def test_any_token_or_authority_means_that_proof_is_needed(config: AdminConfig, needs_proof: bool) -> None:
    assert Policy.of(config).needs_proof is needs_proof


def test_the_log_can_tell_callers_apart() -> None:
    def who(peer: Peer, headers: dict[str, str]) -> str:
        rights = admit(PROOF, TOKENS, peer, "GET", headers)
        assert isinstance(rights, Rights)
        return rights.who

    assert who(UNIX, {}) == "uid 7 by unix socket"
    assert who(TCP, bearer(READ)) == "127.0.0.1 by read token"
    assert who(TCP, bearer(WRITE)) == "127.0.0.1 by write token"
    assert who(certified("ops"), {}) == "192.0.2.9 by certificate of ops"
