"""What can be asked of the API: every operation, the shape of its request and of its answer, as OpenAPI 3.1 has it.

`OPERATIONS` is what api.py serves, request bodies are held to these schemas, and answers are of the types that they
are made from; so the description is not a second truth.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

from lb.admin import views
from lb.admin.shapes import Held, Schema, schema_of
from lb.overrides import MAX_WEIGHT

HEX = Held(pattern=r"^(?:0x)?(?:[0-9A-Fa-f]{2}[ :\t\r\n]*)*$", words="hex digits, two for each octet")
ADDRESS = "ADDRESS:PORT, as in 192.0.2.1:443 or [2001:db8::1]:443"
ETAG = '"[0-9]{1,18}"'
IF_MATCH = rf"{ETAG}|[0-9]{{1,18}}|\*"  # clients that lose the quotes are common
MAX_DATAGRAMS = 256
MAX_BODY = 64 << 10  # octets
MAX_EXPLAIN_BODY = 256 << 10
TIME = Held(-(1 << 52), 1 << 52)


class ErrorView(TypedDict):
    error: str
    reasons: NotRequired[list[str]]


class Nothing(TypedDict):
    pass


class ChangeRequest(TypedDict, total=False):
    drain: Annotated[bool | None, "Whether it gets no new connections; null: as the file says."]
    weight: Annotated[
        Annotated[int, Held(0, MAX_WEIGHT)] | None,
        "Its share of new connections, relative to the others; null: as the file says.",
    ]
    fence: Annotated[bool, "Whether it is declared dead: its clients are reset at once."]


PrepareRequest = TypedDict(
    "PrepareRequest",
    {
        "do": Literal["prepare"],
        "config-id": NotRequired[Annotated[int, Held(0, 6)]],
        "server-id-length": NotRequired[Annotated[int, Held(1, 15)]],
        "nonce-length": NotRequired[Annotated[int, Held(4, 18)]],
        "plaintext": NotRequired[bool],
        "force": NotRequired[bool],
    },
)

StepRequest = TypedDict(
    "StepRequest",
    {
        "do": Literal["activate", "retire"],
        "config-id": Annotated[int, Held(0, 6)],
        "force": NotRequired[bool],
    },
)


class CidQuestion(TypedDict):
    cid: Annotated[str, HEX]
    client: NotRequired[Annotated[str, ADDRESS]]
    local: NotRequired[Annotated[str, ADDRESS]]
    service: NotRequired[str]


class DatagramQuestion(TypedDict):
    datagram: Annotated[str, HEX]
    length: NotRequired[Annotated[int, Held(0, 65535), "Octets of all of it, if only its beginning is given."]]
    client: NotRequired[Annotated[str, ADDRESS]]
    local: NotRequired[Annotated[str, ADDRESS]]
    service: NotRequired[str]


class CapturedDatagram(TypedDict):
    datagram: Annotated[str, HEX]
    length: NotRequired[Annotated[int, Held(0, 65535)]]
    client: Annotated[str, ADDRESS]
    local: NotRequired[Annotated[str, ADDRESS]]
    at: NotRequired[Annotated[float, TIME, "Seconds of any clock."]]


class CaptureQuestion(TypedDict):
    datagrams: Annotated[list[CapturedDatagram], Held(at_most=MAX_DATAGRAMS)]
    service: NotRequired[str]


ServiceExplanation = TypedDict(
    "ServiceExplanation",
    {
        "service": str,
        "algorithm": NotRequired[str],
        "cid-length": NotRequired[int],
        "cid": NotRequired[Annotated[str, "With a short header: as much as is the CID."]],
        "server-id": NotRequired[str],
        "nonce": NotRequired[str],
        "backend": NotRequired[Annotated[str, "Where it goes."]],
        "issued-by": NotRequired[Annotated[str, "The backend whose server ID the CID carries, if that is another."]],
        "address": NotRequired[str],
        "state": NotRequired[views.BackendState],
        "verdict": str,
        "unroutable": NotRequired[str],
        "why": str,
    },
)

Explanation = TypedDict(
    "Explanation",
    {
        "header": NotRequired[Literal["long", "short"]],
        "version": NotRequired[str],
        "octets": NotRequired[int],
        "cid": NotRequired[str],
        "scid": NotRequired[str],
        "config-id": NotRequired[int | None],
        "services": list[ServiceExplanation],
    },
)


class CaptureExplanation(TypedDict):
    datagrams: list[Explanation]


class ChangesView(TypedDict):
    generation: int
    changes: Annotated[list[str], "What changed, a line each."]


class SuccessorView(TypedDict):
    pid: int


class Operation(NamedTuple):
    """One thing that can be asked. `name` is that of a method of api.py; `answer` is a type, or some content types."""

    method: str
    path: str
    name: str
    summary: str
    answer: Any
    request: Any = None
    changes: bool = False
    refusals: tuple[int, ...] = ()  # beside those that all may have
    etag: bool = False
    takes_query: bool = False


_CHANGING = (400, 403, 412, 413, 415, 422)
_TEXT = ("text/plain",)
_SCRAPE = ("text/plain", "application/openmetrics-text")

OPERATIONS = (
    Operation("GET", "/v1/state", "state", "All that is known of the fleet.", views.StateView, etag=True),
    Operation("GET", "/v1/history", "history", "The last minutes, as rates.", views.HistoryView),
    Operation("GET", "/v1/configuration", "configuration", "The file in force, without its secrets.", dict[str, Any]),
    Operation(
        "GET",
        "/v1/services/{service}/backends/{backend}",
        "backend",
        "One backend.",
        views.BackendView,
        refusals=(404,),
        etag=True,
    ),
    Operation(
        "PATCH",
        "/v1/services/{service}/backends/{backend}",
        "change",
        "Drain, weigh or fence a backend. It lasts until it is taken back, also through reloads and restarts.",
        views.BackendView,
        ChangeRequest,
        changes=True,
        refusals=(404, 409, *_CHANGING),
        etag=True,
    ),
    Operation(
        "POST",
        "/v1/reload",
        "reload",
        "Read the configuration file again. With a mistake in it, nothing changes.",
        ChangesView,
        Nothing,
        changes=True,
        refusals=(409, *_CHANGING),
    ),
    Operation(
        "GET",
        "/v1/rotation",
        "rotation",
        "The config IDs of every service, and where each is in its rotation.",
        dict[str, list[views.SlotJson]],
        etag=True,
    ),
    Operation(
        "POST",
        "/v1/services/{service}/rotation",
        "rotate",
        "Take a step of a rotation, in the configuration file and in the balancer.",
        ChangesView,
        PrepareRequest | StepRequest,
        changes=True,
        refusals=(404, 409, *_CHANGING),
    ),
    Operation(
        "POST",
        "/v1/upgrade",
        "upgrade",
        "Start what is installed now in the place of the running process, without losing a packet.",
        SuccessorView,
        Nothing,
        changes=True,
        refusals=(400, 403, 409, 413, 415, 422),
    ),
    Operation(
        "POST",
        "/v1/explain",
        "explain",
        "Where a connection ID, a datagram or a capture of datagrams goes, and why.",
        Explanation | CaptureExplanation,
        CidQuestion | DatagramQuestion | CaptureQuestion,
        refusals=(400, 403, 413, 415, 422),
    ),
    Operation("GET", "/v1/openapi.json", "openapi", "This description.", dict[str, Any]),
    Operation("GET", "/metrics", "metrics", "Metrics, for Prometheus.", _SCRAPE, takes_query=True),
    Operation("GET", "/livez", "livez", "200 as long as the event loop turns.", _TEXT, takes_query=True),
    Operation("GET", "/readyz", "readyz", "200 as long as packets are forwarded.", _TEXT, takes_query=True),
    Operation("GET", "/", "page", "The status page.", ("text/html",), takes_query=True),
    Operation("GET", "/page/{file}", "page_file", "Its parts.", ("*/*",), refusals=(404,), takes_query=True),
)

_REFUSALS = {
    400: "The request is not what this description says.",
    401: "No token, a wrong one, or no client certificate.",
    403: "The caller may look, but not change anything; or the request comes from another site.",
    404: "There is no such thing.",
    409: "Not in this state.",
    412: "If-Match: something was changed meanwhile.",
    413: f"The body is longer than {MAX_BODY} octets ({MAX_EXPLAIN_BODY} for explain).",
    415: "The body is not application/json.",
    422: "The request is understood, and refused. All reasons are named.",
    431: "The header is too large.",
    503: "The balancer did not answer in time.",
}


def _schemas() -> tuple[dict[str, Schema], dict[str, Schema], dict[str, Schema]]:
    """Those that are referred to; those of requests and of answers, by operation."""
    known: dict[str, Schema] = {}
    schema_of(ErrorView, known)
    requests = {o.name: schema_of(o.request, known) for o in OPERATIONS if o.request is not None}
    answers = {o.name: schema_of(o.answer, known) for o in OPERATIONS if not isinstance(o.answer, tuple)}
    return known, requests, answers


SCHEMAS, REQUESTS, ANSWERS = _schemas()


def document(version: str) -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "quiclb",
            "version": version,
            "description": "A running balancer: look at it, and change it. One request per connection. "
            "A Host header must name an IP address or localhost, unless a token, a client certificate or TLS is used. "
            "Changes are made one after the other.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic", "description": "The token as password."},
                "certificate": {"type": "mutualTLS"},
            },
        },
        "security": [{}, {"token": []}, {"password": []}, {"certificate": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    parameters = [_path_parameter(part[1:-1]) for part in operation.path.split("/") if part.startswith("{")]
    if 412 in operation.refusals:
        parameters.append(
            {
                "name": "If-Match",
                "in": "header",
                "description": "The ETag of a state: the change is made only if nothing was changed since.",
                "schema": {"type": "string", "pattern": f"^(?:{IF_MATCH})$"},
            }
        )
    if parameters:
        described["parameters"] = parameters
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": _json(REQUESTS[operation.name])}
    success: dict[str, Any] = {"description": "As asked."}
    if isinstance(operation.answer, tuple):
        success["content"] = {content_type: {"schema": {"type": "string"}} for content_type in operation.answer}
    else:
        success["content"] = _json(ANSWERS[operation.name])
    if operation.etag:
        etag = {"description": "The generation.", "required": True}
        success["headers"] = {"ETag": etag | {"schema": {"type": "string", "pattern": f"^{ETAG}$"}}}
    always = {401, 403, 431, 503} | (set() if operation.takes_query else {400})
    refusals = {str(status): _refusal(status) for status in sorted(always.union(operation.refusals))}
    described["responses"] = {"200": success} | refusals
    return described


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _refusal(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": _REFUSALS[status],
        "content": _json({"$ref": "#/components/schemas/ErrorView"}),
    }
    if status == 401:
        described["headers"] = {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
    return described


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
