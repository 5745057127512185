"""``incbak bitmap list|remove SOURCE``: bitmaps of a repository that is gone, in a real QEMU and in an image."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cli import Incbak
from tests.kit.need import need
from tests.kit.qmp import Qmp
from tests.kit.serve import raw_image, serving

pytestmark = pytest.mark.qemu
SIZE = 8 << 20
FOREIGN = "bitmap0"
GONE = "incbak-00112233-44556677"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io", "qemu-system-x86_64")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True, timeout=20)
    return path


class Machine:
    """A QEMU that does not run its guest: a disk on qcow2, a raw one, and a node that no device uses."""

    def __init__(self, root: Path, image: Path) -> None:
        raw, alone = raw_image(root / "raw.raw", SIZE), raw_image(root / "alone.raw", SIZE)
        self.monitors = [root / "a", root / "b"]
        argv = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "q35", "-name", "vm"]
        for path in self.monitors:
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        for name, form, file in (("vda", "qcow2", image), ("vdb", "raw", raw), ("alone", "raw", alone)):
            node = {"driver": form, "node-name": name, "file": {"driver": "file", "filename": str(file)}}
            argv += ["-blockdev", json.dumps(node)]
            argv += ["-device", f"virtio-blk-pci,drive={name},id={name}-dev"] if name != "alone" else []
        self.process = subprocess.Popen(argv)
        self.qmp = Qmp(self.monitors[1])

    @property
    def source(self) -> str:
        return f"qmp:{self.monitors[0]}"

    def names(self, *, marks: bool = False) -> dict[str, list[str]]:
        """Of every node that has bitmaps; without ``marks`` those that are no end marks."""
        found: dict[str, list[str]] = {}
        for node in self.qmp("query-named-block-nodes", flat=True):
            named = sorted(b["name"] for b in node.get("dirty-bitmaps", []) if "name" in b)
            if shown := [name for name in named if name.endswith("-end") == marks]:
                found[node["node-name"]] = shown
        return found

    def close(self) -> None:
        self.qmp.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def machine(tmp_path: Path, image: Path) -> Iterator[Machine]:
    with closing(Machine(tmp_path, image)) as made:
        yield made


def listed(incbak: Incbak, source: str | Path, *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By disk and name."""
    found = incbak("--json", "bitmap", "list", source, *options).objects()
    return {(b["disk"], b["name"]): b for b in found}


def test_a_running_qemu(incbak: Incbak, machine: Machine, tmp_path: Path) -> None:
    """All of ours are listed, also on a node that is no disk; only what is named goes, from all disks or one."""
    (record,) = incbak("--json", "full", machine.source).objects()
    ours = record["disks"][0]["bitmap"]
    shutil.rmtree(incbak.repo)
    incbak("init")
    for node, name in (("vda", GONE), ("vdb", GONE), ("alone", GONE), ("vda", FOREIGN), ("vdb", f"{GONE}-end")):
        machine.qmp("block-dirty-bitmap-add", node=node, name=name, granularity=65536)
    (second,) = incbak("--json", "full", machine.source).objects()
    found = listed(incbak, machine.source)
    assert {disk for disk, name in found if name == GONE} == {"vda-dev", "vdb-dev", "alone"}
    of_first, of_second = (found["vda-dev", r["disks"][0]["bitmap"]] for r in (record, second))
    assert (of_first["path"], of_second["path"]) == (None, str(incbak.repo))
    assert (of_first["backup"], of_first["persistent"], of_first["dirty"]) == (record["id"][:8], True, 0)
    assert found["alone", GONE] | {"node": "alone", "size": SIZE, "recording": True} == found["alone", GONE]
    assert listed(incbak, machine.source, "--disk", "alone").keys() == {("alone", GONE)}
    text = incbak("bitmap", "list", machine.source).out
    assert "not at hand" in text
    assert FOREIGN not in text
    before = machine.names()
    for names, why in (([FOREIGN], "not a bitmap of incbak"), ([GONE, "incbak-00000000-00000000"], "there is no")):
        ran = incbak.run("bitmap", "remove", machine.source, *names, "--yes")
        assert (ran.code, why in ran.err) == (2, True), ran
    refused = incbak.run("bitmap", "remove", machine.source, GONE)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert machine.names() == before
    incbak("bitmap", "remove", machine.source, GONE, "--yes", "--disk", "vdb-dev")
    assert f"{GONE}-end" not in str(machine.names(marks=True))
    assert machine.names() == before | {"vdb": [n for n in before["vdb"] if n != GONE]}
    ran = incbak("bitmap", "remove", machine.source, GONE, ours, "--yes")
    assert ran.err == ""
    assert machine.names()["vda"] == sorted([FOREIGN, second["disks"][0]["bitmap"]])
    assert "alone" not in machine.names()
    (third,) = incbak("--json", "incremental", machine.source).objects()
    assert {d["reason"] for d in third["disks"]} == {None}, "the chain of the repository at hand goes on"


def test_a_bitmap_of_the_repository_at_hand_goes_with_a_warning(incbak: Incbak, machine: Machine) -> None:
    (record,) = incbak("--json", "full", machine.source).objects()
    disk = record["disks"][0]
    ran = incbak("bitmap", "remove", machine.source, disk["bitmap"], "--disk", disk["name"], "--yes")
    assert "reads the disk whole" in ran.err
    (again,) = incbak("--json", "incremental", machine.source).objects()
    assert {d["name"]: d["kind"] for d in again["disks"]}[disk["name"]] == "full"


