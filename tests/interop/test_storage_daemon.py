"""Images of other formats than raw, in a private qemu-storage-daemon; and a daemon that somebody else runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak.engine.base import end_mark_of, run_name
from incbak.engine.detect import Source, open_engine
from incbak.errors import DiskError, FormatError, ImageInUseError
from incbak.reasons import Reason
from tests.kit.guest_targets import Chain, chain_of
from tests.kit.need import need
from tests.kit.qmp import Qmp

pytestmark = pytest.mark.qemu
SIZE = (8 << 20) + 512


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io")


def make(path: Path, form: str = "qcow2", *options: str, size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, str(path), str(size)], check=True, timeout=20)
    return path


def write(path: Path, *commands: str, form: str = "qcow2") -> None:
    """Write as a VM does, bitmaps recording: ``write -P 7 0 64k`` and the like."""
    run = ["qemu-io", "-f", form, *(x for c in commands for x in ("-c", c)), str(path)]
    subprocess.run(run, check=True, timeout=20, stdout=subprocess.DEVNULL)


def content(path: Path, form: str = "qcow2") -> bytes:
    raw = path.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(raw)], check=True, timeout=20)
    return raw.read_bytes()


def bitmaps(path: Path) -> dict[str, list[str]]:
    """The bitmaps in an image with their flags, but the end marks of ours."""
    run = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, timeout=20, capture_output=True)
    found = json.loads(run.stdout)["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: b["flags"] for b in found if not b["name"].endswith("-end")}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = make(tmp_path / "disk.qcow2")
    write(path, "write -P 1 0 3M", "write -P 2 8M 512")
    return path


def test_full_then_incrementals_from_bitmaps_in_the_image(image: Path, tmp_path: Path) -> None:
    chain = chain_of(str(image), tmp_path)
    assert chain.full().images["disk0"] == content(image)
    assert bitmaps(image) == {chain.name("00000001"): ["auto"]}
    write(image, "write -P 3 1M 4k", "discard 2M 64k", "write -P 4 8M 512")
    second = chain.incremental()
    assert second.reasons == {"disk0": None}
    assert second.copied == {"disk0": 2 * 65536 + 512}
    assert second.images["disk0"] == content(image)
    assert bitmaps(image) == {chain.name("00000002"): ["auto"]}
    third = chain.incremental()
    assert third.copied == {"disk0": 0}
    assert third.images == second.images


def _qemu_img(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, argv)], timeout=20, capture_output=True, text=True, check=False)


def test_going_back_to_an_internal_snapshot(image: Path, tmp_path: Path) -> None:
    """faults row 41: QEMU refuses it while there are bitmaps; without them the disk is read whole."""
    chain = chain_of(str(image), tmp_path)
    chain.full()
    assert _qemu_img("snapshot", "-c", "before", image).returncode == 0
    write(image, "write -P 3 1M 1M")
    chain.incremental()
    ran = _qemu_img("snapshot", "-a", "before", image)
    assert (ran.returncode, "has active dirty bitmaps" in ran.stderr) == (1, True)
    assert chain.incremental().copied == {"disk0": 0}
    for name in bitmaps(image):
        for each in (name, end_mark_of(name)):
            assert _qemu_img("bitmap", "--remove", image, each).returncode == 0
    assert _qemu_img("snapshot", "-a", "before", image).returncode == 0
    made = chain.incremental()
    assert made.reasons == {"disk0": Reason.BITMAP_MISSING}
    assert made.images["disk0"] == content(image)


def test_an_overlay_that_is_committed_into_its_base(image: Path, tmp_path: Path) -> None:
    """faults row 41: the base's own bitmap records what the commit writes."""
    chain = chain_of(str(image), tmp_path)
    chain.full()
    top = tmp_path / "top.qcow2"
    assert _qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top).returncode == 0
    write(top, "write -P 9 2M 128k", "write -P 8 6M 4k")
    assert _qemu_img("commit", top).returncode == 0
    made = chain.incremental()
    assert made.reasons == {"disk0": None}
    assert made.copied["disk0"] >= 3 * 65536
    assert made.images["disk0"] == content(image)


