"""The benchmarks build, run and report. How fast anything is is not for a test to say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import dataplane, decision, load, machine, memory, network, report
from bench.balancers import Nginx, Quiclb
from bench.dataplane import Cell, Plan, busy, paced
from bench.load import Result
from bench.machine import Clocks
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


def test_unknown_part_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["decisions"]) == 2
    assert capsys.readouterr().err == "bench: no part decisions: expected decision, dataplane, memory\n"


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


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
