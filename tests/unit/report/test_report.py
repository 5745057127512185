"""The report: a page that holds together whatever is in the repository, and shows what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from incbak.repo.check import check
from incbak.repo.repository import Repository
from incbak.report import page as module
from incbak.report.history import CELLS, collect, disk_map
from incbak.report.page import page
from tests.kit.cli import Incbak
from tests.unit.repo.scene import new
from tests.unit.report.history import HOSTILE, NOW, back_up, eventful

_VOID = {"meta", "!doctype"}
_TAGS = frozenset(
    ("html", "head", "meta", "title", "style", "body", "header", "main", "section", "div", "h1", "h2", "h3", "p", "b",
     "span", "i", "svg", "g", "rect", "circle", "line", "polyline", "text", "details", "summary", "table", "tr", "th",
     "td", "code")
)  # fmt: skip


class Page(HTMLParser):
    """Parses strictly: every element that is opened is closed in its turn, and all are of kinds that do nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.classes: Counter[str] = Counter()
        self.labels: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _TAGS, tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "src", "srcset", "style", "action", "xlink:href"), (tag, name)
            if name == "class":
                self.classes.update((value or "").split())
            if name == "aria-label":
                self.labels.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, *tags: str) -> str:
        """What stands in these elements."""
        return "\n".join(word for tag in tags for word in self.words.get(tag, []))


def _page(repo: Repository) -> tuple[str, Page]:
    made = page(collect(repo, "/backup", NOW))
    return made, Page(made)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report") / "repo"
    eventful(where).close()
    return where


def test_nothing_is_fetched_and_nothing_runs(hundred: Path) -> None:
    made, _ = _page(Repository.open(hundred))
    assert made.startswith(module.MARK)
    assert "default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;" in made
    assert not re.search(r"https?:|//|url\(|@import|javascript:", made.split("<main>")[0].replace("<!--", ""))
    assert "prefers-color-scheme: dark" in made
    assert "width=device-width" in made


def test_a_hundred_backups(hundred: Path) -> None:
    made, parsed = _page(Repository.open(hundred))
    assert len(made) < 200_000
    shown = Counter(name for name in parsed.classes.elements() if name in ("full", "fallback", "incomplete"))
    assert shown == {"full": 4 + 1, "fallback": 2 + 1, "incomplete": 1 + 1}  # days, and the legend
    assert parsed.classes["incremental"] == 100 - 4 - 2 - 1 + 1
    assert (parsed.classes["read"], parsed.classes["stored"]) == (102, 103)  # a dot each, lines, and the legend
    assert "Calendar of 100 backups on 100 days" in parsed.labels
    assert "Map of the disk: 5 of 64 parts changed" in parsed.labels
    assert parsed.text("summary") == "Backups (the newest 30 of 100)"
    assert len(parsed.words["code"]) == module.LISTED
    assert "disk vda failed: no luck" in parsed.text("td")
    assert "vda: the disk was changed while nobody tracked it" in made


def test_hostile_words_are_only_words(tmp_path: Path) -> None:
    """Names, tags, notes, reasons, times: none of them makes an element or an attribute."""
    repo = new(tmp_path / HOSTILE[-3:-1])
    for n in range(3):
        back_up(
            repo,
            HOSTILE,
            HOSTILE,
            [1, 2, n],
            NOW - timedelta(days=n),
            tags=(HOSTILE,),
            notes=(HOSTILE,),
            disk_reason=HOSTILE,
            finished=("2026-11-20T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")[n],
        )
    made, parsed = _page(repo)
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert parsed.text("h2") == shown
    assert f"Changes on {shown}" in parsed.text("h3")
    assert parsed.text("td").count(shown) == 12
    assert not {c for c in made if not c.isprintable()} - {"\n"}
    assert "2 of 3 backups are older, or their date is no date." in parsed.text("p")


def test_an_empty_repository(tmp_path: Path) -> None:
    _, parsed = _page(new(tmp_path / "repo"))
    assert "There are no backups yet." in parsed.text("p")
    assert "svg" not in parsed.words


