# ruff: noqa: E501 - one mistake, one line
"""Configuration files: what a good one means, and what is said about each bad one."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lb.address import Address
from lb.checks import Section, check_engine
from lb.cid import CidConfig, ConfigId, ServerId
from lb.config import (
    Attach,
    Forward,
    HealthConfig,
    LbConfig,
    Limits,
    LogConfig,
    Phase,
    Probe,
    ResetConfig,
    RotationConfig,
    ServiceConfig,
    XdpConfig,
    load_config,
    refuse_reload,
)
from lb.document import MAX_FILE, Document, Scalar
from lb.errors import ConfigError, ConfigErrors
from lb.keys import BackendKeys, ServiceKeys
from lb.routing import Backend, CidSlot, Service, UnknownServer
from lb.schema import Reading
from tests.files import CID_KEY, OTHER_CID_KEY, RESET_KEY, examples, write_key, write_keys

GOOD = """\
engine: udp
workers: 2
metrics: "127.0.0.1:9100"
log: {format: json, level: warning}
limits: {flows: 500, idle-timeout: 90s, new-flow-timeout: 2500ms, socket-buffer: 64KiB, sockets: 20}
services:
  - name: web
    listen: ["192.0.2.1:443", "[2001:DB8::1]:443"]
    seed: sesame
    unknown-server: drop
    cid-configs:
      - config-id: 0
        server-id-length: 4
        nonce-length: 12
        key-file: secrets/cid-0.key
        encodes-length: true
        reset-key-file: secrets/reset-0.key
      - config-id: 3
        server-id-length: 3
        nonce-length: 6
        appended-length: 2
        key-file: secrets/cid-1.key
        phase: retiring
    rotation: {guard: 1m}
    backends:
      - {name: a, address: "10.0.0.11:443", server-ids: {0: ["3fa91c02"], 3: ["3fa91c"]}}
      - {name: b, address: "[fd00::12]:443", server-ids: {0: ["81D5E47A", "aaaaaaaa"], 3: ["81d5e4"]}, weight: 3, drain: true}
    health: {probe: none, interval: 200ms, jitter: 12.5%, silence: 0s}
    resets: {hold-off: 1.5s, push: false}
  - name: plain
    listen: ["192.0.2.2:443"]
    cid-configs: [{config-id: 0, server-id-length: 8, nonce-length: 7}]
    backends: [{name: x, address: "10.0.1.21:443", server-ids: {0: ["b1946ac92492d234"]}}]
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    return tmp_path


def load(directory: Path, text: str | bytes) -> LbConfig:
    path = directory / "quiclb.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path)


def mistakes(directory: Path, text: str | bytes) -> list[tuple[str, str]]:
    with pytest.raises(ConfigErrors) as caught:
        load(directory, text)
    return [(error.path, error.message) for error in caught.value.exceptions if isinstance(error, ConfigError)]


