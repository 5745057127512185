"""A write to a block device shows, through whatever it was made; a write beside it does not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from incbak import device
from tests.kit.devices import loop_device, partition, written

MIB = 1 << 20


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    (tmp_path / "backing").write_bytes(bytes(4 * MIB))
    return tmp_path / "backing"


class Stack:
    """Devices one on another, gone after the test."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack, self._directory = stack, directory

    def loop(self, backing: Path, *options: str) -> Path:
        return self._stack.enter_context(loop_device(backing, *options))

    def part(self, whole: Path, number: int, start: int = MIB, size: int = MIB) -> Path:
        return self._stack.enter_context(partition(whole, number, start, size, self._directory / f"p{number}"))


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with ExitStack() as stack:
        yield Stack(stack, tmp_path)


def setup_of(told: str) -> str:
    return told.partition(";")[0]


def moved(path: Path, act: Callable[[], object]) -> bool:
    """Whether what is told of the device changes; the set-up stays."""
    before = device.settled(path)
    assert before
    assert device.settled(path) == before
    act()
    after = device.settled(path)
    assert setup_of(after) == setup_of(before)
    return after != before


def test_a_file_below_a_loop_device(backing: Path, stack: Stack) -> None:
    loop = stack.loop(backing)
    assert moved(loop, lambda: written(backing))
    assert moved(loop, lambda: os.utime(backing))
    assert moved(loop, lambda: os.truncate(backing, 5 * MIB))
    assert moved(loop, lambda: written(loop))
    assert not moved(loop, loop.read_bytes)


def test_a_device_below_a_loop_device(backing: Path, stack: Stack) -> None:
    below = stack.loop(backing)
    loop = stack.loop(below, "--offset", str(MIB))
    assert moved(loop, lambda: written(below))
    assert moved(loop, lambda: written(backing))
    assert not moved(loop, below.read_bytes)


def test_a_partition_and_what_is_beside_it(backing: Path, stack: Stack) -> None:
    """Writes to a neighbour are not the partition's; writes through the whole device may be."""
    whole = stack.loop(stack.loop(backing))
    part, neighbour = stack.part(whole, 1), stack.part(whole, 2, start=2 * MIB)

    def counts() -> str:
        return device.settled(part).partition(";")[2].partition("<")[0]  # what is below the loop device moves always

    for path, shows in ((part, True), (neighbour, False), (whole, True), (part, True)):
        before = counts()
        written(path, MIB if path == whole else 0)
        assert (counts() != before) is shows, path


def test_a_partition_at_another_place(backing: Path, stack: Stack, tmp_path: Path) -> None:
    """The same number and size, and no write."""
    whole = stack.loop(backing)
    with partition(whole, 1, MIB, MIB, tmp_path / "p") as part:
        before = device.settled(part)
    with partition(whole, 1, 2 * MIB, MIB, tmp_path / "p") as part:
        assert setup_of(device.settled(part)) != setup_of(before)


def test_a_loop_device_that_shows_another_range(backing: Path, stack: Stack) -> None:
    loops = [stack.loop(backing, *options) for options in ((), ("--offset", "4096"), ("--sizelimit", "8192"))]
    below = {setup_of(device.settled(loop)).partition("<")[2] for loop in loops}
    assert len(below) == 3


@pytest.mark.parametrize("how", ["removed", "renamed", "covered"])
def test_a_file_that_is_not_where_the_kernel_says_tells_nothing(backing: Path, stack: Stack, how: str) -> None:
    """Removed, or hidden below another one of the same name."""
    loop = stack.loop(backing)
    if how == "removed":
        backing.unlink()
    elif how == "renamed":
        backing.rename(backing.with_name("other"))
    else:
        other = backing.with_name("other")
        other.write_bytes(bytes(MIB))
        subprocess.run(["mount", "--bind", other, backing], check=True)
    try:
        assert bool(device.settled(loop)) is (how == "renamed")
    finally:
        if how == "covered":
            subprocess.run(["umount", backing], check=True)


def test_a_device_whose_writes_are_not_counted_tells_nothing(backing: Path, stack: Stack) -> None:
    loop = stack.loop(backing)
    part, switch = stack.part(loop, 1), Path(f"/sys/block/{loop.name}/queue/iostats")
    switch.write_text("0")
    try:
        assert [device.settled(loop), device.settled(part)] == ["", ""]
    finally:
        switch.write_text("1")
    assert device.settled(part)


def _sysfs(directory: Path, whole: str, *parts: str) -> Path:
    """A device's counts: sectors written and discarded."""
    for name, counts in (("", whole), *((f"p{n}", each) for n, each in enumerate(parts))):
        place = directory / name
        place.mkdir(exist_ok=True)
        fields = ["0"] * 17
        fields[6], fields[13] = counts.split()
        (place / "stat").write_text(" ".join(fields))
        if name:
            (place / "partition").write_text("1")
    return directory


def test_counts_that_do_not_stand_still_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour is written between two readings: their difference would hide a write or invent one."""
    place = _sysfs(tmp_path, "100 7", "10 1", "20 2")
    assert device._direct(place) == (70, 4)
    counts, turns = device._counts, iter(range(1000))

    def busy(until: int) -> Callable[[Path], tuple[int, ...]]:
        def read(at: Path) -> tuple[int, ...]:
            if (turn := next(turns)) < until:
                _sysfs(tmp_path, f"{200 + turn} 7", f"{110 + turn} 1", "20 2")
            return counts(at)

        return read

    monkeypatch.setattr(device, "_counts", busy(10))
    assert device._direct(place) == (70, 4)
    monkeypatch.setattr(device, "_counts", busy(1000))
    with pytest.raises(device._UnknownError):
        device._direct(place)


@pytest.mark.parametrize(
    ("time_ns", "now_ns", "may"),
    [
        (10_000_000_001, 10_010_000_000, True),
        (10_000_000_001, 10_030_000_000, False),
        (10_000_000_000, 11_900_000_000, True),
        (10_000_000_000, 12_100_000_000, False),
        (10_000_000_001, 8_000_000_000, False),
        (0, 10_000_000_000, False),
    ],
)
def test_a_time_that_may_come_again(time_ns: int, now_ns: int, may: bool) -> None:
    """Within a tick of the kernel, or the two seconds of some file systems."""
    assert device.may_come_again(time_ns, now_ns) is may


def test_a_time_that_may_come_again_is_waited_out(backing: Path, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, asked = stack.loop(backing), []

    def soon(_time: int, _now: int) -> bool:
        asked.append(1)
        return len(asked) < 3

    monkeypatch.setattr(device, "may_come_again", soon)
    assert device.settled(loop)
    assert len(asked) == 3
