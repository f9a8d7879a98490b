"""The API: what each request means, held to its description, and answered from a running balancer.

It lives on a thread of its own. The balancer's event loop is asked for one thing at a time, and has a deadline to
answer.
"""

from __future__ import annotations

import asyncio
import copy
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from logging import ERROR, WARNING, getLogger
from typing import Any, TypeVar
from urllib.parse import unquote

from lb.admin import views
from lb.admin.access import Policy, Refusal, Rights, Tokens, admit
from lb.admin.http import JSON, PLAIN, Problem, Request, Response, answer
from lb.admin.openapi import IF_MATCH, MAX_BODY, MAX_EXPLAIN_BODY, OPERATIONS, REQUESTS, SCHEMAS, Operation, document
from lb.admin.shapes import mistakes, parse
from lb.describe import describe
from lb.document import shown
from lb.errors import ConfigErrors
from lb.explain import explain
from lb.log import event
from lb.metrics import scrape
from lb.operations import Operations, Refused, RotationStep
from lb.overrides import Change
from lb.routing import RoutingTable
from lb.snapshot import Snapshot

logger = getLogger(__name__)

T = TypeVar("T")

# Ours; seconds.
PATIENCE = 2.0  # for the balancer to say something
CHANGE_PATIENCE = 30.0  # to change something
UPGRADE_PATIENCE = 90.0
GAP = 0.05  # from one snapshot to the next: they are made where packets are moved
COMPLAINTS_GAP = 1.0  # from one logged refusal to the next

LATE = "the balancer did not answer in time"
_STATUS = {"unknown": 404, "conflict": 409, "stale": 412, "invalid": 422, "failed": 422}
_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
}
_CHALLENGES = (
    ("WWW-Authenticate", "Bearer"),
    ("WWW-Authenticate", 'Basic realm="admin", charset="UTF-8"'),  # so that a browser asks for it
)


