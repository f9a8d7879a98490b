"""Our place on an interface: the link that holds the program there, and the file that holds the link.

The link is pinned, so that packets keep flowing while no process of ours is there; whoever comes next takes it over
and swaps the program between two packets. While a process has the place, no other one gets it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lb.forward import Attach
from lb.xdp.abi import mount_bpf, unmount
from lb.xdp.libbpf import XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE, BpfError, Link, Program, attached
from lb.xdp.program import PROGRAM

BPF_FILE_SYSTEM = Path("/sys/fs/bpf")

_FLAGS = {Attach.NATIVE: XDP_FLAGS_DRV_MODE, Attach.GENERIC: XDP_FLAGS_SKB_MODE}


class Attachment:
    """The place on one interface, which is in the network namespace of the calling thread, for programs of one name.

    `predecessor` is the program that was there when the place was taken, if that was ours; `mode` is how the present
    one is attached, None as long as there is none. `refused` says why it is not native, if somebody tried.
    """

    def __init__(self, interface: str, index: int, directory: Path, name: str = PROGRAM) -> None:
        """Take the place. Raises OSError if another process or somebody else's program has it."""
        self.pin = directory / interface
        self.predecessor: Program | None = None
        self.mode: Attach | None = None
        self.refused: BpfError | None = None
        self._interface = interface
        self._index = index
        self._name = name
        self._link: Link | None = None
        self._is_stale = False
        with contextlib.ExitStack() as undo:
            self._lock = undo.enter_context(_lock(interface, index))
            undo.callback(self._let_go)
            self._find_predecessor()
            undo.pop_all()

    def attach(self, program: Program, how: Attach) -> None:
        """Let the program run instead of what runs there now. Raises OSError, with nothing changed."""
        if self._link is None:
            self._create(program, how)
        elif how in (Attach.AUTO, self.mode):
            self._link.update(program)
        else:
            self._change_mode(program, how)

    def detach(self) -> None:
        """Take the program off the interface, and forget that it was there."""
        if self._link is not None:
            self._link.detach()
            self.pin.unlink(missing_ok=True)
            self._link.close()
            self._link = self.mode = None

    def close(self) -> None:
        """Leave the place to a successor. The program stays."""
        self._let_go()
        self._lock.close()

    def _let_go(self) -> None:
        for one in (self._link, self.predecessor):
            if one is not None:
                one.close()
        self._link = self.predecessor = None

    def _find_predecessor(self) -> None:
        there = attached(self._index)
        running = there.native or there.generic or there.offloaded
        with contextlib.suppress(FileNotFoundError):
            self._link = Link.open_pinned(self.pin)
        info = self._link.info if self._link is not None else None
        if info is not None and info.program_id == running:
            self.predecessor = Program.from_id(running)
            name = self.predecessor.info.name
            if name != self._name:
                raise OSError(errno.EBUSY, f"{self.pin} holds another XDP program: {name}, ID {running}")
            self.mode = Attach.NATIVE if there.native else Attach.GENERIC
            return
        if running:
            with Program.from_id(running) as program:
                who = f"{program.info.name}, ID {running}"
            raise OSError(errno.EBUSY, f"{self._interface} has another XDP program: {who}")
        if info is not None and info.ifindex:
            raise OSError(errno.EBUSY, f"{self.pin} holds a program on an interface of another network namespace")
        if self._link is not None:  # of an interface that is gone
            self._link.close()
            self._link = None
            self._is_stale = True

    def _create(self, program: Program, how: Attach) -> None:
        with _directory(self.pin.parent), contextlib.ExitStack() as undo:
            link, mode = self._create_link(program, how)
            undo.callback(link.close)
            if self._is_stale:
                self.pin.unlink()
                self._is_stale = False
            link.pin(self.pin)
            self._link, self.mode = link, mode
            undo.pop_all()

    def _create_link(self, program: Program, how: Attach) -> tuple[Link, Attach]:
        """In the driver, or else behind it, if we may choose."""
        self.refused = None
        if how is not Attach.AUTO:
            return Link.create(program, self._index, _FLAGS[how]), how
        try:
            return Link.create(program, self._index, XDP_FLAGS_DRV_MODE), Attach.NATIVE
        except BpfError as error:
            self.refused = error
            return Link.create(program, self._index, XDP_FLAGS_SKB_MODE), Attach.GENERIC

    def _change_mode(self, program: Program, how: Attach) -> None:
        """No interface has programs in both modes, and no link changes its own: for a moment there is none."""
        before, mode = self._link, self.mode
        assert before is not None and mode is not None  # noqa: S101, PT018 - attach() has looked
        running = Program.from_id(before.info.program_id)
        with running:
            self.detach()
            try:
                self._create(program, how)
            except OSError:
                self._create(running, mode)
                raise


def detach(interface: str, directory: Path, name: str = PROGRAM) -> str:
    """Take a program that nobody looks after off an interface. Returns how it was attached.

    Raises OSError if it is not there, or if a process has its place.
    """
    index = socket.if_nametoindex(interface)
    with contextlib.closing(Attachment(interface, index, directory, name)) as place:
        if place.predecessor is None:
            raise OSError(errno.ENOENT, f"{interface} has no program of quiclb that is pinned at {place.pin}")
        mode = str(place.mode)
        place.detach()
    return mode


def _lock(interface: str, index: int) -> socket.socket:
    """An abstract address, which is the network namespace's own and free again when its process has ended."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(f"\0quiclb/xdp/{index}")
    except OSError as error:
        lock.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(errno.EBUSY, f"another quiclb runs on {interface}") from None
        raise
    return lock


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """A directory in a BPF file system, which is mounted if need be. If the block fails, all is as it was."""
    with contextlib.ExitStack() as undo:
        if not in_bpf_file_system(path):
            if not path.is_relative_to(BPF_FILE_SYSTEM):
                raise OSError(errno.EINVAL, f"{path} is not in a BPF file system")
            mount_bpf(os.fspath(BPF_FILE_SYSTEM))
            undo.callback(unmount, os.fspath(BPF_FILE_SYSTEM))
        for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
            missing.mkdir(mode=0o700)
            undo.callback(missing.rmdir)
        yield
        undo.pop_all()


def in_bpf_file_system(path: Path) -> bool:
    """Whether what is made at a path can hold BPF objects."""
    found: dict[Path, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        found[Path(fields.split()[4])] = rest.split()[0]  # the last mount at a place is the one that is seen
    return next(found[each] for each in (path, *path.parents) if each in found) == "bpf"
