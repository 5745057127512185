"""The ground that everything stands on: extents, units, errors, reasons, host."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incbak import errors, host, units
from incbak.extents import Extent, align_out, intersect, merge, split, total
from incbak.reasons import Reason

SPAN = 64
extent_lists = st.lists(st.builds(Extent, st.integers(0, SPAN), st.integers(0, 20)), max_size=8)


def _bytes(extents: list[Extent]) -> set[int]:
    return {b for e in extents for b in range(e.offset, e.end)}


@given(extent_lists)
def test_merge_covers_the_same_bytes_once(extents: list[Extent]) -> None:
    merged = merge(extents)
    assert _bytes(merged) == _bytes(extents)
    assert total(merged) == len(_bytes(extents))
    assert all(a.end < b.offset for a, b in pairwise(merged))


@given(extent_lists, extent_lists)
def test_intersect_is_the_common_bytes(a: list[Extent], b: list[Extent]) -> None:
    assert _bytes(intersect(merge(a), merge(b))) == _bytes(a) & _bytes(b)


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 64))
def test_split_tiles_at_multiples(offset: int, length: int, at_most: int) -> None:
    """faults row 60: odd offsets and lengths."""
    pieces = list(split(Extent(offset, length), at_most))
    assert pieces[0].offset == offset
    assert pieces[-1].end == offset + length
    assert all(a.end == b.offset and b.offset % at_most == 0 for a, b in pairwise(pieces))
    assert all(p.length <= at_most for p in pieces)


@given(st.integers(0, 200), st.integers(0, 56), st.integers(1, 32))
def test_align_out_covers_whole_units_and_stops_at_the_size(offset: int, length: int, unit: int) -> None:
    """faults row 38: a last partial unit is cut exactly."""
    size = 256
    out = align_out(Extent(offset, length), unit, size)
    assert out.offset % unit == 0
    assert out.offset <= offset
    assert out.end >= offset + length
    assert out.end == size or out.end % unit == 0


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65536), ("64k", 65536), ("64KiB", 65536), ("1.5G", 3 << 29), ("2 T", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1x", "1e3", "0x10", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="not a size"):
        units.parse_size(text)


def test_durations_and_formats() -> None:
    assert [units.parse_duration(t) for t in ("90", "90s", "5m", "2h", "1d", "500ms")] == [
        90,
        90,
        300,
        7200,
        86400,
        0.5,
    ]
    assert [units.format_size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [units.format_duration(s) for s in (0.42, 12.3, 185, 7620)] == ["0.42 s", "12.3 s", "3m05s", "2h07m"]


@pytest.mark.parametrize(
    "text", ["8589934592G", "9" * 400, "9" * 400 + ".5", "9" * 5000, "9" * 5000 + "k", "1" * 309 + "P"]
)
def test_a_size_beyond_any_disk_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="too large"):
        units.parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "100000000000", "9999999w"])
def test_a_duration_that_no_clock_can_wait_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="too long"):
        units.parse_duration(text)


DAY = 86400


@pytest.mark.parametrize(
    ("text", "days"),
    [("6m", 186), ("1y", 366), ("2w", 14), ("14d", 14), ("24h", 1), ("1y5m7d2h", 366 + 155 + 7 + 2 / 24), (" 3D ", 3)],
)
def test_a_time_to_keep_backups_for_is_read_as_restic_reads_it(text: str, days: float) -> None:
    assert units.parse_retention(text) == days * DAY


@pytest.mark.parametrize(
    "text", ["", "30", "90s", "5min", "6 m", "1.5d", "-1d", "7d1y", "1d1d", "soon", "9" * 5000 + "y"]
)
def test_a_time_to_keep_backups_for_that_could_mean_another_is_refused(text: str) -> None:
    """What `parse_duration` takes as seconds or minutes would remove backups that were meant to stay."""
    with pytest.raises(errors.UsageError, match="not a time to keep backups for"):
        units.parse_retention(text)


@pytest.mark.parametrize("text", ["100y", "999999999h", "999999999y"])
def test_a_time_to_keep_backups_for_beyond_any_clock_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="too long"):
        units.parse_retention(text)


def test_every_reason_has_a_text() -> None:
    assert all(reason.text for reason in Reason)


def _all_errors(cls: type[errors.IncbakError]) -> list[type[errors.IncbakError]]:
    return [cls] + [e for sub in cls.__subclasses__() for e in _all_errors(sub)]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Each class is drawn, with its exit code where it is not 1."""
    lines = (errors.__doc__ or "").splitlines()
    for cls in _all_errors(errors.IncbakError):
        if cls.__module__ != "incbak.errors":
            continue
        line = next(text for text in lines if f" {cls.__name__} " in f"{text.replace('-- ', ' ')} ")
        assert cls.exit_code == 1 or f" {cls.exit_code} " in f"{line} "


def test_host_tells_boot_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 50: a pid alone does not identify a process."""
    assert len(host.boot_id()) == 16
    (tmp_path / "boot").write_text("00000000-0000-0000-0000-0000000000ff\n")
    monkeypatch.setenv("INCBAK_BOOT_ID_FILE", str(tmp_path / "boot"))
    assert host.boot_id()[-1] == 0xFF
    child = subprocess.Popen(["sleep", "60"])
    born = host.start_time(child.pid)
    assert born is not None
    assert born >= (host.start_time(os.getpid()) or 0)
    child.kill()
    child.wait()
    assert host.start_time(child.pid) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (TimeoutError(), "TimeoutError, with no further text"),
        (ValueError("  "), "ValueError, with no further text"),
        (OSError(5, "rot"), "[Errno 5] rot"),
    ],
)
def test_an_exception_without_text_says_what_it_is(error: Exception, said: str) -> None:
    assert errors.text_of(error) == said


def test_counts_agree_with_their_nouns() -> None:
    assert [units.counted(n, "pack") for n in (0, 1, 2)] == ["0 packs", "1 pack", "2 packs"]
    assert units.counted(2, "directory", "directories") == "2 directories"
