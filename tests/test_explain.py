"""explain: it says what the Router does, in words, and decodes what a CID carries."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.address import Address
from lb.cid import CidConfig, ConfigId
from lb.explain import MAX_DATAGRAMS, Explainer, Flow, explain, head, suffices
from lb.router import Router, RouterLimits
from lb.routing import BackendState, CidSlot, FourTuple, RoutingTable, Service, UnknownServer
from tests.builders import CONFIG, KEY, RESET_KEY, VIP, cid_of, deterministic_random, flow, long, service, short

FOUR_PASS = CidConfig(ConfigId(3), 4, 6, KEY[::-1], encodes_length=True, appended_length=2)
CLIENT = "198.51.100.7:50000"
STATES = {"b1": BackendState.DRAINING, "b2": BackendState.DOWN, "b3": BackendState.DOWN}
UNLIMITED = RouterLimits(new_flows_rate=0, reset_rate=0, reset_prefix_rate=0)


def tables(**how: Any) -> list[RoutingTable]:
    """One service: b0 active, b1 draining, b2 down, b3 dead."""
    slots = (CidSlot(CONFIG, RESET_KEY), CidSlot(FOUR_PASS))
    return [RoutingTable.build(service(slots=slots, **how), STATES, ["b3"])]


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (one,) = answer["services"]
    assert isinstance(one, dict)
    return one


def test_a_cid_is_decoded_and_its_backend_named() -> None:
    cid = cid_of(0, nonce=7).hex()
    assert explain(tables(), {"cid": cid}) == {
        "cid": cid,
        "config-id": 0,
        "services": [
            {
                "service": "web",
                "algorithm": "single-pass",
                "cid-length": 17,
                "cid": cid,
                "server-id": "a0000000",
                "nonce": f"{7:024x}",
                "backend": "b0",
                "address": "10.0.0.0:443",
                "state": "active",
                "verdict": "cid",
                "why": "its CID carries the server ID of a backend that is ACTIVE",
            }
        ],
    }


def test_a_short_header_does_not_say_where_its_cid_ends_but_the_configuration_does() -> None:
    cid = cid_of(1, config=FOUR_PASS)
    answer = explain(tables(), {"datagram": short(cid + b"more").hex()})
    assert (answer["header"], answer["config-id"], "cid" in answer) == ("short", 3, False)
    one = only(answer)
    assert (one["algorithm"], one["cid"], one["backend"], one["state"]) == (
        "four-pass", cid.hex(), "b1", "draining",
    )  # fmt: skip
    assert one["why"] == "its CID carries the server ID of a backend that is DRAINING"


def test_a_long_header_is_taken_apart() -> None:
    cid = cid_of(0)
    answer = explain(tables(), {"datagram": long(cid, b"\xab\xcd", version=0x6B3343CF).hex()})
    del answer["services"]
    assert answer == {
        "octets": 1200,
        "header": "long",
        "version": "6b3343cf",
        "cid": cid.hex(),
        "scid": "abcd",
        "config-id": 0,
    }


@pytest.mark.parametrize(
    ("dcid", "reason", "because"),
    [
        (b"", "no-cid", "it has no octets"),
        (b"\xe1" + bytes(16), "codepoint-7", "config ID 7 marks CIDs of servers without a configuration"),
        (b"\x31" + bytes(16), "no-config", "its config ID names no configuration"),
        (b"\x11" + bytes(15), "too-short", "it ends before the routing block does"),
        (cid_of(77), "unknown-server", "it decodes to a server ID that is nobody's"),
    ],
)
def test_why_a_cid_is_unroutable(dcid: bytes, reason: str, because: str) -> None:
    one = only(explain(tables(), {"cid": dcid.hex()}))
    assert (one["verdict"], one["unroutable"]) == ("fallback", reason)
    assert one["why"].startswith(f"the CID does not decide, since {because}; the ring chooses by the addresses")


@pytest.mark.parametrize(
    ("number", "packet", "verdict", "whose", "words"),
    [
        (2, short, "cid_down", ("b2", "down", None), "it may come back"),
        (3, short, "reset", (None, None, "b3"), "declared dead, and its client is told by a stateless reset"),
        (3, lambda cid: short(cid, 21), "reset_too_small", (None, None, "b3"), "too short to be answered"),
        (3, long, "fallback", (None, None, "b3"), "its server is declared dead; the ring chooses"),
    ],
)
def test_what_becomes_of_packets_for_servers_that_are_down(
    number: int, packet: Any, verdict: str, whose: tuple[str | None, ...], words: str
) -> None:
    one = only(explain(tables(), {"datagram": packet(cid_of(number)).hex()}))
    assert one["verdict"] == verdict
    assert (one.get("backend"), one.get("state"), one.get("issued-by")) == whose
    assert words in one["why"]


def test_a_fence_is_an_operators_word() -> None:
    table = RoutingTable.build(service(), fenced=["b0"])
    one = only(explain([table], {"cid": cid_of(0).hex()}))
    assert (one["verdict"], one["issued-by"]) == ("reset", "b0")
    assert one["why"].startswith("its server is fenced by the operator, and")


def test_checks_that_are_not_believed_are_told() -> None:
    table = RoutingTable.build(service(2), dict.fromkeys(("b0", "b1"), BackendState.DOWN))
    one = only(explain([table], {"cid": cid_of(0).hex()}))
    assert (one["verdict"], one["state"]) == ("cid", "down")
    assert one["why"].endswith("so few are ACTIVE that the health checks are not believed")


def test_a_dropped_packet_says_whose_wish_that_is() -> None:
    asked = {"datagram": short(cid_of(77)).hex()}
    one = only(explain(tables(unknown_server=UnknownServer.DROP), asked))
    assert (one["verdict"], "backend" in one) == ("unknown_server", False)
    assert one["why"].endswith("the service says `unknown-server: drop`")


@pytest.mark.parametrize(
    ("datagram", "verdict", "why"),
    [("", "empty", "it has no octets"), ("80", "malformed", "it ends before its long header does")],
)
def test_what_is_no_packet(datagram: str, verdict: str, why: str) -> None:
    answer = explain(tables(), {"datagram": datagram})
    assert answer == {
        "octets": len(datagram) // 2,
        "services": [{"service": "web", "verdict": verdict, "why": why}],
    }


def test_the_rings_choice_takes_both_addresses() -> None:
    (table,) = tables()
    asked = {"datagram": long(b"\xff" * 8).hex()}
    assert "backend" not in only(explain([table], asked))
    assert only(explain([table], asked))["why"].endswith("the ring chooses by the addresses, which are not known here")
    chosen = table.fallback(FourTuple("198.51.100.7", 50000, VIP.host, VIP.port))
    assert chosen is not None
    one = only(explain([table], asked | {"client": CLIENT}))
    assert (one["verdict"], one["backend"]) == ("fallback", table.backends[chosen].name)
    wildcard = RoutingTable.build(service(listen=(Address("0.0.0.0", 443),)))
    assert "backend" not in only(explain([wildcard], asked | {"client": CLIENT}))
    assert "backend" in only(explain([wildcard], asked | {"client": CLIENT, "local": "192.0.2.9:443"}))


def test_the_services_that_listen_there_are_asked() -> None:
    def named(name: str, *listen: str) -> RoutingTable:
        web = service(2, listen=tuple(Address.parse(text) for text in listen))
        return RoutingTable.build(Service(name, web.listen, web.cid_slots, web.backends))

    several = [named("a", "192.0.2.1:443"), named("b", "0.0.0.0:444"), named("c", "[::]:443", "192.0.2.1:444")]

    def asked(**given: str) -> list[str]:
        return [one["service"] for one in explain(several, {"cid": "00"} | given)["services"]]

    assert asked() == ["a", "b", "c"]
    assert asked(local="192.0.2.1:443") == ["a"]
    assert asked(local="192.0.2.1:444") == ["b", "c"]
    assert asked(local="[2001:db8::7]:443") == ["c"]
    assert asked(local="192.0.2.1:443", service="b") == ["b"]


def test_datagrams_are_explained_in_the_light_of_those_before_them() -> None:
    initial, handshake = long(b"\xff" * 8, b"me"), long(b"\xfe" * 8, b"me")
    asked = [
        {"datagram": initial.hex(), "client": CLIENT},
        {"datagram": initial.hex(), "client": "198.51.100.8:1"},
        {"datagram": handshake.hex(), "client": CLIENT, "at": 1},
        {"datagram": short(b"\xfd" * 8).hex(), "client": CLIENT, "at": 2},
        {"datagram": short(b"\xfd" * 8).hex(), "client": CLIENT, "at": 1000},
    ]
    answers = explain(tables(), {"datagrams": asked})["datagrams"]
    assert [only(answer)["verdict"] for answer in answers] == [
        "fallback", "table_dcid", "table_scid", "table_flow", "fallback",
    ]  # fmt: skip
    assert len({only(answer)["backend"] for answer in answers}) == 1
    assert only(answers[1])["why"].endswith("a packet before it had the same destination CID")


def test_the_beginning_of_a_datagram_and_its_length_are_enough() -> None:
    (table,) = tables()
    for packet in (short(cid_of(3), 300), short(cid_of(0)), long(b"\xff" * 20, bytes(20)), short(b"\x01", 2)):
        beginning = head(packet)
        assert len(beginning) <= 47
        whole = explain([table], {"datagram": packet.hex(), "client": CLIENT})
        assert explain([table], {"datagram": beginning.hex(), "length": len(packet), "client": CLIENT}) == whole
        assert suffices(beginning, len(packet))
        assert not suffices(beginning[:-1], len(packet))


@pytest.mark.parametrize(
    "text", ["41a0b1", "41 a0 b1", "41:a0:b1", "0x41a0b1", "0x41 a0\nb1", "  41A0B1\t"], ids=range(6)
)
def test_octets_as_people_paste_them(text: str) -> None:
    assert explain(tables(), {"cid": text})["cid"] == "41a0b1"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "expected one of cid, datagram and datagrams"),
    "null": ({"cid": None}, "expected one of cid, datagram and datagrams"),
    "two": ({"cid": "00", "datagram": "00"}, "expected one of cid, datagram and datagrams"),
    "number": ({"cid": 1}, "cid: expected hex digits"),
    "odd": ({"cid": "0"}, "cid: expected hex digits, two for each octet"),
    "long": ({"datagram": "00" * 65536}, "datagram: 65536 octets: expected at most 65535"),
    "field": ({"cid": "00", "color": 1}, "color: unknown field, or one of another question"),
    "client": ({"cid": "00", "client": "here"}, "client: 'here': expected ADDRESS:PORT"),
    "client type": ({"cid": "00", "client": 1}, "client: expected ADDRESS:PORT"),
    "service": ({"cid": "00", "service": "wob"}, "service: expected one of web"),
    "length": ({"datagram": "4000", "length": 1}, "length: expected an integer, 2 to 65535"),
    "length type": ({"datagram": "4000", "length": True}, "length: expected an integer, 2 to 65535"),
    "beginning": ({"datagram": "4000", "length": 100}, "datagram: 2 octets of 100: expected its whole header"),
    "list": ({"datagrams": {}}, f"datagrams: expected a list of at most {MAX_DATAGRAMS}"),
    "many": ({"datagrams": [{}] * (MAX_DATAGRAMS + 1)}, f"datagrams: expected a list of at most {MAX_DATAGRAMS}"),
    "element": ({"datagrams": [1]}, "datagrams[0]: expected an object"),
    "no client": ({"datagrams": [{"datagram": "00"}]}, "datagrams[0].client: missing"),
    "at": ({"datagrams": [{"datagram": "00", "client": CLIENT, "at": "now"}]}, "datagrams[0].at: expected seconds"),
    "at infinity": (
        {"datagrams": [{"datagram": "00", "client": CLIENT, "at": float("nan")}]},
        "datagrams[0].at: expected seconds",
    ),
    "service inside": (
        {"datagrams": [{"datagram": "00", "client": CLIENT, "service": "web"}]},
        "datagrams[0].service: unknown field",
    ),
}


@pytest.mark.parametrize(("asked", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_question_that_makes_no_sense_is_told_why(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at
        explain(tables(), asked)
    assert str(caught.value).startswith(message)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40).map(bytes.hex),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["cid", "datagram", "datagrams", "client", "local", "service", "length", "at"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_question_raises_anything_but_value_errors(asked: dict[str, Any]) -> None:
    try:
        answer = explain(tables(), asked)
    except ValueError:
        return
    json.dumps(answer)


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=60) | st.integers(0, 5).map(cid_of).map(short))))
def test_it_says_what_the_router_does(packets: list[tuple[int, bytes]]) -> None:
    """Whatever comes: the same verdict and the same backend."""
    (table,) = tables()
    router = Router(table, random=deterministic_random(), limits=UNLIMITED)
    explainer = Explainer([table])
    for number, packet in packets:
        who = flow(number)
        route = router.route(packet, who, 0.0)
        client, local = Address(who.client, who.client_port), Address(who.local, who.local_port)
        one = only(explainer.datagram(packet, Flow(client, local)))
        assert one["verdict"] == route.verdict.name.lower()
        unroutable = None if route.unroutable is None else route.unroutable.name.lower().replace("_", "-")
        assert one.get("unroutable") == unroutable
        assert one.get("backend") == (None if route.backend is None else table.backends[route.backend].name)


def test_no_key_is_in_an_answer() -> None:
    said = json.dumps([explain(tables(), {"cid": cid_of(n).hex()}) for n in range(4)])
    for secret in (KEY, KEY[::-1], RESET_KEY):
        assert secret.hex()[:8] not in said
