"""``incbak bitmap show``: a map of what was written since the backup, and of what changes from backup to backup."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incbak.report.terrain import CELLS, COLUMNS, draw
from tests.story.test_story import CLUSTER, REGION, SIZE, Story

CLUSTERS = -(-SIZE // CLUSTER)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def _cells(lines: list[str], label: str) -> str:
    """The characters of the map below the line that begins with ``label``."""
    at = next(n for n, line in enumerate(lines) if line.startswith(label))
    rows = [m[1] for line in lines[at + 1 : at + 5] if (m := re.search(r"^ *[\d.]+ \w+ \[(.{64})\]$", line))]
    return "".join(rows)


def _cell(offset: int) -> int:
    return next(n for n in range(CELLS) if CLUSTERS * (n + 1) // CELLS > offset // CLUSTER)


def test_the_map_shows_what_was_written_and_how_often(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        story.write(serve, 0, REGION)
        story.back_up(serve)
        story.write(serve, 0)
        story.back_up(serve)
        story.write(serve, 2 * REGION, SIZE - 5000)
        lines = story.incbak("bitmap", "show", "vm", "--history").out.splitlines()
    dirty, often = _cells(lines, "map "), _cells(lines, "history ")
    assert (len(dirty), len(often)) == (CELLS, CELLS)
    assert {n for n, char in enumerate(dirty) if char != " "} == {_cell(2 * REGION), CELLS - 1}
    assert {n: char for n, char in enumerate(often) if char != " "} == {0: "@", _cell(REGION): "+"}
    assert "in how many of 2 steps" in "\n".join(lines)
    assert any("a character is 768.0 KiB; '.' to '@'" in line for line in lines)


def test_a_disk_that_was_written_all_over_is_dark(story: Story) -> None:
    with story.serving() as serve, closing(serve.connect("vda")) as client:
        story.back_up(serve, "full")
        for offset in range(0, REGION, CLUSTER):
            client.write(b"x" * 512, offset)
        lines = story.incbak("bitmap", "show", "vm").out.splitlines()
    cells = _cells(lines, "map ")
    assert cells[: _cell(REGION)] == "@" * _cell(REGION)
    assert cells[_cell(REGION) + 1 :].strip() == ""


def test_without_backups_there_is_no_history(story: Story) -> None:
    with story.serving() as serve:
        story.back_up(serve, "full")
        assert "no two backups to compare" in story.incbak("bitmap", "show", "vm", "--history").out
        ran = story.incbak.run("bitmap", "show", "vm", "--history", "-r", story.root / "nothing")
    assert (ran.code, ran.out) == (10, "")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=CELLS))
def test_nothing_is_hidden_and_nothing_is_overdone(shares: list[float]) -> None:
    lines = draw(shares, 1 << 40, "x")
    text = "".join(re.findall(r"\[(.*)\]", "\n".join(lines[:-1])))
    assert len(text) == len(shares)
    assert all(len(line) == len(lines[0]) for line in lines[: len(shares) // COLUMNS])
    for share, char in zip(shares, text, strict=True):
        assert (char == " ") == (share == 0)
        assert (char == "@") == (share == 1)
