"""durable: a file is there whole or not at all, whatever step dies or fails."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from incbak import durable
from incbak.errors import DurabilityError

WRITE_STEPS = ["durable.created", "durable.written", "durable.synced", "durable.named", "durable.dir-synced"]
CHILD = """
import sys
from pathlib import Path
from incbak import durable
durable.write_new(Path(sys.argv[1]), [b"new " * 1000, memoryview(b"end")], replace=sys.argv[2] == "replace")
"""


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()


def _trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the order of the system calls that matter."""
    calls: list[str] = []
    for name in ("fsync", "link", "rename", "unlink"):
        real = getattr(os, name)

        def spy(*args: object, _name: str = name, _real: object = real, **kwargs: object) -> object:
            if _name == "fsync":
                target = os.readlink(f"/proc/self/fd/{args[0]}")
                calls.append("fsync dir" if os.path.isdir(target) else "fsync file")
            else:
                calls.append(_name)
            return _real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    return calls


def test_the_order_is_file_sync_name_directory_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 19: the name never comes before the content, and the directory entry is made durable."""
    calls = _trace(monkeypatch)
    durable.write_new(tmp_path / "a", [b"x"])
    assert calls == ["fsync file", "link", "unlink", "fsync dir"]
    calls.clear()
    durable.write_new(tmp_path / "a", [b"y"], replace=True)
    assert calls == ["fsync file", "rename", "fsync dir"]
    calls.clear()
    (tmp_path / "t").write_bytes(b"z")
    durable.commit(tmp_path / "t", tmp_path / "b")
    assert calls == ["fsync file", "link", "unlink", "fsync dir"]
    calls.clear()
    durable.remove(tmp_path / "b")
    assert calls == ["unlink", "fsync dir"]


@pytest.mark.parametrize("step", WRITE_STEPS)
@pytest.mark.parametrize("mode", ["new", "replace"])
def test_killed_at_any_step_the_file_is_old_or_new(tmp_path: Path, step: str, mode: str) -> None:
    """faults rows 14, 19: SIGKILL at each numbered step."""
    path = tmp_path / "object"
    if mode == "replace":
        path.write_bytes(b"old")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), mode],
        env={**os.environ, "INCBAK_CRASH_AT": step},
        timeout=60,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    new = b"new " * 1000 + b"end"
    if step in ("durable.named", "durable.dir-synced"):
        assert path.read_bytes() == new
    elif mode == "replace":
        assert path.read_bytes() == b"old"
    else:
        assert not path.exists()


@pytest.mark.parametrize("step", WRITE_STEPS[:3])
def test_a_failed_step_leaves_nothing_and_says_so(tmp_path: Path, step: str) -> None:
    """faults rows 28, 31: ENOSPC or EIO at any step before the name; the temporary file goes too."""
    durable.arm(fault_at=f"{step}:1:ENOSPC")
    with pytest.raises(DurabilityError, match="object: No space left"):
        durable.write_new(tmp_path / "object", [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        durable.write_new(path, [b"theirs"])
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_planted_symlink_is_not_followed(tmp_path: Path) -> None:
    """faults row 75: the name in the way is a link to somebody's file."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    link = tmp_path / "object"
    link.symlink_to(victim)
    with pytest.raises(FileExistsError):
        durable.write_new(link, [b"x"])
    durable.write_new(link, [b"x"], replace=True)
    assert victim.read_bytes() == b"precious"
    assert not link.is_symlink()


def test_a_fault_can_strike_once_or_from_then_on(tmp_path: Path) -> None:
    durable.arm(fault_at="durable.written:2:EIO")
    durable.write_new(tmp_path / "a", [b"x"])
    with pytest.raises(DurabilityError):
        durable.write_new(tmp_path / "b", [b"x"])
    durable.write_new(tmp_path / "c", [b"x"])
    durable.arm(fault_at="durable.written:1+:EIO")
    for name in ("d", "e"):
        with pytest.raises(DurabilityError):
            durable.write_new(tmp_path / name, [b"x"])


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    durable.make_dir(tmp_path / "a" / "b")
    durable.write_new(tmp_path / "a" / "b" / "c", [b"x"])
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o600


def test_a_sync_that_fails_is_named(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(DurabilityError, match="cannot sync the thing: Invalid argument"):
        durable.sync_file(write_end, "the thing")
    os.close(read_end)
    os.close(write_end)


def test_any_step_can_be_struck_by_its_number(tmp_path: Path) -> None:
    """``*`` counts every step; `passed` says how many there were."""
    durable.arm("*:0")
    durable.write_new(tmp_path / "a", [b"x"])
    steps = durable.passed()
    assert steps >= len(WRITE_STEPS)
    for number in range(1, steps + 1):
        durable.arm(fault_at=f"*:{number}:EIO")
        with pytest.raises((DurabilityError, OSError), match="Input/output error"):
            durable.write_new(tmp_path / f"b{number}", [b"x"])
        assert durable.passed() == number
    durable.arm(fault_at=f"*:{steps + 1}:EIO")
    durable.write_new(tmp_path / "c", [b"x"])


def _refusing(code: int, *names: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:

            def refuse(*args: object, **kwargs: object) -> None:
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(os, name, refuse)

    return patch


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("renameat2", [True, False])
def test_without_hard_links_it_is_renamed_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, renameat2: bool
) -> None:
    _refusing(code, "link")(monkeypatch)
    if not renameat2:
        monkeypatch.setattr(durable, "_RENAME_NOREPLACE", 1 << 20)  # EINVAL
    durable.write_new(tmp_path / "a", [b"x"])
    (tmp_path / "t").write_bytes(b"y")
    durable.commit(tmp_path / "t", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "a", [b"z"])
    assert (tmp_path / "a").read_bytes() == b"x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(errno.EIO, "link")(monkeypatch)
    with pytest.raises(DurabilityError):
        durable.write_new(tmp_path / "a", [b"x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_only_a_directory_that_cannot_be_synced_at_all_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fatal: bool
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DurabilityError, match="directory") if fatal else nullcontext():
        durable.write_new(tmp_path / "a", [b"x"])


def test_a_file_that_cannot_be_synced_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(errno.EINVAL, "fsync")(monkeypatch)
    with pytest.raises(DurabilityError):
        durable.write_new(tmp_path / "a", [b"x"])
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_is_removed_only_when_its_process_is_dead(tmp_path: Path) -> None:
    path = tmp_path / f".x{durable.HELD}"
    fd = durable.create_held(path)
    assert not durable.remove_abandoned(path)
    assert path.exists()
    os.close(fd)
    assert durable.remove_abandoned(path)
    assert not path.exists()
    assert not durable.remove_abandoned(path)


def test_one_that_is_removed_before_it_is_held_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f".x{durable.HELD}"
    real, removed = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    fd = durable.create_held(path)
    assert os.path.samestat(os.fstat(fd), path.stat())
    os.close(fd)
