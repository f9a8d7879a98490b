"""Steps of a rotation, taken in a configuration file: the entries and key files that come and go with a config ID.

The file is the truth, so that all balancers that have the same one give the same answers. It is changed as a whole or
not at all: what it would be is read and checked as any configuration before it takes the old one's place.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml

from lb import keygen
from lb.cid import CONFIG_IDS, CidConfig, ConfigId, ServerId
from lb.config import load_config
from lb.document import Document, Node
from lb.errors import ConfigErrors
from lb.files import sync_directory, write_file
from lb.keys import LbConfig, Phase, ServiceConfig
from lb.operations import Refused, RotationStep
from lb.rotation import FREE, SlotView
from lb.yamltext import Value, YamlText, get

# Ours.
SERVER_ID_LENGTH, NONCE_LENGTH = 4, 12  # for a service's first configuration; 16 in all: one AES block
SECRETS = "secrets"  # beside the file: where its first keys go


def rotate(path: Path, service: str, step: RotationStep, views: Mapping[ConfigId, SlotView] | None) -> tuple[str, ...]:
    """Take one step in the file at `path`. Returns what was done, a line each.

    `views` is what a balancer that has this file says of the service's config IDs; None if none could be asked.
    Raises Refused; ConfigErrors for a file that has mistakes, or would have; OSError. The file is then as it was.
    """
    if path.is_symlink():
        raise Refused("failed", f"{path}: a symbolic link: expected a regular file; change it where it is made")
    with _only_one(path.parent), contextlib.ExitStack() as undo:
        rewriting = _Rewriting(path, service, views)
        said = _STEPS[step.do](rewriting, step, undo)
        rewriting.replace_file()
        undo.pop_all()
    return said


def key_age(path: Path) -> float | None:
    """Seconds since a key file was written; None if it is not there."""
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None


class _Rewriting:
    """A file, what it says of one service, and the changes to its text."""

    def __init__(self, path: Path, service: str, views: Mapping[ConfigId, SlotView] | None) -> None:
        self.path = path
        self.octets = path.read_bytes()
        self.config = load_config(path)
        names = [section.service.name for section in self.config.services]
        if service not in names:
            raise Refused("unknown", f"{service}: expected a service: {', '.join(names)}")
        self.place = names.index(service)
        self.service: ServiceConfig = self.config.services[self.place]
        self.views = views
        self.expected = dict(self.service.phases)
        self.text = YamlText(self.octets.decode("utf-8-sig"))
        assert self.text.root is not None  # noqa: S101 - it was read as a configuration
        section = get(self.text.root, "services", self.place)
        assert isinstance(section, yaml.MappingNode)  # noqa: S101
        self.section = section

    def position(self, config_id: int) -> int:
        return [slot.config.config_id for slot in self.service.service.cid_slots].index(ConfigId(config_id))

    def phase(self, config_id: int) -> str:
        return str(self.expected.get(ConfigId(config_id), FREE))

    def view(self, config_id: int) -> SlotView | None:
        return self.views.get(ConfigId(config_id)) if self.views is not None else None

    def set_phase(self, config_id: int, phase: Phase) -> None:
        entry = get(self.section, "cid-configs", self.position(config_id))
        assert isinstance(entry, yaml.MappingNode)  # noqa: S101
        written = get(entry, "phase")
        if written is not None:
            self.text.replace(written, str(phase))
        else:
            self.text.add_pair(entry, "phase", str(phase), after="config-id")
        self.expected[ConfigId(config_id)] = phase

    def add(self, entry: Mapping[str, Value], server_ids: Mapping[str, list[str]]) -> None:
        """Add a configuration, and every backend's server IDs under it, by name."""
        config_id = entry["config-id"]
        assert isinstance(config_id, int)  # noqa: S101
        entries = get(self.section, "cid-configs")
        if entries is not None and entries.value:
            assert isinstance(entries, yaml.SequenceNode)  # noqa: S101
            self.text.add_item(entries, entry)
        else:
            if entries is not None:  # []
                self.text.remove_pair(self.section, "cid-configs")
            self.text.add_list_before(self.section, "backends", "cid-configs", entry)
        for backend, ids in zip(self._backends(), server_ids.values(), strict=True):
            known = get(backend, "server-ids")
            if isinstance(known, yaml.MappingNode) and known.value:
                self.text.add_pair(known, config_id, ids)
            elif known is not None:  # {}
                self.text.replace(known, {config_id: ids})
            else:
                self.text.add_pair(backend, "server-ids", {config_id: ids}, after="address")
        self.expected[ConfigId(config_id)] = Phase.PREPARED

    def remove(self, config_id: int) -> None:
        """Remove a configuration, and the server IDs under it."""
        entries = get(self.section, "cid-configs")
        assert isinstance(entries, yaml.SequenceNode)  # noqa: S101
        if len(entries.value) > 1:
            self.text.remove_item(entries, self.position(config_id))
        else:
            self.text.remove_pair(self.section, "cid-configs")
        for backend in self._backends():
            known = get(backend, "server-ids")
            if not isinstance(known, yaml.MappingNode) or get(known, str(config_id)) is None:
                continue
            if len(known.value) > 1:
                self.text.remove_pair(known, str(config_id))
            else:
                self.text.remove_pair(backend, "server-ids")
        del self.expected[ConfigId(config_id)]

    def replace_file(self) -> None:
        """Put the changed text in the old one's place, if it means what it should. Raises as `rotate` does."""
        status = self.path.stat()
        new = self.path.with_name(f".{self.path.name}.new")
        mark = b"\xef\xbb\xbf" if self.octets.startswith(b"\xef\xbb\xbf") else b""
        with contextlib.suppress(FileNotFoundError):
            new.unlink()  # of a process that was killed
        try:
            octets = mark + self.text.changed().encode()
            write_file(new, octets, mode=stat.S_IMODE(status.st_mode), like=status)
            self._refuse_if_stale()
            self._check(new)
            self._refuse_if_stale()
            new.rename(self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            raise
        sync_directory(self.path.parent)

    def _backends(self) -> list[yaml.MappingNode]:
        backends = get(self.section, "backends")
        assert isinstance(backends, yaml.SequenceNode)  # noqa: S101
        return list(backends.value)

    def _refuse_if_stale(self) -> None:
        if self.path.read_bytes() != self.octets:
            raise Refused("stale", f"{self.path}: somebody else has changed it meanwhile: look again")

    def _check(self, new: Path) -> None:
        """Raises ConfigErrors for mistakes, Refused if something changed that was not meant to."""
        by_hand = Refused("failed", f"{self.path}: written in a way that this cannot change: change it by hand")
        try:
            after: LbConfig = load_config(new)
        except ConfigErrors as errors:
            if len(errors.exceptions) == 1 and str(new) in str(errors.exceptions[0]):
                raise by_hand from None  # not even YAML
            raise
        service = after.services[self.place]
        kept = self.service.phases.keys() & service.phases.keys()
        if (
            _without_rotation(Document(self.path).root, self.place) != _without_rotation(Document(new).root, self.place)
            or service.phases != self.expected
            or _known_by(self.service, kept) != _known_by(service, kept)
        ):
            raise by_hand


def _prepare(rewriting: _Rewriting, step: RotationStep, undo: contextlib.ExitStack) -> tuple[str, ...]:
    config_id = _free_config_id(rewriting, step)
    section = rewriting.service
    like = next((s for s in section.service.cid_slots if section.phases[s.config.config_id] is Phase.ACTIVE), None)
    like = like or next(iter(section.service.cid_slots), None)
    config = _cid_config(config_id, step, like.config if like else None)
    entry: dict[str, Value] = {
        "config-id": config_id,
        "server-id-length": config.server_id_length,
        "nonce-length": config.nonce_length,
    }
    made: list[Path] = []
    wanted = [] if step.plaintext else [("key-file", "cid", keygen.cid_key, section.key_files)]
    if like is None or like.reset_key is not None:
        new_reset_key = functools.partial(keygen.reset_key, section.service.reset_rule)
        wanted.append(("reset-key-file", "reset", new_reset_key, section.reset_key_files))
    tag = secrets.token_hex(4)  # a config ID comes back with other keys
    for name, kind, make, files in wanted:
        known = files.get(like.config.config_id) if like else None
        made.append(_write_key(rewriting.path, f"{kind}-{config_id}-{tag}.key", make(), known, undo))
        entry[name] = _as_written(made[-1], rewriting.path.parent)
    if config.encodes_length:
        entry["encodes-length"] = True
    if config.appended_length:
        entry["appended-length"] = config.appended_length
    entry["phase"] = str(Phase.PREPARED)
    ids = _server_ids(rewriting, config, like.config.config_id if like else None)
    rewriting.add(entry, ids)
    backend = section.service.backends[0].name
    return (
        f"config ID {config_id} is prepared: {config.algorithm}, server IDs of {config.server_id_length} octets, "
        f"nonces of {config.nonce_length}",
        *(f"new key file: {path}" for path in made),
        f"new server IDs: {sum(map(len, ids.values()))} of {len(ids)} backends",
        "next: bring this file and its keys to every balancer, and to every server its half, as in",
        f"      quiclb server-config {backend} --config-id {config_id} -c {rewriting.path} --output DIRECTORY",
        f"then: quiclb rotation activate {config_id}",
    )


def _activate(rewriting: _Rewriting, step: RotationStep, undo: contextlib.ExitStack) -> tuple[str, ...]:
    config_id = _given(step)
    phase = rewriting.phase(config_id)
    if phase == FREE:
        raise Refused("conflict", f"config ID {config_id} is free: prepare it first")
    if phase == Phase.ACTIVE:
        raise Refused("conflict", f"config ID {config_id} is active already")
    view = rewriting.view(config_id)
    if view is not None and view.phase == FREE and not step.force:
        raise Refused(
            "conflict", f"config ID {config_id} is in the file, but the balancer does not decode it: reload it first"
        )
    before = [other for other, phase in rewriting.expected.items() if phase is Phase.ACTIVE]
    rewriting.set_phase(config_id, Phase.ACTIVE)
    for other in before:
        rewriting.set_phase(other, Phase.RETIRING)
    return (
        f"config ID {config_id} is active: servers are to issue it, and no other",
        *(f"config ID {other} is retiring: once it is quiet, quiclb rotation retire {other}" for other in before),
    )


def _retire(rewriting: _Rewriting, step: RotationStep, undo: contextlib.ExitStack) -> tuple[str, ...]:
    config_id = _given(step)
    phase = rewriting.phase(config_id)
    if phase == FREE:
        raise Refused("conflict", f"config ID {config_id} is free already")
    if phase == Phase.ACTIVE:
        raise Refused("conflict", f"config ID {config_id} is active: servers issue it; activate another one first")
    if not step.force:
        _refuse_in_use(config_id, rewriting.view(config_id))
    section = rewriting.service
    files = [f[ConfigId(config_id)] for f in (section.key_files, section.reset_key_files) if config_id in f]
    rewriting.remove(config_id)
    named = [path for s in rewriting.config.services for f in (s.key_files, s.reset_key_files) for path in f.values()]
    return (
        f"config ID {config_id} is free",
        *(f"no longer used: {path}; delete it once no balancer uses it" for path in files if named.count(path) < 2),
    )


_STEPS = {"prepare": _prepare, "activate": _activate, "retire": _retire}


def _given(step: RotationStep) -> int:
    if step.config_id is None or step.config_id not in CONFIG_IDS:
        raise Refused("invalid", f"config ID: {step.config_id}: expected 0 to 6")
    return step.config_id


def _refuse_in_use(config_id: int, view: SlotView | None) -> None:
    if view is None:
        raise Refused(
            "conflict",
            f"config ID {config_id}: no balancer could be asked whether packets still come with it; "
            "with --force it goes all the same, and so do its connections",
        )
    if view.phase == FREE or view.may_be_freed:
        return
    last = "none came yet" if view.last_packet is None else f"the latest one came {view.last_packet:.0f}s ago"
    when = "" if view.free_in is None else f"; free in {view.free_in:.0f}s if no more come"
    raise Refused(
        "conflict",
        f"config ID {config_id} is in use: expected no packets for {view.guard:g}s, and {last}{when}; "
        "with --force it goes all the same, and so do its connections",
    )


def _free_config_id(rewriting: _Rewriting, step: RotationStep) -> ConfigId:
    def busy(config_id: ConfigId) -> float:
        view = rewriting.view(config_id)
        return 0.0 if view is None or view.may_be_freed or step.force else view.free_in or 0.0

    if step.config_id is not None:
        config_id = ConfigId(_given(step))
        phase = rewriting.phase(config_id)
        if phase != FREE:
            raise Refused("conflict", f"config ID {config_id} is {phase}: expected a free one")
        if busy(config_id):
            raise Refused(
                "conflict",
                f"config ID {config_id} was freed while it was in use: it takes another configuration in "
                f"{busy(config_id):.0f}s",
            )
        return config_id
    active = [config_id for config_id, phase in rewriting.expected.items() if phase is Phase.ACTIVE]
    first = max(active, default=-1) + 1  # round and round, so that each rests for as long as it can
    order = [ConfigId((first + i) % len(CONFIG_IDS)) for i in CONFIG_IDS]
    free = [config_id for config_id in order if rewriting.phase(config_id) == FREE and not busy(config_id)]
    if not free:
        raise Refused("conflict", "no config ID is free: retire one first")
    return free[0]


def _cid_config(config_id: ConfigId, step: RotationStep, like: CidConfig | None) -> CidConfig:
    """What is asked for, and for the rest as the one in use. The key is not in it, but whether there is one."""
    like = like or CidConfig(config_id, SERVER_ID_LENGTH, NONCE_LENGTH, encodes_length=False)
    try:
        return replace(
            like,
            config_id=config_id,
            server_id_length=like.server_id_length if step.server_id_length is None else step.server_id_length,
            nonce_length=like.nonce_length if step.nonce_length is None else step.nonce_length,
            key=None if step.plaintext else bytes(16),
        )
    except ValueError as error:
        raise Refused("invalid", str(error)) from None


def _server_ids(rewriting: _Rewriting, config: CidConfig, like: ConfigId | None) -> dict[str, list[str]]:
    """New server IDs by backend, as many for each as it has under `like`, and none that would give a plaintext away."""
    counts = {
        backend.name: max(len(backend.server_ids.get(like, ())) if like is not None else 0, 1)
        for backend in rewriting.service.service.backends
    }
    total = sum(counts.values())
    taken: set[ServerId] = {
        server_id
        for section in rewriting.config.services
        for slot in section.service.cid_slots
        if (slot.config.key is None) != (config.key is None)
        for backend in section.service.backends
        for server_id in backend.server_ids.get(slot.config.config_id, ())
        if len(server_id) == config.server_id_length
    }
    try:
        most = min(256**config.server_id_length, total + len(taken))
        fresh = [each for each in keygen.server_ids(config.server_id_length, most) if each not in taken]
    except ValueError:
        fresh = []
    if len(fresh) < total:
        raise Refused(
            "invalid",
            f"server IDs of {config.server_id_length} octets: there are not {total} that no "
            f"{'encrypted' if config.key is None else 'plaintext'} configuration has: expected a greater length",
        )
    secrets.SystemRandom().shuffle(fresh)
    left = iter(fresh)
    return {name: [next(left).hex() for _ in range(count)] for name, count in counts.items()}


def _write_key(config: Path, name: str, digits: str, like: Path | None, undo: contextlib.ExitStack) -> Path:
    """Write a key beside that of another configuration, for whoever may read that. Gone if the step is not taken."""
    directory = like.parent if like else config.parent / SECRETS
    directory.mkdir(mode=0o700, exist_ok=True)
    status = (like or config).stat()
    mode = stat.S_IMODE(status.st_mode) & 0o640 if like else 0o600
    path = directory / name
    undo.callback(path.unlink, missing_ok=True)
    write_file(path, f"{digits}\n".encode(), mode=mode, like=status)
    sync_directory(directory)
    return path


def _as_written(path: Path, directory: Path) -> str:
    return str(path.relative_to(directory) if path.is_relative_to(directory) else path)


def _without_rotation(root: Node, place: int) -> Node:
    """A file's tree without what a rotation of the service at `place` may change."""
    if isinstance(root, dict) and isinstance(services := root["services"], list):
        section = services[place]
        if isinstance(section, dict):
            section.pop("cid-configs", None)
            backends = section["backends"]
            for backend in backends if isinstance(backends, list) else ():
                if isinstance(backend, dict):
                    backend.pop("server-ids", None)
    return root


class _KnownBy(NamedTuple):
    """What must not change of the configurations that stay."""

    slots: list[object]
    server_ids: list[object]


def _known_by(section: ServiceConfig, config_ids: set[ConfigId]) -> _KnownBy:
    service = section.service
    return _KnownBy(
        [slot for slot in service.cid_slots if slot.config.config_id in config_ids],
        [{c: ids for c, ids in backend.server_ids.items() if c in config_ids} for backend in service.backends],
    )


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """One rotation at a time among the files of a directory, whoever takes it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("conflict", f"{directory}: somebody else takes a step just now: try again") from None
        yield
    finally:
        os.close(descriptor)