def test_none_is_removed_beside_a_backup_or_while_a_job_uses_it(incbak: Incbak, machine: Machine) -> None:
    """Whichever job it is."""
    machine.qmp("block-dirty-bitmap-add", node="vda", name=GONE)
    machine.qmp("block-dirty-bitmap-add", node="vdb", name="incbak-00112233-55555555")
    machine.qmp("blockdev-add", driver="null-co", node_name="t", size=SIZE)
    job = {"device": "vda", "target": "t", "sync": "bitmap", "bitmap": GONE, "bitmap_mode": "never"}
    machine.qmp("blockdev-backup", **job, job_id="incbak-00112233-88888888-0", auto_finalize=False)
    machine.qmp.wait_event("BLOCK_JOB_PENDING")
    for name, why in ((GONE, f"a job uses bitmap {GONE}"), ("incbak-00112233-55555555", "a backup is at work")):
        ran = incbak.run("bitmap", "remove", machine.source, name, "--yes")
        assert (ran.code, why in ran.err) == (1, True), ran
    assert machine.names() == {"vda": [GONE], "vdb": ["incbak-00112233-55555555"]}
    machine.qmp("job-cancel", id="incbak-00112233-88888888-0")


def _stored(image: Path) -> dict[str, list[str]]:
    run = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, timeout=20, capture_output=True)
    return {b["name"]: b["flags"] for b in json.loads(run.stdout)["format-specific"]["data"].get("bitmaps", [])}


def test_a_qcow2_that_is_off(incbak: Incbak, image: Path) -> None:
    """An inconsistent bitmap goes too; what others have stored stays; the rest of the chain goes on."""
    for name in (GONE, FOREIGN):
        subprocess.run(["qemu-img", "bitmap", "--add", image, name], check=True, timeout=20)
    io = subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert io.stdin
    assert io.stdout
    io.stdin.write(b"write 0 64k\n")
    io.stdin.flush()
    io.stdout.readline()
    io.kill()
    io.communicate()
    assert "in-use" in _stored(image)[GONE]
    (record,) = incbak("--json", "full", image).objects()
    found = listed(incbak, image)
    assert found["disk0", GONE]["state"] == "inconsistent"
    assert found["disk0", GONE]["dirty"] is None
    assert FOREIGN not in str(found)
    incbak("bitmap", "remove", image, GONE, "--yes")
    left = [name for name in _stored(image) if not name.endswith("-end")]
    assert sorted(left) == sorted([FOREIGN, record["disks"][0]["bitmap"]])
    (again,) = incbak("--json", "incremental", image).objects()
    assert again["disks"][0]["reason"] is None


@pytest.mark.parametrize("how", ["open", "dirty", "guessed"])
def test_a_qcow2_that_is_not_to_be_written(incbak: Incbak, image: Path, how: str) -> None:
    """It stays as it is to the last byte."""
    subprocess.run(["qemu-img", "bitmap", "--add", image, GONE], check=True, timeout=20)
    if how == "dirty":
        with image.open("r+b") as f:
            f.seek(79)
            f.write(b"\1")  # incompatible feature bit 0
    name = image.rename(image.with_suffix(".img")) if how == "guessed" else image
    before = name.read_bytes()
    holder = None
    if how == "open":
        opened = f"driver=qcow2,file.filename={name},file.locking=off"
        holder = subprocess.Popen(["qemu-io", "--image-opts", opened], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdin
        assert holder.stdout
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        before = name.read_bytes()
    ran = incbak.run("bitmap", "remove", name, GONE, "--yes")
    assert ran.code == 1, ran
    assert {"open": "is in use", "dirty": "dirty", "guessed": "--format qcow2"}[how] in ran.err, ran
    assert name.read_bytes() == before
    if how == "guessed":
        incbak("bitmap", "remove", name, GONE, "--yes", "--format", "qcow2")
        assert GONE not in _stored(name)
    if holder:
        holder.communicate(b"quit\n", timeout=20)


def test_incbak_serve_and_a_raw_image_that_is_off(incbak: Incbak, tmp_path: Path) -> None:
    """There the bitmaps are files, which `bitmap list` knows; by SOURCE they are removed too."""
    image = raw_image(tmp_path / "x.raw", SIZE)
    for n in range(2):
        with serving(tmp_path, {"vda": image}) as serve:
            incbak("full", f"qmp:{serve.monitor}")
            ((disk, name),) = listed(incbak, f"qmp:{serve.monitor}")
            if n == 0:
                incbak("bitmap", "remove", f"qmp:{serve.monitor}", name, "--yes")
                assert listed(incbak, f"qmp:{serve.monitor}") == {}
            assert serve.stop() == 0
    assert listed(incbak, image, "--name", "vm").keys() == {(disk, name)}
    incbak("bitmap", "remove", image, name, "--yes", "--name", "vm")
    assert incbak("--json", "bitmap", "list").objects() == []


@pytest.mark.parametrize("answer", ["no", "yes"])
def test_on_a_terminal_it_asks(incbak: Incbak, machine: Machine, answer: str) -> None:
    """And the monitor is free for others while the question is open."""
    machine.qmp("block-dirty-bitmap-add", node="vda", name=GONE)
    ours, theirs = pty.openpty()
    process = incbak.popen("bitmap", "remove", machine.source, GONE, stdin=theirs)
    os.close(theirs)
    try:
        assert process.stderr
        seen = ""
        while "Type yes" not in seen:
            seen += process.stderr.read(1) or pytest.fail(seen)
        assert GONE in str(listed(incbak, machine.source))
        os.write(ours, answer.encode() + b"\n")
        process.communicate(timeout=60)
    finally:
        os.close(ours)
    assert (process.returncode, machine.names()) == ((0, {}) if answer == "yes" else (2, {"vda": [GONE]}))
