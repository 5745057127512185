"""Restore to a file: whole and durable under its name, or not there; and nothing that is there is spoilt."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from incbak import durable, newfile
from incbak.disk.file import open_disk
from incbak.errors import DamagedError, DurabilityError, ImageInUseError, RestoreError, UsageError
from incbak.events import Event, Progress, Warned
from incbak.extents import Extent
from incbak.repo.tree import FANOUT
from incbak.restore import flushing
from incbak.restore.images import InPlaceTarget
from incbak.restore.restore import Restored, restore_disk
from incbak.restore.targets import FileTarget, open_target
from tests.kit.cli import Incbak, content, differing
from tests.kit.need import need_root
from tests.unit.restore.conftest import CLUSTER, DATA, SIZE, Made

WHOLE = sum(min(CLUSTER, SIZE - n * CLUSTER) for n in DATA)


def _restore(made: Made, path: Path, *, force: bool = False, salvage: bool = False) -> Restored:
    return restore_disk(made.repo, made.record, made.disk, open_target(str(path), SIZE, force=force), salvage=salvage)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to restore to, in a directory with nothing else."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.raw"


def test_a_file_is_what_the_disk_was_and_sparse(made: Made, out: Path) -> None:
    """I1; also the odd tail (faults row 38)."""
    events: list[Event] = []
    done = restore_disk(made.repo, made.record, made.disk, open_target(str(out), SIZE), report=events.append)
    assert differing(content(out, CLUSTER), made.held) == []
    assert (done.size, done.written, done.damaged) == (SIZE, WHOLE, [])
    assert out.stat().st_blocks * 512 < 4 * WHOLE
    assert out.stat().st_mode & 0o777 == 0o600
    assert list(out.parent.iterdir()) == [out]
    assert events[-1] == Progress("vda", SIZE, SIZE)


def test_it_is_synced_before_it_has_its_name(made: Made, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File sync, name, directory sync; and no byte is written after the first."""
    steps: list[str] = []

    def spy(name: str, what: int) -> None:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            where = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[what])
            if where.startswith(str(out.parent)):
                steps.append(f"{name} {Path(where).name}")
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    for name, what in (("fsync", 0), ("link", 1), ("rename", 1), ("pwrite", 0)):
        spy(name, what)
    _restore(made, out)
    first = steps.index("fsync disk.raw.incomplete")
    assert "pwrite disk.raw.incomplete" in steps[:first]
    assert steps[first:] == ["fsync disk.raw.incomplete", "link disk.raw", "fsync out"]


# -- what is there -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_left_alone(made: Made, out: Path) -> None:
    out.write_bytes(b"mine")
    with pytest.raises(RestoreError, match="exists"):
        _restore(made, out)
    assert out.read_bytes() == b"mine"
    assert list(out.parent.iterdir()) == [out]


def test_force_replaces_a_file_and_only_when_the_new_one_is_whole(made: Made, out: Path) -> None:
    out.write_bytes(b"mine")
    made.spoil(made.cluster(5))
    with pytest.raises(DamagedError):
        _restore(made, out, force=True)
    assert out.read_bytes() == b"mine"
    made.spoil(made.cluster(5))
    _restore(made, out, force=True)
    assert differing(content(out, CLUSTER), made.held) == []