class Balancer:
    """A running balancer as another thread sees it: every question has a deadline, and snapshots are not too many."""

    def __init__(self, operations: Operations, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one that `operations` are to be called on."""
        self.operations = operations
        self._loop = loop
        self._due: asyncio.Task[Snapshot] | None = None
        self._one = asyncio.Lock()
        self._latest = float("-inf")

    async def ask(self, question: Coroutine[Any, Any, T], patience: float = PATIENCE, late: str = LATE) -> T:
        """Raises Problem, saying `late`, if the answer takes too long. What was asked for goes on all the same."""
        try:
            asked = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question, self._loop))
        except RuntimeError:  # the loop is closed
            question.close()
            raise Problem(503, "the balancer has stopped") from None
        await asyncio.wait({asked}, timeout=patience)
        if not asked.done():
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise Problem(503, late)
        if asked.cancelled():
            raise Problem(503, "the balancer has stopped")
        try:
            return asked.result()
        except TimeoutError:
            raise Problem(503, "the engine did not answer in time") from None

    async def snapshot(self) -> Snapshot:
        """One that was begun after this question, and that all who asked before it began share."""
        if self._due is None:
            self._due = asyncio.create_task(self._snapshot())
        return await asyncio.shield(self._due)

    async def _snapshot(self) -> Snapshot:
        async with self._one:
            now = asyncio.get_running_loop().time()
            await asyncio.sleep(max(0.0, self._latest + GAP - now))
            self._due = None
            self._latest = asyncio.get_running_loop().time()
            return await self.ask(self.operations.snapshot())

    async def turns(self) -> None:
        """Raises Problem if the event loop that moves packets does not turn."""

        async def nothing() -> None:
            pass

        await self.ask(nothing())


class Probes:
    """What anybody may ask at the metrics port: whether it lives, whether it forwards, and what it counts."""

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self._trouble = ""  # that was logged, until a scrape succeeds

    async def answer(self, request: Request) -> Response:
        """Never raises."""
        if request.method not in ("GET", "HEAD"):
            return Problem(405, "GET and HEAD only", headers=(("Allow", "GET, HEAD"),)).response()
        try:
            match request.path:
                case "/":
                    return Response(200, b"quiclb: see /metrics\n", PLAIN)
                case "/livez":
                    return await self.livez()
                case "/readyz":
                    return await self.readyz()
                case "/metrics":
                    return await self.metrics(request)
            return Problem(404, "see /metrics").response()
        except Problem as problem:
            return problem.response()

    async def livez(self) -> Response:
        await self._balancer.turns()
        return Response(200, b"ok\n", PLAIN)

    async def readyz(self) -> Response:
        now = await self._balancer.snapshot()
        if not now.tables:
            raise Problem(503, "no tables yet")
        return Response(200, b"ok\n", PLAIN)

    async def metrics(self, request: Request) -> Response:
        try:
            body, content_type = scrape(await self._balancer.snapshot(), request.headers.get("Accept", ""))
        except Problem as problem:
            self._log(str(problem))
            raise
        except Exception as error:  # a scrape that fails must not end the server
            self._log(f"{type(error).__name__}: {error}")
            raise Problem(503, "see the log") from None
        self._trouble = ""
        return Response(200, body, content_type)

    def _log(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            event(logger, ERROR, "metrics-error", error=trouble)


class Api:
    """Answers requests. `tokens` says which are in force at the moment."""

    def __init__(self, balancer: Balancer, probes: Probes, policy: Policy, tokens: Callable[[], Tokens]) -> None:
        self._balancer = balancer
        self._probes = probes
        self._policy = policy
        self._tokens = tokens
        self._version = _version()
        self._described: tuple[object, dict[str, Any]] = None, {}
        self._tables: dict[str, tuple[RoutingTable, RoutingTable]] = {}  # those that were copied, and the copies
        self._files = _page_files()
        self._routes: dict[tuple[str, ...], dict[str, Operation]] = {}
        for operation in OPERATIONS:
            self._routes.setdefault(tuple(operation.path.split("/")), {})[operation.method] = operation
        self._complaint_due = float("-inf")
        self._unheard = 0  # complaints since the latest one that was logged

    async def answer(self, request: Request) -> Response:
        """Never raises."""
        rights = admit(self._policy, self._tokens(), request.peer, request.method, request.headers)
        if isinstance(rights, Refusal):
            self._complain(request, rights.reason)
            # The same octets for whatever was asked.
            if rights.status == 401:
                return Problem(401, "unauthorised", headers=_CHALLENGES).response()
            return Problem(403, "forbidden").response()
        try:
            return await self._answer(request, rights)
        except Problem as problem:
            return problem.response()
        except Refused as refused:
            return Problem(_STATUS[refused.kind], str(refused), *_several(refused.reasons)).response()
        except ConfigErrors as errors:
            reasons = [str(error) for error in errors.exceptions]
            return Problem(422, "the configuration has mistakes; nothing was changed", *reasons).response()
        except Exception:  # one that fails must not end the server
            logger.exception("cannot answer %s %s", request.method, shown(request.path))
            return Problem(500, "see the log").response()

    async def _answer(self, request: Request, rights: Rights) -> Response:
        operation, names = self._find(request)
        if request.query and not operation.takes_query:
            raise Problem(400, f"?{shown(request.query)}: expected no query")
        given: Any = None
        if operation.request is not None:
            given = await self._read(request, operation)
        elif request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in request.headers:
            raise Problem(400, "a body: expected none")
        if operation.changes and not rights.may_write:
            self._complain(request, f"{rights.who} may not change anything")
            raise Problem(403, "you may look, but not change anything")
        handle: Callable[..., Awaitable[Response]] = getattr(self, f"_{operation.name}")
        return await handle(request, rights, *names, *(() if given is None else (given,)))

    def _find(self, request: Request) -> tuple[Operation, list[str]]:
        asked = request.path.split("/")
        for template, by_method in self._routes.items():
            if len(template) == len(asked) and all(
                part.startswith("{") or part == there for part, there in zip(template, asked, strict=True)
            ):
                names = [unquote(there) for part, there in zip(template, asked, strict=True) if part.startswith("{")]
                operation = by_method.get("GET" if request.method == "HEAD" else request.method)
                if operation is None:
                    allowed = ", ".join(["GET, HEAD" if method == "GET" else method for method in by_method])
                    raise Problem(405, f"{shown(request.method)}: expected {allowed}", headers=(("Allow", allowed),))
                return operation, names
        raise Problem(404, f"{shown(request.path)}: see /v1/openapi.json")

    async def _read(self, request: Request, operation: Operation) -> Any:
        content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type != JSON or "Content-Encoding" in request.headers:
            raise Problem(415, f"expected a body of Content-Type {JSON}, as it is")
        body = await request.body(MAX_EXPLAIN_BODY if operation.name == "explain" else MAX_BODY)
        try:
            given = parse(body)
        except ValueError as error:
            raise Problem(400, str(error)) from None
        found = list(mistakes(given, REQUESTS[operation.name], SCHEMAS))
        if found:
            raise Problem(400, found[0], *_several(found))
        return given

    def _complain(self, request: Request, reason: str) -> None:
        """To the log, but not as often as somebody outside likes."""
        now = time.monotonic()
        if now < self._complaint_due:
            self._unheard += 1
            return
        self._complaint_due = now + COMPLAINTS_GAP
        more = {"more": self._unheard} if self._unheard else {}
        self._unheard = 0
        event(logger, WARNING, "admin-refused", peer=request.peer, reason=reason, **more)

    async def _state(self, _request: Request, rights: Rights) -> Response:
        now = await self._balancer.snapshot()
        may: views.Rights = "write" if rights.may_write else "read"
        state = views.state(now, version=self._version, time=time.time(), rights=may)
        return answer(state, headers=_etag(now.generation))

    async def _history(self, _request: Request, _rights: Rights) -> Response:
        return answer(views.history(await self._balancer.snapshot()))

    async def _configuration(self, _request: Request, _rights: Rights) -> Response:
        config = (await self._balancer.snapshot()).config
        if self._described[0] is not config:
            self._described = config, describe(config)
        return answer(self._described[1])

    async def _backend(self, _request: Request, _rights: Rights, service: str, backend: str) -> Response:
        now = await self._balancer.snapshot()
        found = views.backend(now, service, backend, time.time())
        if found is None:
            raise Problem(404, f"{shown(service)}, {shown(backend)}: there is no such backend")
        return answer(found, headers=_etag(now.generation))

    async def _change(self, request: Request, rights: Rights, service: str, backend: str, given: Change) -> Response:
        change = self._balancer.operations.change(
            service, backend, given, who=rights.who, generation=_generation(request)
        )
        await self._ask_for_change(change)
        return await self._backend(request, rights, service, backend)

    async def _reload(self, request: Request, rights: Rights, _given: Mapping[str, Any]) -> Response:
        reload = self._balancer.operations.reload(who=rights.who, generation=_generation(request))
        return await self._changed(await self._ask_for_change(reload))

    async def _rotation(self, _request: Request, _rights: Rights) -> Response:
        now = await self._balancer.snapshot()
        return answer(views.rotation(now), headers=_etag(now.generation))

    async def _rotate(self, request: Request, rights: Rights, service: str, given: Mapping[str, Any]) -> Response:
        step = RotationStep(**{name.replace("-", "_"): value for name, value in given.items()})
        rotate = self._balancer.operations.rotate(service, step, who=rights.who, generation=_generation(request))
        return await self._changed(await self._ask_for_change(rotate))

    async def _upgrade(self, _request: Request, rights: Rights, _given: Mapping[str, Any]) -> Response:
        upgrade = self._balancer.operations.upgrade(who=rights.who)
        return answer({"pid": await self._ask_for_change(upgrade, UPGRADE_PATIENCE)})

    async def _explain(self, _request: Request, _rights: Rights, given: Mapping[str, Any]) -> Response:
        now = await self._balancer.snapshot()
        # Ciphers are not to be shared between threads.
        known, self._tables = self._tables, {}
        for name, table in now.tables.items():
            copied = known.get(name)
            self._tables[name] = copied if copied is not None and copied[0] is table else (table, copy.copy(table))
        try:
            return answer(explain([mine for _, mine in self._tables.values()], given))
        except ValueError as error:
            raise Problem(422, str(error)) from None

    async def _openapi(self, _request: Request, _rights: Rights) -> Response:
        return answer(document(self._version))

    async def _metrics(self, request: Request, _rights: Rights) -> Response:
        return await self._probes.metrics(request)

    async def _livez(self, _request: Request, _rights: Rights) -> Response:
        return await self._probes.livez()

    async def _readyz(self, _request: Request, _rights: Rights) -> Response:
        return await self._probes.readyz()

    async def _page(self, request: Request, rights: Rights) -> Response:
        return await self._page_file(request, rights, "index.html")

    async def _page_file(self, _request: Request, _rights: Rights, name: str) -> Response:
        found = self._files.get(name)
        if found is None:
            raise Problem(404, f"{shown(name)}: the page has no such part")
        return found

    async def _ask_for_change(self, change: Coroutine[Any, Any, T], patience: float = CHANGE_PATIENCE) -> T:
        try:
            return await self._balancer.ask(change, patience, f"{LATE}; the change may still be made")
        except OSError as error:
            raise Problem(422, error.strerror or str(error)) from None

    async def _changed(self, changes: tuple[str, ...]) -> Response:
        now = await self._balancer.snapshot()
        return answer({"generation": now.generation, "changes": list(changes)})


def _generation(request: Request) -> int | None:
    """Of the state that the caller knows. Raises Problem if what he says cannot be one."""
    given = request.headers.get("If-Match", "*").strip()
    if given == "*":
        return None
    if not re.fullmatch(IF_MATCH, given):
        raise Problem(400, f"If-Match: {shown(given)}: expected the ETag of a state, as it was")
    return int(given.strip('"'))


def _etag(generation: int) -> tuple[tuple[str, str], ...]:
    return (("ETag", f'"{generation}"'),)


def _several(reasons: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Those that are worth a list beside the error."""
    return tuple(reasons) if len(reasons) > 1 else ()


def _page_files() -> dict[str, Response]:
    """The page's files, all of them: what is not here is not served."""
    directory = resources.files("lb.admin") / "page"
    if not directory.is_dir():
        return {}
    files = {}
    for file in directory.iterdir():
        content_type = _CONTENT_TYPES.get(file.name.rpartition(".")[2])
        if content_type is not None and file.is_file():
            files[file.name] = Response(200, file.read_bytes(), content_type)
    return files


def _version() -> str:
    try:
        return version("quiclb")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
