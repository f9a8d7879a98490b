"""Where a connection ID or a datagram goes, and why: asked of the code that routes, and told in words.

Questions and answers are mappings with hyphened fields; octets are hex digits. Nothing is remembered from one question
to the next, and nothing of a running balancer's own memory is known here: a datagram that its tables would find is
explained as the first of its flow, unless those before it are part of the question. Limits of rates do not apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lb.address import Address
from lb.cid import MAX_CID_LENGTH_V1, CidConfig, Codec, ConnectionId, config_id_of
from lb.packet import Header, parse_header
from lb.reset_scheme import Scheme
from lb.router import Route, Router, RouterLimits, Verdict
from lb.routing import BackendState, FourTuple, RoutingTable, Unroutable

# The specification's.
MAX_DATAGRAM = 65_535
# Ours.
MAX_DATAGRAMS = 256  # in one question
BIG_ENOUGH = 1200  # octets of a packet that any answer to it fits into
NO_LIMITS = RouterLimits(new_flows_rate=0, reset_rate=0, reset_prefix_rate=0)
SOMEBODY = FourTuple("192.0.2.1", 443, "192.0.2.1", 443)  # whose choice by the ring is told to nobody

UNROUTABLE_WHY = {
    Unroutable.NO_CID: "it has no octets",
    Unroutable.NO_CONFIG: "its config ID names no configuration",
    Unroutable.CODEPOINT_7: "config ID 7 marks CIDs of servers without a configuration",
    Unroutable.TOO_SHORT: "it ends before the routing block does",
    Unroutable.UNKNOWN_SERVER: "it decodes to a server ID that is nobody's",
    Unroutable.DEAD_SERVER: "its server is declared dead",
}
VERDICT_WHY = {
    Verdict.CID: "its CID carries the server ID of a backend that is {state}",
    Verdict.CID_DOWN: "its CID carries the server ID of a backend that is DOWN but not declared dead: it may come back",
    Verdict.TABLE_SCID: "a packet before it had the same addresses and source CID",
    Verdict.TABLE_DCID: "a packet before it had the same destination CID",
    Verdict.TABLE_FLOW: "a packet before it had the same addresses",
    Verdict.FALLBACK: "the ring chooses by the addresses",
    Verdict.RESET: "its server is declared dead, and its client is told by a stateless reset",
    Verdict.EMPTY: "it has no octets",
    Verdict.MALFORMED: "it ends before its long header does",
    Verdict.UNKNOWN_SERVER: "the service says `unknown-server: drop`",
    Verdict.NO_BACKEND: "no backend takes new connections",
    Verdict.RESET_TOO_SMALL: "its server is declared dead, and it is too short to be answered with a stateless reset",
}
STATES = {BackendState.ACTIVE: "active", BackendState.DRAINING: "draining", BackendState.DOWN: "down"}


def explain(tables: Sequence[RoutingTable], given: Mapping[str, Any]) -> dict[str, Any]:
    """What each service makes of one `cid`, one `datagram`, or of `datagrams` in their order.

    `service` names the only service to ask. `client` and `local` are the two ends, ADDRESS:PORT; without `service`,
    those services are asked that listen at `local`. A datagram may be given by its beginning and its whole `length`.
    Raises ValueError, naming the field, for anything else. To be called where the tables are used: their ciphers are
    not to be shared between threads.
    """
    given = {name: value for name, value in given.items() if value is not None}
    asked = given.keys() & _QUESTIONS
    if len(asked) != 1:
        raise ValueError("expected one of cid, datagram and datagrams")
    (question,) = asked
    _refuse_others(given, {question, "service"} if question == "datagrams" else _FIELDS - (_QUESTIONS - asked))
    explainer = Explainer(tables, _service(tables, given))
    if question == "cid":
        return explainer.cid(octets(given["cid"], "cid", MAX_DATAGRAM), _flow(given))
    if question == "datagram":
        return explainer.datagram(_datagram(given), _flow(given))
    several = given["datagrams"]
    if not isinstance(several, list) or len(several) > MAX_DATAGRAMS:
        raise ValueError(f"datagrams: expected a list of at most {MAX_DATAGRAMS}")
    return {"datagrams": [_one_of(explainer, one, f"datagrams[{i}]") for i, one in enumerate(several)]}


class Flow(NamedTuple):
    """The ends of a datagram, as far as they are known."""

    client: Address | None = None
    local: Address | None = None


class Explainer:
    """Explains one datagram after the other; what routers remember of those before counts, and so does their order."""

    def __init__(self, tables: Iterable[RoutingTable], service: str | None = None) -> None:
        """`service` is the only one to ask, whatever a datagram's addresses are."""
        self._by_addresses = service is None
        self._services = [_Asked(table) for table in tables if service in (None, table.service.name)]
        self._now = 0.0

    def cid(self, cid: bytes, flow: Flow = Flow()) -> dict[str, Any]:  # noqa: B008 - it is immutable
        """What becomes of packets with a short header and this CID."""
        header = Header(is_long=False, dcid=ConnectionId(cid), scid=None)
        answer: dict[str, Any] = {"cid": cid.hex(), "config-id": config_id_of(cid)}
        services = []
        for service in self._at(flow.local):
            # Padded, a CID that ends too early would be whole; any other gets room for an answer to it.
            is_short = service.table.by_cid(cid) in (Unroutable.NO_CID, Unroutable.TOO_SHORT)
            packet = (b"\x40" + cid).ljust(0 if is_short else BIG_ENOUGH, b"\0")
            services.append(service.explain(packet, header, flow, self._now))
        return answer | {"services": services}

    def datagram(self, datagram: bytes, flow: Flow = Flow(), at: float = 0.0) -> dict[str, Any]:  # noqa: B008
        """What becomes of a UDP payload that came `at` some second of any clock."""
        self._now = max(self._now, at)
        header = parse_header(datagram)
        answer: dict[str, Any] = {"octets": len(datagram)}
        if header is not None:
            answer["header"] = "long" if header.is_long else "short"
            if header.scid is not None:
                answer |= {"version": datagram[1:5].hex(), "cid": header.dcid.hex(), "scid": header.scid.hex()}
            answer["config-id"] = config_id_of(header.dcid)
        services = [service.explain(datagram, header, flow, self._now) for service in self._at(flow.local)]
        return answer | {"services": services}

    def _at(self, local: Address | None) -> list[_Asked]:
        if local is None or not self._by_addresses:
            return self._services
        return [service for service in self._services if listens_at(service.table.service.listen, local)]