def edited(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def test_every_key_of_a_file_means_what_the_documents_say(directory: Path) -> None:
    health = HealthConfig(probe=Probe.NONE, interval=0.2, jitter=0.125, silence=0.0)
    zero, three = ConfigId(0), ConfigId(3)
    web = Service(
        name="web",
        listen=(Address("192.0.2.1", 443), Address("2001:db8::1", 443)),
        cid_slots=(
            CidSlot(CidConfig(zero, 4, 12, bytes.fromhex(CID_KEY), True), bytes.fromhex(RESET_KEY)),
            CidSlot(CidConfig(three, 3, 6, bytes.fromhex(OTHER_CID_KEY), False, 2), None),
        ),
        backends=(
            Backend("a", Address("10.0.0.11", 443), {zero: ids("3fa91c02"), three: ids("3fa91c")}),
            Backend("b", Address("fd00::12", 443), {zero: ids("81d5e47a", "aaaaaaaa"), three: ids("81d5e4")}, 3),
        ),
        seed="sesame",
        unknown_server=UnknownServer.DROP,
    )
    plain = Service(
        name="plain",
        listen=(Address("192.0.2.2", 443),),
        cid_slots=(CidSlot(CidConfig(zero, 8, 7, None, False)),),
        backends=(Backend("x", Address("10.0.1.21", 443), {zero: ids("b1946ac92492d234")}),),
    )
    assert load(directory, GOOD) == LbConfig(
        engine="udp",
        workers=2,
        runtime_directory=None,
        metrics=Address("127.0.0.1", 9100),
        log=LogConfig(format="json", level="warning"),
        limits=Limits(flows=500, idle_timeout=90.0, new_flow_timeout=2.5, socket_buffer=65536, sockets=20),
        services=(
            ServiceConfig(
                service=web,
                health=health,
                resets=ResetConfig(hold_off=1.5, push=False),
                draining=frozenset({"b"}),
                phases={zero: Phase.ACTIVE, three: Phase.RETIRING},
                key_files={zero: directory / "secrets/cid-0.key", three: directory / "secrets/cid-1.key"},
                reset_key_files={zero: directory / "secrets/reset-0.key"},
                rotation=RotationConfig(guard=60.0),
            ),
            ServiceConfig(service=plain, phases={zero: Phase.ACTIVE}),
        ),
    )


def ids(*digits: str) -> frozenset[ServerId]:
    return frozenset(ServerId(bytes.fromhex(d)) for d in digits)


def test_defaults_are_those_that_other_modules_count_on() -> None:
    assert HealthConfig() == HealthConfig(
        probe=Probe.VERSION_NEGOTIATION,
        interval=1.0,
        timeout=0.5,
        fall=3,
        rise=2,
        jitter=0.1,
        suspect_interval=0.02,
        silence=0.5,
    )
    assert ResetConfig() == ResetConfig(hold_off=5.0, rate=1000, prefix_rate=10, push_rate=10000, push=True)
    assert Limits() == Limits(
        flows=100_000,
        idle_timeout=120.0,
        new_flow_timeout=10.0,
        table_entries=65_536,
        new_flows_rate=10_000,
        sockets=None,
        socket_buffer=4 << 20,
    )
    assert LogConfig() == LogConfig(format="text", level="info")


@pytest.mark.parametrize("name", ["minimal.yaml", "quiclb.yaml", "two-services.yaml", "xdp.yaml", "nlb.yaml"])
def test_the_examples_load(tmp_path: Path, name: str) -> None:
    assert load_config(examples(tmp_path) / name).services


def test_file_names_start_at_the_directory_of_the_file(directory: Path) -> None:
    absolute = write_key(directory / "elsewhere" / "x.key", CID_KEY)
    text = edited("secrets/cid-0.key", str(absolute)).replace("workers: 2", "runtime-directory: run")
    config = load(directory, text)
    assert config.runtime_directory == directory / "run"
    assert config.services[0].service.cid_slots[0].config.key == bytes.fromhex(CID_KEY)


def test_keys_do_not_print(directory: Path) -> None:
    printed = repr(load(directory, GOOD))
    for digits in (CID_KEY, OTHER_CID_KEY, RESET_KEY):
        assert digits not in printed
        assert repr(bytes.fromhex(digits))[2:-1] not in printed


# What is replaced by what, the path of the one mistake, and a part of its message.
CID0, CID1 = "services[0].cid-configs[0]", "services[0].cid-configs[1]"
A, B, X = "services[0].backends[0]", "services[0].backends[1]", "services[1].backends[0]"
MISTAKES = {
    # Keys.
    "unknown key": ("workers: 2", "worker: 2", "worker", "unknown key; did you mean workers?"),
    "unknown key like no other": ("workers: 2", "zzz: 2", "zzz", "unknown key"),
    "unknown key inside": ("weight: 3", "wieght: 3", f"{B}.wieght", "unknown key; did you mean weight?"),
    "unknown key with odd characters": ("workers: 2", '"a\\nb": 2', '"a\\nb"', "unknown key"),
    "merge key": ("workers: 2", "<<: {workers: 2}", '<<', "unknown key"),
    "key given twice": ("workers: 2", "workers: 2\nworkers: 3", "workers", "given twice, again in line 3"),
    "key given twice inside": ("weight: 3", "weight: 3, weight: 3", f"{B}.weight", "given twice, again in line 27"),
    "key that is a list": ("workers: 2", "[workers]: 2", "", "a list, mapping or alias for a key"),
    "missing key": ("  - name: plain\n", "  -\n", "services[1].name", "missing: expected a name"),
    "missing length": ("        nonce-length: 12\n", "", f"{CID0}.nonce-length", "missing: expected an integer, 4 to 18"),
    "nothing": ("workers: 2", "workers:", "workers", "nothing: expected an integer, 1 to 64, or no such key"),
    "nothing for a mapping": ("log: {format: json, level: warning}", "log:", "log", "nothing: expected a mapping"),
    # YAML's own ideas.
    "bool for int": ("workers: 2", "workers: true", "workers", "true: expected an integer, 1 to 64"),
    "octal": ("workers: 2", "workers: 010", "workers", "010: expected an integer"),
    "hexadecimal": ("workers: 2", "workers: 0x10", "workers", "0x10: expected an integer"),
    "underscore": ("workers: 2", "workers: 1_0", "workers", "1_0: expected an integer"),
    "float": ("workers: 2", "workers: 2.0", "workers", "2.0: expected an integer"),
    "quoted integer": ("workers: 2", 'workers: "2"', "workers", "2: expected an integer"),
    "a very long integer": ("workers: 2", f"workers: {'9' * 5000}", "workers", "hex digits>: expected an integer"),
    "sexagesimal": ('"192.0.2.2:443"', "1:30", "services[1].listen[0]", "1:30: YAML takes this for an integer; put it"),
    "yes": ("push: false", "push: no", "services[0].resets.push", "no: expected true or false"),
    "capital true": ("push: false", "push: True", "services[0].resets.push", "True: expected true or false"),
    "name that is a date": ("name: plain", "name: 2026-05-29", "services[1].name", "YAML takes this for a date"),
    "name that is a number": ("name: plain", "name: 12", "services[1].name", "12: YAML takes this for an integer"),
    "server ID that is an integer": ('"b1946ac92492d234"', "1234567812345678", f"{X}.server-ids.0[0]", "put it in quotes"),
    "server ID that is octal": ('"b1946ac92492d234"', "0011223300112233", f"{X}.server-ids.0[0]", "put it in quotes"),
    "seed that is a number": ("seed: sesame", "seed: 90125", "services[0].seed", "YAML takes this for an integer; put it"),
    "alias": ("json, level: warning", "&n json, level: *n", "log.level", "*n: aliases are not used here"),
    "tag": ("workers: 2", "workers: !!int 2", "workers", "tags are not used here"),
    "python tag": ("workers: 2", "workers: !!python/name:os.system x", "workers", "tags are not used here"),
    # Kinds.
    "engine": ("engine: udp", "engine: upd", "engine", "upd: expected udp or xdp; did you mean udp?"),
    "interface of the udp engine": ("workers: 2", "interface: eth0", "interface", "eth0: expected no such key, or engine: xdp"),
    "forward mode of the udp engine": ("workers: 2", "forward: nat", "forward", "nat: expected no such key, or engine: xdp"),
    "section of the udp engine": ("workers: 2", "xdp: {}", "xdp", "a mapping: expected no such key, or engine: xdp"),
    "too many workers": ("workers: 2", "workers: 65", "workers", "65: expected an integer, 1 to 64"),
    "negative": ("workers: 2", "workers: -1", "workers", "-1: expected an integer, 1 to 64"),
    "list for scalar": ("workers: 2", "workers: [2]", "workers", "a list: expected an integer, 1 to 64"),
    "scalar for list": ('listen: ["192.0.2.2:443"]', 'listen: "192.0.2.2:443"', "services[1].listen", "expected a list"),
    "scalar for mapping": ("{0: [\"b1946ac92492d234\"]}", "b1", f"{X}.server-ids", "b1: expected a mapping"),
    "list for mapping": ("log: {format: json, level: warning}", "log: []", "log", "a list: expected a mapping"),
    "empty list": ('listen: ["192.0.2.2:443"]', "listen: []", "services[1].listen", "0 elements: expected 1 to 64"),
    "duration without unit": ("idle-timeout: 90s", "idle-timeout: 90", "limits.idle-timeout", "90: a number without a unit"),
    "duration with space": ("idle-timeout: 90s", "idle-timeout: 90 s", "limits.idle-timeout", "90 s: expected a duration, 1s to 24h"),
    "duration too long": ("idle-timeout: 90s", "idle-timeout: 25h", "limits.idle-timeout", "25h: expected a duration, 1s to 24h"),
    "duration of a lifetime": ("interval: 200ms", "interval: 999999999999h", "services[0].health.interval", "expected a duration"),
    "negative duration": ("interval: 200ms", "interval: -1s", "services[0].health.interval", "-1s: expected a duration, 10ms to 1h"),
    "size in decimal": ("socket-buffer: 64KiB", "socket-buffer: 64KB", "limits.socket-buffer", "64KB: expected a size, 4KiB to 1GiB"),
    "size with a fraction": ("socket-buffer: 64KiB", "socket-buffer: 1.5MiB", "limits.socket-buffer", "1.5MiB: expected a size"),
    "jitter without sign": ("jitter: 12.5%", "jitter: 0.125", "services[0].health.jitter", "a number without a unit"),
    "jitter too large": ("jitter: 12.5%", "jitter: 51%", "services[0].health.jitter", "51%: expected a percentage, 0% to 50%"),
    "metrics on an admin address": ("log: {format", "admin: {listen: [\"127.0.0.1:9100\"]}\nlog: {format", "admin.listen[0]", "127.0.0.1:9100: metrics has it already"),
    "admin twice": ("log: {format", "admin: {listen: [\"unix:a\", \"unix:a\"]}\nlog: {format", "admin.listen[1]", "admin.listen[0] has it already"),
    "admin for everybody": ("log: {format", "admin: {listen: [\"0.0.0.0:9101\"]}\nlog: {format", "admin.listen[0]", "0.0.0.0:9101: expected a loopback address or unix:PATH"),
    "socket path too long": ("log: {format", f"admin: {{listen: [\"unix:/{'x' * 107}\"]}}\nlog: {{format", "admin.listen[0]", "expected a path of 1 to 107 octets behind unix:"),
    "socket without path": ("log: {format", "admin: {listen: [\"unix:\"]}\nlog: {format", "admin.listen[0]", "unix:: expected a path"),
    "short token": ("log: {format", "admin: {write-token-file: empty.key}\nlog: {format", "admin.write-token-file", "holds 0 characters: expected a token of 16 to 200"),
    "token for everybody": ("log: {format", "admin: {read-token-file: world.key}\nlog: {format", "admin.read-token-file", "mode 0604 lets everybody at it"),
    "token that is not there": ("log: {format", "admin: {read-token-file: none}\nlog: {format", "admin.read-token-file", "cannot be read: No such file"),
    "certificate without key": ("log: {format", "admin: {certificate-file: a.pem}\nlog: {format", "admin.certificate-file", "expected admin.key-file as well"),
    "key without certificate": ("log: {format", "admin: {key-file: a.pem}\nlog: {format", "admin.key-file", "expected admin.certificate-file as well"),
    "client CA without certificate": ("log: {format", "admin: {client-ca-file: a.pem}\nlog: {format", "admin.client-ca-file", "expected admin.certificate-file as well"),
    "writers without client CA": ("log: {format", "admin: {writers: [me]}\nlog: {format", "admin.writers", "expected admin.client-ca-file as well"),
    "back-off to less": ("interval: 200ms", "interval: 200ms, max-interval: 100ms", "services[0].health.max-interval", "100ms: expected at least services[0].health.interval, which is 200ms"),
    "path without slash": ("probe: none", "probe: none, http3: {path: status}", "services[0].health.http3.path", "status: expected a path that begins with a slash"),
    "path with a space": ("probe: none", "probe: none, http3: {path: \"/a b\"}", "services[0].health.http3.path", "expected a path"),
    "name of a server": ("probe: none", "probe: none, http3: {server-name: a..b}", "services[0].health.http3.server-name", "a..b: expected a host name"),
    "status backwards": ("probe: none", "probe: none, http3: {status: 300-200}", "services[0].health.http3.status", "300-200: expected a range of status codes"),
    "status as a number": ("probe: none", "probe: none, http3: {status: 200}", "services[0].health.http3.status", "200: YAML takes this for an integer"),
    "body of nothing": ("probe: none", "probe: none, http3: {body: \"\"}", "services[0].health.http3.body", "expected a text of 1 to 256"),
    "CA file that is not there": ("probe: none", "probe: none, http3: {verify: true, ca-file: none.pem}", "services[0].health.http3.ca-file", "cannot be read: No such file"),
    "CA file that is a pipe": ("probe: none", "probe: none, http3: {verify: true, ca-file: pipe}", "services[0].health.http3.ca-file", "pipe: expected a regular file"),
    "CA file without a certificate": ("probe: none", "probe: none, http3: {verify: true, ca-file: long.key}", "services[0].health.http3.ca-file", "holds no certificate in PEM"),
    "phase": ("phase: retiring", "phase: free", "services[0].cid-configs[1].phase", "free: expected prepared, active or retiring"),
    "probe": ("probe: none", "probe: vn", "services[0].health.probe", "vn: expected version-negotiation, http3 or none"),
    "level": ("level: warning", "level: warn", "log.level", "did you mean warning?"),
    "unknown-server": ("unknown-server: drop", "unknown-server: reject", "services[0].unknown-server", "expected fallback or drop"),
    "name with a space": ("name: plain", "name: a b", "services[1].name", "a b: expected a name"),
    "name too long": ("name: plain", f"name: {'n' * 65}", "services[1].name", "nnn...: expected a name"),
    "seed that does not print": ("seed: sesame", 'seed: "a\\0b"', "services[0].seed", "3 characters: expected a text"),
    "host name": ('"192.0.2.2:443"', '"example.com:443"', "services[1].listen[0]", "expected an IP address before the port"),
    "no port": ('"192.0.2.2:443"', '"192.0.2.2"', "services[1].listen[0]", "expected ADDRESS:PORT"),
    "port 0": ('"192.0.2.2:443"', '"192.0.2.2:0"', "services[1].listen[0]", "expected ADDRESS:PORT"),
    "IPv6 without brackets": ('"192.0.2.2:443"', '"2001:db8::2:443"', "services[1].listen[0]", "go in brackets"),
    "endless address": ('"192.0.2.2:443"', f'"1.2.3.4:{"9" * 6000}"', "services[1].listen[0]", "expected ADDRESS:PORT"),
    "metrics": ('metrics: "127.0.0.1:9100"', "metrics: 9100", "metrics", "9100: YAML takes this for an integer"),
    "server ID with odd digits": ('"b1946ac92492d234"', '"b1946ac92492d23"', f"{X}.server-ids.0[0]", "two hex digits each"),
    "server ID that is no hex": ('"b1946ac92492d234"', '"z1946ac92492d234"', f"{X}.server-ids.0[0]", "two hex digits each"),
    "server ID too long": ('"b1946ac92492d234"', f'"{"ab" * 16}"', f"{X}.server-ids.0[0]", "1 to 15 octets"),
    "no server ID in a list": ('["b1946ac92492d234"]', "[]", f"{X}.server-ids.0", "0 elements: expected 1 to 65536"),
    "config ID out of range": ("3: [\"81d5e4\"]", "3: [\"81d5e4\"], 7: [\"00\"]", f"{B}.server-ids.7", "7: expected a config ID, 0 to 6"),
    # CID configurations.
    "config ID 7": ("config-id: 3", "config-id: 7", f"{CID1}.config-id", "7: expected an integer, 0 to 6"),
    "nonce too short": ("nonce-length: 6", "nonce-length: 3", f"{CID1}.nonce-length", "3: expected an integer, 4 to 18"),
    "sum over 19": ("nonce-length: 6", "nonce-length: 17", CID1, "take 20 octets together: expected at most 19"),
    "CID over 20": ("appended-length: 2", "appended-length: 11", CID1, "11 appended octets: a CID holds at most 20"),
    "key file missing": ("secrets/cid-0.key", "secrets/none.key", f"{CID0}.key-file", "none.key: cannot be read: No such file"),
    "key file unreadable": ("secrets/cid-0.key", "/proc/self/mem", f"{CID0}.key-file", "/proc/self/mem: cannot be read: Input/output"),
    "key file is a directory": ("secrets/cid-0.key", "secrets", f"{CID0}.key-file", "secrets: a directory"),
    "key file is a device": ("secrets/cid-0.key", "/dev/null", f"{CID0}.key-file", "/dev/null: not a regular file"),
    "key file is a pipe": ("secrets/cid-0.key", "pipe", f"{CID0}.key-file", "pipe: not a regular file"),
    "key file under a file": ("secrets/cid-0.key", "secrets/cid-0.key/x", f"{CID0}.key-file", "cannot be read: Not a directory"),
    "key file name too long": ("secrets/cid-0.key", "x" * 5000, f"{CID0}.key-file", "cannot be read: File name too long"),
    "key file name with NUL": ("secrets/cid-0.key", '"a\\0b"', f"{CID0}.key-file", "expected the name of a file"),
    "key file is world-readable": ("secrets/cid-0.key", "world.key", f"{CID0}.key-file", "mode 0604 lets everybody at it: expected 0600"),
    "key file too short": ("secrets/cid-0.key", "short.key", f"{CID0}.key-file", "holds 30 characters: expected 32 hex digits"),
    "key file is empty": ("secrets/cid-0.key", "empty.key", f"{CID0}.key-file", "holds 0 characters: expected 32 hex digits"),
    "key file too long": ("secrets/cid-0.key", "long.key", f"{CID0}.key-file", "holds more than 256 characters"),
    "key file is no hex": ("secrets/cid-0.key", "nohex.key", f"{CID0}.key-file", "holds something else than hex digits"),
    "key file of a reset key": ("secrets/cid-0.key", "secrets/reset-1.key", f"{CID0}.key-file", "holds 64 characters: expected 32"),
    "reset key file of a CID key": ("secrets/reset-0.key", "secrets/cid-1.key", f"{CID0}.reset-key-file", "holds 32 characters: expected 64"),
    "key instead of its file": ("secrets/cid-0.key", OTHER_CID_KEY, f"{CID0}.key-file", "<32 hex digits>: looks like a key"),
    "reset key made of the CID key": ("secrets/reset-0.key", "doubled.key", f"{CID0}.reset-key-file", f"contains the key of {CID0}.key-file"),
    # What must be different.
    "config ID twice": ("config-id: 3", "config-id: 0", f"{CID1}.config-id", f"0: {CID0}.config-id has it already"),
    "service name twice": ("name: plain", "name: web", "services[1].name", "web: services[0].name has it already"),
    "backend name twice": ("name: b,", "name: a,", f"{B}.name", f"a: {A}.name has it already"),
    "backend address twice": ('"[fd00::12]:443"', '"10.0.0.11:443"', f"{B}.address", f"10.0.0.11:443: {A}.address has it already"),
    "server ID twice": ('"aaaaaaaa"', '"3FA91C02"', f"{B}.server-ids.0[1]", f"{A}.server-ids.0[0] has it already"),
    "server ID twice in one list": ('"aaaaaaaa"', '"81d5e47a"', f"{B}.server-ids.0[1]", f"{B}.server-ids.0[0] has it already"),
    "listener twice in a service": ('"192.0.2.2:443"', '"192.0.2.2:443", "192.0.2.2:443"', "services[1].listen[1]", "services[1].listen[0] has it already"),
    "listener twice": ('"192.0.2.2:443"', '"192.0.2.1:443"', "services[1].listen[0]", "192.0.2.1:443: services[0].listen[0] has it already"),
    "listener in another spelling": ('"192.0.2.2:443"', '"[2001:db8:0::1]:443"', "services[1].listen[0]", "services[0].listen[1] has it already"),
    "wildcard after address": ('"192.0.2.2:443"', '"0.0.0.0:443"', "services[1].listen[0]", "0.0.0.0:443: overlaps with services[0].listen[0]"),
    "address after wildcard": ('"[2001:DB8::1]:443"', '"0.0.0.0:443"', "services[1].listen[0]", "192.0.2.2:443: overlaps with services[0].listen[1]"),
    "backend is a listener": ('"10.0.1.21:443"', '"192.0.2.1:443"', f"{X}.address", "services[0].listen[0] has it, which makes a loop"),
    "backend is everybody": ('"10.0.1.21:443"', '"0.0.0.0:443"', f"{X}.address", "0.0.0.0:443: expected the address of one machine"),
    "backend is a group": ('"10.0.1.21:443"', '"[ff02::1]:443"', f"{X}.address", "expected the address of one machine"),
    # What must agree.
    "server ID of the wrong length": ('"aaaaaaaa"', '"aaaaaa"', f"{B}.server-ids.0[1]", f"aaaaaa: 3 octets, but {CID0}.server-id-length is 4"),
    "server IDs of no configuration": ("3: [\"81d5e4\"]", "3: [\"81d5e4\"], 5: [\"00\"]", f"{B}.server-ids.5", "5: expected the config-id of one of cid-configs"),
    "backend without server IDs": (", 3: [\"81d5e4\"]}", "}", f"{B}.server-ids", f"nothing for config ID 3: expected a server ID, as {CID1} has it"),
    "backend without any": (', server-ids: {0: ["b1946ac92492d234"]}', "", f"{X}.server-ids", "nothing for config ID 0"),
    "weights": ('["b1946ac92492d234"]}}', '["b1946ac92492d234"]}, weight: 0}', "services[1].backends", "every weight is 0"),
    "hold-off": ("probe: none, interval: 200ms", "timeout: 2s", "services[0].resets.hold-off", "1500ms: expected at least services[0].health.timeout, which is 2s"),
    "new-flow-timeout": ("new-flow-timeout: 2500ms", "new-flow-timeout: 2m", "limits.new-flow-timeout", "2m: expected at most limits.idle-timeout, which is 90s"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_with_its_path_and_nothing_else_is(
    directory: Path, old: str, new: str, path: str, message: str
) -> None:
    os.mkfifo(directory / "pipe", 0o600)
    write_key(directory / "world.key", CID_KEY, 0o604)
    write_key(directory / "short.key", CID_KEY[:30])
    write_key(directory / "empty.key", "")
    write_key(directory / "long.key", CID_KEY * 9)
    write_key(directory / "nohex.key", "g" * 32)
    write_key(directory / "doubled.key", RESET_KEY[:32] + CID_KEY)
    found = mistakes(directory, edited(old, new))
    assert [path] == [p for p, _ in found], found
    assert message in found[0][1]
    for digits in (CID_KEY, OTHER_CID_KEY, RESET_KEY, "sesame", "90125", "g" * 32):
        assert digits not in found[0][1]


XDP = """\
engine: xdp
interface: eth0.100
forward: nat
xdp:
  attach: native
  pin-directory: pins
  source: [10.0.0.2, "FD00:0::2"]
  nat-ports: 2048-4095
  constant-time: true
services:
  - name: web
    listen: ["192.0.2.1:443"]
    backends:
      - {name: a, address: "10.0.0.11:443"}
      - {name: b, address: "10.0.0.12:443"}
  - name: names
    listen: ["192.0.2.1:853"]
    backends: [{name: x, address: "10.0.0.11:853"}]
"""


def test_every_key_of_the_xdp_engine_means_what_the_documents_say(directory: Path) -> None:
    config = load(directory, XDP)
    assert replace(config, services=()) == LbConfig(
        engine="xdp",
        interface="eth0.100",
        forward=Forward.NAT,
        xdp=XdpConfig(
            attach=Attach.NATIVE,
            pin_directory=directory / "pins",
            source=("10.0.0.2", "fd00::2"),
            nat_ports=range(2048, 4096),
            constant_time=True,
        ),
        services=(),
    )
    assert XdpConfig() == XdpConfig(
        attach=Attach.AUTO,
        pin_directory=Path("/sys/fs/bpf/quiclb"),
        source=(),
        nat_ports=range(1024, 32768),
        constant_time=False,
    )


@pytest.mark.parametrize("forward", Forward)
def test_every_forward_mode_loads(directory: Path, forward: Forward) -> None:
    config = load(directory, edited("forward: nat", f"forward: {forward.name.lower()}", XDP))
    assert config.forward is forward


def test_one_line_makes_an_xdp_balancer_of_a_udp_one(directory: Path) -> None:
    """Drop-in: what is only for sockets may stay in the file."""
    text = edited("engine: udp", "engine: xdp\ninterface: eth0").replace("workers: 2\n", "")
    assert load(directory, text).services == load(directory, GOOD).services


WEB, BACKEND_B, NAMES = "services[0].listen", "services[0].backends[1].address", "services[1].backends[0].address"
ANOTHER_PORT = '"10.0.0.12:443"', '"10.0.0.12:4433"', BACKEND_B
XDP_MISTAKES = {
    "interface missing": ("interface: eth0.100\n", "", "interface", "missing: expected the name of a network interface"),
    "interface name too long": ("eth0.100", "i" * 16, "interface", "expected the name of a network interface, up to 15"),
    "interface name with a slash": ("eth0.100", "a/b", "interface", "a/b: expected the name of a network interface"),
    "interface name that is a directory": ("eth0.100", "..", "interface", "..: expected the name of a network interface"),
    "interface name with a space": ("eth0.100", "a b", "interface", "a b: expected the name of a network interface"),
    "interface name that is a number": ("eth0.100", "12", "interface", "12: YAML takes this for an integer; put it in quotes"),
    "workers with xdp": ("forward: nat", "workers: 2", "workers", "2: expected 1 with engine: xdp, which is on every CPU"),
    "forward mode": ("forward: nat", "forward: dsr", "forward", "dsr: expected nat, dnat, l2, ipip or gue"),
    "attach mode": ("attach: native", "attach: offload", "xdp.attach", "offload: expected auto, native or generic"),
    "unknown key of xdp": ("attach: native", "attack: native", "xdp.attack", "unknown key; did you mean attach?"),
    "source with a port": ('"FD00:0::2"', '"10.0.0.3:443"', "xdp.source[1]", "10.0.0.3:443: expected an IP address"),
    "source in brackets": ('"FD00:0::2"', '"[fd00::2]"', "xdp.source[1]", "[fd00::2]: expected an IP address, as in"),
    "source that is a name": ("10.0.0.2", "here", "xdp.source[0]", "here: expected an IP address, as in"),
    "source with a zone": ('"FD00:0::2"', '"fe80::1%eth0"', "xdp.source[1]", "fe80::1%eth0: expected one that means the same"),
    "source in disguise": ('"FD00:0::2"', '"::ffff:10.0.0.2"', "xdp.source[1]", "::ffff:10.0.0.2: write it as IPv4"),
    "sources of one family": ('"FD00:0::2"', "10.0.0.3", "xdp.source[1]", "of the same family as xdp.source[0]: expected one"),
    "source that is everybody": ("10.0.0.2", "0.0.0.0", "xdp.source[0]", "0.0.0.0: expected the address of one machine"),
    "source that is a group": ('"FD00:0::2"', '"ff02::1"', "xdp.source[1]", "ff02::1: expected the address of one machine"),
    "nat-ports backwards": ("2048-4095", "4095-2048", "xdp.nat-ports", "4095-2048: expected a range of ports"),
    "nat-ports from 0": ("2048-4095", "0-4095", "xdp.nat-ports", "0-4095: expected a range of ports"),
    "nat-ports too high": ("2048-4095", "2048-65536", "xdp.nat-ports", "2048-65536: expected a range of ports"),
    "nat-ports that is one port": ("2048-4095", "2048", "xdp.nat-ports", "2048: YAML takes this for an integer"),
    "constant-time": ("constant-time: true", "constant-time: yes", "xdp.constant-time", "yes: expected true or false"),
}  # fmt: skip
REACH_MISTAKES = {
    "two listeners of dnat": ("dnat", '"192.0.2.1:443"', '"192.0.2.1:443", "192.0.2.2:443"', f"{WEB}[1]", "192.0.2.2:443: expected one listening address per service with forward: dnat"),
    "wildcard listener of dnat": ("dnat", '"192.0.2.1:853"', '"0.0.0.0:853"', "services[1].listen[0]", "0.0.0.0:853: expected one listening address per service with forward: dnat"),
    "backend of another family": ("dnat", '"10.0.0.12:443"', '"[fd00::12]:443"', BACKEND_B, f"[fd00::12]:443: expected an address of the family of {WEB}[0], as dnat keeps it"),
    "backend of two services": ("dnat", '"10.0.0.11:853"', '"10.0.0.12:443"', NAMES, f"10.0.0.12:443: {BACKEND_B} has it already: expected another with forward: dnat"),
    "another port with l2": ("l2", *ANOTHER_PORT, f"10.0.0.12:4433: expected the port of {WEB}[0], as forward: l2 changes none"),
    "another port with ipip": ("ipip", *ANOTHER_PORT, f"10.0.0.12:4433: expected the port of {WEB}[0], as forward: ipip changes none"),
    "another port with gue": ("gue", *ANOTHER_PORT, f"10.0.0.12:4433: expected the port of {WEB}[0], as forward: gue changes none"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "path", "message"), XDP_MISTAKES.values(), ids=XDP_MISTAKES.keys())
def test_a_mistake_about_the_xdp_engine_is_named(directory: Path, old: str, new: str, path: str, message: str) -> None:
    found = mistakes(directory, edited(old, new, XDP))
    assert [path] == [p for p, _ in found], found
    assert message in found[0][1]


@pytest.mark.parametrize(
    ("forward", "old", "new", "path", "message"), REACH_MISTAKES.values(), ids=REACH_MISTAKES.keys()
)
def test_what_a_backend_would_not_understand_is_a_mistake(
    directory: Path, forward: str, old: str, new: str, path: str, message: str
) -> None:
    text = edited(old, new, XDP)
    assert load(directory, text)
    assert mistakes(directory, edited("forward: nat", f"forward: {forward}", text)) == [(path, message)]


def test_two_ports_of_a_service_are_one_too_many_where_none_is_changed(directory: Path) -> None:
    text = edited('"192.0.2.1:443"', '"192.0.2.1:443", "192.0.2.1:8443"', edited("forward: nat", "forward: l2", XDP))
    assert [path for path, _ in mistakes(directory, text)] == ["services[0].backends[0].address", BACKEND_B]
    assert "listen[1]" in mistakes(directory, text)[0][1]


def test_more_backends_than_a_ring_can_name_are_a_mistake(tmp_path: Path) -> None:
    """Sixteen services may have as many as that, and no single one: so there is one service here, made without a file."""
    (tmp_path / "empty.yaml").write_text("{}")
    document = Document(tmp_path / "empty.yaml")
    reading = Reading(document)

    def check(count: int) -> None:
        backends = tuple(
            BackendKeys(name=f"b{i}", address=Address(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 443))
            for i in range(count)
        )
        listen = (Address("192.0.2.1", 443),)
        service = ServiceKeys(name="web", listen=listen, backends=backends)
        check_engine(
            LbConfig(engine="xdp", interface="eth0", services=()),
            {"interface": Scalar("eth0", "str")},
            [Section(service, "services[0]", reading)],
            reading,
        )

    check(65_535)
    assert document.mistakes == []
    check(65_536)
    assert [(error.path, error.message) for error in document.mistakes] == [
        ("services", "65536 backends: expected at most 65535 with engine: xdp")
    ]


SHARED = """\
services:
  - name: web
    listen: ["192.0.2.1:443"]
    cid-configs:
      - {config-id: 0, server-id-length: 4, nonce-length: 12, key-file: secrets/cid-0.key}
      - {config-id: 1, server-id-length: 4, nonce-length: 6}
    backends:
      - {name: a, address: "10.0.0.11:443", server-ids: {0: ["3fa91c02"], 1: ["c0c0c0c0"]}}
      - {name: b, address: "10.0.0.12:443", server-ids: {0: ["81d5e47a"], 1: ["d1d1d1d1"]}}
"""


def test_plaintext_and_encrypted_configurations_share_no_server_id(directory: Path) -> None:
    """Section 9.7 of the draft: also if the ID is another backend's."""
    assert load(directory, SHARED)
    assert mistakes(directory, edited("d1d1d1d1", "3fa91c02", SHARED)) == [
        (
            f"{B}.server-ids.1[0]",
            f"3fa91c02: {A}.server-ids.0[0] has it in an encrypted configuration: expected another ID",
        )
    ]
    assert mistakes(directory, edited("81d5e47a", "c0c0c0c0", SHARED)) == [
        (
            f"{B}.server-ids.0[0]",
            f"c0c0c0c0: {A}.server-ids.1[0] has it in a plaintext configuration: expected another ID",
        )
    ]


def test_configurations_with_one_key_share_no_server_id(directory: Path) -> None:
    """Section 9.6 of the draft: one server would use each nonce twice. It is the key that counts, not its file."""
    text = edited("nonce-length: 6}", "nonce-length: 6, key-file: secrets/copy.key}", SHARED)
    text = edited("d1d1d1d1", "81d5e47a", text)
    write_key(directory / "secrets" / "copy.key", OTHER_CID_KEY)
    assert load(directory, text)
    write_key(directory / "secrets" / "copy.key", CID_KEY)
    assert mistakes(directory, text) == [
        (
            f"{B}.server-ids.1[0]",
            f"81d5e47a: {B}.server-ids.0[0] has it under the same key ({CID0}.key-file): "
            "expected another ID or another key",
        )
    ]


def test_all_mistakes_are_found_at_once_and_come_in_the_order_of_the_file(directory: Path) -> None:
    text = GOOD
    for old, new in (
        ("workers: 2", "workers: 0\nworkers: 1"),
        ("level: warning", "level: loud"),
        ('"192.0.2.1:443"', '"192.0.2.1"'),
        ("nonce-length: 12", "nonce-length: 1"),
        ("secrets/cid-1.key", "secrets/lost.key"),
        ('"aaaaaaaa"', '"3fa91c02"'),
        ("probe: none", "prob: none"),
        ("name: plain", "name: web"),
        ("server-id-length: 8", "server-id-length: 7"),
    ):
        text = edited(old, new, text)
    assert [path for path, _ in mistakes(directory, text)] == [
        "workers",
        "workers",
        "log.level",
        "services[0].listen[0]",
        f"{CID0}.nonce-length",
        f"{CID1}.key-file",
        f"{B}.server-ids.0[1]",
        "services[0].health.prob",
        "services[1].name",
        f"{X}.server-ids.0[0]",
    ]


WHOLE_FILES = {
    "empty": (b"", "nothing in it"),
    "comments only": (b"# nothing\n", "nothing in it"),
    "not UTF-8": (b"name: \xff\n", "not UTF-8 at octet 6"),
    "control characters": (b"name: \x01\n", "not YAML"),
    "syntax": (b"a: [1\nb: 2\n", "line 2, column 2: not YAML"),
    "tab": (b"a:\n\t- b\n", "line 2, column 1: not YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "a second document"),
    "too deep": (b"[" * 1000, "line 1: nested more than 16 deep"),
    "too large": (b"#" * (MAX_FILE + 1), "more than 4 MiB"),
}


@pytest.mark.parametrize(("octets", "message"), WHOLE_FILES.values(), ids=WHOLE_FILES.keys())
def test_a_file_that_is_no_use_is_named(directory: Path, octets: bytes, message: str) -> None:
    found = mistakes(directory, octets)
    assert [path for path, _ in found] == [str(directory / "quiclb.yaml")]
    assert message in found[0][1]


@pytest.mark.parametrize(("text", "found"), [("[]", "a list"), ("hello", "hello"), ("12", "12")])
def test_a_file_that_is_no_mapping_is_one_mistake(directory: Path, text: str, found: str) -> None:
    name = str(directory / "quiclb.yaml")
    assert mistakes(directory, text) == [(name, f"{found}: expected a mapping of keys to values")]


def test_a_byte_order_mark_is_no_mistake(directory: Path) -> None:
    assert load(directory, b"\xef\xbb\xbf" + GOOD.encode()) == load(directory, GOOD)


@pytest.mark.parametrize("name", [".", "none.yaml", "quiclb.yaml/x", "x" * 300, "/dev/null", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(directory: Path, name: str) -> None:
    (directory / "quiclb.yaml").write_text(GOOD)
    with pytest.raises(ConfigErrors) as caught:
        load_config(directory / name)
    assert len(caught.value.exceptions) == 1


def test_an_alias_bomb_is_defused(directory: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    found = mistakes(directory, "\n".join(lines))
    assert ("a39[1]", "*a38: aliases are not used here; write the value out") in found


def test_a_large_fleet_loads(directory: Path) -> None:
    """4096 backends, the most that a service may have, in a few seconds at the very worst."""
    backends = "".join(
        f'      - {{name: b{i}, address: "10.{i >> 8}.{i & 255}.1:443", server-ids: {{0: ["{i:08x}"]}}}}\n'
        for i in range(4096)
    )
    head = SHARED[: SHARED.index("      - {config-id: 1")]
    assert len(load(directory, f"{head}    backends:\n{backends}").services[0].service.backends) == 4096


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.dates()
WORDS = st.sampled_from(
    ["services", "name", "listen", "cid-configs", "config-id", "key-file", "backends", "server-ids", "health", "limits"]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | TEXTS, inner, max_size=4),
    max_leaves=30,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads_or_says_why(directory: Path, octets: bytes) -> None:
    with contextlib.suppress(ConfigErrors):
        load(directory, octets)


@FUZZ
@given(st.binary(max_size=200))
def test_no_octets_raise_anything_but_config_errors(directory: Path, octets: bytes) -> None:
    loads_or_says_why(directory, octets)


@FUZZ
@given(st.text(max_size=200))
def test_no_text_raises_anything_but_config_errors(directory: Path, text: str) -> None:
    loads_or_says_why(directory, text.encode(errors="replace"))


@FUZZ
@given(TREES)
def test_no_tree_raises_anything_but_config_errors(directory: Path, tree: object) -> None:
    loads_or_says_why(directory, yaml.safe_dump({"services": tree}, allow_unicode=True).encode(errors="replace"))


@FUZZ
@given(
    st.sampled_from(
        [GOOD, XDP, edited("forward: nat", "forward: dnat", XDP), edited("forward: nat", "forward: l2", XDP)]
    ),
    st.integers(0),
    st.integers(0, 12),
    st.sampled_from(["", "0", "-", ":", '"', "[", "}", "\n", "*", "é"]),
)
def test_no_small_change_raises_anything_but_config_errors(
    directory: Path, text: str, where: int, cut: int, put: str
) -> None:
    at = where % len(text)
    loads_or_says_why(directory, (text[:at] + put + text[at + cut :]).encode())


@FUZZ
@given(which=st.sampled_from(["top", "xdp", "service", "backend"]), nth=st.integers(0), value=TREES)
def test_no_value_in_an_xdp_balancers_file_raises_anything_but_config_errors(
    directory: Path, which: str, nth: int, value: object
) -> None:
    tree = yaml.safe_load(XDP)
    service = tree["services"][0]
    owner = {"top": tree, "xdp": tree["xdp"], "service": service, "backend": service["backends"][0]}[which]
    owner[list(owner)[nth % len(owner)]] = value
    loads_or_says_why(directory, yaml.safe_dump(tree).encode())


@FUZZ
@given(which=st.sampled_from(["log", "limits", "service", "cid-config", "backend"]), nth=st.integers(0), value=TREES)
def test_no_value_in_a_good_file_raises_anything_but_config_errors(
    directory: Path, which: str, nth: int, value: object
) -> None:
    tree = yaml.safe_load(GOOD)
    service = tree["services"][0]
    owner = {
        "log": tree["log"],
        "limits": tree["limits"],
        "service": service,
        "cid-config": service["cid-configs"][0],
        "backend": service["backends"][0],
    }[which]
    owner[list(owner)[nth % len(owner)]] = value
    loads_or_says_why(directory, yaml.safe_dump(tree).encode())


XDP_RELOADS = {
    "interface": (("eth0.100", "eth1"), ("interface", "eth1: this process runs with eth0.100; a restart changes it")),
    "forward": (("forward: nat", "forward: l2"), ("forward", "l2: this process runs with nat; a restart changes it")),
    "attach": (
        ("attach: native", "attach: auto"),
        ("xdp.attach", "auto: this process runs with native; a restart changes it"),
    ),
    "source": (
        ('10.0.0.2, "FD00:0::2"', "10.0.0.2"),
        ("xdp.source", "['10.0.0.2']: this process runs with ['10.0.0.2', 'fd00::2']; a restart changes it"),
    ),
    "nat-ports": (
        ("2048-4095", "2048-4096"),
        ("xdp.nat-ports", "2048-4096: this process runs with 2048-4095; a restart changes it"),
    ),
    "constant-time": (
        ("constant-time: true", "constant-time: false"),
        ("xdp.constant-time", "False: this process runs with True; a restart changes it"),
    ),
}


@pytest.mark.parametrize(("change", "refused"), XDP_RELOADS.values(), ids=XDP_RELOADS.keys())
def test_a_reload_cannot_move_the_program(directory: Path, change: tuple[str, str], refused: tuple[str, str]) -> None:
    old, new = load(directory, XDP), load(directory, edited(*change, XDP))
    assert [(error.path, error.message) for error in refuse_reload(old, new)] == [refused]


RELOADS = {
    "the same": (GOOD, []),
    "backends and health": (edited("weight: 3", "weight: 1").replace("interval: 200ms", "interval: 2s"), []),
    "another service": (GOOD.replace("name: plain", "name: other"), []),
    "resets switched on": (
        edited(
            "key-file: secrets/cid-1.key", "key-file: secrets/cid-1.key\n        reset-key-file: secrets/reset-1.key"
        ),
        [],
    ),
    "resets switched off": (edited("        reset-key-file: secrets/reset-0.key\n", ""), []),
    "rate of new flows": (edited("flows: 500", "flows: 500, new-flows-rate: 7"), []),
    "workers": (edited("workers: 2", "workers: 3"), [("workers", "3: this process runs with 2; a restart changes it")]),
    "metrics": (
        edited('metrics: "127.0.0.1:9100"\n', ""),
        [("metrics", "nothing: this process runs with 127.0.0.1:9100; a restart changes it")],
    ),
    "sockets": (
        edited("sockets: 20", "sockets: 21"),
        [("limits.sockets", "21: this process runs with 20; a restart changes it")],
    ),
    "idle-timeout": (
        edited("idle-timeout: 90s", "idle-timeout: 1h"),
        [("limits.idle-timeout", "1h: this process runs with 90s; a restart changes it")],
    ),
}


@pytest.mark.parametrize(("text", "refused"), RELOADS.values(), ids=RELOADS.keys())
def test_a_reload_is_refused_where_it_would_break_something(
    directory: Path, text: str, refused: list[tuple[str, str]]
) -> None:
    old, new = load(directory, GOOD), load(directory, text)
    assert [(error.path, error.message) for error in refuse_reload(old, new)] == refused
