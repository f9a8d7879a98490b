"""ReturnPaths: what a killed process leaves behind, and what is made of a file that is not right."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lb.address import Address
from lb.returnpath import ReturnPath, ReturnPaths

V4, V6 = Address("192.0.2.1", 443), Address("2001:db8::1", 443)
PATHS = [
    ReturnPath(40000, V4, Address("198.51.100.7", 50000), Address("0.0.0.0", 443), 0, "192.0.2.9", bytes(17), True),
    ReturnPath(40001, V6, Address("198.51.100.7", 50001), V4, 0, None, None, False),
    ReturnPath(65535, V4, Address("fe80::1", 1), V6, 3, None, bytes(range(20)), True),
    ReturnPath(1, V6, Address("2001:db8::2", 65535), Address("::", 443), 0, "2001:db8::9", b"\xff", False),
]


def left_behind(path: Path, paths: list[ReturnPath], capacity: int = 10) -> None:
    """A process writes these and dies."""
    file = ReturnPaths(path, capacity)
    for number, return_path in enumerate(paths):
        file.write(number, return_path)
    file.commit()
    file.close()


def found(path: Path, capacity: int = 10) -> list[ReturnPath]:
    file = ReturnPaths(path, capacity)
    try:
        return list(file.remembered())
    finally:
        file.close()


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    left_behind(tmp_path / "flows.map", PATHS)

    assert found(tmp_path / "flows.map") == PATHS


def test_a_flow_that_ended_is_not_found_and_its_place_serves_another(tmp_path: Path) -> None:
    file = ReturnPaths(tmp_path / "flows.map", 3)
    for number in range(3):
        file.write(number, PATHS[number])
    file.clear(1)
    file.clear(2)
    file.write(2, PATHS[3])
    file.commit()
    file.close()

    assert found(tmp_path / "flows.map") == [PATHS[0], PATHS[3]]


def test_what_is_not_written_again_is_forgotten_with_the_commit_and_not_before(tmp_path: Path) -> None:
    left_behind(tmp_path / "flows.map", PATHS)
    dies_before_commit = ReturnPaths(tmp_path / "flows.map", 10)
    dies_before_commit.close()
    assert found(tmp_path / "flows.map") == PATHS
    left_behind(tmp_path / "flows.map", [])

    assert found(tmp_path / "flows.map") == []


def test_the_file_names_clients_and_so_is_nobody_elses_to_read(tmp_path: Path) -> None:
    left_behind(tmp_path / "new" / "flows.map", PATHS)

    assert stat.S_IMODE((tmp_path / "new" / "flows.map").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_half_written_record_is_left_out_the_others_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "flows.map"
    left_behind(path, PATHS)
    octets = bytearray(path.read_bytes())
    at = octets.index(bytes.fromhex("c0000209"))  # the first record's local address
    octets[at] ^= 1
    path.write_bytes(octets)

    assert found(path) == PATHS[1:]
    assert [r.message for r in caplog.records] == ["return-paths-damaged"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda octets: b"", "not a file of this version of quiclb"),
        (lambda octets: b"somebody's notes, long enough to be looked at" * 9, "not a file of this version of quiclb"),
        (lambda octets: octets.replace(b"return paths 1", b"return paths 2"), "not a file of this version of quiclb"),
        (lambda octets: octets[:30] + bytes(18) + octets[48:], "its header is damaged"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_ignored_kept_aside_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, reason: str
) -> None:
    path = tmp_path / "flows.map"
    left_behind(path, PATHS)
    foreign = damage(path.read_bytes())  # type: ignore[operator]
    path.write_bytes(foreign)
    caplog.set_level(logging.WARNING)

    assert found(path) == []
    assert [(r.message, r.__dict__["fields"]["reason"]) for r in caplog.records] == [("return-paths-ignored", reason)]
    assert path.with_suffix(".ignored").read_bytes() == foreign


def test_a_file_from_before_the_last_boot_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import struct
    import zlib

    path = tmp_path / "flows.map"
    left_behind(path, PATHS)
    octets = path.read_bytes()
    header = octets[:24] + bytes(16) + octets[40:44]
    path.write_bytes(header + struct.pack("=I", zlib.crc32(header)) + octets[48:])

    assert found(path) == []
    assert caplog.records[0].__dict__["fields"]["reason"] == "from before the last boot"


def test_two_processes_cannot_share_it(tmp_path: Path) -> None:
    file = ReturnPaths(tmp_path / "flows.map", 10)
    with pytest.raises(BlockingIOError):
        ReturnPaths(tmp_path / "flows.map", 10, patience=0)
    file.close()

    ReturnPaths(tmp_path / "flows.map", 10, patience=0).close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_not_a_file_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "flows.map"
    make(path)
    left_behind(path, PATHS)

    assert [r.message for r in caplog.records] == ["return-paths-ignored"]
    assert found(path) == PATHS


def test_what_cannot_be_put_in_place_is_said_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for in_the_way in (tmp_path / "flows.map" / "x", tmp_path / "flows.ignored" / "x"):
        in_the_way.mkdir(parents=True)
    left_behind(tmp_path / "flows.map", PATHS)

    assert [r.message for r in caplog.records] == ["return-paths-ignored", "return-paths-lost"]


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_somebody_else_could_have_written_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "there" / "flows.map"
    left_behind(path, PATHS)
    if os.geteuid() == 0:
        os.chown(path if what == "file" else path.parent, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)

    if what == "directory" or os.geteuid() == 4711:
        with pytest.raises(PermissionError, match="somebody else's"):
            ReturnPaths(path, 10)
    else:
        assert found(path) == []
        assert caplog.records[0].__dict__["fields"]["reason"] == "somebody else's"


def test_a_directory_that_cannot_be_made_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(OSError, match=r"exists|Not a directory"):
        ReturnPaths(tmp_path / "file" / "flows.map", 10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(octets=st.binary(max_size=400), keep_header=st.booleans())
def test_no_file_whatever_its_octets_raises(tmp_path: Path, octets: bytes, keep_header: bool) -> None:
    path = tmp_path / "flows.map"
    left_behind(path, PATHS)
    path.write_bytes((path.read_bytes()[:48] if keep_header else b"") + octets)

    assert found(path) == [] or keep_header
