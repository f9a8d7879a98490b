"""Rotation in files: what each step changes in one, what it leaves alone, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from lb import keygen
from lb.cid import ConfigId
from lb.cli import main
from lb.config import ServiceConfig, load_config
from lb.keyfile import read_key
from lb.keys import Phase
from lb.operations import Refused, RotationStep
from lb.rewrite import key_age, rotate
from lb.rotation import SlotView
from tests.files import CID_KEY, write_keys

BLOCK = """\
# A fleet.
runtime-directory: run
services:
  # the one that counts
  - name: web   # as in metrics
    listen: ["192.0.2.1:443"]
    cid-configs:
      # the first key
      - config-id: 0
        server-id-length: 4   # octets
        nonce-length: 12
        key-file: secrets/cid-0.key
        encodes-length: true
        reset-key-file: secrets/reset-0.key

    # ünser Rechenzentrum
    backends:
      - name: a             # the old one
        address: "10.0.0.1:443"
        server-ids:
          0: ["aaaaaaaa", "abababab"]

      - {name: b, address: "10.0.0.2:443", server-ids: {0: ['bbbbbbbb']}}   # the new one
    # the end
  - name: plain
    listen: ["192.0.2.2:443"]
    backends:
      - {name: x, address: "10.0.0.3:443"}
"""
FLOW = """\
services: [{name: web, listen: ["192.0.2.1:443"], cid-configs: [{config-id: 0, server-id-length: 4, nonce-length: 12,
  key-file: secrets/cid-0.key}], backends: [{name: a, address: "10.0.0.1:443", server-ids: {0: [aaaaaaaa]}},
  {name: b, address: "10.0.0.2:443", server-ids: {0: [bbbbbbbb]}}]}]
runtime-directory: run
"""
JSON = json.dumps(
    {
        "runtime-directory": "run",
        "services": [
            {
                "name": "web",
                "listen": ["192.0.2.1:443"],
                "cid-configs": [
                    {"config-id": 0, "server-id-length": 1, "nonce-length": 4, "key-file": "secrets/cid-0.key"}
                ],
                "backends": [{"name": "a", "address": "10.0.0.1:443", "server-ids": {"0": ["aa"]}}],
            }
        ],
    },
    indent=2,
)
SEEN = SlotView("retiring", 10, 2.0, 300.0, 298.0, False, "single-pass", 1.0)
QUIET = SlotView("retiring", 10, 400.0, 300.0, 0.0, True, "single-pass", 500.0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    return tmp_path


def written(directory: Path, text: str = BLOCK) -> Path:
    path = directory / "lb.yaml"
    path.write_bytes(text.encode())
    return path


def service(path: Path, name: str = "web") -> ServiceConfig:
    return next(section for section in load_config(path).services if section.service.name == name)


def quiclb(path: Path, *words: str, service: str = "web") -> int:
    """`quiclb rotation` on a file whose balancer does not run."""
    return main(["rotation", *words, "-c", str(path), "--service", service])


@pytest.mark.parametrize("text", [BLOCK, FLOW, JSON], ids=["block", "flow", "json"])
def test_all_the_way_round_every_config_id(directory: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(directory, text)
    first = service(path)
    used = []
    for active in range(9):
        old, new = ConfigId(active % 7), ConfigId((active + 1) % 7)
        assert quiclb(path, "prepare") == 0
        assert service(path).phases == {old: Phase.ACTIVE, new: Phase.PREPARED}
        assert quiclb(path, "activate", str(new)) == 0
        assert service(path).phases == {old: Phase.RETIRING, new: Phase.ACTIVE}
        assert quiclb(path, "retire", str(old), "--force") == 0
        now = service(path)
        (slot,) = now.service.cid_slots
        used.append((slot.config.key, slot.reset_key, [b.server_ids for b in now.service.backends]))
        assert slot.config.algorithm == first.service.cid_slots[0].config.algorithm
        assert slot.config.encodes_length == first.service.cid_slots[0].config.encodes_length
        assert (slot.reset_key is None) == (first.service.cid_slots[0].reset_key is None)
        assert [len(b.server_ids[new]) for b in now.service.backends] == [
            len(b.server_ids[ConfigId(0)]) for b in first.service.backends
        ]
    assert len({key for key, _, _ in used}) == 9
    if text == JSON:
        json.loads(path.read_text())
    digits = {key.hex() for key, _, _ in used if key}
    assert not any(each in capsys.readouterr().out for each in digits)


@pytest.mark.parametrize("before", ["\ufeff", ""], ids=["marked", "unmarked"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "dos"])
@pytest.mark.parametrize("end", [True, False], ids=["ended", "cut"])
def test_files_of_other_editors_stay_theirs(directory: Path, before: str, newline: str, end: bool) -> None:
    text = before + (BLOCK if end else BLOCK.rstrip("\n")).replace("\n", newline)
    path = written(directory, text)
    for name in ("web", "plain"):
        assert quiclb(path, "prepare", "6", service=name) == 0
        assert set(path.read_bytes().replace(newline.encode(), b"").decode()) & {"\n", "\r"} == set()
        assert quiclb(path, "retire", "6", "--force", service=name) == 0
        assert path.read_bytes().decode() == text


def test_everything_else_stays_as_it_was_written(directory: Path) -> None:
    path = written(directory)
    quiclb(path, "prepare", "3")
    prepared = service(path)
    entry = f"""\
      - config-id: 3
        server-id-length: 4
        nonce-length: 12
        key-file: {prepared.key_files[ConfigId(3)].relative_to(directory)}
        reset-key-file: {prepared.reset_key_files[ConfigId(3)].relative_to(directory)}
        encodes-length: true
        phase: prepared
