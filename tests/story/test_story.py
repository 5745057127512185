"""The story of the README, with real processes: serve, backups, clean stops, kills, power cuts, restores."""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.kit.cli import Content, Incbak, content, differing
from tests.kit.serve import Serve, raw_image, serving

CLUSTER = 65536
REGION = 64 << 20
SIZE = 3 * REGION + 5 * 512


class Story:
    """One VM with one disk, a repository, and a way to write as the guest would."""

    def __init__(self, root: Path) -> None:
        self.root, self.image = root, raw_image(root / "disk.raw", SIZE)
        self.incbak = Incbak(root)
        self.boot = root / "boot_id"
        self.reboot()
        self.incbak("init")
        self.number = 0
        self.expected: dict[str, Content] = {}

    def reboot(self) -> None:
        """Another boot id: what a host says of itself after a power cut."""
        self.boot.write_text(str(uuid.uuid4()))

    def serving(self, *options: str) -> Iterator[Serve]:
        return serving(self.root, {"vda": self.image}, *options, env={"INCBAK_BOOT_ID_FILE": str(self.boot)})

    def write(self, serve: Serve, *places: int) -> None:
        """A cluster's worth at each place, with content never seen before."""
        with_client = serve.connect("vda")
        for place in places:
            self.number += 1
            with_client.write(random.Random(self.number).randbytes(5000), place)
        with_client.close()

    def back_up(self, serve: Serve | Path, kind: str = "incremental") -> dict:
        """A backup of the quiet disk; remembers what it must restore to."""
        source = serve if isinstance(serve, Path) else f"qmp:{serve.monitor}"
        name = ["--name", "vm"] if isinstance(serve, Path) else []
        made = self.incbak("--json", kind, source, *name).objects()[0]
        self.expected[made["id"]] = content(self.image)
        return made["disks"][0]

    def verify(self) -> None:
        """Every backup ever made restores bit for bit, and everything in the repository verifies."""
        for ident, held in self.expected.items():
            assert differing(self.incbak.restored(ident), held) == [], ident
        self.incbak("check", "--read-data")


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_backups_go_on_over_clean_stops_and_kills(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0, REGION)
        assert story.back_up(serve, "full")["reason"] is None
        story.write(serve, 10 * CLUSTER)
        assert story.back_up(serve)["read"] == CLUSTER
        story.write(serve, 20 * CLUSTER + 100, SIZE - 5000)
        assert serve.stop() == 0
    with story.serving() as serve:
        disk = story.back_up(serve)
        assert (disk["kind"], disk["reason"]) == ("incremental", None)
        assert disk["read"] == 2 * CLUSTER + SIZE % CLUSTER
        story.write(serve, 2 * REGION, 5)
        serve.stop(signal.SIGKILL)
    with story.serving() as serve:
        disk = story.back_up(serve)
        assert (disk["kind"], disk["read"], disk["reason"]) == ("incremental", 2 * CLUSTER, None)
        story.write(serve, 7 * CLUSTER)
        serve.stop(signal.SIGKILL)
    with story.serving() as serve:
        story.write(serve, 8 * CLUSTER)
        serve.stop(signal.SIGKILL)
    with story.serving() as serve:
        assert story.back_up(serve)["read"] == 2 * CLUSTER
    story.verify()


