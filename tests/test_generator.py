"""lb/generator.py and lb/highwater.py: no nonce twice, in any thread, after any switch, restart or crash."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lb.cid import CidConfig, Codec, ConfigId, ConnectionId, FourPass, ServerId
from lb.errors import QuicLbError
from lb.generator import RETRY_EVERY, CidGenerator, NonceMark
from lb.highwater import HighWaterFile

KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
OTHER_KEY = bytes.fromhex("ffeeddccbbaa99887766554433221100")
SERVER_ID = ServerId(b"srv1")
SINGLE_PASS = CidConfig(ConfigId(0), 4, 12, KEY)
FOUR_PASS = CidConfig(ConfigId(1), 4, 8, OTHER_KEY)
PLAINTEXT = CidConfig(ConfigId(2), 4, 8)
CONFIGS = pytest.mark.parametrize("config", [SINGLE_PASS, FOUR_PASS, PLAINTEXT], ids=lambda c: c.algorithm)


class MemoryMarks:
    """Marks that outlive a generator; `broken` makes saving fail."""

    def __init__(self) -> None:
        self.marks: dict[str, NonceMark] = {}
        self.broken = False
        self.attempts = 0

    def load(self, identity: str) -> NonceMark | None:
        return self.marks.get(identity)

    def save(self, identity: str, mark: NonceMark) -> None:
        self.attempts += 1
        if self.broken:
            raise OSError(28, "No space left on device")
        self.marks[identity] = mark


class NearTheEnd(MemoryMarks):
    """Marks of servers that have `left` nonces more."""

    def __init__(self, left: int, nonce_length: int, start: int = 5) -> None:
        super().__init__()
        self._mark = NonceMark(start, (1 << 8 * nonce_length) - left)

    def load(self, identity: str) -> NonceMark | None:
        return self.marks.get(identity, self._mark)


def seeded(seed: int = 1) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


def nonces(config: CidConfig, cids: Iterable[ConnectionId]) -> list[int]:
    """The nonces of CIDs of our own server, as numbers."""
    codec = Codec(config)
    decoded = [codec.decode(cid) for cid in cids]
    assert {d.server_id if d else None for d in decoded} == {SERVER_ID}
    return [int.from_bytes(d.nonce) for d in decoded if d]


def take(generator: CidGenerator, count: int) -> list[ConnectionId]:
    return [generator.next() for _ in range(count)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_unroutable(cid: ConnectionId) -> bool:
    return cid[0] >> 5 == 0b111


@pytest.mark.parametrize("config", [SINGLE_PASS, FOUR_PASS], ids=lambda c: c.algorithm)
def test_encrypted_nonces_count_from_a_random_start(config: CidConfig) -> None:
    starts = set()
    for seed in range(20):
        got = nonces(config, take(CidGenerator(config, SERVER_ID, random=seeded(seed)), 5))
        assert got == [got[0] + i for i in range(5)]
        starts.add(got[0])
    assert len(starts) == 20


@pytest.mark.parametrize("nonce_length", range(4, 19))
def test_a_counter_wraps_through_zero(nonce_length: int) -> None:
    config = CidConfig(ConfigId(0), 1, nonce_length, KEY)
    generator = CidGenerator(config, ServerId(b"s"), random=lambda count: b"\xff" * count)
    codec = Codec(config)
    decoded = [codec.decode(cid) for cid in take(generator, 3)]
    last = (1 << 8 * nonce_length) - 1
    assert [int.from_bytes(d.nonce) for d in decoded if d] == [last, 0, 1]
    assert generator.remaining == last + 1 - 3


@pytest.mark.parametrize("nonce_length", range(4, 19))
def test_a_counter_that_is_back_at_its_start_is_exhausted(nonce_length: int) -> None:
    config = CidConfig(ConfigId(0), 1, nonce_length, KEY)
    marks = NearTheEnd(3, nonce_length, start=2)
    generator = CidGenerator(config, ServerId(b"s"), random=seeded(), marks=marks)
    last = (1 << 8 * nonce_length) - 1
    seen = []
    for left in (3, 2, 1):
        assert (generator.remaining, generator.config) == (left, config)
        decoded = Codec(config).decode(generator.next())
        seen.append(int.from_bytes(decoded.nonce) if decoded else None)
    assert seen == [last, 0, 1]  # and 2 was the first

    assert (generator.remaining, generator.config) == (0, None)
    assert all(is_unroutable(cid) for cid in take(generator, 50))
    assert (generator.issued, generator.unroutable_issued) == (53, 50)
    assert {mark.reserved for mark in marks.marks.values()} == {1 << 8 * nonce_length}

    restarted = CidGenerator(config, ServerId(b"s"), random=seeded(), marks=marks)
    assert is_unroutable(restarted.next())


@CONFIGS
def test_four_threads_never_get_the_same(config: CidConfig, tmp_path: Path) -> None:
    with HighWaterFile(tmp_path / "nonces") as marks, ThreadPoolExecutor(4) as threads:
        generator = CidGenerator(config, SERVER_ID, random=os.urandom, marks=marks, block=1000)
        parts = list(threads.map(lambda _: take(generator, 15_000), range(4)))
        assert generator.issued == 60_000
    cids = [cid for part in parts for cid in part]
    assert len(set(nonces(config, cids))) == len(set(cids)) == 60_000


def test_no_thread_takes_a_nonce_while_another_reserves() -> None:
    """Two that both saw the last reserved nonce would use one that no mark covers."""
    inside: list[int] = []
    second = Event()

    class SlowMarks(MemoryMarks):
        def save(self, identity: str, mark: NonceMark) -> None:
            inside.append(mark.reserved)
            if len(inside) > 1:
                second.set()
            second.wait(0.2)  # long enough for the other thread to come in, if it can
            assert len(inside) == 1
            super().save(identity, mark)

    generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=SlowMarks(), block=10)
    with ThreadPoolExecutor(4) as threads:
        cids = [got for part in [threads.submit(take, generator, 2) for _ in range(4)] for got in part.result()]
    assert len(set(nonces(SINGLE_PASS, cids))) == 8


def test_after_a_switch_no_thread_issues_under_the_old_configuration() -> None:
    generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=os.urandom)
    switched, stop = Event(), Event()

    def run(_: int) -> list[tuple[bool, ConnectionId]]:
        got = []
        while not stop.is_set():
            got.append((switched.is_set(), generator.next()))
        return got

    with ThreadPoolExecutor(4) as threads:
        parts = [threads.submit(run, i) for i in range(4)]
        try:
            wait_until(lambda: generator.issued > 1000)
            generator.switch(FOUR_PASS, SERVER_ID)
            switched.set()
            enough = generator.issued + 1000
            wait_until(lambda: generator.issued > enough)
        finally:
            stop.set()
        got = [pair for part in parts for pair in part.result()]
    config_ids = {late: {cid[0] >> 5 for was_late, cid in got if was_late is late} for late in (False, True)}
    assert config_ids[True] == {FOUR_PASS.config_id}
    assert SINGLE_PASS.config_id in config_ids[False]
    assert len({cid for _, cid in got}) == len(got)


@CONFIGS
def test_a_configuration_that_comes_back_goes_on_where_it_stopped(config: CidConfig) -> None:
    generator = CidGenerator(config, SERVER_ID, random=seeded())
    other = CidConfig(ConfigId(6), 4, 12, bytes(16))
    first = take(generator, 100)
    generator.switch(other, SERVER_ID)
    nonces(other, take(generator, 100))
    generator.switch(None, None)
    assert all(is_unroutable(cid) for cid in take(generator, 100))
    generator.switch(config, SERVER_ID)
    assert len(set(nonces(config, first + take(generator, 100)))) == 200


def test_configurations_that_share_key_and_server_id_share_nonces() -> None:
    """The config ID is no input of the cipher: the same nonce would make the same routing block."""
    twin = CidConfig(ConfigId(5), 4, 12, KEY, encodes_length=False)
    generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded())
    first = take(generator, 10)
    generator.switch(twin, SERVER_ID)
    second = take(generator, 10)
    start = nonces(SINGLE_PASS, first)[0]
    assert nonces(SINGLE_PASS, first) + nonces(twin, second) == list(range(start, start + 20))
    assert len({cid[1:] for cid in first + second}) == 20


@pytest.mark.parametrize(
    ("config", "server_id", "shared"),
    [
        (CidConfig(ConfigId(0), 4, 12, KEY), SERVER_ID, True),
        (CidConfig(ConfigId(6), 4, 12, KEY, encodes_length=False, appended_length=2), SERVER_ID, True),
        (CidConfig(ConfigId(0), 4, 12, OTHER_KEY), SERVER_ID, False),
        (CidConfig(ConfigId(0), 4, 11, KEY), SERVER_ID, False),
        (CidConfig(ConfigId(0), 4, 12, KEY), ServerId(b"srv2"), False),
        (CidConfig(ConfigId(0), 4, 12), SERVER_ID, False),
    ],
)
def test_the_identity_of_a_nonce_space_is_its_key_and_server_id(
    config: CidConfig, server_id: ServerId, shared: bool
) -> None:
    ours, theirs = MemoryMarks(), MemoryMarks()
    CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=ours).next()
    CidGenerator(config, server_id, random=seeded(), marks=theirs).next()
    assert (ours.marks.keys() == theirs.marks.keys()) is shared
    for identity in (*ours.marks, *theirs.marks):
        assert len(bytes.fromhex(identity)) == 16
        assert KEY.hex()[:8] not in identity


def test_plaintext_configurations_of_two_config_ids_have_nonces_of_their_own() -> None:
    marks = [MemoryMarks(), MemoryMarks()]
    for config_id, store in enumerate(marks):
        CidGenerator(CidConfig(ConfigId(config_id), 4, 8), SERVER_ID, random=seeded(), marks=store).next()
    assert marks[0].marks.keys() != marks[1].marks.keys()


@CONFIGS
def test_a_restart_skips_the_rest_of_the_block(config: CidConfig, tmp_path: Path) -> None:
    cids: list[ConnectionId] = []
    for issued in (1, 63, 64, 65, 0, 200):
        with HighWaterFile(tmp_path / "nonces") as marks:
            cids += take(CidGenerator(config, SERVER_ID, random=os.urandom, marks=marks, block=64), issued)
    got = nonces(config, cids)
    assert len(set(got)) == len(set(cids)) == 393
    if config.key:  # the first nonces of the runs, counted from the very first
        runs = [(got[i] - got[0]) % (1 << 8 * config.nonce_length) for i in (0, 1, 64, 128, 193)]
        assert runs == [0, 64, 128, 192, 320]


@CONFIGS
def test_a_killed_process_and_its_successors_repeat_nothing(config: CidConfig, tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from lb.cid import *; from lb.generator import *; from lb.highwater import *\n"
        f"config = CidConfig({config.config_id}, 4, {config.nonce_length}, {config.key!r})\n"
        "g = CidGenerator(config, b'srv1', random=os.urandom, marks=HighWaterFile(sys.argv[1]), block=50)\n"
        "while True: print(g.next().hex(), flush=True)\n"
    )
    cids: list[ConnectionId] = []
    for count in (120, 7, 333):
        with subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "nonces"], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(count)]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        cids += [ConnectionId(bytes.fromhex(line)) for line in lines if line.endswith("\n")]
    assert len(cids) >= 460
    assert len(set(nonces(config, cids))) == len(cids)


def test_exhaustion_goes_to_the_standbys_in_order_and_then_to_0b111() -> None:
    configs = [CidConfig(ConfigId(i), 4, 4, bytes([i]) * 16) for i in range(3)]
    generator = CidGenerator(
        configs[0],
        SERVER_ID,
        random=seeded(),
        marks=NearTheEnd(2, 4),
        standby=[(configs[1], SERVER_ID), (configs[2], SERVER_ID)],
    )
    assert [cid[0] >> 5 for cid in take(generator, 9)] == [0, 0, 1, 1, 2, 2, 7, 7, 7]


def test_a_standby_with_the_key_of_the_exhausted_configuration_is_no_help() -> None:
    twin = CidConfig(ConfigId(5), 4, 12, KEY)
    generator = CidGenerator(
        SINGLE_PASS, SERVER_ID, random=seeded(), marks=NearTheEnd(1, 12), standby=[(twin, SERVER_ID)]
    )
    assert [cid[0] >> 5 for cid in take(generator, 3)] == [0, 7, 7]


def test_a_new_configuration_ends_exhaustion() -> None:
    generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=NearTheEnd(1, 12))
    assert [is_unroutable(cid) for cid in take(generator, 2)] == [False, True]
    generator.switch(CidConfig(ConfigId(1), 4, 12, OTHER_KEY), SERVER_ID)
    assert [cid[0] >> 5 for cid in take(generator, 2)] == [1, 7]  # those marks leave each one nonce


def test_low_is_said_once_per_configuration_and_outside_of_the_lock() -> None:
    said: list[int] = []

    def on_low(remaining: int) -> None:
        assert generator.remaining == remaining  # with the lock held this would never return
        said.append(remaining)

    space = 1 << 32
    config = CidConfig(ConfigId(0), 4, 4, KEY)
    generator = CidGenerator(
        config,
        SERVER_ID,
        random=seeded(),
        marks=NearTheEnd(space // 8 + 2, 4),
        standby=[(CidConfig(ConfigId(1), 4, 4, OTHER_KEY), SERVER_ID)],
        on_low=on_low,
    )
    take(generator, 1)
    assert said == []
    take(generator, 10)
    assert said == [space // 8]
    generator.switch(CidConfig(ConfigId(2), 4, 4, bytes(16)), SERVER_ID)
    take(generator, 10)
    generator.switch(config, SERVER_ID)
    take(generator, 10)
    assert said == [space // 8] * 2


@CONFIGS
def test_without_a_working_store_nothing_beyond_the_reservation_is_issued(config: CidConfig) -> None:
    marks = MemoryMarks()
    generator = CidGenerator(config, SERVER_ID, random=seeded(), marks=marks, block=10)
    cids = take(generator, 3)
    assert generator.store_error is None

    marks.broken = True
    cids += take(generator, 7)  # those are reserved
    assert generator.store_error is None
    lost = take(generator, 3 * RETRY_EVERY)
    assert all(is_unroutable(cid) for cid in lost)
    assert str(generator.store_error) == "[Errno 28] No space left on device"
    assert marks.attempts == 1 + 3  # not one per CID

    marks.broken = False
    cids += take(generator, 100)  # it is time for another attempt
    assert generator.store_error is None
    assert (generator.issued, generator.unroutable_issued) == (110 + len(lost), len(lost))
    assert len(set(nonces(config, cids))) == 110

    cids += take(CidGenerator(config, SERVER_ID, random=seeded(9), marks=marks, block=10), 100)
    assert len(set(nonces(config, cids))) == len(cids)


def test_a_directory_that_vanishes_costs_routability_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with HighWaterFile(tmp_path / "state" / "nonces") as marks:
        generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=marks, block=4)
        cids = take(generator, 2)
        shutil.rmtree(tmp_path / "state")
        cids += take(generator, 2)
        assert is_unroutable(generator.next())
        assert isinstance(generator.store_error, FileNotFoundError)
        (tmp_path / "state").mkdir()
        cids += [cid for cid in take(generator, 2 * RETRY_EVERY) if not is_unroutable(cid)]
    assert len(set(nonces(SINGLE_PASS, cids))) == len(cids) > 4


def test_plaintext_nonces_are_a_permuted_counter() -> None:
    marks = MemoryMarks()
    generator = CidGenerator(PLAINTEXT, SERVER_ID, random=seeded(), marks=marks)
    got = nonces(PLAINTEXT, take(generator, 5))
    (mark,) = marks.marks.values()
    permutation = FourPass(mark.permutation_key, 8)
    counted = [int.from_bytes(permutation.decrypt(nonce.to_bytes(8))) for nonce in got]
    assert counted == [mark.start + i for i in range(5)]


@pytest.mark.parametrize("nonce_length", [4, 5, 8, 15])
def test_plaintext_nonces_show_no_counter(nonce_length: int) -> None:
    """Neighbours differ as random octets do: in half of their bits, by no constant, in every position."""
    config = CidConfig(ConfigId(0), 4, nonce_length)
    got = nonces(config, take(CidGenerator(config, SERVER_ID, random=seeded(3)), 4000))
    bits = 8 * nonce_length
    changes = [a ^ b for a, b in pairwise(got)]
    assert len({b - a for a, b in pairwise(got)}) > 3990
    per_position = [sum(change >> bit & 1 for change in changes) / len(changes) for bit in range(bits)]
    assert min(per_position) > 0.45
    assert max(per_position) < 0.55
    ascents = sum(a < b for a, b in pairwise(got)) / len(changes)
    assert 0.45 < ascents < 0.55


def test_many_plaintext_nonces_of_the_shortest_kind_are_distinct() -> None:
    """100000 random draws of 4 octets would repeat with probability 0.69."""
    config = CidConfig(ConfigId(0), 4, 4)
    generator = CidGenerator(config, SERVER_ID, random=seeded(4))
    assert len(set(take(generator, 100_000))) == 100_000


def test_what_is_neither_server_id_nor_nonce_is_random() -> None:
    config = CidConfig(ConfigId(3), 4, 8, KEY, encodes_length=False, appended_length=3)
    cids = take(CidGenerator(config, SERVER_ID, random=seeded()), 1000)
    assert {len(cid) for cid in cids} == {16}
    assert {cid[0] for cid in cids} == set(range(0b011_00000, 0b100_00000))
    assert [len({cid[i] for cid in cids}) > 240 for i in (13, 14, 15)] == [True] * 3


def test_an_encoded_length_counts_the_appended_octets() -> None:
    config = CidConfig(ConfigId(3), 4, 8, KEY, appended_length=3)
    cids = take(CidGenerator(config, SERVER_ID, random=seeded()), 100)
    assert {(cid[0], len(cid)) for cid in cids} == {(0b011_01111, 16)}
    assert len({cid[13:] for cid in cids}) == 100


@pytest.mark.parametrize(
    ("config", "given", "length"),
    [
        (None, None, 8),
        (None, 17, 17),
        (CidConfig(ConfigId(0), 4, 12, KEY), None, 17),
        (CidConfig(ConfigId(0), 4, 15, KEY), None, 20),
        (CidConfig(ConfigId(0), 1, 4, KEY), None, 8),  # six octets would be under the draft's eight
        (CidConfig(ConfigId(0), 4, 12, KEY), 20, 20),
    ],
)
def test_unroutable_cids_say_their_length_and_keep_it(config: CidConfig | None, given: int | None, length: int) -> None:
    server_id = ServerId(bytes(config.server_id_length)) if config else None
    generator = CidGenerator(config, server_id, random=seeded(), unroutable_length=given)
    generator.switch(FOUR_PASS, SERVER_ID)
    generator.switch(None, None)
    cids = take(generator, 200)
    assert {(cid[0], len(cid)) for cid in cids} == {(0b111_00000 | length - 1, length)}
    assert len(set(cids)) == 200
    assert (generator.remaining, generator.config) == (0, None)


@pytest.mark.parametrize(
    ("config", "server_id", "options", "message"),
    [
        (SINGLE_PASS, None, {}, "no server ID: expected 4"),
        (SINGLE_PASS, b"abc", {}, "server ID of 3 octets: expected 4"),
        (SINGLE_PASS, b"srv1", {"standby": [(FOUR_PASS, b"long1")]}, "server ID of 5 octets: expected 4"),
        (None, None, {"standby": [(FOUR_PASS, b"srv1")]}, "standby configurations without"),
        (None, None, {"unroutable_length": 7}, "0b111 CIDs of 7 octets: expected 8 to 20"),
        (None, None, {"unroutable_length": 21}, "0b111 CIDs of 21 octets: expected 8 to 20"),
        (None, None, {"block": 0}, "blocks of 0 nonces"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    config: CidConfig | None, server_id: ServerId | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CidGenerator(config, server_id, random=seeded(), **options)


def test_a_switch_that_is_refused_changes_nothing() -> None:
    generator = CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded())
    with pytest.raises(ValueError, match="server ID of 3 octets"):
        generator.switch(FOUR_PASS, ServerId(b"abc"))
    nonces(SINGLE_PASS, take(generator, 5))


@pytest.mark.parametrize(
    "mark", [NonceMark(1 << 96, 0), NonceMark(-1, 0), NonceMark(0, (1 << 96) + 1), NonceMark(0, 1, b"short")]
)
def test_an_impossible_mark_is_refused(mark: NonceMark) -> None:
    marks = MemoryMarks()
    CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=marks).next()
    (identity,) = marks.marks
    marks.marks[identity] = mark
    with pytest.raises(QuicLbError, match=identity):
        CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=marks)


def test_a_mark_does_not_show_its_key() -> None:
    assert repr(NonceMark(1, 2, KEY)) == "NonceMark(start=1, reserved=2)"


def test_a_file_keeps_what_was_saved(tmp_path: Path) -> None:
    saved = {"aa": NonceMark(5, 1 << 144, b""), "bb": NonceMark(0, 7, KEY)}
    with HighWaterFile(tmp_path / "nonces") as file:
        assert file.load("aa") is None
        file.save("aa", NonceMark(5, 1, b""))
        for identity, mark in saved.items():
            file.save(identity, mark)
    with HighWaterFile(tmp_path / "nonces") as file:
        assert {identity: file.load(identity) for identity in ("aa", "bb", "cc")} == {**saved, "cc": None}


def test_a_file_is_private_whatever_the_umask_and_whatever_lay_there(tmp_path: Path) -> None:
    leftover = tmp_path / "nonces.new"
    leftover.write_text("torn")
    leftover.chmod(0o644)
    before = os.umask(0)
    try:
        with HighWaterFile(tmp_path / "nonces") as file:
            file.save("aa", NonceMark(5, 1, KEY))
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {
        "nonces": 0o600,
        "nonces.lock": 0o600,
    }


def test_a_file_has_one_process_at_a_time(tmp_path: Path) -> None:
    program = "import sys; from lb.highwater import *; HighWaterFile(sys.argv[1])"
    command: Sequence[str] = [sys.executable, "-c", program, str(tmp_path / "nonces")]
    with HighWaterFile(tmp_path / "nonces"):
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "in use by another process" in other.stderr
        with pytest.raises(QuicLbError, match="in use by another process"):
            HighWaterFile(tmp_path / "nonces")
    assert subprocess.run(command, check=False).returncode == 0


def test_two_generators_cannot_share_nonces_through_one_file(tmp_path: Path) -> None:
    with HighWaterFile(tmp_path / "nonces") as file:
        CidGenerator(SINGLE_PASS, SERVER_ID, random=seeded(), marks=file)
        CidGenerator(SINGLE_PASS, ServerId(b"srv2"), random=seeded(), marks=file)
        with pytest.raises(QuicLbError, match="already have a generator"):
            CidGenerator(CidConfig(ConfigId(4), 4, 12, KEY), SERVER_ID, random=seeded(), marks=file)


def test_a_closed_file_saves_nothing(tmp_path: Path) -> None:
    file = HighWaterFile(tmp_path / "nonces")
    file.close()
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.save("aa", NonceMark(0, 1))
    assert not (tmp_path / "nonces").exists()


def test_a_file_cut_or_changed_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    with HighWaterFile(path) as file:
        file.save("aa" * 16, NonceMark(1234567, 65536, KEY))
    good = path.read_bytes()
    damaged = [good[:cut] for cut in range(len(good) - 1)]  # without the last newline nothing is missing
    damaged += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(QuicLbError, match="damaged") as caught:
            HighWaterFile(path)
        assert KEY.hex() not in str(caught.value)
    path.write_bytes(good)
    HighWaterFile(path).close()


def with_digest(table: object) -> str:
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(
        {"format": "quiclb nonce marks 1", "sha256": hashlib.sha256(canonical).hexdigest(), "marks": table}
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "7",
        '"text"',
        "{}",
        "\0" * 4096,
        "[" * 100_000,
        with_digest([]),
        with_digest({"aa": 1}),
        with_digest({"aa": {"start": 1, "reserved": 2}}),
        with_digest({"aa": {"start": "1", "reserved": 2, "permutation_key": ""}}),
        with_digest({"aa": {"start": 1, "reserved": True, "permutation_key": ""}}),
        with_digest({"aa": {"start": 1, "reserved": 2.5, "permutation_key": ""}}),
        with_digest({"aa": {"start": 1, "reserved": 2, "permutation_key": "xyz"}}),
        with_digest({"aa": {"start": 1, "reserved": 2, "permutation_key": 5}}),
        with_digest({}).replace("marks 1", "marks 2"),
    ],
    ids=lambda content: content[:40] or "empty",
)
def test_a_file_of_another_kind_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(QuicLbError, match="give this server new server IDs"):
        HighWaterFile(path)
    assert path.read_text() == content


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    with HighWaterFile(path) as file:
        file.save("aa", NonceMark(0, 1))
    path.chmod(0o640)
    with pytest.raises(QuicLbError, match="mode 0640, expected 0600"):
        HighWaterFile(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_not_a_regular_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "nonces")
    with pytest.raises(QuicLbError, match="nonces"):
        HighWaterFile(tmp_path / "nonces")


def test_a_missing_directory_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(QuicLbError, match=r"absent/nonces\.lock: No such file or directory"):
        HighWaterFile(tmp_path / "absent" / "nonces")
