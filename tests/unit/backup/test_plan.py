"""What is read, and why: every reason for which an incremental reads a disk whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace as changed

from incbak.backup.plan import Known, Planned, Request, choose, make_plan, missed
from incbak.bitmap.lost import Lost
from incbak.disk.stacking import Key
from incbak.engine.base import BitmapInfo, Description, EngineDisk, LeftOut, bitmap_name
from incbak.errors import UsageError
from incbak.reasons import Reason
from incbak.repo.record import DiskRecord, Origin, Record

CLUSTER = 65536
SIZE = 100 * CLUSTER
REPOSITORY = "aaaaaaaa" + 24 * "0"
OLD, BASE, NEW = (digit * 8 + 24 * "0" for digit in "123")


def _record(ident: str, seq: int, *disks: str, size: int = SIZE) -> Record:
    made = tuple(
        DiskRecord(
            name=d,
            size=size,
            kind="full",
            base=None,
            reason=None,
            read=0,
            stored=0,
            root=ident[0] * 64,
            bitmap=_name(ident, d),
        )
        for d in disks or ("vda",)
    )
    return Record(
        id=ident, seq=seq, vm="vm", kind="full", base=None, started="", finished="", cluster_size=CLUSTER, disks=made,
        engine="test",
    )  # fmt: skip


def _name(ident: str, disk: str = "vda") -> str:
    return bitmap_name(f"incbak-aaaaaaaa-{ident[:8]}", disk)


def _disk(*bitmaps: BitmapInfo, name: str = "vda", size: int = SIZE) -> EngineDisk:
    return EngineDisk(name, size, f"node-{name}", device=f"device-{name}", bitmaps=bitmaps)


def _bitmap(ident: str, **more: Any) -> BitmapInfo:
    return BitmapInfo(**{"name": _name(ident), "granularity": CLUSTER, "count": CLUSTER, **more})


KNOWN = Known(REPOSITORY, CLUSTER, [_record(OLD, 1), _record(BASE, 2)])


def _plan(disk: EngineDisk, known: Known = KNOWN, *, strays: tuple[tuple[str, str], ...] = ()) -> Planned:
    (planned,) = make_plan([disk], known, Request(True, NEW, frozenset(strays)))
    assert planned.plan.new_bitmap == _name(NEW, disk.name)
    assert planned.plan.granularity == CLUSTER
    assert (planned.plan.base_bitmap is None) == (planned.base is None)
    return planned


def test_the_newest_backup_with_a_bitmap_is_the_base() -> None:
    planned = _plan(_disk(_bitmap(OLD), _bitmap(BASE)))
    assert planned.base is KNOWN.records[1]
    assert planned.before is KNOWN.records[1].disks[0]
    assert (planned.plan.base_bitmap, planned.plan.reason) == (_name(BASE), None)


@pytest.mark.parametrize(
    "trouble",
    [{"inconsistent": True}, {"busy": True}, {"recording": False}, {"granularity": 4096}, {"reason": Reason.DIGEST}],
)
def test_an_older_backup_is_the_base_where_the_newest_ones_bitmap_is_no_good(trouble: dict[str, Any]) -> None:
    """Its bitmap has recorded all the time."""
    planned = _plan(_disk(_bitmap(OLD), _bitmap(BASE, **trouble)))
    assert planned.base is KNOWN.records[0]
    assert (planned.plan.base_bitmap, planned.plan.reason) == (_name(OLD), None)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"inconsistent": True}, Reason.BITMAP_INCONSISTENT),
        ({"inconsistent": True, "count": 0}, Reason.BITMAP_INCONSISTENT),
        ({"busy": True}, Reason.BITMAP_BUSY),
        ({"recording": False}, Reason.BITMAP_DISABLED),
        ({"granularity": CLUSTER // 2}, Reason.GRANULARITY),
        ({"granularity": CLUSTER * 2}, Reason.GRANULARITY),
        ({"inconsistent": True, "granularity": 0, "reason": Reason.UNCLEAN_SHUTDOWN}, Reason.UNCLEAN_SHUTDOWN),
        ({"inconsistent": True, "granularity": 0, "reason": Reason.DISK_CHANGED}, Reason.DISK_CHANGED),
        ({"reason": Reason.TRACKING_FAILED}, Reason.TRACKING_FAILED),
    ],
)
def test_a_bitmap_that_cannot_be_believed(trouble: dict[str, Any], reason: Reason) -> None:
    planned = _plan(_disk(_bitmap(BASE, **trouble)))
    assert (planned.base, planned.plan.reason) == (None, reason)
    assert planned.before is KNOWN.records[1].disks[0], "what is at its place is not stored again"


@pytest.mark.parametrize(
    ("older", "strays", "expected"),
    [
        ((), (), Reason.UNSAVED),
        ((), (("vda", _name("4" * 32)),), Reason.BASE_MISSING),
        ((_bitmap(OLD),), (), Reason.SUPERSEDED),
        ((_bitmap(BASE, inconsistent=True),), (), Reason.BITMAP_INCONSISTENT),
    ],
)
def test_a_bitmap_that_is_not_there_has_the_reason_that_this_host_remembers(
    older: tuple[BitmapInfo, ...], strays: tuple[tuple[str, str], ...], expected: Reason
) -> None:
    """Unless the disk's other bitmaps tell more: what was noted of the last end of the VM may be long ago."""
    lost = {"vda": Lost({_name(BASE): Reason.UNSAVED})}
    assert _plan(_disk(*older), _with(lost=lost), strays=strays).plan.reason is expected