"""
    ids = [json.dumps(_ids_in_order(path, name)) for name in ("a", "b")]
    expected = (
        BLOCK.replace("secrets/reset-0.key\n", f"secrets/reset-0.key\n{entry}")
        .replace('"abababab"]\n', f'"abababab"]\n          3: {ids[0]}\n')
        .replace("['bbbbbbbb']}", f"['bbbbbbbb'], 3: {ids[1]}}}")
    )
    assert path.read_text() == expected
    quiclb(path, "activate", "3")
    expected = expected.replace("config-id: 0\n", "config-id: 0\n        phase: retiring\n")
    assert path.read_text() == expected.replace("phase: prepared", "phase: active")
    quiclb(path, "activate", "0")
    quiclb(path, "retire", "3", "--force")
    assert path.read_text() == BLOCK.replace("config-id: 0\n", "config-id: 0\n        phase: active\n")


def _ids_in_order(path: Path, backend: str) -> list[str]:
    from lb.document import Document

    services = Document(path).root["services"]  # type: ignore[index,call-overload]
    found = next(b for b in services[0]["backends"] if b["name"].text == backend)  # type: ignore[index,call-overload,union-attr]
    return [scalar.text for scalar in found["server-ids"]["3"]]  # type: ignore[index,call-overload,union-attr]


def test_a_service_without_a_configuration_gets_its_first(directory: Path) -> None:
    path = written(directory)
    assert quiclb(path, "prepare", service="plain") == 0
    found = service(path, "plain")
    (slot,) = found.service.cid_slots
    assert (slot.config.config_id, slot.config.server_id_length, slot.config.nonce_length) == (0, 4, 12)
    assert (slot.config.algorithm, slot.reset_key is not None) == ("single-pass", True)
    assert found.phases == {0: Phase.PREPARED}
    assert quiclb(path, "retire", "0", "--force", service="plain") == 0
    assert path.read_text() == BLOCK


@pytest.mark.parametrize("empty", ["cid-configs: [], ", ""])
def test_an_empty_list_of_configurations_is_as_good_as_none(directory: Path, empty: str) -> None:
    text = (
        f'services: [{{name: web, listen: ["192.0.2.1:443"], {empty}'
        'backends: [{name: a, address: "10.0.0.1:443", server-ids: {}}]}]\nruntime-directory: run\n'
    )
    path = written(directory, text)
    assert quiclb(path, "prepare") == 0
    assert len(service(path).service.cid_slots) == 1


def test_lengths_and_plaintext_can_be_asked_for(directory: Path) -> None:
    path = written(directory)
    assert quiclb(path, "prepare", "5", "--server-id-length", "3", "--nonce-length", "5", "--plaintext") == 0
    config = next(s.config for s in service(path).service.cid_slots if s.config.config_id == 5)
    assert (config.server_id_length, config.nonce_length, config.algorithm) == (3, 5, "plaintext")
    assert 5 not in service(path).key_files


def test_new_key_files_are_for_those_who_may_read_the_old_ones(directory: Path) -> None:
    path = written(directory)
    (directory / "secrets" / "cid-0.key").chmod(0o640)
    path.chmod(0o664)
    quiclb(path, "prepare")
    found = service(path)
    new = [found.key_files[ConfigId(1)], found.reset_key_files[ConfigId(1)]]
    assert [stat.S_IMODE(each.stat().st_mode) for each in new] == [0o640, 0o600]
    assert {each.parent for each in new} == {directory / "secrets"}
    assert [len(read_key(each, length)) for each, length in zip(new, (16, 32), strict=True)] == [16, 32]
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert (age := key_age(new[0])) is not None
    assert 0 <= age < 60
    assert key_age(directory / "none") is None


def test_key_files_of_a_configuration_that_is_gone_are_left_and_named(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(directory)
    quiclb(path, "prepare")
    quiclb(path, "activate", "1")
    capsys.readouterr()
    assert quiclb(path, "retire", "0", "--force") == 0
    out = capsys.readouterr().out
    for name in ("cid-0.key", "reset-0.key"):
        assert f"no longer used: {directory / 'secrets' / name}" in out
        assert (directory / "secrets" / name).exists()


REFUSED: Mapping[str, tuple[list[list[str]], list[str], str]] = {
    "a config ID that is not free": ([], ["prepare", "0"], "config ID 0 is active: expected a free one"),
    "prepared twice": ([["prepare", "4"]], ["prepare", "4"], "config ID 4 is prepared: expected a free one"),
    "all in use": ([["prepare"]] * 6, ["prepare"], "no config ID is free: retire one first"),
    "too long": ([], ["prepare", "--nonce-length", "18"], "server ID and nonce take 22 octets together"),
    "activating nothing": ([], ["activate", "2"], "config ID 2 is free: prepare it first"),
    "activating twice": ([], ["activate", "0"], "config ID 0 is active already"),
    "retiring what servers issue": ([], ["retire", "0"], "config ID 0 is active: servers issue it"),
    "even by force": ([], ["retire", "0", "--force"], "config ID 0 is active: servers issue it"),
    "retiring nothing": ([], ["retire", "2"], "config ID 2 is free already"),
    "retiring unasked": (
        [["prepare", "1"], ["activate", "1"]],
        ["retire", "0"],
        "config ID 0: no balancer could be asked whether packets still come with it",
    ),
}


@pytest.mark.parametrize(("before", "words", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_an_unsafe_order_is_refused_and_changes_nothing(
    directory: Path, capsys: pytest.CaptureFixture[str], before: list[list[str]], words: list[str], reason: str
) -> None:
    path = written(directory)
    for step in before:
        assert quiclb(path, *step) == 0
    text, keys = path.read_text(), sorted(os.listdir(directory / "secrets"))
    capsys.readouterr()
    assert quiclb(path, *words) != 0
    assert reason in capsys.readouterr().err
    assert (path.read_text(), sorted(os.listdir(directory / "secrets"))) == (text, keys)
    assert not list(directory.glob(".*"))


def retiring(directory: Path) -> Path:
    path = written(directory)
    rotate(path, "web", RotationStep(do="prepare", config_id=1), None)
    rotate(path, "web", RotationStep(do="activate", config_id=1), None)
    return path


def test_a_config_id_that_packets_come_with_is_not_freed_unless_by_force(directory: Path) -> None:
    path = retiring(directory)
    with pytest.raises(
        Refused,
        match="config ID 0 is in use: expected no packets for 300s, and the latest one came 2s ago; free in 298s",
    ):
        rotate(path, "web", RotationStep(do="retire", config_id=0), {ConfigId(0): SEEN})
    rotate(path, "web", RotationStep(do="retire", config_id=0, force=True), {ConfigId(0): SEEN})
    assert service(path).phases == {1: Phase.ACTIVE}


def test_a_config_id_that_is_quiet_is_freed(directory: Path) -> None:
    path = retiring(directory)
    rotate(path, "web", RotationStep(do="retire", config_id=0), {ConfigId(0): QUIET})
    assert service(path).phases == {1: Phase.ACTIVE}


def test_a_config_id_that_was_freed_by_force_rests_for_the_guard_time(directory: Path) -> None:
    path = written(directory)
    views = {ConfigId(1): SEEN._replace(phase="free")}
    with pytest.raises(Refused, match=r"config ID 1 was freed while it was in use: it takes another .* in 298s"):
        rotate(path, "web", RotationStep(do="prepare", config_id=1), views)
    rotate(path, "web", RotationStep(do="prepare"), views)
    assert set(service(path).phases) == {0, 2}  # the next best
    rotate(path, "web", RotationStep(do="prepare", config_id=1, force=True), views)


def test_what_the_balancer_does_not_decode_yet_is_not_activated(directory: Path) -> None:
    path = written(directory)
    rotate(path, "web", RotationStep(do="prepare", config_id=1), None)
    with pytest.raises(Refused, match="the balancer does not decode it: reload it first"):
        rotate(path, "web", RotationStep(do="activate", config_id=1), {ConfigId(1): QUIET._replace(phase="free")})


def test_plaintext_and_encrypted_configurations_share_no_server_ids(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither those that are made here, as long as there are others, nor those that somebody writes."""
    path = written(directory, JSON)
    one = {f"{i:02x}" for i in range(256)} - {"aa"}
    for _ in range(4):  # of one octet: chance alone would not do
        assert quiclb(path, "prepare", "--plaintext") == 0
    all_but = sorted(one - {"7f"})
    path.write_text(JSON.replace('"aa"', ", ".join(f'"{each}"' for each in ["aa", *all_but])))
    assert quiclb(path, "prepare", "--plaintext") != 0
    assert "there are not 255 that no encrypted configuration has" in capsys.readouterr().err

    path.write_text(JSON)
    quiclb(path, "prepare", "1", "--plaintext")
    ids = next(iter(service(path).service.backends[0].server_ids[ConfigId(1)])).hex()
    path.write_text(path.read_text().replace(f'"{ids}"', '"aa"'))
    capsys.readouterr()
    assert quiclb(path, "activate", "1") == 2
    assert "has it in an encrypted configuration: expected another ID" in capsys.readouterr().err


