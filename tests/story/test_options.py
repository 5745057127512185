"""Options of the commands that make and show backups, on an image that nobody has open."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.serve import raw_image

SIZE = 4 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    raw_image(tmp_path / "web1.raw", SIZE, b"x" * SIZE)
    return made


def test_attached_files_come_back_as_they_were(incbak: Incbak) -> None:
    text = "<domain type='kvm'>\n  <name>web1 \N{SNOWMAN}</name>\n</domain>"
    (incbak.root / "web1.xml").write_text(text)
    (incbak.root / "note").write_text("")
    incbak("full", incbak.root / "web1.raw", "--attach", incbak.root / "web1.xml", "--attach", incbak.root / "note")
    assert incbak("show", "latest", "--attachment", "web1.xml").out == text
    assert "attached  web1.xml" in incbak("show", "latest").out
    assert incbak("--json", "show", "latest").objects()[0]["attachments"] == ["web1.xml", "note"]
    missing = incbak.run("show", "latest", "--attachment", "web2.xml")
    assert (missing.code, "It has: web1.xml, note." in missing.err) == (2, True)


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe", "is not text"), (b"x" * ((1 << 20) + 1), "larger than"), (None, "No such file")]
)
def test_what_cannot_be_attached_is_said_before_anything_is_done(
    incbak: Incbak, content: bytes | None, said: str
) -> None:
    path = incbak.root / "web1.xml"
    if content is not None:
        path.write_bytes(content)
    ran = incbak.run("full", incbak.root / "web1.raw", "--attach", path)
    assert ran.code == 2
    assert said in ran.err
    assert incbak.list() == []


def test_a_speed_limit_is_kept(incbak: Incbak) -> None:
    begun = time.monotonic()
    incbak("full", incbak.root / "web1.raw", "--speed-limit", "2M")
    assert time.monotonic() - begun >= 2
    assert incbak.run("full", incbak.root / "web1.raw", "--speed-limit", "fast").code == 2