@pytest.mark.parametrize(("host", "origin"), [("elsewhere", None), ("here", Origin("r", 1)), ("here", None)])
def test_only_a_backup_of_this_host_is_lost_with_its_vm(host: str, origin: Origin | None) -> None:
    finished = "2020-01-01T00:00:00.000Z"
    record = msgspec.structs.replace(KNOWN.records[1], host=host, origin=origin, finished=finished)
    lost = {"vda": Lost({}, float("inf"), Reason.UNSAVED)}
    known = _with(records=[record], host="here", lost=lost)
    expected = Reason.UNSAVED if (host, origin) == ("here", None) else Reason.BITMAP_MISSING
    assert _plan(_disk(), known).plan.reason is expected


def _with(**more: Any) -> Known:
    return replace(KNOWN, **more)


@pytest.mark.parametrize(
    ("known", "disk", "strays", "reason"),
    [
        pytest.param(_with(records=[]), _disk(), (), Reason.NO_BASE, id="no backup yet"),
        pytest.param(_with(records=[]), _disk(_bitmap(BASE)), (), Reason.NO_BASE, id="none, a bitmap in use elsewhere"),
        pytest.param(
            _with(records=[]), _disk(), (("vda", _name(BASE)),), Reason.BASE_MISSING, id="the only backup is deleted"
        ),
        pytest.param(KNOWN, _disk(), (), Reason.BITMAP_MISSING, id="no bitmap"),
        pytest.param(
            KNOWN, _disk(_bitmap(BASE, name=_name(BASE, "vdb"))), (), Reason.WRONG_DISK, id="the bitmap of another disk"
        ),
        pytest.param(KNOWN, _disk(_bitmap("4" * 32)), (), Reason.BITMAP_MISSING, id="a bitmap of another backup"),
        pytest.param(
            KNOWN, _disk(), (("vda", _name("4" * 32)),), Reason.BASE_MISSING, id="the base is deleted, older ones stay"
        ),
        pytest.param(
            KNOWN, _disk(), (("vdb", _name("4" * 32)),), Reason.BITMAP_MISSING, id="the base of another disk is deleted"
        ),
        pytest.param(KNOWN, _disk(_bitmap(BASE), size=SIZE + 512), (), Reason.RESIZED, id="grown"),
        pytest.param(KNOWN, _disk(_bitmap(BASE), size=SIZE - 512), (), Reason.RESIZED, id="shrunk"),
        pytest.param(KNOWN, _disk(_bitmap(BASE), name="vdb"), (), Reason.NEW_DISK, id="a disk that came later"),
        pytest.param(
            _with(damaged={OLD, BASE}), _disk(_bitmap(BASE), _bitmap(OLD)), (), Reason.BASE_DAMAGED, id="damaged"
        ),
        pytest.param(
            _with(records=KNOWN.records[:1], unreadable=(BASE,)),
            _disk(_bitmap(BASE)), (), Reason.BASE_DAMAGED, id="its record cannot be read",
        ),
        pytest.param(
            _with(records=[], unreadable=(BASE,)),
            _disk(_bitmap(BASE)), (), Reason.BASE_DAMAGED, id="the only record cannot be read",
        ),
    ],
)  # fmt: skip
def test_no_backup_can_be_the_base(
    known: Known, disk: EngineDisk, strays: tuple[tuple[str, str], ...], reason: Reason
) -> None:
    """I5: unknown means that everything is read, and why."""
    planned = _plan(disk, known, strays=strays)
    assert (planned.base, planned.plan.base_bitmap, planned.plan.reason) == (None, None, reason)


