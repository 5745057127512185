"""Is the bitmap telling the truth? ``incremental --audit`` and ``bitmap verify`` beside a guest, and without one."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from incbak.backup.audit import UNIT
from tests.kit.cli import content, differing
from tests.kit.serve import Serve
from tests.story.test_story import CLUSTER, REGION, SIZE, Story

WRITTEN, BEHIND = 3 * CLUSTER, REGION + 21 * UNIT + 2 * CLUSTER


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A disk with content in all regions."""
    made = Story(tmp_path)
    with made.image.open("r+b") as f:
        for at in range(0, SIZE - CLUSTER, 40 * CLUSTER):
            f.seek(at)
            f.write(os.urandom(4096))
        f.seek(BEHIND)
        f.write(b"before")
    return made


def _write_behind(story: Story, at: int = BEHIND) -> None:
    """What nobody sees: the content changes, the time of change does not (as on a block device)."""
    before = story.image.stat()
    fd = os.open(story.image, os.O_WRONLY)
    os.pwrite(fd, b"behind", at)
    os.close(fd)
    os.utime(story.image, ns=(before.st_atime_ns, before.st_mtime_ns))


def _incremental(story: Story, serve: Serve, share: str) -> dict[str, Any]:
    (disk,) = story.incbak("--json", "incremental", f"qmp:{serve.monitor}", "--audit", share).objects()[0]["disks"]
    return disk


def test_a_lie_is_found_told_and_mended(story: Story) -> None:
    """The cluster is stored, the disk is read whole, offsets and reason are in the record, the next run is as ever."""
    with story.serving() as serve:
        story.back_up(serve, "full")
        story.write(serve, WRITTEN)
        _write_behind(story)
        ran = story.incbak("--json", "incremental", f"qmp:{serve.monitor}", "--audit", "100%")
        (disk,) = ran.objects()[0]["disks"]
        assert (disk["kind"], disk["reason"], disk["read"]) == ("full", "audit", SIZE)
        assert f"{CLUSTER} bytes at {BEHIND}" in disk["detail"]
        assert f"at {BEHIND}" in ran.err
        assert not differing(story.incbak.restored(), content(story.image))
        story.write(serve, WRITTEN)
        (again,) = story.incbak("--json", "incremental", f"qmp:{serve.monitor}", "--audit", "100%").objects()[0][
            "disks"
        ]
        assert (again["kind"], again["reason"]) == ("incremental", None)
        assert SIZE - again["audited"] == again["read"]


def test_without_an_audit_nobody_would_know(story: Story) -> None:
    """The control: what the audit is for."""
    with story.serving() as serve:
        story.back_up(serve, "full")
        story.write(serve, WRITTEN)
        _write_behind(story)
        story.incbak("incremental", f"qmp:{serve.monitor}")
        assert differing(story.incbak.restored(), content(story.image)) == [BEHIND]


def test_the_slices_cover_the_disk_in_turn(story: Story) -> None:
    """With 25% a lie is found in one of four runs, and the slices together are the disk."""
    with story.serving() as serve:
        story.back_up(serve, "full")
        audited, reasons = [], []
        _write_behind(story)
        for _ in range(4):
            (disk,) = story.incbak("--json", "incremental", f"qmp:{serve.monitor}", "--audit", "25").objects()[0][
                "disks"
            ]
            audited.append(disk["audited"])
            reasons.append(disk["reason"])
        assert reasons.count("audit") == 1
        assert sum(audited) == SIZE
        assert max(audited) - min(audited) <= UNIT


def test_a_guest_that_writes_is_no_lie(story: Story) -> None:
    """Marks are made before writes: whatever is read changed has its mark by then."""
    with story.serving() as serve:
        story.back_up(serve, "full")
        stop = threading.Event()

        def guest() -> None:
            client, number = serve.connect("vda"), 0
            while not stop.is_set():
                number += 1
                client.write(number.to_bytes(8, "big") * 512, number * 5 * CLUSTER % (SIZE - 4096) // 512 * 512)
            client.close()

        thread = threading.Thread(target=guest)
        thread.start()
        try:
            for _ in range(3):
                ran = story.incbak("bitmap", "verify", f"qmp:{serve.monitor}")
                assert "no difference" in ran.out
                story.incbak("incremental", f"qmp:{serve.monitor}", "--audit", "100%", "--no-fallback")
        finally:
            stop.set()
            thread.join()


def test_verify_finds_it_too_and_the_bitmap_stays_invalid(story: Story) -> None:
    """With a monitor and with an image that is off; exit code 5; the next run reads everything."""
    with story.serving("--ignore-ctime") as serve:  # it alone would show
        story.back_up(serve, "full")
        good = story.incbak("bitmap", "verify", f"qmp:{serve.monitor}")
        assert "no difference" in good.out
        assert serve.stop() == 0
    name = ("--name", "vm")
    _write_behind(story)
    ran = story.incbak.run("bitmap", "verify", story.image, *name)
    assert ran.code == 5, ran
    assert f"{CLUSTER} bytes at {BEHIND}" in ran.out
    assert "does not tell the truth" in ran.err
    again = story.incbak("bitmap", "verify", story.image, *name)
    assert "nothing to verify" in again.out
    (row,) = story.incbak("--json", "status", story.image, *name).objects()
    (shown,) = story.incbak("--json", "bitmap", "list").objects()
    assert (row["reason"], shown["state"], shown["reason"]) == ("audit", "invalid", "audit")
    disk = story.back_up(story.image)
    assert (disk["kind"], disk["reason"]) == ("full", "audit")
    story.verify()


def test_what_verify_found_beside_a_guest_is_the_reason_of_the_record(story: Story) -> None:
    """Served: the server keeps the reason over its end, and the bitmap records no more."""
    with story.serving() as serve:
        story.back_up(serve, "full")
        _write_behind(story)
        assert story.incbak.run("bitmap", "verify", f"qmp:{serve.monitor}").code == 5
        story.write(serve, WRITTEN)
        (shown,) = story.incbak("--json", "bitmap", "list").objects()
        (row,) = story.incbak("--json", "status", f"qmp:{serve.monitor}").objects()
        assert (shown["reason"], row["reason"], row["dirty"]) == ("audit", "audit", SIZE)
        assert serve.stop() == 0
    with story.serving() as serve:
        disk = story.back_up(serve)
        assert (disk["kind"], disk["reason"]) == ("full", "audit")
        assert story.back_up(serve)["reason"] is None
        story.verify()


@pytest.mark.parametrize("share", ["-1", "101", "x", "0.0001%"])
def test_a_share_that_is_none(story: Story, share: str) -> None:
    ran = story.incbak.run("incremental", story.image, f"--audit={share}")
    assert (ran.code, "not a percentage" in ran.err) == (2, True)