def test_a_power_cut_costs_the_touched_regions(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        story.write(serve, REGION + 3 * CLUSTER)
        serve.stop(signal.SIGKILL)
    story.reboot()
    with story.serving() as serve:
        disk = story.back_up(serve)
        assert (disk["kind"], disk["read"], disk["reason"]) == ("incremental", REGION, None)
        assert disk["changed"] == CLUSTER
        story.write(serve, 5)
        assert story.back_up(serve)["read"] == CLUSTER
    story.verify()


def test_an_unsound_coarse_map_after_a_power_cut_costs_everything_and_says_why(story: Story) -> None:
    with story.serving() as serve:
        story.back_up(serve, "full")
        story.write(serve, 0)
        serve.stop(signal.SIGKILL)
    story.reboot()
    (bitmap,) = story.incbak.state.glob("vm/vda/*.bitmap")
    with bitmap.open("r+b") as f:
        f.seek(-4096, os.SEEK_END)
        f.write(b"\0")
    with story.serving() as serve:
        ran = story.incbak("--json", "incremental", f"qmp:{serve.monitor}")
        disk = ran.objects()[0]["disks"][0]
        assert (disk["kind"], disk["read"], disk["reason"]) == ("full", SIZE, "coarse-map")
        assert "coarse-map" in ran.err
        assert disk["stored"] < 3 * CLUSTER
    assert differing(story.incbak.restored(), content(story.image)) == []


@pytest.mark.parametrize("size", [SIZE + 5 * CLUSTER, SIZE - REGION + 512])
def test_a_disk_that_is_resized_is_read_whole_once(story: Story, size: int) -> None:
    """faults rows 35 and 36: the next incremental says why, the one after it is small again, all restore."""
    with story.serving() as serve:
        story.write(serve, 0, REGION)
        story.back_up(serve, "full")
        story.write(serve, 10 * CLUSTER)
        qmp = serve.qmp()
        qmp("block_resize", device="vda", size=size)
        qmp.close()
        story.write(serve, size - 5000)
        disk = story.back_up(serve)
        assert (disk["kind"], disk["reason"], disk["size"], disk["read"]) == ("full", "resized", size, size)
        story.write(serve, 11 * CLUSTER)
        assert serve.stop() == 0
    with story.serving() as serve:
        disk = story.back_up(serve)
        assert (disk["kind"], disk["reason"], disk["read"]) == ("incremental", None, CLUSTER)
    story.verify()


def test_an_image_that_is_off_still_gets_incrementals(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        story.write(serve, 9 * CLUSTER)
        assert serve.stop() == 0
    assert story.back_up(story.image)["read"] == CLUSTER
    assert story.back_up(story.image)["read"] == 0
    with story.serving() as serve:
        story.write(serve, CLUSTER)
        assert story.back_up(serve)["read"] == CLUSTER
    story.verify()


def test_an_image_changed_behind_our_back_is_read_whole(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        assert serve.stop() == 0
    with story.image.open("r+b") as f:
        f.seek(77 * CLUSTER)
        f.write(b"written by somebody else")
    assert story.back_up(story.image)["reason"] == "disk-changed"
    assert story.back_up(story.image)["read"] == 0
    story.verify()


def test_a_resized_disk_is_read_whole_then_incrementally(story: Story) -> None:
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        assert serve.stop() == 0
    os.truncate(story.image, SIZE + REGION)
    with story.serving() as serve:
        assert story.back_up(serve)["reason"] == "resized"
        story.write(serve, SIZE + 4096)
        disk = story.back_up(serve)
        assert (disk["size"], disk["read"]) == (SIZE + REGION, CLUSTER)
    os.truncate(story.image, SIZE)
    assert story.back_up(story.image)["reason"] == "resized"
    story.verify()


def test_a_commit_that_was_lost_does_not_lose_the_base(story: Story) -> None:
    """Rows of faults.md: killed after the copy, before the commit, and after the commit, before the bitmaps go."""
    with story.serving() as serve:
        story.write(serve, 0)
        story.back_up(serve, "full")
        for point, made in (("runner.planned", 0), ("runner.copied", 0), ("runner.committed", 1), ("runner.done", 1)):
            before = len(story.incbak.list())
            story.write(serve, 3 * CLUSTER)
            now = content(story.image)
            ran = story.incbak.run("incremental", f"qmp:{serve.monitor}", env={"INCBAK_CRASH_AT": point})
            assert ran.code == -signal.SIGKILL
            backups = story.incbak.list()
            assert len(backups) == before + made, point
            if made:
                story.expected[backups[-1]["id"]] = now
            story.write(serve, 4 * CLUSTER)
            disk = story.back_up(serve)
            assert disk["reason"] is None
            assert disk["read"] == (1 if made else 2) * CLUSTER, point
            with closing(serve.qmp()) as qmp:
                assert list(qmp.bitmaps("vda")) == [disk["bitmap"]]
    story.verify()


def test_several_disks_share_one_instant(tmp_path: Path) -> None:
    incbak = Incbak(tmp_path)
    images = {name: raw_image(tmp_path / f"{name}.raw", 10 << 20) for name in ("vda", "vdb", "vdc")}
    incbak("init")
    with serving(tmp_path, images) as serve:
        clients = {name: serve.connect(name) for name in images}
        for name, client in clients.items():
            client.write(name.encode() * 1000, 12345)
        incbak("full", f"qmp:{serve.monitor}")
        clients["vdb"].write(b"only vdb", 5 << 20)
        made = incbak("--json", "incremental", f"qmp:{serve.monitor}").objects()[0]
        assert {d["name"]: d["read"] for d in made["disks"]} == {"vda": 0, "vdb": CLUSTER, "vdc": 0}
        made = incbak("--json", "incremental", f"qmp:{serve.monitor}", "--exclude", "vdc").objects()[0]
        assert [d["name"] for d in made["disks"]] == ["vda", "vdb"]
        made = incbak("--json", "incremental", f"qmp:{serve.monitor}").objects()[0]
        assert [d["reason"] for d in made["disks"]] == [None] * 3
        for name, image in images.items():
            assert differing(incbak.restored("latest", name), content(image)) == []
        refused = incbak.run("restore", "latest", tmp_path / "x.raw")
        assert refused.code == 2
        assert "--disk" in refused.err
        (tmp_path / "all").mkdir()
        incbak("restore", "latest", tmp_path / "all")
        assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["vda.raw", "vdb.raw", "vdc.raw"]
        for client in clients.values():
            client.close()