def test_a_bitmap_with_the_name_that_earlier_versions_gave_is_the_base() -> None:
    """Its record has that name."""
    run = _name(BASE).rpartition("-")[0]
    record = KNOWN.records[1]
    for named in (run, None):
        known = _with(records=[changed(record, disks=(changed(record.disks[0], bitmap=named),))])
        assert _plan(_disk(_bitmap(BASE, name=run)), known).plan.base_bitmap == run


def test_the_name_of_a_bitmap_in_a_record_is_believed_only_for_its_own_backup() -> None:
    record = changed(KNOWN.records[1], disks=(changed(KNOWN.records[1].disks[0], bitmap=_name(OLD)),))
    assert _plan(_disk(_bitmap(OLD)), _with(records=[record])).plan.reason is Reason.BITMAP_MISSING


_A = ["/a.raw", 7, 1, "boot"]


@pytest.mark.parametrize(
    ("before", "now", "in_memory", "stored"),
    [
        (_A, _A, True, True),
        (_A, ["/b.raw", 8, 1, "boot"], False, False),
        (_A, ["/moved.raw", 7, 1, "boot"], True, True),
        (_A, ["/a.raw", 8, 1, "boot"], False, True),  # copied back: the bitmap came with it, or there is none
        (_A, ["/a.raw", 7, 2, "boot"], False, True),  # of another file system
        (_A, ["/a.raw", None, None, "boot"], True, True),  # renamed
        (["/a.raw", 6, 1, "boot"], ["/a.raw", None, None, "boot"], False, True),
        (_A, ["/a.raw", 8, 1, "other boot"], True, True),
        (_A, ["/b.raw", 7, 2, "other boot"], True, True),
        (_A, ["/b.raw", 8, 1, "other boot"], False, False),
        (["/a.raw", None, None, "boot"], ["/b.raw", None, None, "boot"], False, False),
        (["nbd://a", None, None, "boot"], ["nbd://a", None, None, "boot"], True, True),
        (["/a.raw", 7], ["/a.raw", 8, 1, "boot"], True, True),  # as earlier versions recorded it
        (["/a.raw", 7], ["/b.raw", 8, 1, "boot"], False, False),
        (None, ["/b.raw", 8, 1, "boot"], True, True),
        (_A, None, True, True),
    ],
)
def test_a_node_that_got_another_file_is_another_disk(
    before: list[Any], now: list[Any], in_memory: bool, stored: bool
) -> None:
    """Its bitmaps stay, in QEMU (``blockdev-reopen``)."""
    record = changed(KNOWN.records[1], config={"opened": {"vda": before}} if before else {})
    known = _with(records=[record], opened={"vda": now} if now else {}, held={Key(1, 7), Key(1, 9)})
    for persistent, same in ((False, in_memory), (True, stored)):
        planned = _plan(_disk(_bitmap(BASE, persistent=persistent)), known)
        assert planned.plan.reason is (None if same else Reason.DISK_CHANGED)


def test_what_an_engine_has_open_is_not_always_seen() -> None:
    """Then a name is all that there is."""
    record = changed(KNOWN.records[1], config={"opened": {"vda": _A}})
    for name, reason in (("/a.raw", None), ("/b.raw", Reason.DISK_CHANGED)):
        known = _with(records=[record], opened={"vda": [name, None, None, "boot"]})
        assert _plan(_disk(_bitmap(BASE)), known).plan.reason is reason


def test_a_damaged_base_is_passed_over_for_an_older_one() -> None:
    """I1, L26: nothing is built on what is damaged, nor compared with it."""
    known = _with(damaged={BASE})
    planned = _plan(_disk(_bitmap(OLD), _bitmap(BASE)), known)
    assert planned.base is KNOWN.records[0]
    assert _plan(_disk(_bitmap(BASE)), known).before is KNOWN.records[0].disks[0]
    assert _plan(_disk(_bitmap(BASE)), _with(damaged={OLD, BASE})).before is None


