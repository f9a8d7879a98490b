"""Taking the place on an interface, running there after the process, being taken over, and touching nobody else's."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.forward import Attach, Forward
from lb.xdp.attachment import BPF_FILE_SYSTEM, Attachment, in_bpf_file_system
from lb.xdp.interface import read_interface
from lb.xdp.libbpf import XDP_FLAGS_SKB_MODE, BpfError, Link, Object, Program, attached
from lb.xdp.netlink import Netlink
from lb.xdp.program import LoadedProgram, load_program
from tests import namespaces
from tests.namespaces import inside, ip
from tests.xdp import bpf

DECAP = Path(bpf.ROOT / "lb/xdp/decap.bpf.o")


@pytest.fixture
def index() -> Iterator[int]:
    """The index of eth0 in a namespace that this thread is in; there is another interface at its other end."""
    reason = namespaces.missing() or bpf.missing()
    if reason:
        pytest.skip(reason)
    with namespaces.namespaces("lb", "far") as (lb, far), inside(lb):
        ip(lb, f"link add eth0 type veth peer name eth0 netns {far}", "link set eth0 up")
        ip(far, "link set eth0 up")
        with Netlink() as netlink:
            yield read_interface("eth0", netlink).index


@pytest.fixture
def pins(index: int) -> Iterator[Path]:
    """A directory to pin in, which is not there yet."""
    directory = BPF_FILE_SYSTEM / f"quiclb-test-{os.getpid()}" / "pins"
    yield directory
    if directory.exists():
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()
    if directory.parent.exists():
        directory.parent.rmdir()


@contextlib.contextmanager
def loaded(forward: Forward = Forward.L2) -> Iterator[LoadedProgram]:
    program = load_program(bpf.settings(forward))
    try:
        yield program
    finally:
        program.close()


@contextlib.contextmanager
def place(index: int, pins: Path) -> Iterator[Attachment]:
    made = Attachment("eth0", index, pins)
    try:
        yield made
    finally:
        made.close()


def running(index: int) -> int:
    """The ID of the program on the interface; 0 if there is none."""
    found = attached(index)
    return found.native or found.generic


@contextlib.contextmanager
def somebody_elses() -> Iterator[Program]:
    with Object(DECAP) as compiled:
        compiled.load()
        with compiled.program("decap") as program:
            yield program


@pytest.mark.parametrize(
    ("how", "mode"),
    [(Attach.AUTO, Attach.NATIVE), (Attach.NATIVE, Attach.NATIVE), (Attach.GENERIC, Attach.GENERIC)],
)
def test_a_program_is_attached_where_it_can_be(index: int, pins: Path, how: Attach, mode: Attach) -> None:
    with loaded() as ours, place(index, pins) as taken:
        assert taken.predecessor is None
        taken.attach(ours.program, how)
        assert taken.mode is mode
        number = ours.program.info.id
        assert (attached(index).native, attached(index).generic) == ((number, 0) if mode == "native" else (0, number))


def test_a_program_outlives_its_process_and_is_taken_over(index: int, pins: Path) -> None:
    with loaded() as first:
        number = first.program.info.id
        with place(index, pins) as taken:
            taken.attach(first.program, Attach.GENERIC)
    assert running(index) == number

    with place(index, pins) as taken, loaded(Forward.GUE) as second:
        assert taken.predecessor is not None
        assert taken.predecessor.info.id == number
        assert taken.mode is Attach.GENERIC
        taken.attach(second.program, Attach.AUTO)
        assert running(index) == second.program.info.id
        assert taken.mode is Attach.GENERIC


@pytest.mark.parametrize(
    ("before", "after"), [(Attach.GENERIC, Attach.NATIVE), (Attach.NATIVE, Attach.GENERIC)], ids=str
)
def test_a_mode_that_is_asked_for_replaces_another(index: int, pins: Path, before: Attach, after: Attach) -> None:
    with loaded() as ours, place(index, pins) as taken:
        taken.attach(ours.program, before)
    with loaded() as ours, place(index, pins) as taken:
        taken.attach(ours.program, after)
        assert taken.mode is after
        number = running(index)
    assert running(index) == number


def test_a_detached_program_leaves_nothing_behind(index: int, pins: Path) -> None:
    with loaded() as ours, place(index, pins) as taken:
        taken.attach(ours.program, Attach.AUTO)
        taken.detach()
        assert running(index) == 0
        assert taken.mode is None
        assert not taken.pin.exists()
        taken.attach(ours.program, Attach.AUTO)
        assert running(index) == ours.program.info.id


def test_a_program_that_is_refused_leaves_the_machine_as_it_was(index: int, pins: Path) -> None:
    """Here by a device that has too little room for headers in its way in."""
    with loaded() as ours, place(index, pins) as taken:
        with pytest.raises(BpfError, match="cannot attach"):
            taken.attach(Program(os.dup(os.open("/dev/null", os.O_RDONLY))), Attach.AUTO)
        assert taken.refused is not None
        assert running(index) == 0
        assert not pins.parent.exists()

        taken.attach(ours.program, Attach.NATIVE)
        for how in (Attach.AUTO, Attach.GENERIC):
            with pytest.raises(BpfError):
                taken.attach(Program(os.dup(os.open("/dev/null", os.O_RDONLY))), how)
            assert (running(index), taken.mode) == (ours.program.info.id, Attach.NATIVE)
            assert taken.pin.exists()


def test_a_directory_that_can_hold_no_link_is_refused(index: int, tmp_path: Path) -> None:
    with (
        loaded() as ours,
        place(index, tmp_path / "pins") as taken,
        pytest.raises(OSError, match="is not in a BPF file system"),
    ):
        taken.attach(ours.program, Attach.AUTO)
    assert running(index) == 0
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_program_is_left_alone_and_named(index: int, pins: Path) -> None:
    with somebody_elses() as theirs, Link.create(theirs, index, XDP_FLAGS_SKB_MODE):
        number = theirs.info.id
        with pytest.raises(OSError, match=f"eth0 has another XDP program: decap, ID {number}") as refused:
            Attachment("eth0", index, pins)
        assert refused.value.errno == errno.EBUSY
        assert running(index) == number
    with place(index, pins) as taken:
        assert taken.predecessor is None


def test_somebody_elses_program_at_our_path_is_left_alone_and_named(index: int, pins: Path) -> None:
    with loaded() as ours, place(index, pins) as taken:
        taken.attach(ours.program, Attach.AUTO)
        pin = taken.pin
        taken.detach()
    with somebody_elses() as theirs, Link.create(theirs, index, XDP_FLAGS_SKB_MODE) as link:
        link.pin(pin)
        with pytest.raises(OSError, match=f"holds another XDP program: decap, ID {theirs.info.id}"):
            Attachment("eth0", index, pins)
        link.detach()


def test_only_one_process_has_the_place(index: int, pins: Path) -> None:
    with place(index, pins), pytest.raises(OSError, match="another quiclb runs on eth0"):
        Attachment("eth0", index, pins)
    script = (
        "from lb.xdp.attachment import Attachment, Path\n"
        f"taken = Attachment('eth0', {index}, Path({str(pins)!r}))\n"
        "print(flush=True)\n"
        "input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OSError, match="another quiclb runs on eth0"):
            Attachment("eth0", index, pins)
        other.kill()
    with place(index, pins):
        pass


def test_a_pin_of_an_interface_that_is_gone_is_replaced(index: int, pins: Path) -> None:
    with loaded() as ours, place(index, pins) as taken:
        taken.attach(ours.program, Attach.AUTO)
    subprocess.run([namespaces.IP, "link", "delete", "eth0"], check=True)
    subprocess.run([namespaces.IP, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"], check=True)
    with Netlink() as netlink:
        now = read_interface("eth0", netlink).index
    with loaded() as ours, place(now, pins) as taken:
        assert taken.predecessor is None
        taken.attach(ours.program, Attach.AUTO)
        assert running(now) == ours.program.info.id


def test_the_kind_of_a_file_system_is_known(tmp_path: Path) -> None:
    assert not in_bpf_file_system(tmp_path / "not" / "there")
    assert not in_bpf_file_system(Path("/proc/1"))
