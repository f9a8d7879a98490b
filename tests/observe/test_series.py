"""Time series are known beforehand: nothing that is sent to a balancer makes one."""

from __future__ import annotations

import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.builders import long, short
from tests.fleet import eventually, udp_socket
from tests.test_control import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def series(site: Site) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    with urllib.request.urlopen(f"http://{site.admin}/metrics", timeout=20) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


def test_a_storm_of_garbage_makes_no_series(site: Site) -> None:
    site.start()
    with udp_socket() as client:
        for backend in (0, 1):
            client.sendto(short(site.cid(backend)), site.vip)
    # When each was last seen: the only ones that are not there from the beginning.
    eventually(lambda: sum("last_datagram" in name for name, _ in series(site)) == 3)
    before = series(site)

    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sent = 0
    for _ in range(20):
        with udp_socket() as client:
            for _ in range(50):
                octets = chance.randbytes(chance.randrange(1, 60))
                client.sendto(chance.choice((octets, short(octets), long(octets[:20], octets[:8]))), site.vip)
                sent += 1
    # Some may find no room in a buffer.
    eventually(lambda: site.metric("quiclb_unroutable_datagrams_total") > sent / 10)
    assert series(site) == before