class _Asked:
    """A service that is asked: its table, and a router that begins with no memory."""

    def __init__(self, table: RoutingTable) -> None:
        self.table = table
        self._router = Router(table, random=bytes, limits=NO_LIMITS)
        self._codecs = {slot.config.config_id: Codec(slot.config) for slot in table.service.cid_slots}

    def explain(self, datagram: bytes, header: Header | None, flow: Flow, now: float) -> dict[str, Any]:
        answer: dict[str, Any] = {"service": self.table.service.name}
        if header is not None:
            answer |= self._decoded(header)
        addresses = self._four_tuple(flow)
        route = self._router.route(datagram, addresses or SOMEBODY, now)
        is_chosen_by_addresses = route.verdict in (Verdict.FALLBACK, Verdict.TABLE_FLOW, Verdict.TABLE_SCID)
        if route.backend is not None and (addresses or not is_chosen_by_addresses):
            answer |= self._backend(route.backend)
        if answer.get("issued-by") == answer.get("backend"):
            answer.pop("issued-by", None)
        answer["verdict"] = route.verdict.name.lower()
        if route.unroutable is not None:
            answer["unroutable"] = route.unroutable.name.lower().replace("_", "-")
        return answer | {"why": self._why(route, answer, has_addresses=addresses is not None)}

    def _decoded(self, header: Header) -> dict[str, Any]:
        """What the CID carries, and whose it is, by the configuration that its config ID names."""
        config_id = config_id_of(header.dcid)
        codec = None if config_id is None else self._codecs.get(config_id)
        if codec is None:
            return {}
        config: CidConfig = codec.config
        known: dict[str, Any] = {"algorithm": config.algorithm, "cid-length": config.cid_length}
        decoded = codec.decode(header.dcid)
        if decoded is None:
            return known
        if not header.is_long and (whole := self.table.whole_cid(header.dcid)):
            known["cid"] = whole.hex()
        known |= {"server-id": decoded.server_id.hex(), "nonce": decoded.nonce.hex()}
        server = self.table.servers(config.config_id).get(decoded.server_id)
        return known if server is None else known | {"issued-by": self.table.backends[server.backend].name}

    def _backend(self, index: int) -> dict[str, Any]:
        backend = self.table.backends[index]
        state = STATES[self.table.states[index]]
        if backend.name in self.table.dead:
            state = "fenced" if backend.name in self.table.fenced else "dead"
        return {"backend": backend.name, "address": str(backend.address), "state": state}

    def _four_tuple(self, flow: Flow) -> FourTuple | None:
        """The addresses that the ring takes; None if they are not known."""
        local = flow.local or self.table.service.listen[0]
        if flow.client is None or local.is_wildcard:
            return None
        return FourTuple(flow.client.host, flow.client.port, local.host, local.port)

    def _why(self, route: Route, answer: Mapping[str, Any], *, has_addresses: bool) -> str:
        state, issuer = answer.get("state", ""), answer.get("issued-by")
        why = VERDICT_WHY[route.verdict].format(state=state.upper())
        if route.verdict is Verdict.CID and state == STATES[BackendState.DOWN]:
            why += "; so few are ACTIVE that the health checks are not believed"
        scheme = self.table.service.reset_rule.scheme
        if route.verdict is Verdict.RESET and scheme is not Scheme.HMAC_SHA256:
            why += f", with the token that {scheme} would make"
        if route.verdict is Verdict.FALLBACK and not has_addresses:
            why += ", which are not known here"
        if route.unroutable is not None:
            why = f"the CID does not decide, since {UNROUTABLE_WHY[route.unroutable]}; {why}"
        return why.replace(_DEAD, "fenced by the operator") if issuer in self.table.fenced else why


