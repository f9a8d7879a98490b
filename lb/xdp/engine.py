"""XdpEngine: keeps a program in the kernel in step with routing tables. Packets do not come here.

What blocks is done by one thread, in order (`plane.py`). The event loop asks it ten times a second what is new, and
when there is something to apply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lb.engine import Counters, Suspect
from lb.routing import RoutingTable
from lb.upstream import ServicePolicy
from lb.xdp.plane import Plane, XdpSettings

__all__ = ["XdpEngine", "XdpSettings"]

# Ours.
TICK = 0.1  # seconds between looks at next hops, silent backends and idle flows

logger = logging.getLogger(__name__)

T = TypeVar("T")


class XdpEngine:
    """The data plane of one interface.

    `suspect(service, backend)` is called at signs of trouble, `on_reachable(service, backend, is_reachable)` when
    packets can or cannot be sent to a backend any more; at first all are taken to be reachable.
    """

    def __init__(
        self,
        settings: XdpSettings,
        policies: Mapping[str, ServicePolicy],
        *,
        suspect: Suspect,
        on_reachable: Callable[[str, str, bool], None],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._policies = policies
        self._suspect = suspect
        self._on_reachable = on_reachable
        self._plane = Plane(settings, random)
        self._thread: ThreadPoolExecutor | None = None
        self._looking: asyncio.Task[None] | None = None

    # Engine.

    async def start(self, tables: Sequence[RoutingTable]) -> None:
        """Attach, or take over from a predecessor. Raises OSError: then the machine is as it was."""
        self._thread = ThreadPoolExecutor(1, "xdp")
        try:
            await self._do(lambda: self._plane.start(tables, self._policies, self._now()))
            await self._look()
        except BaseException:
            await self._do(self._plane.close)
            self._thread.shutdown()
            raise
        self._looking = asyncio.create_task(self._keep_looking())

    async def apply(self, tables: Sequence[RoutingTable]) -> None:
        """Obey these tables from now on. Raises OSError, and then those before are obeyed."""
        await self._do(lambda: self._plane.apply(tables, self._policies, self._now()))
        await self._look()  # who of the new ones cannot be reached is known already

    def set_policies(self, policies: Mapping[str, ServicePolicy]) -> None:
        """Replace policies; they take effect with the next `apply`."""
        self._policies = policies

    async def counters(self) -> Counters:
        return await self._do(self._plane.counters)

    async def stop(self) -> None:
        """End what this process does, once. The program stays on the interface, and packets keep flowing."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
            self._looking = None
        if self._thread is not None:
            try:
                await self._do(self._plane.close)
            finally:
                self._thread.shutdown()
                self._thread = None

    async def unreachable(self, backends: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], str]:
        """Those of these backends, whether in tables or not yet, that packets cannot be sent to, and why.

        `backends` are hosts, by service and name. Nobody is unreachable before the start.
        """
        if self._thread is None:
            return {}
        return await self._do(lambda: self._plane.unreachable(backends, self._now()))

    @property
    def attach_mode(self) -> str:
        """`native` or `generic`."""
        return self._plane.attach_mode

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            await self._look()

    async def _look(self) -> None:
        try:
            look = await self._do(lambda: self._plane.look(self._now()))
        except Exception:  # whatever it is, it must not be the last look
            logger.exception("the program goes on; this look at it failed")
            return
        for service, backend in look.suspects:
            self._suspect(service, backend)
        for (service, backend), is_reachable in look.reachable.items():
            self._on_reachable(service, backend, is_reachable)

    async def _do(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    @staticmethod
    def _now() -> float:
        return time.monotonic()
