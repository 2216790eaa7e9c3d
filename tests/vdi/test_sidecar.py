"""Sidecars: what was written is found again, and nothing else is ever taken for it."""

import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udedup.errors import UdedupError
from udedup.vdi.digests import EMPTY_PAGE, PAGE_BYTES
from udedup.vdi.sidecar import (
    HEADER_BYTES,
    RECORD_BYTES,
    BusyError,
    DamagedError,
    FileIdentity,
    Identity,
    Sidecar,
    StaleError,
    UnfitError,
    digest_of_path,
)
from udedup.vdi.state import UNUSED_SECONDS, StateDirectory

FILE = FileIdentity(digest_of_path(Path("/images/disk.raw")), 5, 77, 1 << 30, 1_700_000_000_000_000_000)
IDENTITY = Identity("raw", 1 << 30, (FILE,))
IMAGE = Path("/images/disk.raw")
NOBODY = 65534


def page(number: int) -> bytes:
    """A page of digests, all known."""
    return random.Random(number).randbytes(PAGE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / IDENTITY.name


@pytest.fixture
def sidecar(path: Path) -> Iterator[Sidecar]:
    made = Sidecar.create(path, IDENTITY)
    yield made
    made.close()


def reopened(path: Path, identity: Identity = IDENTITY) -> list[bytes | None]:
    """Pages 0 to 7 as another process would find them."""
    found = Sidecar.open(path, identity)
    try:
        return found.read(0, 8)
    finally:
        found.close()


def test_written_pages_are_found_and_no_others(sidecar: Sidecar, path: Path) -> None:
    sidecar.write({1: page(1), 2: page(2), 5: page(5)})
    expected = [None, page(1), page(2), None, None, page(5), None, None]
    assert sidecar.read(0, 8) == expected
    assert reopened(path) == expected


def test_it_is_as_sparse_as_what_was_read(sidecar: Sidecar, path: Path) -> None:
    """The last page of a disk of 16 TiB."""
    last = (16 << 40) // (1 << 20) - 1
    sidecar.write({last: page(1)})
    assert sidecar.read(last, 1) == [page(1)]
    assert sidecar.read(last // 2, 8) == [None] * 8
    assert path.stat().st_size > 60 << 30
    assert path.stat().st_blocks * 512 < 64 << 10


def test_what_others_know_is_not_lost(sidecar: Sidecar, path: Path) -> None:
    """Two writers, each with half of a page, the digests of which don't come in the other's way."""
    half = PAGE_BYTES // 2
    other = Sidecar.open(path, IDENTITY)
    sidecar.write({0: page(0)[:half] + bytes(half)})
    other.write({0: bytes(half) + page(0)[half:]})
    assert sidecar.read(0, 1) == [page(0)]
    other.write({0: bytes(half) + page(1)[half:]}, overwrite={0})
    assert sidecar.read(0, 1) == [bytes(half) + page(1)[half:]]
    other.close()


def other(**changes: object) -> Identity:
    return Identity("raw", 1 << 30, (msgspec.structs.replace(FILE, **changes),))


@pytest.mark.parametrize(
    "identity",
    [
        other(size=(1 << 30) + 1),
        other(mtime_ns=FILE.mtime_ns + 1),
        other(inode=78),
        other(device=6),
        other(path=digest_of_path(Path("/images/moved.raw"))),
        Identity("qcow2", 1 << 30, (FILE,)),
        Identity("raw", 1 << 31, (FILE,)),
        Identity("raw", 1 << 30, (FILE, FILE)),
    ],
)
def test_digests_of_another_image_are_not_taken(sidecar: Sidecar, path: Path, identity: Identity) -> None:
    sidecar.write({0: page(0)})
    with pytest.raises(StaleError):
        reopened(path, identity)


def test_backing_files_count(path: Path) -> None:
    """A change of the last file of a chain."""
    chain = Identity("qcow2", 1 << 30, (FILE, FILE, FILE))
    Sidecar.create(path, chain).close()
    reopened(path, chain)
    touched = msgspec.structs.replace(FILE, mtime_ns=1)
    with pytest.raises(StaleError):
        reopened(path, Identity("qcow2", 1 << 30, (FILE, FILE, touched)))


def test_names_go_by_path_and_place_and_format() -> None:
    names = {
        identity.name
        for identity in (
            IDENTITY,
            other(inode=78),
            other(device=6),
            other(path=digest_of_path(Path("/images/moved.raw"))),
            Identity("qcow2", 1 << 30, (FILE,)),
        )
    }
    assert len(names) == 5
    assert other(size=1, mtime_ns=1).name == IDENTITY.name


def test_longest_chain_fits(path: Path) -> None:
    widest = FileIdentity(bytes(16), (1 << 64) - 1, (1 << 64) - 1, (1 << 63) - 1, (1 << 63) - 1)
    chain = Identity("qcow2", (1 << 63) - 1, (widest,) * 64)
    Sidecar.create(path, chain).close()
    assert reopened(path, chain) == [None] * 8


# ---- damage ----


@attrs.frozen
class Damage:
    """Bytes that are put over a file, which is cut before or after."""

    place: int
    content: bytes
    end: int | None


DAMAGES = st.builds(
    Damage,
    st.integers(0, HEADER_BYTES + 8 * RECORD_BYTES),
    st.binary(max_size=64),
    st.none() | st.integers(0, HEADER_BYTES + 8 * RECORD_BYTES),
)


@settings(max_examples=100, deadline=None)
@given(damages=st.lists(DAMAGES, min_size=1, max_size=3))
def test_whatever_is_damaged_no_wrong_digest_comes_out(damages: list[Damage]) -> None:
    """Each page is found as it was written, or as never written where that is what's there, or the file is refused."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        made = Sidecar.create(path, IDENTITY)
        made.write({1: page(1), 2: page(2), 7: page(7)})
        made.close()
        raw = bytearray(path.read_bytes())
        for damage in damages:
            raw[damage.place : damage.place + len(damage.content)] = damage.content
            del raw[len(raw) if damage.end is None else damage.end :]
        path.write_bytes(raw)
        try:
            found = reopened(path)
        except DamagedError:
            return
        for number, digests in enumerate(found):
            assert digests in (None, page(number))


@pytest.mark.parametrize("place", [0, 16, 40, 60, HEADER_BYTES + 1, HEADER_BYTES + RECORD_BYTES - 1])
def test_a_changed_bit_is_noticed(sidecar: Sidecar, path: Path, place: int) -> None:
    sidecar.write({0: page(0)})
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedError):
        reopened(path)


def test_records_of_another_page_or_an_earlier_file_are_noticed(sidecar: Sidecar, path: Path) -> None:
    """Blocks of the disk that were written for something else, whole."""
    sidecar.write({0: page(0)})
    raw = path.read_bytes()
    record = raw[HEADER_BYTES : HEADER_BYTES + RECORD_BYTES]
    path.write_bytes(raw + record)
    with pytest.raises(DamagedError):
        reopened(path)
    Sidecar.create(path, IDENTITY).close()
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(record)
    with pytest.raises(DamagedError):
        reopened(path)


def test_every_cut_of_a_write_is_noticed_or_whole(tmp_path: Path) -> None:
    """A crash in the middle of writing over a page: at each sector, what is behind it still is what was there."""
    path = tmp_path / "x"
    made = Sidecar.create(path, IDENTITY)
    made.write({0: page(0), 1: page(1)})
    before = path.read_bytes()
    made.write({0: page(8), 1: page(9)}, overwrite={0, 1})
    after = path.read_bytes()
    made.close()
    wholes = 0
    for cut in range(0, len(after), 512):
        path.write_bytes(after[:cut] + before[cut:])
        try:
            found = reopened(path)
        except DamagedError:
            continue
        wholes += 1
        assert found[0] in (page(0), page(8))
        assert found[1] in (page(1), page(9))
    assert wholes < len(after) // 512


WRITER = """
import random, sys
from pathlib import Path
from vdi.test_sidecar import IDENTITY, page
from udedup.vdi.sidecar import Sidecar
path, seed = Path(sys.argv[1]), int(sys.argv[2])
chooser = random.Random(seed)
print("ready", flush=True)
while True:
    known = path.exists() and chooser.random() < 0.9
    sidecar = Sidecar.open(path, IDENTITY) if known else Sidecar.create(path, IDENTITY)
    for _ in range(chooser.randrange(20)):
        numbers = chooser.sample(range(8), 3)
        sidecar.write({number: page(number) for number in numbers}, overwrite=numbers[:1])
    sidecar.close()
"""


def test_writers_may_be_killed_at_any_time(path: Path) -> None:
    """Two at a time, 8 times: what the next one finds is what was written, or it is found out."""
    for attempt in range(8):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, path, str(2 * attempt + number)], stdout=subprocess.PIPE)
            for number in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(random.Random(attempt).random() * 0.05)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        try:
            found = reopened(path)
        except (DamagedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            continue
        assert all(digests in (None, page(number)) for number, digests in enumerate(found))


# ---- who may write, and when ----


def test_others_sidecars_are_refused(sidecar: Sidecar, path: Path) -> None:
    sidecar.write({0: page(0)})
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        with pytest.raises(UnfitError, match="somebody else"):
            reopened(path)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(UnfitError, match="somebody else"):
            reopened(path)
        os.chown(path, 0, 0)
    assert reopened(path)[0] == page(0)


def test_links_and_pipes_are_not_followed(sidecar: Sidecar, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        reopened(link)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UnfitError):
        reopened(tmp_path / "pipe")


def test_who_holds_the_lock_is_not_waited_for_long(
    sidecar: Sidecar, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udedup.vdi.sidecar.LOCK_SECONDS", 0.05)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            sidecar.read(0, 1)
        fcntl.flock(file, fcntl.LOCK_SH)
        assert sidecar.read(0, 1) == [None]
        with pytest.raises(BusyError):
            sidecar.write({0: page(0)})


def test_replaced(sidecar: Sidecar, path: Path) -> None:
    assert not sidecar.replaced
    Sidecar.create(path, IDENTITY).close()
    assert sidecar.replaced
    # It goes nowhere.
    sidecar.write({0: page(0)})
    assert reopened(path) == [None] * 8


# ---- the directory ----


def test_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    StateDirectory.open(tmp_path / "state" / "udedup")
    assert (tmp_path / "state" / "udedup").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_of_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(UdedupError, match="others may write to it"):
        StateDirectory.open(tmp_path)


def test_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UdedupError, match="--state-dir"):
        StateDirectory.open(tmp_path / "file")


def test_damaged_sidecar_is_dropped_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o700)
    state = StateDirectory.open(tmp_path)
    path = tmp_path / IDENTITY.name
    path.write_bytes(b"nonsense")
    path.chmod(0o600)
    assert state.find(IMAGE, IDENTITY) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"image {IMAGE}: its digests in {path} are dropped: the file is damaged: its header is wrong"
    ]
    assert not path.exists()
    made = state.find_or_create(IMAGE, IDENTITY)
    found = state.find_or_create(IMAGE, IDENTITY)
    assert not made.replaced
    made.write({0: EMPTY_PAGE})
    made.close()
    found.close()


def test_sidecar_of_before_a_change_is_dropped_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o700)
    caplog.set_level(logging.INFO)
    state = StateDirectory.open(tmp_path)
    state.create(IDENTITY).close()
    assert state.find(IMAGE, other(mtime_ns=5)) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert list(tmp_path.iterdir()) == []


def test_unused_and_half_made_ones_are_tidied_up(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    state = StateDirectory.open(tmp_path)
    state.create(IDENTITY).close()
    old, half = tmp_path / other(inode=78).name, tmp_path / ".abc.digests"
    state.create(other(inode=78)).close()
    half.touch()
    (tmp_path / "notes").touch()
    for path in (old, half, tmp_path / "notes"):
        os.utime(path, (0, time.time() - UNUSED_SECONDS - 10))
    StateDirectory.open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([IDENTITY.name, "notes"])
    os.utime(tmp_path / IDENTITY.name, (0, 0))
    found = state.find(IMAGE, IDENTITY)
    assert found is not None
    found.close()
    state.tidy()
    assert (tmp_path / IDENTITY.name).exists()
