# ruff: noqa: RUF009 - key() makes a field
"""Every key of a balancer's file, and of a server's, in tables that are dataclasses; `schema.py` says how that works.

Names are the draft's, with hyphens in the file. `config.py` and `server_config.py` read with these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lb.address import Address
from lb.cid import KEY_LENGTH, CidConfig, ConfigId, ServerId
from lb.forward import Attach, Forward
from lb.keyfile import read_key
from lb.kinds import (
    Choice,
    Duration,
    FileName,
    Flag,
    Fraction,
    HostName,
    HttpAddress,
    Integer,
    InterfaceName,
    IpAddress,
    Moment,
    Name,
    PortRange,
    Secret,
    ServerIdText,
    Size,
    StatusRange,
    Text,
    UdpAddress,
    UrlPath,
)
from lb.reset_scheme import Keys, ResetRule, Scheme
from lb.routing import Service, UnknownServer
from lb.schema import INVALID, ListOf, MappingOf, Reading, Record, key

# Ours.
MAX_SERVICES = 256
MAX_LISTENERS = 64
MAX_BACKENDS = 4096
MAX_SERVER_IDS = 65_536
MAX_RATE = 1_000_000_000


class Probe(StrEnum):
    """How a backend's health is asked for."""

    VERSION_NEGOTIATION = "version-negotiation"
    HTTP3 = "http3"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Http3Config:
    """What a backend is asked for with `probe: http3`, and which answer is a good one."""

    path: str = key(UrlPath(), "What is asked for.", "/")
    server_name: str | None = key(
        HostName(), "The name that it is asked for by. By default the backend's address.", None
    )
    status: range = key(StatusRange(), "Status codes that are a success.", range(200, 300))
    body: str | None = key(Text(256), "A text that the body must contain, within its first 64 KiB.", None)
    verify: bool = key(Flag(), "Whether the server's certificate must be good for the name.", False)
    ca_file: Path | None = key(
        FileName(), "With `verify`: certificates to trust, in PEM. By default the system's.", None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """When a backend is DOWN and when it is not; times in seconds, `jitter` a fraction of `interval`."""

    probe: Probe = key(
        Choice({str(p): p for p in Probe}),
        "What a backend is asked: to negotiate the version, as every QUIC server must, for a page, or nothing at all.",
        Probe.VERSION_NEGOTIATION,
    )
    interval: float = key(Duration(0.01, 3600), "Time from one probe to the next.", 1.0)
    timeout: float = key(Duration(0.01, 60), "How long an answer may take.", 0.5)
    fall: int = key(Integer(1, 100), "Probes missed in a row that make a backend DOWN.", 3)
    rise: int = key(Integer(1, 100), "Probes answered in a row that end it.", 2)
    jitter: float = key(Fraction(0, 0.5), "By how much of the interval each wait may differ from it.", 0.1)
    suspect_interval: float = key(
        Duration(0.001, 10), "Time between probes of a backend that something seems wrong with.", 0.02
    )
    silence: float = key(
        Duration(0, 3600),
        "How long a backend may send nothing while it gets traffic and not be suspected; 0s: ever.",
        0.5,
    )
    max_interval: float | None = key(
        Duration(0.01, 3600),
        "Back-off: while a backend is DOWN the time between probes doubles up to this. By default it does not.",
        None,
    )
    panic_threshold: float = key(
        Fraction(0, 1),
        "With fewer of the backends ACTIVE than this, the health checks are not believed: all take connections and "
        "nobody is reset. With none ACTIVE that is so in any case.",
        0.0,
    )
    slow_start: float = key(
        Duration(0, 3600),
        "How long a backend that rises takes to get its whole share of new connections; 0s: no time.",
        0.0,
    )
    http3: Http3Config = key(Record(Http3Config), "With `probe: http3`: the question and the answer.", Http3Config())


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetConfig:
    """Which stateless resets are sent, when and how often; times in seconds, rates per second."""

    scheme: Scheme = key(
        Choice({str(scheme): scheme for scheme in Scheme}),
        "How the servers make their tokens: see [Resets](resets.md).",
        Scheme.HMAC_SHA256,
    )
    keys: Keys = key(
        Choice({str(keys): keys for keys in Keys}),
        "Whether the key in `reset-key-file` is one that each server's own follows from, or the one that all have.",
        Keys.PER_SERVER,
    )
    server_address: str | None = key(
        IpAddress(),
        "With `scheme: mvfst`: the address that servers are bound to. By default that of the backend.",
        None,
    )
    worker_number: bool = key(
        Flag(),
        "With `scheme: nginx`: whether tokens depend on the worker, as since nginx 1.29.6 and 1.28.3. "
        "The first of a backend's server IDs is worker 0's, and so on.",
        True,
    )
    hold_off: float = key(Duration(0.01, 3600), "How long a backend is DOWN before it is declared dead.", 5.0)
    rate: int = key(Integer(1, MAX_RATE), "Resets per second that answer packets, at most.", 1000)
    prefix_rate: int = key(Integer(1, MAX_RATE), "The same per source prefix, an IPv4 /24 or an IPv6 /56.", 10)
    push_rate: int = key(Integer(1, MAX_RATE), "Resets per second that nobody asked for, at most.", 10_000)
    push: bool = key(Flag(), "Whether clients that say nothing are told too when their server is declared dead.", True)

    @property
    def rule(self) -> ResetRule:
        return ResetRule(self.scheme, self.keys, self.server_address, self.worker_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may hold; times in seconds, sizes in octets."""

    flows: int = key(
        Integer(1, 10_000_000), "Flows per worker; at the limit the oldest idle one goes.", 100_000, restart=True
    )
    idle_timeout: float = key(
        Duration(1, 86_400), "How long a flow may be idle, both ways, and be kept.", 120.0, restart=True
    )
    new_flow_timeout: float = key(
        Duration(0.1, 86_400),
        "The same for a flow whose client has not shown that it received something.",
        10.0,
        restart=True,
    )
    table_entries: int = key(
        Integer(1, 16_777_216), "Entries of each of the three tables for unroutable packets.", 65_536, restart=True
    )
    new_flows_rate: int = key(
        Integer(0, MAX_RATE), "Fallback decisions per second and source prefix; 0: no limit.", 10_000
    )
    sockets: int | None = key(
        Integer(1, 1_000_000),
        "Sockets towards backends, per worker. By default what the descriptor limit allows.",
        None,
        restart=True,
    )
    socket_buffer: int = key(Size(4096, 1 << 30), "Send and receive buffer of every socket.", 4 << 20, restart=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is logged to standard error, and how."""

    format: str = key(Choice({"text": "text", "json": "json"}), "Lines of key=value, or of JSON.", "text", restart=True)
    level: str = key(
        Choice({level: level for level in ("debug", "info", "warning", "error")}),
        "The least important level that is logged.",
        "info",
        restart=True,
    )
    flows: float = key(
        Fraction(0, 1), "With `engine: udp`: how many of the new flows are logged, chosen by chance.", 0.0, restart=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminConfig:
    """Who may look at a running balancer and change it, and where."""

    listen: tuple[Path | Address, ...] | None = key(
        ListOf(HttpAddress(), 0, 8),
        "Where the API and the status page are. By default `unix:admin.sock` in the runtime directory.",
        None,
        restart=True,
    )
    read_token_file: Path | None = key(
        FileName(), "File with the bearer token, at least 16 characters, of those who may look.", None, restart=True
    )
    write_token_file: Path | None = key(
        FileName(), "The same, of those who may change something as well.", None, restart=True
    )
    certificate_file: Path | None = key(
        FileName(), "TLS on all addresses but unix sockets: the certificates, in PEM.", None, restart=True
    )
    key_file: Path | None = key(FileName(), "Its private key, in PEM.", None, restart=True)
    client_ca_file: Path | None = key(
        FileName(),
        "Who signs the certificates of clients, in PEM. With one of those a client may look.",
        None,
        restart=True,
    )
    writers: tuple[str, ...] = key(
        ListOf(Text(128), 0, 64),
        "Common names of client certificates that may change something as well.",
        (),
        restart=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationConfig:
    """When a CID configuration is out of use; times in seconds."""

    guard: float = key(
        Duration(0, 168 * 3600),
        "How long no packet may have come with a config ID before it is free for another configuration.",
        300.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class XdpConfig:
    """How the xdp engine takes hold of its interface, and what it uses there. `source` has one address per family."""

    attach: Attach = key(
        Choice({str(a): a for a in Attach}),
        "In the interface's driver, or behind it, or where it can be: `native` if the driver allows it.",
        Attach.AUTO,
        restart=True,
    )
    pin_directory: Path = key(
        FileName(),
        "A directory of a BPF file system. What is pinned there outlives the process, and packets keep flowing.",
        Path("/sys/fs/bpf/quiclb"),
        restart=True,
    )
    source: tuple[str, ...] = key(
        ListOf(IpAddress(), 0, 2),
        "What backends see as sender: of datagrams with `nat`, of tunnels with `ipip` and `gue`. One per family; "
        "by default addresses of the interface.",
        (),
        restart=True,
    )
    nat_ports: range = key(
        PortRange(), "Ports of these addresses that `nat` uses towards backends.", range(1024, 32768), restart=True
    )
    constant_time: bool = key(
        Flag(), "Whether AES does without tables, whose use of the cache tells about keys; slower.", False, restart=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CidKeys:
    """How CIDs carry server IDs: the keys that a balancer's file and a server's have in common."""

    config_id: ConfigId = key(Integer(0, 6), "The config rotation bits. 7 marks CIDs without a configuration.")
    server_id_length: int = key(Integer(1, 15), "Octets of a server ID.")
    nonce_length: int = key(Integer(4, 18), "Octets of a nonce; with the server ID at most 19, and 16 is fastest.")
    key_file: Path | None = key(FileName(), "File with the key, 32 hex digits. Without one CIDs are plaintext.", None)
    encodes_length: bool = key(Flag(), "Whether the first octet of its CIDs holds the CID's length.", True)
    appended_length: int = key(Integer(0, 14), "Octets that servers append for their own use.", 0)

    def cid_config(self, path: str, reading: Reading) -> Any:
        """The CidConfig that these keys describe; INVALID, and the mistakes noted, if there can be none."""
        cid_key = read_key_file(self.key_file, KEY_LENGTH, f"{path}.key-file", reading)
        lengths = (self.server_id_length, self.nonce_length, self.encodes_length, self.appended_length)
        if any(value is INVALID for value in lengths):
            return INVALID
        # A wrong config ID is noted already; the lengths may be wrong as well.
        config_id = ConfigId(0) if self.config_id is INVALID else self.config_id
        try:
            config = CidConfig(config_id, *lengths[:2], None, *lengths[2:])
        except ValueError as error:
            return reading.mistake(path, str(error))
        return INVALID if INVALID in (cid_key, self.config_id) else replace(config, key=cid_key)


def read_key_file(name: Path | None, length: int, path: str, reading: Reading, longest: int | None = None) -> Any:
    """The key in a file, if one is named; INVALID, and the mistake noted, if it cannot be used. It has `length` octets,
    or any number up to `longest`."""
    if name is None or name is INVALID:
        return None if name is None else INVALID
    try:
        return read_key(name, length, longest)
    except ValueError as error:
        return reading.mistake(path, str(error))


class Phase(StrEnum):
    """Where a CID configuration is in its life: balancers know it; servers issue it; they do so no more."""

    PREPARED = "prepared"
    ACTIVE = "active"
    RETIRING = "retiring"


@dataclass(frozen=True, slots=True, kw_only=True)
class CidConfigKeys(CidKeys):
    """One of `cid-configs`."""

    phase: Phase = key(
        Choice({str(p): p for p in Phase}),
        "Whether servers issue it not yet, now, or no more. Balancers decode it in any case.",
        Phase.ACTIVE,
    )

    encodes_length: bool = key(Flag(), "Whether the first octet of the servers' CIDs holds the CID's length.", False)
    reset_key_file: Path | None = key(
        FileName(),
        "File with the key of stateless resets, 64 hex digits, or what `resets.keys: shared` needs. "
        "Without one there are none.",
        None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendKeys:
    """One of `backends`."""

    name: str = key(Name(), "Its name in metrics and logs.")
    address: Address = key(UdpAddress(), "Where it receives; its family need not be its clients'.")
    server_ids: Mapping[ConfigId, tuple[ServerId, ...]] = key(
        MappingOf(6, "config ID", ListOf(ServerIdText(), 1, MAX_SERVER_IDS)),
        "The server IDs it may encode, by config ID.",
        {},
    )
    weight: int = key(Integer(0, 1000), "Its share of new connections, relative to the others; 0: none.", 1)
    drain: bool = key(Flag(), "Whether it keeps the connections it has and gets no new ones.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceKeys:
    """One of `services`."""

    name: str = key(Name(), "Its name in metrics and logs.")
    listen: tuple[Address, ...] = key(ListOf(UdpAddress(), 1, MAX_LISTENERS), "The addresses that clients send to.")
    cid_configs: tuple[CidConfigKeys, ...] = key(
        ListOf(Record(CidConfigKeys), 0, 7), "How servers encode their IDs, one entry per config ID.", ()
    )
    backends: tuple[BackendKeys, ...] = key(ListOf(Record(BackendKeys), 1, MAX_BACKENDS), "The servers behind it.")
    seed: str = key(
        Secret(), "Shuffles the choice of servers for new connections; the same on every balancer of a fleet.", ""
    )
    unknown_server: UnknownServer = key(
        Choice({"fallback": UnknownServer.FALLBACK, "drop": UnknownServer.DROP}),
        "What becomes of a CID whose server ID is nobody's.",
        UnknownServer.FALLBACK,
    )
    health: HealthConfig = key(Record(HealthConfig), "How backends are watched.", HealthConfig())
    resets: ResetConfig = key(Record(ResetConfig), "How clients of a dead server are told.", ResetConfig())
    rotation: RotationConfig = key(Record(RotationConfig), "When a CID configuration is out of use.", RotationConfig())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """One service: what to route, how to watch its backends, when to reset.

    `draining` names backends. `phases` and the files of keys are by config ID; not every one has files.
    """

    service: Service
    health: HealthConfig = field(default_factory=HealthConfig)
    resets: ResetConfig = field(default_factory=ResetConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    draining: frozenset[str] = frozenset()
    phases: Mapping[ConfigId, Phase] = field(default_factory=dict)
    key_files: Mapping[ConfigId, Path] = field(default_factory=dict)
    reset_key_files: Mapping[ConfigId, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LbConfig:
    """Everything a balancer is told. None for `runtime_directory` leaves the choice to the start."""

    engine: str = key(
        Choice({"udp": "udp", "xdp": "xdp"}),
        "What moves packets: sockets, or a program in the kernel on the way into one interface.",
        "udp",
        restart=True,
    )
    workers: int = key(
        Integer(1, 64), "Processes that share the listening addresses; `xdp` takes no more than one.", 1, restart=True
    )
    interface: str | None = key(
        InterfaceName(), "With `engine: xdp`: the interface that clients and backends are behind.", None, restart=True
    )
    forward: Forward = key(
        Choice({mode.name.lower(): mode for mode in Forward}),
        "With `engine: xdp`: how packets reach backends.",
        Forward.NAT,
        restart=True,
    )
    xdp: XdpConfig = key(Record(XdpConfig), "With `engine: xdp`: how it takes hold of the interface.", XdpConfig())
    runtime_directory: Path | None = key(
        FileName(),
        "Where return paths, the operator's changes and sockets are kept, so that a crash loses no flow. "
        "By default $RUNTIME_DIRECTORY or its like.",
        None,
        restart=True,
    )
    admin: AdminConfig = key(Record(AdminConfig), "Who may look and change something, and where.", AdminConfig())
    metrics: Address | None = key(
        UdpAddress(), "Where /metrics is served over HTTP (TCP) to anybody. By default nowhere.", None, restart=True
    )
    log: LogConfig = key(Record(LogConfig), "What is logged.", LogConfig())
    limits: Limits = key(Record(Limits), "What may be held.", Limits())
    services: tuple[ServiceConfig, ...] = key(ListOf(Record(ServiceKeys), 1, MAX_SERVICES), "What is balanced.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """A server's file."""

    name: str = key(Name(), "Its name in what it logs and answers.")
    cid_config: CidKeys | None = key(
        Record(CidKeys), "How it encodes its server ID. Without it, CIDs are unroutable ones.", None
    )
    server_id: ServerId | None = key(ServerIdText(), "Its server ID under this configuration.", None)
    reset_key_file: Path | None = key(
        FileName(), "File with the reset key of its server ID, 64 hex digits. Without one it sends no resets.", None
    )
    nonce_file: Path | None = key(
        FileName(), "File that says which nonces are used up, so that a restart repeats none.", None
    )
    made: str | None = key(
        Moment(), "When this file was made. A server that runs takes no file that is older than the one it has.", None
    )
