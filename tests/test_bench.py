"""The benchmarks build, run and report. How fast anything is is not for a test to say."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import backend, dataplane, decision, load, machine, memory, network, report, restart
from bench.balancers import Nginx, Quiclb
from bench.dataplane import Cell, Plan, busy, paced
from bench.load import Result
from bench.machine import Clocks
from bench.xdp import compiler, frames, nanoseconds, paths, picture, prototype, throughput, updates
from bench.xdp import part as xdp
from bench.xdp import report as xdp_report
from bench.xdp.nanoseconds import Cost, Sample
from bench.xdp.updates import Update
from lb.cid import CidConfig, Codec, ConfigId
from lb.config import load_config

CONFIG = CidConfig(ConfigId(2), 4, 12, key=bytes(16))

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


@needs_gcc
def test_generator_compiles_without_a_warning_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    program = load.build(tmp_path)
    for arguments in ([], ["--load", "nonsense"], ["--flows", "0"]):
        refused = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "bad arguments" in refused.stderr


def test_every_flow_has_a_cid_of_its_own_backend(tmp_path: Path) -> None:
    flows = 3 * network.BACKENDS + 1
    load.write_cids(tmp_path / "cids", CONFIG, flows)
    octets = (tmp_path / "cids").read_bytes()
    cids = [octets[i : i + CONFIG.cid_length] for i in range(0, len(octets), CONFIG.cid_length)]

    assert len(set(cids)) == len(cids) == flows
    codec = Codec(CONFIG)
    for flow, cid in enumerate(cids):
        decoded = codec.decode(cid)
        assert decoded is not None
        assert decoded.server_id == load.server_id(flow % network.BACKENDS, CONFIG)


def test_decisions_are_the_expected_ones_and_take_time() -> None:
    """`measure` itself asserts the verdict of every case."""
    costs = decision.measure(rounds=1, calls=300)

    assert [cost.case for cost in costs] == [
        "plaintext, 4 + 12",
        "single-pass, 4 + 12",
        "four-pass, 3 passes, 4 + 8",
        "four-pass, 4 passes, 8 + 6",
        "unroutable, (4-tuple, SCID) table",
        "unroutable, DCID table",
        "unroutable, 4-tuple table",
        "unroutable, fallback, recorded",
    ]
    assert all(cost.route > 0 for cost in costs)
    assert [cost.by_cid is not None for cost in costs] == [True] * 4 + [False] * 4


def test_quiclb_gets_a_configuration_that_it_understands(tmp_path: Path) -> None:
    server_ids = [load.server_id(i, CONFIG).hex() for i in range(network.BACKENDS)]
    started = Quiclb(CONFIG, server_ids, program=["quiclb"]).command(tmp_path)

    assert started == ["quiclb", "run", "-c", str(tmp_path / "quiclb.yaml")]
    (configured,) = load_config(tmp_path / "quiclb.yaml").services
    (slot,) = configured.service.cid_slots
    assert (slot.config.config_id, slot.config.algorithm, slot.config.cid_length) == (2, "single-pass", 17)
    assert len(configured.service.backends) == network.BACKENDS


def test_key_is_in_a_file_that_only_its_owner_reads_and_not_in_the_configuration(tmp_path: Path) -> None:
    Quiclb(CONFIG, [], program=["quiclb"]).command(tmp_path)

    assert (tmp_path / "cid.key").stat().st_mode & 0o777 == 0o600
    assert bytes(16).hex() not in (tmp_path / "quiclb.yaml").read_text()


def test_nginx_differs_in_multi_accept_only(tmp_path: Path) -> None:
    texts = []
    for multi_accept in (False, True):
        nginx = Nginx(Path("/nginx"), Path("/modules"), multi_accept)
        nginx.command(tmp_path)
        texts.append((tmp_path / "nginx.conf").read_text().splitlines())

    differing = [pair for pair in zip(*texts, strict=True) if pair[0] != pair[1]]
    assert differing == [("    multi_accept off;", "    multi_accept on;")]


def result(microseconds: float, **counts: int) -> Result:
    """A run of a million packets at so much CPU time each, on a core of its own."""
    plain = {"sent": 1_000_000, "delivered": 1_000_000, "misrouted": 0, "moved": 0, "alien": 0, "refused": 0}
    used = Clocks(core=microseconds, balancer=microseconds)
    return Result(**(plain | {"overrun": 0, "flows": 256, "answered": 0} | counts), seconds=1.0, clocks=used)


@pytest.mark.parametrize(
    ("kind", "ratio", "verdict"),
    [
        ("single", 0.95, "target, single datagrams at least 0.95: 0.95, reached"),
        ("single", 0.9, "target, single datagrams at least 0.95: 0.90, NOT reached"),
        ("train", 4.5, "target, GRO trains of 8 at least 4: 4.50, reached"),
        ("download", 3.9, "target, downloads, trains of 8 at least 4: 3.90, NOT reached"),
    ],
)
def test_report_says_plainly_whether_a_target_was_reached(kind: str, ratio: float, verdict: str) -> None:
    offer = busy(64)
    cell = Cell(offer, kind, "quiclb udp", [result(1.0)], [ratio])
    section = report.dataplane_section([cell], offer, Plan((offer,)))

    assert verdict in section.remarks
    assert not section.wrong  # slow is not wrong
    assert not [remark for remark in section.remarks if "NOISE" in remark]


def test_a_misrouted_packet_of_ours_is_wrong_and_one_of_nginx_is_what_it_does() -> None:
    offer = paced(1000)
    ours = Cell(offer, "single", "quiclb udp", [result(1.0, misrouted=1)], [])
    theirs = Cell(offer, "single", "nginx, default", [result(1.0, misrouted=900_000)], [])

    assert report.dataplane_section([ours], offer, Plan((offer,))).wrong
    assert not report.dataplane_section([theirs], offer, Plan((offer,))).wrong


def test_a_core_that_others_used_makes_the_figures_noise() -> None:
    offer = busy(64)
    shared = result(1.0)._replace(clocks=Clocks(core=2.0, balancer=1.0))
    section = report.dataplane_section([Cell(offer, "single", "quiclb udp", [shared], [])], offer, Plan((offer,)))

    assert [remark[:16] for remark in section.remarks if "NOISE" in remark] == ["NOISE: up to 50%"]


def test_tables_as_text_and_as_markdown() -> None:
    section = report.Section("Title", ("a", "long"), [("wide cell", "1"), ("x", "22")], ("A remark.",))

    assert report.as_text(section).splitlines() == [
        "Title",
        "=====",
        "",
        "a          long",
        "---------  ----",
        "wide cell  1",
        "x          22",
        "",
        "A remark.",
    ]
    assert report.as_markdown(section).splitlines() == [
        "### Title",
        "",
        "| a | long |",
        "| --- | --- |",
        "| wide cell | 1 |",
        "| x | 22 |",
        "",
        "A remark.",
    ]


needs_compiler = pytest.mark.skipif(not compiler.is_there(), reason="there is neither clang nor ziglang")


def test_every_flow_of_the_xdp_part_has_a_frame_of_its_own_and_a_cid_of_its_backend() -> None:
    for config in frames.CONFIGS:
        sent = [frames.frame(flow, frames.short(config, flow, 60)) for flow in range(frames.BACKENDS + 9)]
        cids = [frame[43 : 43 + config.cid_length] for frame in sent]
        decoded = [Codec(config).decode(cid) for cid in cids]

        assert len({frame[26:38] for frame in sent}) == len(set(cids)) == len(sent)
        assert [found.server_id for found in decoded if found] == [
            frames.server_id(flow % frames.BACKENDS, config) for flow in range(len(sent))
        ]


@pytest.mark.parametrize(("is_ipv6", "vlan", "payload_at"), [(False, False, 42), (True, False, 62), (False, True, 46)])
def test_headers_of_frames_are_right(is_ipv6: bool, vlan: bool, payload_at: int) -> None:
    frame = frames.frame(7, b"payload!", is_ipv6=is_ipv6, vlan=vlan)
    ip = frame[18 if vlan else 14 :]

    assert frame[payload_at:] == b"payload!"
    assert int.from_bytes(frame[payload_at - 4 : payload_at - 2]) == 8 + 8
    if is_ipv6:
        assert int.from_bytes(ip[4:6]) == len(ip) - 40
    else:
        assert int.from_bytes(ip[2:4]) == len(ip)
        assert sum(int.from_bytes(ip[at : at + 2]) for at in range(0, 20, 2)) % 0xFFFF == 0


@needs_compiler
def test_harness_compiles_without_a_warning(tmp_path: Path) -> None:
    assert compiler.harness(tmp_path).read_bytes()[:4] == b"\x7fELF"


@needs_compiler
def test_a_source_that_is_wrong_is_told_in_the_compilers_words(tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text("int nonsense(void) { return undeclared; }")
    with pytest.raises(compiler.CompilerError, match=r"wrong\.c: .*undeclared"):
        compiler.compile_bpf(tmp_path / "wrong.c", tmp_path / "wrong.o")


def test_a_folder_without_the_prototype_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "sr.bpf.c").touch()
    with pytest.raises(compiler.CompilerError, match=r"has no lb\.bpf\.c, gen_tables\.py$"):
        prototype.Prototype(tmp_path, tmp_path)


def cost(path: str, ours: float, theirs: float | None = None, *, is_promised: bool = True) -> Cost:
    """Figures of one load, above a floor of 10 ns."""
    other = [Sample(theirs + 10, 10, 9)] if theirs is not None else []
    return Cost(path, "group", is_promised, [Sample(ours + 10, 10, 9)], other)


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        ([cost("a", 115, 100), cost("b", 20, 40)], "2 of 2, the worst is a at 1.15, reached"),
        ([cost("a", 115, 100), cost("b", 47, 40)], "1 of 2, the worst is b at 1.18, NOT reached"),
        ([cost("a", 115, 100), cost("b", 80, 40, is_promised=False)], "1 of 1, the worst is a at 1.15, reached"),
        ([cost("a", 115)], "not measured, there is no prototype"),
    ],
)
def test_report_says_plainly_whether_the_prototype_was_matched(costs: list[Cost], verdict: str) -> None:
    section = xdp_report.paths_section(costs, loads=1, packets=1000)

    assert f"target, no path dearer than 1.15 times the prototype's: {verdict}" in section.remarks
    assert not section.wrong  # slow is not wrong


@pytest.mark.parametrize(
    ("nanoseconds", "verdict"),
    [(1000, "1,000,000, reached"), (1001, "999,001, NOT reached")],
)
def test_report_says_plainly_whether_resets_are_fast_enough(nanoseconds: float, verdict: str) -> None:
    section = xdp_report.paths_section([cost(paths.RESET, nanoseconds)], loads=1, packets=1000)

    assert f"target, 1,000,000 stateless resets per second and core: {verdict}" in section.remarks


def test_report_says_plainly_whether_changes_are_fast_enough() -> None:
    section = xdp_report.updates_section([Update(updates.WHOLE, [0.3, 0.099, 0.09]), Update(updates.DOWN, [0.005])])

    assert section.remarks[1:] == [
        "target, 4096 backends and 65536 server IDs, where nothing was in less than 100 ms: 99.0 ms, reached",
        "target, one backend goes DOWN in less than 5 ms: 5.0 ms, NOT reached",
    ]


def test_floors_that_differ_make_the_figures_noise() -> None:
    disturbed = cost("b", 50)._replace(ours=[Sample(70, 20, 19)])
    for quiet, noise in ((9, []), (8, ["NOISE: the program that only transmits was slower by half in 1 of 9 loads"])):
        section = xdp_report.paths_section([cost("a", 50)] * quiet + [disturbed], loads=1, packets=1000)

        assert [remark.partition(": others")[0] for remark in section.remarks if "NOISE" in remark] == noise


def svg(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 # it is our own


def test_picture_has_a_bar_for_every_figure_and_says_which() -> None:
    drawn = svg(xdp_report.chart([cost("plain & simple", 50, 40), cost("only ours", 100)]))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    widths = sorted(float(r.get("width", "")) for r in drawn.iter() if r.tag.endswith("rect"))

    assert {"group", "plain & simple", "only ours", "50", "40", "100", "quiclb", "prototype"} <= set(texts)
    paper, longest = widths[-1], widths[-2]
    assert widths == pytest.approx([10, 10, 0.4 * longest, 0.5 * longest, longest, paper], abs=0.1)


@pytest.mark.parametrize(("highest", "last"), [(1, 1), (7, 7), (8, 8), (9, 10), (99, 100), (641, 700), (1130, 1200)])
def test_axis_of_the_picture_is_as_long_as_it_must_be(highest: float, last: int) -> None:
    drawn = svg(picture.bars("title", "unit", ("a",), [("group", [picture.Row("row", [highest])])]))
    ticks = [e.text for e in drawn.iter() if e.tag.endswith("text") and e.get("text-anchor") == "middle"]

    assert (ticks[0], ticks[-1]) == ("0", str(last))
    assert len(ticks) <= 9


def test_the_backend_part_measures_both_servers_and_says_what_was_reached(tmp_path: Path) -> None:
    said: list[str] = []
    plan = backend.Plan(rounds=1, connections=5, handshakes=3, octets=50_000, cids=500)
    found = backend.measure(plan, tmp_path, said.append)
    assert said == ["backend: round 1 of 1"]
    assert [each.repeated for each in found.generated] == [0] * len(backend.CONFIGS)
    assert all(figure > 0 for turn in (*found.stock, *found.reference) for figure in turn)
    section = backend.section(found)
    assert (section.wrong, len(section.rows)) == (False, len(backend.CONFIGS) + 6)
    assert sum(remark.startswith("target, ") for remark in section.remarks) == 4

    twice = found.generated[0]._replace(repeated=1)
    assert backend.section(dataclasses.replace(found, generated=[twice])).wrong


def test_unknown_part_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["decisions"]) == 2
    assert (
        capsys.readouterr().err
        == "bench: no part decisions: expected decision, dataplane, memory, xdp, restart, backend\n"
    )


@pytest.mark.skipif(machine.obstacle() is not None, reason=str(machine.obstacle()))
class TestInNamespaces:
    """A short run of each load: every packet reaches the server in its CID, and nothing stays behind."""

    def test_no_load_is_misrouted(self, tmp_path: Path) -> None:
        plan = Plan((busy(64),), rounds=1, seconds=0.2)
        cells = dataplane.measure(plan, None, None, tmp_path, print)

        assert [cell.load for cell in cells] == list(dataplane.TITLES)
        assert {cell.load: cell.misrouted for cell in cells} == dict.fromkeys(dataplane.TITLES, 0)
        assert all(cell.results[0].delivered for cell in cells)
        assert not any(name in namespaces() for name in (network.Network().load, network.Network().balancer))

    def test_every_flow_of_a_set_up_is_answered(self, tmp_path: Path) -> None:
        (footprint,) = memory.measure(None, tmp_path, print, flow_counts=[600])

        assert (footprint.result.flows, footprint.lost_flows, footprint.complete) == (600, 0, True)
        assert footprint.after["total"] > 0


@pytest.mark.skipif(bool(machine.obstacle() or xdp.obstacle()), reason=str(machine.obstacle() or xdp.obstacle()))
class TestInTheKernel:
    """Every path once, few packets: `measure` asserts that each packet took the path that it was to take."""

    @pytest.mark.parametrize("path", paths.PATHS, ids=lambda path: path.name)
    def test_packets_take_their_path(self, path: paths.Path, tmp_path: Path) -> None:
        (cost,) = nanoseconds.measure(
            compiler.harness(tmp_path), None, print, loads=1, packets=2 * paths.MAX_FLOWS, paths=[path]
        )

        assert (cost.path, len(cost.ours), cost.ratio) == (path.name, 1, None)
        assert cost.ours[0].nanoseconds > 0

    def test_frames_arrive_at_the_far_end_of_a_veth_pair(self, tmp_path: Path) -> None:
        floods = throughput.measure(compiler.harness(tmp_path), print, rounds=1, packets=20_000)

        assert [flood.forwarder for flood in floods] == [throughput.NULL, *throughput.NAMES]
        assert all(flood.mpps > 0 for flood in floods)

    def test_changes_are_timed(self, tmp_path: Path) -> None:
        measured = updates.measure(tmp_path, print, rounds=1)

        assert [update.change for update in measured] == list(updates.TARGETS)
        assert all(update.seconds > 0 for update in measured)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_restart_report_says_what_was_lost_and_what_was_noise() -> None:
    _, reload, upgrade, kill = restart.EVENTS
    good, bad = restart.Run(1000, 0, 0, 0, 1.5, 0.7), restart.Run(1000, 2, 1, 0, 99.0)
    section = restart.section(
        [
            restart.Restart("udp", event, runs)
            for event, runs in ((reload, [good]), (upgrade, [good, bad]), (kill, [bad]))
        ],
        5000,
    )

    assert [row[1:4] for row in section.rows] == [
        ("reload, 5 times", "1000", "0"),
        ("upgrade (take-over)", "2000", "3"),
        ("kill -9, and start", "1000", "3"),
    ]
    assert "target, udp, reload, 5 times: lost 0, reached" in section.remarks
    assert "target, udp, upgrade (take-over): lost 3, NOT reached" in section.remarks
    assert not section.wrong
    assert not [remark for remark in section.remarks if "NOISE" in remark]
    twice = restart.section([restart.Restart("udp", restart.EVENTS[0], [bad._replace(twice=1)])], 5000)
    assert twice.wrong
    assert [remark[:10] for remark in twice.remarks if "NOISE" in remark] == ["NOISE: udp"]


@pytest.mark.skipif(machine.obstacle() is not None, reason=machine.obstacle() or "")
def test_no_datagram_is_lost_or_doubled_while_one_process_takes_over_from_another(tmp_path: Path) -> None:
    """At a rate that any machine gives."""
    (found,) = restart.measure(["udp"], 1000, 1, None, tmp_path, print, [restart.EVENTS[2]])

    (run,) = found.runs
    assert run.sent > 1000
    assert (run.lost, run.twice) == (0, 0)
    assert run.pause is not None
