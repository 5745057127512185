"""Which image a disk is: names, two images, backing files, and a run that looks again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from incbak import host
from incbak.backup.facts import Peer
from incbak.backup.opened import opened_of
from incbak.backup.plan import Known, Request, choose, make_plan
from incbak.backup.runner import Options, run
from incbak.backup.sources import Sources, contradictions, other_images, other_names
from incbak.engine.base import BitmapInfo, Description, EngineDisk, run_name
from incbak.errors import ImageChangedError, UsageError
from incbak.events import Event, Warned
from incbak.fleet.config import load
from incbak.reasons import Reason
from incbak.repo.record import DiskRecord, Origin, Record
from tests.kit.devices import loop_device
from tests.kit.need import need_root
from tests.unit.backup.scene import Disk, FakeEngine
from tests.unit.repo.scene import new

CLUSTER, SIZE = 65536, 1 << 20
REPOSITORY = "a" * 32
OLD, NEW, NEXT = ("1" * 32, "2" * 32, "3" * 32)


def _record(ident: str, seq: int, **more: Any) -> Record:
    disk = DiskRecord(name="vda", size=SIZE, kind="full", base=None, reason=None, read=0, stored=0, root="0" * 64)
    return Record(
        id=ident, seq=seq, kind="full", base=None, started="", finished="", cluster_size=CLUSTER,
        disks=(disk,), engine="", **{"vm": "vm", "host": "here", **more},
    )  # fmt: skip


def _bitmap(ident: str, **more: Any) -> BitmapInfo:
    return BitmapInfo(run_name(REPOSITORY[:8], ident[:8]), CLUSTER, 0, **more)


def _planned(known: Known, *bitmaps: BitmapInfo) -> tuple[str | None, Reason | None]:
    disk = EngineDisk("vda", SIZE, "vda", bitmaps=bitmaps)
    (planned,) = make_plan([disk], known, Request(incremental=True, backup=NEXT))
    return planned.base.id if planned.base else None, planned.plan.reason


@pytest.mark.parametrize(
    ("newest", "bitmaps", "base", "reason"),
    [
        ({}, (_bitmap(OLD), _bitmap(NEW)), NEW, None),
        ({}, (_bitmap(OLD), _bitmap(NEW, inconsistent=True)), OLD, None),
        ({}, (_bitmap(OLD),), None, Reason.SUPERSEDED),
        ({"host": "there"}, (_bitmap(OLD),), None, Reason.SUPERSEDED),
        ({"origin": Origin("b" * 32, 7)}, (_bitmap(OLD),), OLD, None),
        ({"origin": Origin("b" * 32, 7), "host": "there"}, (_bitmap(OLD),), None, Reason.SUPERSEDED),
        ({}, (), None, Reason.BITMAP_MISSING),
    ],
)
def test_the_newest_backup_decides(
    newest: dict[str, Any], bitmaps: tuple[BitmapInfo, ...], base: str | None, reason: Reason | None
) -> None:
    """A state directory that was put back, a VM that came home; a copy of our own backup says nothing of that."""
    known = Known(REPOSITORY, CLUSTER, [_record(OLD, 1), _record(NEW, 2, **newest)], host="here")
    assert _planned(known, *bitmaps) == (base, reason)


BACKING = [["/base", 5, 6, 7]]


@pytest.mark.parametrize(
    ("then", "now", "reason"),
    [
        ({"backing": {"vda": BACKING}}, {"vda": BACKING}, None),
        ({"backing": {"vda": BACKING}}, {"vda": [["/base", 5, 6, 8]]}, Reason.BACKING_CHANGED),
        ({"backing": {"vda": BACKING}}, {"vda": [*BACKING, *BACKING]}, Reason.BACKING_CHANGED),
        ({"backing": {"vda": BACKING}}, {}, Reason.BACKING_CHANGED),
        ({}, {"vda": BACKING}, Reason.BACKING_CHANGED),
        ({"backing": {"vdb": BACKING}}, {}, None),
    ],
)
def test_a_backing_file_that_was_changed(then: dict[str, Any], now: dict[str, Any], reason: Reason | None) -> None:
    """No bitmap marks it; a base that does not say what its backing files were shows nothing."""
    known = Known(REPOSITORY, CLUSTER, [_record(OLD, 1, config=then)], backing=now)
    assert _planned(known, _bitmap(OLD)) == (None if reason else OLD, reason)


NBD = "nbd+unix:///?socket=/s"


@pytest.mark.parametrize(
    ("then", "now", "trusted", "reason"),
    [
        ([[NBD, None]], [[NBD, None]], (), Reason.UNPROVEN),
        ([[NBD, None]], [[NBD, None]], (NBD,), None),
        ([[NBD]], [[NBD, None]], (), Reason.UNPROVEN),
        ([[NBD]], [[NBD, None]], (NBD,), None),
        ([["nbd:other", None]], [[NBD, None]], (NBD,), Reason.BACKING_CHANGED),
        ([["/base", 5, 6, 7]], [["/base", None]], (), Reason.UNPROVEN),
        ([["/base", None]], [["/base", 5, 6, 7]], (), Reason.BACKING_CHANGED),
        ([["/base", 5, 6, 7]], [["/base", 5, 6, 8]], ("/base",), None),
        ([["/base", 5, 6, 7, 8]], [["/base", 5, 6, 7, 8]], (), None),
        ([["/base", 5, 6, 7, 8]], [["/base", 5, 6, 7, 9]], (), Reason.UNPROVEN),
        ([["/base", 5, 6, 7]], [["/base", 5, 6, 7, 8]], (), Reason.UNPROVEN),
        ([["/base", 5, 6, 7, 8]], [["/base", 5, 6, 7]], (), None),
        ([["/dev/x", 0, 6, 7]], [["/dev/x", "boot:1;2:3"]], (), Reason.BACKING_CHANGED),
        (["rubbish"], [["/base", 5, 6, 7]], (), Reason.BACKING_CHANGED),
        ([[]], [["/base", 5, 6, 7]], (), Reason.BACKING_CHANGED),
        ({"no": "list"}, [["/base", 5, 6, 7]], (), Reason.BACKING_CHANGED),
    ],
)
def test_what_is_not_known_is_never_unchanged(
    then: Any, now: list[Any], trusted: tuple[str, ...], reason: Reason | None
) -> None:
    """Unless its owner says so; and an older record, or a damaged one, costs one full read."""
    records = [_record(OLD, 1, config={"backing": {"vda": then}})]
    known = Known(REPOSITORY, CLUSTER, records, backing={"vda": now}, trusted=trusted)
    assert _planned(known, _bitmap(OLD)) == (None if reason else OLD, reason)


def _chain(directory: Path) -> Description:
    """An overlay on a base, below a filter."""
    for name in ("overlay", "base"):
        (directory / name).write_bytes(name.encode() * 1000)
    blocks = [
        {"node": "throttle", "file": str(directory / "overlay"), "children": {"file": "top"}},
        {"node": "top", "file": str(directory / "overlay"), "children": {"file": "f", "backing": "low"}},
        {"node": "f", "file": str(directory / "overlay"), "children": {}},
        {"node": "low", "file": str(directory / "base"), "children": {"file": "g"}},
        {"node": "g", "file": str(directory / "base"), "children": {}},
    ]
    return Description("vm", (EngineDisk("vda", SIZE, "throttle"),), config={"blocks": blocks})


def _write(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def _replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").rename(path)


def _older(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("how", [_write, _replace, _older, Path.unlink])
@pytest.mark.parametrize("which", ["overlay", "base"])
def test_what_tells_a_change(tmp_path: Path, how: Callable[[Path], None], which: str) -> None:
    """Of a backing file between two runs; of all files during a run of an image that is off."""
    description = _chain(tmp_path)
    run = Sources(description, off=True)
    assert [entry[0] for entry in run.backing["vda"]] == [str(tmp_path / "base")]
    run.confirm()
    how(tmp_path / which)
    assert (Sources(description, off=True).backing == run.backing) is (which == "overlay")
    with pytest.raises(ImageChangedError, match=which):
        run.confirm()
    Sources(_chain(tmp_path), off=False).confirm()


def _disks(data: Path, **images: Path | str) -> Description:
    """Disks of one node each; what is called vdd has ``data`` as its data file."""
    blocks: list[dict[str, Any]] = [{"node": name, "file": str(image)} for name, image in images.items()]
    blocks.append({"node": "data", "file": str(data)})
    for block in blocks:
        block["children"] = {"data-file": "data"} if block["node"] == "vdd" else {}
    disks = tuple(EngineDisk(name, SIZE, name) for name in images)
    return Description("vm", disks, config={"blocks": blocks})


def test_two_disks_of_a_running_vm_that_have_bytes_in_common_are_refused(tmp_path: Path) -> None:
    """What the guest writes to one of them is recorded for that one only."""
    need_root()
    image, data, other = (tmp_path / name for name in ("image", "data", "other"))
    for each in (image, data, other):
        each.write_bytes(bytes(SIZE))
    (tmp_path / "link").symlink_to(image)
    with loop_device(image) as first, loop_device(image) as second:
        Sources(_disks(data, vda=image, vdb=other, vdc="nbd://host/x", vdd="/dev/null"), off=False)
        for one, two in ((first, image), (first, second), (image, image), (image, tmp_path / "link")):
            with pytest.raises(UsageError, match="vda and vdb have bytes in common"):
                Sources(_disks(data, vda=one, vdb=two), off=False)
        with pytest.raises(UsageError, match="vda and vdd have bytes in common"):
            Sources(_disks(data, vda=data, vdd=image), off=False)


@pytest.mark.parametrize("kind", ["file", "device"])
def test_what_is_open_is_known_by_its_numbers(tmp_path: Path, kind: str) -> None:
    """Whatever it is called, and where its process is."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    with loop_device(image) if kind == "device" else nullcontext(image) as path, path.open("rb") as f:
        found = os.fstat(f.fileno())
        numbers = [found.st_rdev, -1] if kind == "device" else [found.st_ino, found.st_dev]
        link = tmp_path / "link"
        link.symlink_to(path)
        for name, seen in ((path, numbers), (link, numbers), (tmp_path, [None, None]), (tmp_path / "no", [None, None])):
            description = Description("vm", (EngineDisk("vda", SIZE, "n"),), "", {"images": {"vda": str(name)}})
            made = opened_of(description, Peer(os.getpid(), [str(path)]))
            assert made == {"vda": [str(name), *seen, host.boot_id().hex()]}