def test_a_file_with_mistakes_is_left_alone(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(directory, BLOCK.replace("nonce-length: 12", "nonce-length: 3"))
    assert quiclb(path, "prepare") == 2
    assert "nonce-length" in capsys.readouterr().err
    assert len(os.listdir(directory / "secrets")) == 4


def test_an_unknown_service_is_told_the_known_ones(directory: Path) -> None:
    with pytest.raises(Refused, match="wbe: expected a service: web, plain"):
        rotate(written(directory), "wbe", RotationStep(do="prepare"), None)


def test_comments_behind_dashes_do_no_harm(directory: Path) -> None:
    odd = BLOCK.replace("      - config-id: 0\n", "      - # well-known\n        config-id: 0\n")
    path = written(directory, odd)
    for step in (("prepare", "1"), ("activate", "1"), ("retire", "0", "--force")):
        assert quiclb(path, *step) == 0
    assert service(path).phases == {1: Phase.ACTIVE}
    assert "# the first key\n      - config-id: 1\n" in path.read_text()


def test_a_layout_that_cannot_be_changed_safely_is_not_changed(directory: Path) -> None:
    odd = BLOCK.replace('          0: ["aaaaaaaa"', '          ? 0\n          : ["aaaaaaaa"')
    path = written(directory, odd)
    with pytest.raises(Refused, match="written in a way that this cannot change: change it by hand"):
        rotate(path, "web", RotationStep(do="prepare", config_id=1), None)
    assert path.read_text() == odd
    assert len(os.listdir(directory / "secrets")) == 4


def test_a_symbolic_link_is_not_replaced(directory: Path) -> None:
    link = directory / "link.yaml"
    link.symlink_to(written(directory))
    with pytest.raises(Refused, match="a symbolic link"):
        rotate(link, "web", RotationStep(do="prepare"), None)


def test_of_two_steps_at_once_one_is_refused(directory: Path) -> None:
    path = written(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="somebody else takes a step just now: try again"):
        rotate(path, "web", RotationStep(do="prepare"), None)
    os.close(descriptor)
    assert rotate(path, "web", RotationStep(do="prepare"), None)[0].startswith("config ID 1 is prepared")


def test_an_edit_that_comes_in_between_is_not_lost(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(directory)
    edited = BLOCK.replace("10.0.0.2:443", "10.0.0.9:443")

    def edit_and_make() -> str:
        path.write_text(edited)
        return CID_KEY

    monkeypatch.setattr(keygen, "cid_key", edit_and_make)
    with pytest.raises(Refused, match="somebody else has changed it meanwhile"):
        rotate(path, "web", RotationStep(do="prepare"), None)
    assert path.read_text() == edited
    assert len(os.listdir(directory / "secrets")) == 4