@pytest.mark.parametrize("looks", [True, False])
def test_a_file_that_appears_meanwhile_is_left_alone(
    made: Made, out: Path, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """Before the last look, and between that and the name."""
    target = open_target(str(out), SIZE)
    out.write_bytes(b"mine")
    if not looks:
        monkeypatch.setattr(FileTarget, "_check", lambda self: None)
    with pytest.raises(RestoreError, match="exists" if looks else "appeared during the restore"):
        restore_disk(made.repo, made.record, made.disk, target)
    assert out.read_bytes() == b"mine"
    assert list(out.parent.iterdir()) == [out]


def test_an_image_that_is_in_use_is_not_replaced(made: Made, out: Path) -> None:
    """faults row 82: at the beginning, and when it came into use during the restore."""
    out.write_bytes(b"mine")
    disk = open_disk(out)
    with pytest.raises(ImageInUseError):
        _restore(made, out, force=True)
    disk.close()
    target = open_target(str(out), SIZE, force=True)
    disk = open_disk(out)
    with pytest.raises(ImageInUseError):
        restore_disk(made.repo, made.record, made.disk, target)
    disk.close()
    assert out.read_bytes() == b"mine"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_refused(made: Made, out: Path, kind: str) -> None:
    if kind == "directory":
        out.mkdir()
    else:
        os.mkfifo(out)
    with pytest.raises(RestoreError, match="neither a file nor a block device"):
        _restore(made, out, force=True)


def test_a_link_is_followed_to_the_file_it_names(made: Made, out: Path) -> None:
    real = out.with_name("real.raw")
    real.write_bytes(b"mine")
    out.symlink_to(real)
    _restore(made, out, force=True)
    assert out.is_symlink()
    assert differing(content(real, CLUSTER), made.held) == []


def test_a_planted_link_is_not_followed(made: Made, out: Path, tmp_path: Path) -> None:
    """faults row 75: nothing is written but in its place."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    out.with_name("disk.raw.incomplete").symlink_to(victim)
    with pytest.raises(RestoreError, match="no regular file"):
        _restore(made, out)
    assert victim.read_bytes() == b"mine"


@pytest.mark.root
def test_a_planted_file_of_another_user_is_refused_and_stays(made: Made, out: Path) -> None:
    """It is open to whoever made it: the restored disk would be theirs to read, and to change after it was verified."""
    need_root()
    planted = out.with_name("disk.raw.incomplete")
    planted.touch(0o666)
    os.chown(planted, 65534, 65534)
    with pytest.raises(RestoreError, match=r"of another user \(uid 65534\)"):
        _restore(made, out)
    assert (planted.stat().st_uid, planted.stat().st_size) == (65534, 0)


def _plant(link: Path, to: str | Path) -> None:
    """A link that another user has made."""
    need_root()
    link.symlink_to(to)
    os.lchown(link, 65534, 65534)


@pytest.mark.root
@pytest.mark.parametrize("what", ["there", "missing", "directory", "behind our own link"])
def test_a_link_of_another_user_is_not_followed(made: Made, out: Path, tmp_path: Path, what: str) -> None:
    """Not to a file that would be replaced, nor to a name that a file would get: that of a job of cron, say."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "disk.raw").write_bytes(b"mine")
    where = out
    if what in ("there", "missing"):
        _plant(out, victim / ("disk.raw" if what == "there" else "new"))
    else:
        _plant(out.parent / "sub", victim)
        where = out.parent / "sub" / "disk.raw"
        if what != "directory":
            (tmp_path / "ours").symlink_to(out.parent / "sub")
            where = tmp_path / "ours" / "disk.raw"
    with pytest.raises(UsageError, match=r"link of another user \(uid 65534\)"):
        _restore(made, where, force=True)
    with pytest.raises(UsageError, match="link of another user"):
        FileTarget(where, SIZE, force=True)
    with pytest.raises(UsageError, match="link of another user"):
        InPlaceTarget(where, SIZE)
    assert [p.name for p in victim.iterdir()] == ["disk.raw"]
    assert (victim / "disk.raw").read_bytes() == b"mine"


def test_links_are_followed_within_bounds(tmp_path: Path) -> None:
    """Ours, upwards too; a loop ends."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to("../b/c")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").symlink_to(tmp_path / "a")
    newfile.refuse_foreign_links(tmp_path / "a" / "up" / ".." / "a" / "new")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="too many links"):
        newfile.refuse_foreign_links(tmp_path / "loop" / "new")


@pytest.mark.root
def test_nor_is_one_to_a_device(made: Made, out: Path, loop: Callable[[int], Path]) -> None:
    device = loop(SIZE)
    _plant(out, device)
    with pytest.raises(UsageError, match="link of another user"):
        _restore(made, out)
    with device.open("rb") as f:
        assert set(f.read(65536)) == {0xEE}


def test_whoever_has_a_leftover_open_sees_nothing_of_the_disk(made: Made, out: Path) -> None:
    """A killed restore's, or one that root made for another: it is removed, and created again."""
    planted = out.with_name("disk.raw.incomplete")
    with planted.open("w+b") as theirs:
        planted.chmod(0o666)
        _restore(made, out)
        assert os.fstat(theirs.fileno()).st_size == 0
    assert out.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("force", [True, False])
def test_a_file_that_is_put_in_its_place_is_not_given_its_name(made: Made, out: Path, force: bool) -> None:
    """By who can write to the directory; the file that was written and verified is another."""
    target = open_target(str(out), SIZE, force=force)
    planted = out.with_name("disk.raw.incomplete")
    planted.unlink()
    planted.write_bytes(b"another")
    with pytest.raises(DurabilityError, match="replaced by another process"):
        restore_disk(made.repo, made.record, made.disk, target)
    assert not out.exists()
    assert planted.read_bytes() == b"another"


@pytest.mark.parametrize("where", ["/dev/no-such-disk", "/dev/mapper/no-such-disk", "/dev/disk/../no-such-disk"])
def test_no_file_is_made_below_dev(made: Made, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in memory, under the name of a device that was mistyped."""
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("something is opened"))
    with pytest.raises(UsageError, match="nothing is made below /dev"):
        open_target(where, SIZE)
    assert not Path(where).exists()


def test_nothing_else_is_made_below_dev_either() -> None:
    name = Path(f"/dev/incbak-no-such-{os.getpid()}")
    try:
        with pytest.raises(UsageError, match="below /dev"):
            durable.make_dir(name / "repo")
        with pytest.raises(UsageError, match="below /dev"):
            durable.write_new(name, [b"x"])
    finally:
        shutil.rmtree(name, ignore_errors=True)
        name.unlink(missing_ok=True)
    newfile.refuse_below_dev(Path("/dev/shm/page"))
    newfile.refuse_below_dev(Path("/developer/page"))


def test_two_restores_to_one_file(made: Made, out: Path) -> None:
    target = open_target(str(out), SIZE)
    with pytest.raises(ImageInUseError, match="another restore"):
        open_target(str(out), SIZE)
    restore_disk(made.repo, made.record, made.disk, target)
    assert differing(content(out, CLUSTER), made.held) == []


# -- what fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["cluster", "leaf", "root", "missing"])
def test_what_does_not_verify_is_not_restored(made: Made, out: Path, part: str) -> None:
    """I1: nothing under the name, nothing beside it, and the backup is named."""
    tree = made.repo.tree(made.disk)
    if part == "missing":
        (pack,) = (made.repo.storage.root / "packs").iterdir()
        pack.unlink()
    else:
        made.spoil({"cluster": made.cluster(5), "leaf": tree.leaf_digest(2), "root": tree.root}[part])
    with pytest.raises(DamagedError) as caught:
        _restore(made, out)
    assert "vda" in str(caught.value)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ("cluster", [Extent(5 * CLUSTER, CLUSTER)]),
        ("last", [Extent(3 * FANOUT * CLUSTER, 1000)]),
        ("leaf", [Extent(2 * FANOUT * CLUSTER, FANOUT * CLUSTER)]),
    ],
)
def test_salvage_gets_what_is_whole(made: Made, out: Path, part: str, lost: list[Extent]) -> None:
    """The rest is zeroes, and where they are is told."""
    leaf = made.repo.tree(made.disk).leaf_digest(2)
    made.spoil({"cluster": made.cluster(5), "last": made.cluster(3 * FANOUT), "leaf": leaf}[part])
    events: list[Event] = []
    target = open_target(str(out), SIZE)
    done = restore_disk(made.repo, made.record, made.disk, target, salvage=True, report=events.append)
    assert done.damaged == lost
    assert any(isinstance(e, Warned) and str(lost[0].offset) in e.text for e in events)
    kept = {at: piece for at, piece in made.held.items() if at < 0 or not lost[0].offset <= at < lost[0].end}
    assert differing(content(out, CLUSTER), kept) == []


def test_a_cluster_of_another_length_is_damage(made: Made, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: a tree may name any blob; one that is longer would spoil its neighbour, or write past the end."""
    reader = made.repo.reader()
    number = made.cluster(2)
    read_many = type(reader).read_many

    def lengthened(self: object, digests: object) -> object:
        for row, data in read_many(self, digests):  # type: ignore[arg-type]
            yield row, bytes(data) + b"x" if digests[row].tobytes() == number else data  # type: ignore[index,arg-type]

    monkeypatch.setattr(type(reader), "read_many", lengthened)
    with pytest.raises(DamagedError, match=f"{CLUSTER} bytes in 1 places"):
        _restore(made, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("point", ["durable.written", "durable.synced", "durable.named"])
def test_a_sync_that_fails_leaves_nothing(made: Made, out: Path, point: str) -> None:
    """faults row 31: not even under the temporary name, unless the name was there before the failure."""
    durable.arm(fault_at=f"{point}:1:EIO")
    with pytest.raises(DurabilityError):
        _restore(made, out)
    assert list(out.parent.iterdir()) == ([out] if point == "durable.named" else [])


def test_a_sync_on_the_way_that_fails_fails_the_restore(made: Made, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 31: the kernel tells once; the sync in the end goes well."""
    monkeypatch.setattr(flushing, "STEP", WHOLE)  # it is begun with the last write
    durable.arm(fault_at="durable.sync:1:EIO")
    with pytest.raises(DurabilityError, match=r"cannot sync .*disk\.raw: Input/output error"):
        _restore(made, out)
    assert list(out.parent.iterdir()) == []


def test_the_first_sync_on_the_way_that_fails_is_final(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "STEP", 10)
    durable.arm(fault_at="durable.sync:2:EIO")
    with out.open("wb") as file:
        flush = flushing.Flushing(file.fileno(), "it")
        for _ in range(2):
            for count in (9, 1):
                flush.wrote(count)
            assert flush._last
            flush._last.exception()
        for act in (lambda: flush.wrote(10), lambda: flush.wrote(10), flush.finish):
            with pytest.raises(DurabilityError, match="cannot sync it"):
                act()
        flush.close()
        flush.close()
    assert durable.passed("durable.sync") == 2


def test_a_full_disk_says_so_and_leaves_nothing(made: Made, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 28."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = open_target(str(out), SIZE)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RestoreError, match="No space left"):
        restore_disk(made.repo, made.record, made.disk, target)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "point",
    ["restore.opened", "restore.written", "durable.written", "durable.synced", "durable.named", "restore.named"],
)
def test_killed_at_any_step_the_name_stands_for_a_whole_disk(made: Made, out: Path, point: str) -> None:
    """faults row 16; and the next restore is not hindered by what was left."""
    incbak = Incbak(made.repo.storage.root.parent)
    ran = incbak.run("-q", "restore", "latest", out, env={"INCBAK_CRASH_AT": point})
    assert ran.code == -signal.SIGKILL
    assert out.exists() == (point in ("durable.named", "restore.named"))
    if out.exists():
        assert differing(content(out, CLUSTER), made.held) == []
    _restore(made, out, force=True)
    assert differing(content(out, CLUSTER), made.held) == []
    assert list(out.parent.iterdir()) == [out]


def test_what_an_earlier_restore_left_does_not_shine_through(made: Made, out: Path) -> None:
    """The temporary file is taken over, so it must be blank again."""
    out.with_name("disk.raw.incomplete").write_bytes(b"\xee" * (SIZE + CLUSTER))
    _restore(made, out)
    assert differing(content(out, CLUSTER), made.held) == []