def listens_at(listen: Iterable[Address], local: Address) -> bool:
    """Whether what is sent to `local` comes to one of these addresses."""
    return any(
        one.port == local.port and (one.host == local.host or (one.is_wildcard and one.is_ipv6 == local.is_ipv6))
        for one in listen
    )


def octets(value: Any, name: str, most: int) -> bytes:
    """Octets as people paste them: hex digits, maybe with blanks, colons, or 0x before them. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected hex digits")  # noqa: TRY004 - a field is wrong, not a caller
    digits = "".join(value.replace(":", " ").split()).removeprefix("0x")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"{name}: expected hex digits, two for each octet") from None
    if len(found) > most:
        raise ValueError(f"{name}: {len(found)} octets: expected at most {most}")
    return found


def suffices(beginning: bytes, length: int) -> bool:
    """Whether the beginning of a datagram of `length` octets is enough to explain it by."""
    header = parse_header(beginning)
    if header is None:  # cut off, it says nothing; whole, it is malformed
        return len(beginning) == length
    return header.is_long or len(beginning) >= min(length, _SHORT_HEAD)


def head(datagram: bytes) -> bytes:
    """As much of a datagram as a question needs beside its length."""
    header = parse_header(datagram)
    if header is None:
        return datagram
    return datagram[: 7 + len(header.dcid) + len(header.scid)] if header.scid is not None else datagram[:_SHORT_HEAD]


_QUESTIONS = {"cid", "datagram", "datagrams"}
_FIELDS = _QUESTIONS | {"length", "client", "local", "service"}
_DEAD = "declared dead"
_SHORT_HEAD = 1 + MAX_CID_LENGTH_V1


def _one_of(explainer: Explainer, given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: expected an object")  # noqa: TRY004
    fields = {field: value for field, value in given.items() if value is not None}
    try:
        _refuse_others(fields, {"datagram", "length", "client", "local", "at"})
        if "client" not in fields:
            raise ValueError("client: missing")
        at = fields.get("at", 0.0)
        if not isinstance(at, int | float) or isinstance(at, bool) or not abs(at) < 1 << 53:
            raise ValueError("at: expected seconds")
        return explainer.datagram(_datagram(fields), _flow(fields), float(at))
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _refuse_others(given: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in given.keys() - set(known):
        raise ValueError(f"{name}: unknown field, or one of another question")


def _service(tables: Iterable[RoutingTable], given: Mapping[str, Any]) -> str | None:
    name = given.get("service")
    names = [table.service.name for table in tables]
    if name is not None and name not in names:
        raise ValueError(f"service: expected one of {', '.join(names)}")
    return name


def _datagram(given: Mapping[str, Any]) -> bytes:
    datagram = octets(given.get("datagram"), "datagram", MAX_DATAGRAM)
    length = given.get("length", len(datagram))
    if type(length) is not int or not len(datagram) <= length <= MAX_DATAGRAM:
        raise ValueError(f"length: expected an integer, {len(datagram)} to {MAX_DATAGRAM}")
    if not suffices(datagram, length):
        raise ValueError(f"datagram: {len(datagram)} octets of {length}: expected its whole header")
    return datagram.ljust(length, b"\0")


def _flow(given: Mapping[str, Any]) -> Flow:
    return Flow(_address(given, "client"), _address(given, "local"))


def _address(given: Mapping[str, Any], name: str) -> Address | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected ADDRESS:PORT")  # noqa: TRY004
    try:
        return Address.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
