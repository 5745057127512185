"""The report in a browser: at a desk and on a phone, light and dark.

Pictures go to ``INCBAK_ARTEFACTS``, if that is set, for somebody to look at.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from incbak.repo.drills import Drill, add_drill
from incbak.report.history import collect
from incbak.report.page import page
from tests.kit.browser import Browser
from tests.unit.repo.scene import new
from tests.unit.report.history import HOSTILE, NOW, back_up, eventful

LOOKS = {(look, scheme) for look in ("desk", "phone") for scheme in ("light", "dark")}
DESK, PHONE = 1280, 390
PAPER = {"light": "rgb(246, 246, 244)", "dark": "rgb(20, 20, 19)"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ordinary.html`` and ``hostile.html``."""
    where = tmp_path_factory.mktemp("pages")
    repo = eventful(where / "repo", 60)
    for problems, ago in ((), 9), (("disk vda, partition 2: ext4: e2fsck -fn exits with 4",), 2):
        at = (NOW - timedelta(days=ago)).timestamp()
        vm, ident = "web1", repo.backups()[-1].id
        add_drill(repo.storage, Drill(vm=vm, backup=ident, at=at, seconds=60.0, sample=100.0, seed=1,
                                      exit_code=int(bool(problems)), problems=problems), NOW.timestamp)  # fmt: skip
    assert len(repo.storage.list("drills")) == 2
    (where / "ordinary.html").write_text(page(collect(repo, "/backup", NOW)))
    strange = new(where / "strange")
    for n in range(3):
        more = {"tags": (HOSTILE,), "notes": ("x" * 3000,), "disk_reason": HOSTILE}
        back_up(strange, HOSTILE + "y" * 3000, "z" * 3000, [1, 2, n], NOW - timedelta(days=n), **more)
    (where / "hostile.html").write_text(page(collect(strange, "/" + "w" * 3000, NOW)))
    return where


@pytest.mark.parametrize("name", ["ordinary", "hostile"])
def test_it_fits_fetches_nothing_and_runs_nothing(browser: Browser, pages: Path, name: str) -> None:
    out = Path(os.environ.get("INCBAK_ARTEFACTS") or pages).resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = pages / f"{name}.html"
    for look, scheme in sorted(LOOKS):
        width = PHONE if look == "phone" else DESK
        shown = browser.show(file, width, dark=scheme == "dark", phone=look == "phone")
        assert shown.requested() == [file.as_uri()]
        assert shown.complaints() == []
        assert shown.ask("[innerWidth, document.documentElement.scrollWidth]") == [width, width], (look, scheme)
        assert shown.ask("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
        assert shown.ask("document.scripts.length + document.images.length") == 0
        assert shown.ask(UNREADABLE) == [], (look, scheme)
        alarms = shown.ask("[...document.querySelectorAll('.alarm')].map(e => e.textContent)")
        assert [alarm.split(",")[0] for alarm in alarms] == ["Last drill 2 days ago"] * (name == "ordinary")
        shown.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert shown.ask("document.documentElement.scrollWidth") == width, (look, scheme, "with all lists open")
        picture = out / f"report-{name}-{look}-{scheme}.png"
        shown.picture(picture)
        drawn, _height = struct.unpack_from(">II", picture.read_bytes(), 16)
        assert drawn == (2 * width if look == "phone" else width)
        shown.close()


UNREADABLE = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255, 255, 255)"; };
  return [...document.querySelectorAll("h1, h2, h3, p, b, span, td, th, summary, svg text")].filter(e => {
    const s = getComputedStyle(e), [a, b] = [light(e.ownerSVGElement ? s.fill : s.color), light(behind(e))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
  }).map(e => e.tagName + " " + e.textContent.slice(0, 40));
})()"""
"""Texts whose contrast is below 4.5, what WCAG 2 asks for."""