def test_a_backing_file_is_part_of_the_disk(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2")
    write(base, "write -P 5 0 1M")
    top = make(tmp_path / "top.qcow2", "qcow2", "-b", "base.qcow2", "-F", "qcow2")
    write(top, "write -P 6 512k 64k")
    chain = chain_of(str(top), tmp_path)
    assert chain.full().images["disk0"] == content(top)
    write(top, "write -P 7 3M 64k")
    second = chain.incremental()
    assert second.copied == {"disk0": 65536}
    assert second.images["disk0"] == content(top)


@pytest.mark.parametrize("form", ["vmdk", "qed", "vhdx"])
def test_formats_that_hold_no_bitmaps_are_read_whole(tmp_path: Path, form: str) -> None:
    path = make(tmp_path / f"disk.{form}", form, size=8 << 20)
    write(path, "write -P 9 1M 128k", form=form)
    with pytest.raises(FormatError, match=f"{form.upper()} image, and its format is not guessed"):
        chain_of(str(path), tmp_path).full()
    chain_of(str(path), tmp_path, format=form).full()
    again = chain_of(str(path), tmp_path).full()  # the state directory has it now
    assert again.images["disk0"] == content(path, form)
    assert "cannot store bitmaps" in again.description.notes[0]


def test_old_qcow2_is_read_whole(tmp_path: Path) -> None:
    chain = chain_of(str(make(tmp_path / "disk.qcow2", "qcow2", "-o", "compat=0.10")), tmp_path)
    chain.full()
    assert chain.incremental().reasons == {"disk0": Reason.BITMAP_MISSING}


def test_an_image_in_use_is_refused_with_a_hint(image: Path, tmp_path: Path) -> None:
    with daemon(image, tmp_path), pytest.raises(ImageInUseError) as caught:
        chain_of(str(image), tmp_path).full()
    assert "qmp:" in caught.value.hint


def test_a_broken_image_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(DiskError, match="version 0 is not known"):
        chain_of(str(path), tmp_path).full()


def test_bitmaps_of_dead_runs_go_and_those_of_others_stay(image: Path, tmp_path: Path) -> None:
    chain = chain_of(str(image), tmp_path)
    chain.full()
    stray, other = chain.name("deadbeef"), run_name("0badcafe", "00000001")
    for name in (stray, other, "mine"):
        subprocess.run(["qemu-img", "bitmap", "--add", str(image), name], check=True, timeout=20)
    second = chain.incremental()
    assert second.reasons == {"disk0": None}
    assert any(stray in text for text in chain.removed)
    assert set(bitmaps(image)) == {chain.name("00000002"), other, "mine"}


def test_a_failed_copy_leaves_the_image_as_it_was(image: Path, tmp_path: Path) -> None:
    chain = chain_of(str(image), tmp_path)
    chain.full()
    write(image, "write -P 3 1M 4k")
    before = bitmaps(image)

    def die(targets: dict) -> None:  # type: ignore[type-arg]
        targets["disk0"].dead = True

    chain.during = die  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="disks failed"):
        chain.incremental()
    assert bitmaps(image) == before
    chain.during = None
    assert chain.incremental().images["disk0"] == content(image)


def test_the_daemon_does_not_outlive_a_killed_owner(image: Path, tmp_path: Path) -> None:
    """Killed between the copy and the commit, the image is free at once and its bitmaps are sound (faults row 13)."""
    chain = chain_of(str(image), tmp_path)
    chain.full()
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom incbak.engine.detect import *\n"
        "async def main():\n  e = await open_engine(Source(sys.argv[1], Path(sys.argv[2])))\n"
        "  print((await e.describe()).disks[0].size, flush=True)\n  await asyncio.sleep(60)\nasyncio.run(main())"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(image), str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout
    assert owner.stdout.readline() == b"%d\n" % SIZE
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            backup = chain.incremental()
            break
        except ImageInUseError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert backup.reasons == {"disk0": None}


class daemon:
    """A qemu-storage-daemon of somebody else."""

    def __init__(self, image: Path, directory: Path, *options: str, unsafe: bool = False) -> None:
        self.monitor = directory / "qsd"
        file = {"driver": "file", "filename": str(image), "cache": {"no-flush": unsafe}}
        node = {"driver": "qcow2", "node-name": "web", "file": file}
        chardev = f"socket,id=m,server=on,wait=off,path={self.monitor}"
        command = ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--chardev", chardev]
        self.process = subprocess.Popen([*command, "--monitor", "chardev=m", *options])

    def __enter__(self) -> daemon:
        Qmp(self.monitor).close()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def running(image: Path, tmp_path: Path) -> Iterator[Chain]:
    with daemon(image, tmp_path) as d:
        yield chain_of(f"qmp:{d.monitor}", tmp_path)


def test_a_daemon_that_runs(running: Chain, image: Path, tmp_path: Path) -> None:
    full = running.full()
    second = running.incremental()
    assert (second.reasons, second.copied) == ({"web": None}, {"web": 0})
    assert full.images == second.images
    assert second.description.engine.startswith("qemu-storage-daemon 7") or second.description.engine


def test_a_daemon_keeps_its_bitmaps_over_a_restart(image: Path, tmp_path: Path) -> None:
    with daemon(image, tmp_path) as d:
        chain = chain_of(f"qmp:{d.monitor}", tmp_path)
        chain.full()
    write(image, "write -P 8 1M 64k")
    with daemon(image, tmp_path):
        second = chain.incremental()
    assert second.copied == {"web": 65536}
    assert second.images["web"] == content(image)


def test_a_daemon_that_does_not_flush_stores_no_bitmaps_and_believes_none(image: Path, tmp_path: Path) -> None:
    with daemon(image, tmp_path) as d:
        chain = chain_of(f"qmp:{d.monitor}", tmp_path)
        chain.full()
    assert bitmaps(image)
    with daemon(image, tmp_path, unsafe=True):
        second = chain.incremental()
        third = chain.incremental()
    assert (second.reasons, third.reasons) == ({"web": Reason.UNFLUSHED}, {"web": None})
    assert "its bitmap is lost when the daemon ends" in second.result.notes[0]
    assert bitmaps(image) == {}


def test_a_disk_that_is_exported_for_writing_is_left_out(image: Path, tmp_path: Path) -> None:
    nbd = ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"]
    export = ["--export", "type=nbd,id=e,node-name=web,writable=on"]
    with daemon(image, tmp_path, *nbd, *export) as d:

        async def look() -> str:
            engine = await open_engine(Source(f"qmp:{d.monitor}", tmp_path))
            try:
                description = await engine.describe()
                assert not description.disks
                return description.left_out[0].why
            finally:
                await engine.close()

        assert "exported for writing" in asyncio.run(look())
