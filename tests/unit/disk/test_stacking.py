"""What holds bytes of an image: device-mapper, md and partitions as sysfs shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.disk import stacking
from incbak.disk.stacking import Key, Loop, share_bytes, stack_of
from tests.kit.sysfs import Sysfs


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    return Sysfs(tmp_path / "sys", monkeypatch)


def _sets(key: Key) -> tuple[set[Key], set[Key]]:
    stack = stack_of(key)
    assert stack.complete
    return set(stack.image), set(stack.beside)


def test_a_logical_volume_is_not_its_neighbours(system: Sysfs) -> None:
    """But it lies on the partition and the disk below it; and the disk is all that is built on it."""
    disk = system.device("sda")
    boot = system.partition("sda", "sda1", 0, 1024)
    physical = system.partition("sda", "sda2", 1024, 1 << 19)
    ours, root = system.device("dm-0"), system.device("dm-1")
    crypt = system.device("dm-2")
    system.built("dm-0", on="sda/sda2")
    system.built("dm-1", on="sda/sda2")
    system.built("dm-2", on="dm-0")
    assert _sets(ours) == ({ours, crypt}, {physical, disk})
    assert _sets(crypt) == ({crypt}, {ours, physical, disk})
    assert _sets(boot) == ({boot}, {disk})
    assert _sets(physical) == ({physical, ours, root, crypt}, {disk})
    assert _sets(disk) == ({disk, boot, physical, ours, root, crypt}, set())


def test_an_array_lies_on_its_members(system: Sysfs) -> None:
    array, spare = system.device("md0"), system.device("md1")
    members = []
    for disk in ("sda", "sdb"):
        whole = system.device(disk)
        members += [whole, system.partition(disk, f"{disk}1", 8, 1024)]
        system.partition(disk, f"{disk}2", 2048, 1024)
        system.built("md0", on=f"{disk}/{disk}1")
        system.built("md1", on=f"{disk}/{disk}2")
    inner = system.partition("md0", "md0p1", 8, 64)
    assert _sets(array) == ({array, inner}, set(members))
    assert _sets(inner) == ({inner}, {array, *members})
    assert spare not in stack_of(members[1]).keys
    assert _sets(members[1]) == ({members[1], array, inner}, {members[0]})


def test_images_that_have_bytes_in_common(system: Sysfs) -> None:
    """A disk and its partition, or a volume and what it lies on; not two partitions, nor two volumes."""
    disk = system.device("sda")
    boot = system.partition("sda", "sda1", 0, 1024)
    physical = system.partition("sda", "sda2", 1024, 1 << 19)
    ours, root = system.device("dm-0"), system.device("dm-1")
    system.built("dm-0", on="sda/sda2")
    system.built("dm-1", on="sda/sda2")
    assert share_bytes({"vda": [boot], "vdb": [physical]}) is None
    assert share_bytes({"vda": [ours], "vdb": [root], "vdc": [boot]}) is None
    assert share_bytes({"vda": [root], "vdb": [boot], "vdc": [disk]}) == ("vda", "vdc")
    assert share_bytes({"vda": [boot], "vdb": [root], "vdc": [physical]}) == ("vdb", "vdc")
    assert share_bytes({"vda": [boot], "vdb": [boot]}) == ("vda", "vdb")
    assert share_bytes({}) is None


def test_partitions_that_overlap(system: Sysfs) -> None:
    """An extended partition, or one that a wrong table made; and what is built on what lies within the image."""
    disk = system.device("sda", size=4096)
    image = system.partition("sda", "sda1", 0, 1024)
    within, across, apart = (
        system.partition("sda", f"sda{n}", start, 1024 if n > 2 else 512)
        for n, start in ((2, 256), (3, 512), (4, 1024))
    )
    built = [system.device(f"dm-{n}") for n in (2, 3, 4)]
    for n in (2, 3, 4):
        system.built(f"dm-{n}", on=f"sda/sda{n}")
    assert _sets(image) == ({image}, {disk, within, across, built[0]})
    assert apart not in stack_of(image).keys


def test_a_file_behind_a_loop_device_and_what_else_shows_it(system: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    file, size = Key(5, 7), 1024 * 512
    whole, head, tail = (system.device(f"loop{n}", size=1024) for n in range(3))
    loops = [
        Loop("loop0", whole, file, (0, size), False),
        Loop("loop1", head, file, (0, size // 2), False),
        Loop("loop2", tail, file, (size // 2, 1 << 63), True),
    ]
    monkeypatch.setattr(stacking, "_loops", lambda: iter(loops))
    mapped = system.device("dm-0")
    system.built("dm-0", on="loop0")
    for device, image, beside, met in (
        (file, {file, whole, head, tail, mapped}, set(), loops),
        (whole, {whole, mapped}, {file, head, tail}, loops[1:2]),
        (head, {head}, {file, whole}, loops[:1]),
        (mapped, {mapped}, {whole, file}, []),
    ):
        assert _sets(device) == (image, beside)
        assert list(stack_of(device).loops) == met


def test_a_walk_has_bounds(system: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it has not seen is not taken for unused."""
    keys = [system.device(f"dm-{n}") for n in range(4)]
    for n in range(3):
        system.built(f"dm-{n + 1}", on=f"dm-{n}")
    assert stack_of(keys[0]).complete
    monkeypatch.setattr(stacking, "DEPTH", 2)
    assert not stack_of(keys[0]).complete
    assert not stack_of(keys[3]).complete
    monkeypatch.setattr(stacking, "DEPTH", 16)
    monkeypatch.setattr(stacking, "MOST", 2)
    assert not stack_of(keys[0]).complete
    assert not stack_of(keys[3]).complete