def test_two_disks_of_one_name() -> None:
    """One of them would be backed up, and nothing would say so."""
    disks = EngineDisk("disk1", SIZE, "a"), EngineDisk("disk1", SIZE, "b")
    with pytest.raises(UsageError, match="two disks are called 'disk1': nodes a and b"):
        choose(Description("vm", disks), (), ())


@pytest.mark.parametrize("how", ["other", "link", "moved", "other host", "never backed up"])
def test_two_images_of_one_name(tmp_path: Path, how: str) -> None:
    """The first one is still there: then the second is not the same disk, unless somebody says so."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    if how == "link":
        second.hardlink_to(first)
    else:
        second.write_bytes(b"2")
    if how == "moved":
        first.unlink()
    record = _record(OLD, 1, config={"images": {"vda": str(first)}}, host="there" if how == "other host" else "here")
    now = Description("vm", (EngineDisk("vda", SIZE, "vda"),), config={"images": {"vda": str(second)}})
    records = [] if how == "never backed up" else [record]
    if how == "other":
        with pytest.raises(UsageError, match="is another image") as raised:
            other_images(now, records, "here")
        assert "--name" in raised.value.hint
        (what,) = other_images(now, records, "here", claimed=True)
        assert "is another image; if both are disks of the VM, name them with --disk" in what
    else:
        assert other_images(now, records, "here") == []
    assert other_images(replace(now, config={"images": {"vda": str(first)}}), records, "here") == []


@pytest.mark.parametrize(("disks", "fine"), [(("", ""), False), (("a", "b"), True), (("a", "a"), False)])
def test_two_vms_with_one_source(tmp_path: Path, disks: tuple[str, str], fine: bool) -> None:
    text = ""
    for name, disk in zip(("one", "two"), disks, strict=True):
        text += f'[vms.{name}]\nsource = "qmp:/run/x.qmp"\n' + (f'disks = ["{disk}"]\n' if disk else "")
    path = tmp_path / "config.toml"
    path.write_text(text)
    path.chmod(0o600)
    if fine:
        load(path)
    else:
        with pytest.raises(UsageError, match="also the source of one"):
            load(path)


UUID, OTHER, NONE = (f"{digit}0000000-0000-0000-0000-000000000000" for digit in "120")


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        ({"name": "web1", "uuid": UUID}, {"name": "web1", "uuid": UUID}, ""),
        ({"name": "db", "uuid": UUID}, None, "is called 'db', not 'web1'"),
        ({"name": "db", "uuid": UUID}, {"name": "web1", "uuid": UUID}, "is called 'db', not 'web1'"),
        ({"name": "db", "uuid": UUID}, {"name": "db", "uuid": UUID}, ""),
        ({"name": None, "uuid": UUID}, {"name": "web1", "uuid": OTHER}, f"UUID {OTHER}"),
        ({"uuid": NONE}, {"uuid": OTHER}, ""),
        ({}, {}, ""),
    ],
)
def test_a_name_that_the_source_contradicts(now: dict[str, Any], before: dict[str, Any] | None, said: str) -> None:
    """A backup that was made under it all the same speaks for it."""
    records = [] if before is None else [_record(OLD, 1, config=before)]
    found = contradictions("web1", Description(None, (), config=now), records)
    assert len(found) == bool(said)
    assert said in "".join(found)


@pytest.mark.parametrize(
    ("now", "before", "vm", "only", "spoken"),
    [
        ({"name": "web1", "uuid": UUID}, {"name": "web1", "uuid": UUID}, "zz", (), True),
        ({"name": "web1", "uuid": UUID}, {"name": "web1", "uuid": UUID}, "web1", (), False),  # as the monitor says
        ({"name": "web1", "uuid": UUID}, {"name": "web1", "uuid": OTHER}, "zz", (), False),
        ({"name": "new", "uuid": UUID}, {"name": "web1", "uuid": UUID}, "new", (), False),  # renamed in QEMU
        ({"name": "web1", "uuid": NONE}, {"name": "web1", "uuid": NONE}, "zz", (), True),
        ({"name": "web1"}, {"name": "web1"}, "zz", (), True),
        ({"name": "web1"}, {"name": "db"}, "zz", (), False),
        ({"uuid": NONE}, {"uuid": NONE}, "zz", (), False),
        ({"name": "web1"}, {"name": "web1"}, "zz", ("vdb",), False),  # each name has disks of its own
        ({"name": "web1"}, {"name": "web1"}, "zz", ("vda",), True),
    ],
)
def test_backups_of_the_same_source_under_another_name(
    now: dict[str, Any], before: dict[str, Any], vm: str, only: tuple[str, ...], spoken: bool
) -> None:
    """However often the name was used, newest too: it does not speak for itself."""
    disks = (EngineDisk("vda", SIZE, "vda"), EngineDisk("vdb", SIZE, "vdb"))
    records = [_record(OLD, 1, vm="one", config=before), _record(NEXT, 2, vm=vm, config=now)]
    found = other_names(vm, Description(None, disks, config=now), records, "here", only)
    assert [OLD[:8] in what for what in found] == [True] * spoken
    if "uuid" not in now:
        assert other_names(vm, Description(None, disks, config=now), records, "elsewhere", only) == []


@pytest.mark.parametrize("strict", [False, True])
def test_such_a_name_is_a_note_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    engine, repo = FakeEngine({"vda": Disk(bytearray(CLUSTER))}), new(tmp_path)
    told = engine.describe

    async def describe() -> Description:
        return replace(await told(), config={"name": "db"})

    monkeypatch.setattr(engine, "describe", describe)
    heard: list[Event] = []
    options = Options(incremental=False, name="web1", strict=strict)
    if strict:
        with pytest.raises(UsageError, match="is called 'db'"):
            asyncio.run(run(repo, engine, options, heard.append))
        assert engine.steps == []
    else:
        record = asyncio.run(run(repo, engine, options, heard.append)).record
        assert record
        assert [n for n in record.notes if "is called 'db'" in n]
        assert [e for e in heard if isinstance(e, Warned)]
    repo.close()