def test_a_resized_disk_is_compared_with_no_backup_of_another_size() -> None:
    known = _with(records=[_record(OLD, 1, size=SIZE + CLUSTER), _record(BASE, 2)])
    planned = _plan(_disk(_bitmap(BASE), _bitmap(OLD), size=SIZE + CLUSTER), known)
    assert planned.base is None, "a bitmap is cut where its disk is, and what comes back is not marked"
    assert _plan(_disk(_bitmap(BASE), size=SIZE + CLUSTER), known).before is known.records[0].disks[0]
    assert _plan(_disk(_bitmap(BASE), size=SIZE + 2 * CLUSTER), known).before is None


def test_each_disk_has_a_base_of_its_own() -> None:
    """A backup that lacks a disk, since that had failed, leaves the disk its older base."""
    known = _with(records=[_record(OLD, 1, "vda", "vdb"), _record(BASE, 2, "vda")])
    disks = [
        _disk(_bitmap(OLD), _bitmap(BASE)),
        _disk(_bitmap(OLD, name=_name(OLD, "vdb")), name="vdb"),
        _disk(name="vdc"),
    ]
    found = make_plan(disks, known, Request(True, NEW))
    assert [p.base.id if p.base else None for p in found] == [BASE, OLD, None]
    assert [p.plan.reason for p in found] == [None, None, Reason.NEW_DISK]


def test_a_full_has_no_base_and_no_reason_and_is_compared_all_the_same() -> None:
    (planned,) = make_plan([_disk(_bitmap(BASE))], KNOWN, Request(False, NEW))
    assert (planned.base, planned.plan.base_bitmap, planned.plan.reason) == (None, None, None)
    assert planned.before is KNOWN.records[1].disks[0]


# -- which disks -------------------------------------------------------------------------------------------------------

DISKS = Description("vm", (_disk(), _disk(name="vdb")), left_out=(LeftOut("cd0", "it is read-only"),))


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ([], [], ["vda", "vdb"]),
        (["vdb"], [], ["vdb"]),
        (["device-vdb", "node-vda"], [], ["vdb", "vda"]),
        (["vda", "node-vda"], [], ["vda"]),
        ([], ["vdb"], ["vda"]),
        (["vda", "vdb"], ["device-vda"], ["vdb"]),
    ],
)
def test_disks_are_chosen_by_name_device_or_node(include: list[str], exclude: list[str], chosen: list[str]) -> None:
    assert [d.name for d in choose(DISKS, include, exclude)] == chosen


@pytest.mark.parametrize(
    ("include", "exclude", "says"),
    [
        (["vdc"], [], "no disk 'vdc' to back up"),
        (["cd0"], [], "it is read-only"),
        ([], ["vdc"], "no disk 'vdc'"),
        ([], ["vda", "vdb"], "there is no disk to back up: vda is excluded; vdb is excluded; cd0: it is read-only"),
    ],
)
def test_disks_that_cannot_be_chosen(include: list[str], exclude: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        choose(DISKS, include, exclude)


@pytest.mark.parametrize(
    ("include", "exclude", "told"),
    [((), (), ["usb0", "data"]), (("vda",), (), []), (("usb0",), (), ["usb0"]), ((), ("data",), ["usb0"])],
)
def test_a_disk_that_nobody_would_miss_is_left_out_unsaid(
    include: tuple[str, ...], exclude: tuple[str, ...], told: list[str]
) -> None:
    left = (LeftOut("usb0", "it is removable"), LeftOut("cd0", "no medium", expected=True), LeftOut("data", "why"))
    assert [x.name for x in missed(Description("vm", (_disk(),), left_out=left), include, exclude)] == told


def test_that_there_is_no_disk_gives_the_reasons() -> None:
    """Of a bounded number: the names are those of a VM's devices."""
    none = Description("vm", (), left_out=tuple(LeftOut(f"cd{n}", "it is empty") for n in range(20)))
    with pytest.raises(UsageError, match=r"cd0: it is empty; cd1: .*cd15: it is empty, and 4 more$"):
        choose(none, [], [])
    with pytest.raises(UsageError, match=r"no disk to back up: the VM has none$"):
        choose(Description("vm", ()), [], [])


@pytest.mark.parametrize("sampling", [True, False])
def test_a_provisional_bitmap_is_for_a_run_that_samples(sampling: bool) -> None:
    planned = _plan(_disk(_bitmap(BASE, provisional=True)), replace(KNOWN, sampling=sampling))
    assert planned.plan.reason is (None if sampling else Reason.UNPROVEN)
