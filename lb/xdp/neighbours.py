"""Next hops: the MAC addresses that packets to backends go to, as the kernel's routes and neighbour table have them.

The kernel resolves, we ask it to and follow what it says. A backend has a next hop if the way to it is over our
interface and whoever is next on it has a known MAC address; otherwise there is a reason why it has none.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable, Mapping

from lb.xdp.image import NextHop
from lb.xdp.interface import ETHERNET_ADDRESS, read_interface
from lb.xdp.netlink import RTN_LOCAL, RTN_UNICAST, Neighbour, Netlink, Route, read_neighbour

# Ours. Seconds.
USE_INTERVAL = 5.0  # between requests to confirm the neighbours that we have, all of them
RETRY_INTERVAL = 1.0  # and those that we miss
ROUTES_INTERVAL = 1.0  # between looks at changing routes


class Neighbours:
    """Follows the next hops of a set of hosts. Methods are for one thread at a time; `follow` is quick.

    `hops` has the next hop of each host that has one, `reasons` says of each other host why not; `interface` is
    what our interface is like. All three are replaced when they change, never changed.
    """

    def __init__(self, interface: str) -> None:
        """In the network namespace of the calling thread. Raises OSError, naming the interface, if it is not there."""
        self._name = interface
        self._queries = Netlink()
        self._news = Netlink()
        self._hosts: frozenset[str] = frozenset()
        self._ways: dict[str, Route | str] = {}  # by host; or why there is none
        self._next_hops: set[str] = set()  # on our interface
        self._macs: dict[str, bytes] = {}  # by next hop
        self._failed: set[str] = set()  # next hops that do not answer
        self._doubted: set[str] = set()  # next hops that have failed once
        self._routes_are_old = False
        self._routes_read = self._used = self._retried = float("-inf")
        self.hops: Mapping[str, NextHop] = {}
        self.reasons: Mapping[str, str] = {}
        try:
            self._news.subscribe()
            self.interface = read_interface(interface, self._queries)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        self._queries.close()
        self._news.close()

    def set_hosts(self, hosts: Iterable[str], now: float) -> None:
        """These are to be followed, and no others. Blocks: about 15 us for each host."""
        hosts = frozenset(hosts)
        if hosts == self._hosts:
            return
        self._hosts = hosts
        self._read_all(now)

    def wait(self, patience: float, now: float) -> None:
        """Block until every host has a next hop, or cannot have one, or for `patience` seconds."""
        deadline = now + patience
        while self.is_waiting and now < deadline:
            self.wait_for_news(deadline - now)
            now = time.monotonic()
            self.follow(now)

    def wait_for_news(self, patience: float) -> None:
        """Block until the kernel has something to say, or for `patience` seconds."""
        poll = select.poll()
        poll.register(self._news.fileno(), select.POLLIN)
        poll.poll(1000 * patience)

    @property
    def is_waiting(self) -> bool:
        """Whether the kernel is still looking for somebody."""
        return any(
            not isinstance(way, str) and (hop := way.gateway or host) not in self._macs and hop not in self._failed
            for host, way in self._ways.items()
        )

    def follow(self, now: float) -> bool:
        """Take in what has changed. Returns whether `hops` or `interface` did."""
        hops, interface = self.hops, self.interface
        changes = self._news.changes()
        if changes is None:  # there were too many
            self._read_all(now)
        else:
            for change in changes:
                neighbour = read_neighbour(change)
                if neighbour is None:  # a link, an address, a route or a rule
                    self._routes_are_old = True
                else:
                    self._take(neighbour)
            if self._routes_are_old and now - self._routes_read >= ROUTES_INTERVAL:
                self._read_all(now)
            elif changes:
                self._put_together()
        self._use(now)
        return self.hops is not hops or self.interface is not interface

    def _read_all(self, now: float) -> None:
        """Ask for everything."""
        self._routes_are_old = False
        self._routes_read = now
        try:
            interface = read_interface(self._name, self._queries)
        except OSError:
            interface = self.interface._replace(is_up=False)
        if interface.index != self.interface.index:  # another one: whom the old one knew says nothing
            self._macs.clear()
            self._failed.clear()
        if interface != self.interface:
            self.interface = interface
        hosts = sorted(self._hosts)
        self._ways = {
            host: self._way(host, found) for host, found in zip(hosts, self._queries.routes(hosts), strict=True)
        }
        self._next_hops = {way.gateway or host for host, way in self._ways.items() if not isinstance(way, str)}
        # Of others we know only what was once.
        self._macs = {hop: mac for hop, mac in self._macs.items() if hop in self._next_hops}
        self._failed &= self._next_hops
        self._doubted &= self._next_hops
        for neighbour in self._queries.neighbours():
            self._take(neighbour)
        self._put_together()
        self._retried = float("-inf")
        self._use(now)

    def _way(self, host: str, found: Route | OSError) -> Route | str:
        if isinstance(found, OSError):
            return f"there is no route to {host}: {found.strerror}"
        if found.type == RTN_LOCAL:
            return f"{host} is an address of this machine"
        if found.type != RTN_UNICAST:
            return f"there is no route to {host}"
        if found.interface != self.interface.index:
            return f"the route to {host} is not over {self._name}"
        return found

    def _take(self, neighbour: Neighbour) -> None:
        host = neighbour.host
        if neighbour.interface != self.interface.index or host not in self._next_hops:
            return
        if len(neighbour.mac) == ETHERNET_ADDRESS:
            self._macs[host] = neighbour.mac
            self._failed.discard(host)
            self._doubted.discard(host)
        elif host in self._macs and host not in self._doubted:
            # Flushed from the table, which looks like a failure, or looked for: that says little against what we know.
            self._doubted.add(host)
            self._used = float("-inf")  # ask at once
        elif neighbour.has_failed:
            self._macs.pop(host, None)
            self._failed.add(host)

    def _put_together(self) -> None:
        hops, reasons = {}, {}
        for host, way in self._ways.items():
            if isinstance(way, str):
                reasons[host] = way
                continue
            hop = way.gateway or host
            mac = self._macs.get(hop)
            if mac is None:
                reasons[host] = f"nobody answers for {hop} on {self._name}"
            else:
                hops[host] = NextHop(mac, min(way.mtu or self.interface.mtu, self.interface.mtu))
        if hops != self.hops:
            self.hops = hops
        if reasons != self.reasons:
            self.reasons = reasons

    def _use(self, now: float) -> None:
        """Have the kernel confirm whom we know, and look for whom we miss."""
        confirm, retry = now - self._used >= USE_INTERVAL, now - self._retried >= RETRY_INTERVAL
        if not confirm and not retry:
            return
        known = self._next_hops & self._macs.keys()
        if confirm:
            self._used = now
            self._queries.use(self.interface.index, sorted(known))
        if retry:
            self._retried = now
            self._queries.use(self.interface.index, sorted(self._next_hops - known))