def test_one_backup_and_a_damaged_record(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    back_up(repo, "web1", "vda", [1, 2], NOW)
    other = back_up(repo, "web2", "vda", [1, 2], NOW)
    (tmp_path / "repo" / "backups" / other.id).write_bytes(b"rot")
    _, parsed = _page(repo)
    assert parsed.text("h2") == "web1"
    assert "There are no two backups to compare." in parsed.text("p")
    assert "1 records of backups cannot be read" in parsed.text("p")


def test_what_was_verified_is_told(hundred: Path) -> None:
    repo = Repository.open(hundred)
    assert "No check has read data yet." in _page(repo)[1].text("p")
    check(repo, read_data=True)
    made = page(collect(repo, "/backup", NOW.replace(year=2100)))
    assert "all data was read within the last" in Page(made).text("p")


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Repository]:
    """A disk of 600 clusters; the second backup changes its ends, the third its start and middle."""
    repo, content = new(tmp_path / "repo"), [1] * 600
    for n, places in enumerate([(), (0, 599), (0, 300)]):
        for place in places:
            content[place] = 10 + n
        back_up(repo, "web1", "vda", content, NOW)
    yield repo
    repo.close()


def test_the_map_counts_the_steps_in_which_a_part_changed(changed: Repository) -> None:
    found = disk_map(changed, changed.backups(), "vda", 1000)
    times = found.times.tolist()
    assert (found.pairs, len(times), found.note) == (2, CELLS, "")
    assert {n: count for n, count in enumerate(times) if count} == {0: 2, 300 * CELLS // 600: 1, CELLS - 1: 1}


def test_the_map_stops_where_its_budget_ends(changed: Repository) -> None:
    """Newest first; a pair that was not compared whole does not count."""
    found = disk_map(changed, changed.backups(), "vda", 3)
    assert (found.pairs, int(found.times.sum())) == (1, 2)
    assert "not compared" in found.note
    read: list[int] = []
    reader = type(changed.reader())
    original = reader.read
    reader.read = lambda self, digest: (read.append(1), original(self, digest))[1]  # type: ignore[method-assign, assignment]
    try:
        disk_map(changed, changed.backups(), "vda", 3)
    finally:
        reader.read = original  # type: ignore[method-assign]
    assert len(read) == 3


def test_damage_ends_the_comparison_and_not_the_report(changed: Repository) -> None:
    repo = Repository.open(changed.storage.root)
    for pack in (changed.storage.root / "packs").iterdir():
        pack.chmod(0o600)
        pack.write_bytes(bytes(pack.stat().st_size))
    made, parsed = _page(repo)
    assert "not compared" in made
    assert parsed.text("h2") == "web1"


def test_a_disk_that_was_resized_is_compared_from_there_on(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    for content in ([1, 1], [1, 1, 1], [1, 2, 1]):
        back_up(repo, "web1", "vda", content, NOW)
    found = disk_map(repo, repo.backups(), "vda", 1000)
    assert (found.pairs, found.times.tolist()) == (1, [0, 1, 0])


# -- the command -------------------------------------------------------------------------------------------------------


def test_it_replaces_a_report_and_nothing_else(incbak: Incbak, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert incbak("report", "--html", file).out == f"wrote {file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    first, inode = file.read_text(), file.stat().st_ino
    file.chmod(0o644)
    incbak("-q", "report", "--html", file)
    assert (file.stat().st_mode & 0o777, file.stat().st_ino != inode) == (0o644, True)
    assert Page(file.read_text()).text("h1") == Page(first).text("h1")
    disk = tmp_path / "web1.raw"
    disk.write_bytes(b"precious")
    ran = incbak.run("report", "--html", disk)
    assert (ran.code, "is there and no report" in ran.err, disk.read_bytes()) == (2, True, b"precious")


@pytest.mark.parametrize("point", ["durable.created", "durable.written", "durable.synced"])
def test_a_failure_leaves_the_old_report(incbak: Incbak, tmp_path: Path, point: str) -> None:
    file = tmp_path / "report.html"
    incbak("report", "--html", file)
    before = file.read_bytes()
    ran = incbak.run("report", "--html", file, env={"INCBAK_FAULT_AT": f"{point}:1:ENOSPC"})
    assert (ran.code, "No space left" in ran.err, file.read_bytes()) == (1, True, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["repo", "report.html"]


def test_the_module_is_imported_when_it_is_needed() -> None:
    """A start stays quick."""
    code = "import sys, incbak.cli.main; sys.exit(any('report.page' in m or 'report.charts' in m for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
