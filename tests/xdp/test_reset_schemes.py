"""Resets that servers of every make would have made: the program and the router of the udp engine make the same tokens.

native/test_reset_token.py has the arithmetic, with the vectors; here it is in the kernel, for whole packets.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lb.cid import CidConfig, Codec, ServerId
from lb.forward import Forward
from lb.reset_scheme import Keys, ResetRule, Scheme
from lb.router import Router, Verdict
from lb.routing import CidSlot, RoutingTable, Service
from tests.builders import server_id, short
from tests.xdp.bpf import NO_LIMITS, Action
from tests.xdp.cases import CONFIGS, DEAD, STATES, THE_DEAD, WEB, Way
from tests.xdp.expectations import Loaded
from tests.xdp.forwarding import datagram, flow_of
from tests.xdp.frames import parse

WAY = Way(4, 4)
WORKERS = 3
SECRETS = {Scheme.HAPROXY: b"a text of cluster-secret", Scheme.PICOQUIC: bytes(range(16))}
RULES = [
    *(ResetRule(scheme, keys) for scheme in Scheme for keys in Keys),
    ResetRule(Scheme.NGINX, worker_number=False),
    ResetRule(Scheme.MVFST, server_address="2001:db8::ffff"),
]


def fleet(rule: ResetRule) -> Service:
    """The usual service, in which each server has one server ID per worker."""
    key = SECRETS.get(rule.scheme, bytes(range(32))) if rule.keys is Keys.SHARED else bytes(range(32))
    ids = [
        {c.config_id: tuple(worker_id(number, worker, c) for worker in range(WORKERS)) for c in CONFIGS}
        for number in range(len(WEB[WAY].backends))
    ]
    return replace(
        WEB[WAY],
        cid_slots=tuple(CidSlot(config, key) for config in CONFIGS),
        backends=tuple(
            replace(backend, server_ids={c: frozenset(some) for c, some in of.items()}, workers=of)
            for backend, of in zip(WEB[WAY].backends, ids, strict=True)
        ),
        reset_rule=rule,
    )


def worker_id(number: int, worker: int, config: CidConfig) -> ServerId:
    return server_id(16 * number + worker, config.server_id_length)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(str(field) for field in rule))
def test_both_engines_make_the_same_tokens(rule: ResetRule, loaded: Loaded) -> None:
    balancer = loaded(Forward.L2)
    table = RoutingTable.build(fleet(rule), STATES, THE_DEAD)
    balancer.apply([table])
    balancer.forget()
    router = Router(table, random=bytes, limits=NO_LIMITS)
    tokens = set()
    for config in CONFIGS:
        for worker in range(WORKERS):
            for nonce in range(2):  # the second finds what is kept of the key
                cid = Codec(config).encode(
                    worker_id(DEAD, worker, config),
                    nonce.to_bytes(config.nonce_length),
                    appended=b"\xa9" * config.appended_length,
                )
                frame = datagram(WAY, short(cid, 100), port=1000 + worker)
                outcome = balancer.run(bytes(frame))
                route = router.route(frame.payload, flow_of(frame), 0.0)

                assert outcome.action is Action.TX
                assert outcome.counted == {f"{WAY.service} RESET": 1}
                assert route.verdict is Verdict.RESET
                assert route.reply is not None
                assert parse(outcome.frame).payload[-16:] == route.reply[-16:]
                tokens.add(route.reply[-16:])
    assert len(tokens) == len(CONFIGS) * WORKERS * 2
