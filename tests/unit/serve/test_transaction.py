"""Transactions: everything at one instant on all disks, or nothing, and nothing is left behind."""

from __future__ import annotations

import errno
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from incbak import durable
from incbak.bitmap import format as fmt
from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import Flag, Slot
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.serve import transaction as module
from incbak.serve.commands.bitmaps import Clear
from incbak.serve.schema import QmpError
from tests.kit.serve import Machine, wait_until

GRAIN = 65536
SIZE = 64 * GRAIN

Action = dict[str, Any]


def _action(kind: str, **data: object) -> Action:
    return {"type": kind, "data": {k.replace("_", "-"): v for k, v in data.items()}}


def _add(name: str, disk: str = "vda", **more: object) -> Action:
    return _action("block-dirty-bitmap-add", node=disk, name=name, **more)


def _backup(target: str, disk: str = "vda", **more: object) -> Action:
    return _action("blockdev-backup", device=disk, target=target, **({"sync": "full", "job_id": target} | more))


def _picture(machine: Machine) -> object:
    """All that a transaction could leave behind."""
    files = sorted(str(p.relative_to(machine.directory)) for p in machine.directory.glob("state/**/*.bitmap*"))
    bits = {
        (disk, name): (bitmap.runs().tolist(), bitmap.enabled)
        for disk, tracked in machine.tracked.items()
        for name, bitmap in tracked.bitmaps.items()
    }
    tracked = [(t._copies, t._shadows, dict(t.busy), t.gate._draining) for t in machine.tracked.values()]
    users = {name: target.user for name, target in machine.vm.targets.items()}
    return files, bits, tracked, users, machine("query-jobs"), machine.vm.budget.used


FIRSTS = {
    "add": _add("new"),
    "add-persistent": _add("new", persistent=True),
    "remove": _action("block-dirty-bitmap-remove", node="vda", name="kept"),
    "remove-memory": _action("block-dirty-bitmap-remove", node="vda", name="memory"),
    "clear": _action("block-dirty-bitmap-clear", node="vda", name="kept"),
    "disable": _action("block-dirty-bitmap-disable", node="vda", name="kept"),
    "enable": _action("block-dirty-bitmap-enable", node="vda", name="off"),
    "merge": _action("block-dirty-bitmap-merge", node="vda", target="off", bitmaps=["kept", "memory"]),
    "backup": _backup("t0"),
    "backup-bitmap": _backup("t0", sync="bitmap", bitmap="kept", bitmap_mode="always"),
}


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """A VM of two disks with a persistent, a memory and a disabled bitmap, some bits, and two targets."""
    disks = {"vda": FaultyDisk(MemoryDisk(SIZE), Faults()), "vdb": MemoryDisk(SIZE)}
    with Machine(tmp_path, disks) as made:
        made("block-dirty-bitmap-add", node="vda", name="kept", persistent=True)
        made("block-dirty-bitmap-add", node="vda", name="memory")
        made.guest["vda"].write(memoryview(b"x" * GRAIN), 3 * GRAIN + 1)
        made("block-dirty-bitmap-add", node="vda", name="off", disabled=True)
        made.target("t0", SIZE)
        made.target("t1", SIZE)
        yield made
        durable.arm()


STOPS = [(f, s) for f in FIRSTS for s in ("abort", "fails-to-prepare")]
STOPS += [(f, "fails-to-apply") for f in FIRSTS if not f.startswith("backup")]


@pytest.mark.parametrize(("first", "stop"), STOPS)
def test_of_a_transaction_that_stops_nothing_is_left(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, first: str, stop: str
) -> None:
    """Nothing happened, whichever action went before and whichever step failed; the same works afterwards."""
    before = _picture(machine)
    last = {
        "abort": _action("abort"),
        "fails-to-prepare": _action("block-dirty-bitmap-clear", node="vdb", name="nowhere"),
        "fails-to-apply": _backup("t1", "vdb"),
    }[stop]
    with monkeypatch.context() as broken:
        if stop == "fails-to-apply":

            def fail(_self: object) -> None:
                raise OSError(errno.EIO, "Input/output error")

            broken.setattr("incbak.serve.commands.backup.BackupJob.begin", fail)
        with pytest.raises(QmpError):
            machine("transaction", actions=[FIRSTS[first], last])
    wait_until(lambda: _picture(machine) == before, "the picture is as before")
    machine.guest["vda"].write(memoryview(b"y"), 9 * GRAIN)
    kept = machine.tracked["vda"].bitmaps["kept"]
    assert kept.is_dirty(9 * GRAIN, 1), "it goes on recording"
    machine("transaction", actions=[FIRSTS[first]])


def test_a_bitmap_that_is_found_wrong_stays_with_the_reason(machine: Machine) -> None:
    """It records no more, is told as invalid, cannot be used, and can be removed."""
    arguments = {"node": "vda", "name": "kept", "reason": "audit"}
    machine("x-incbak-bitmap-invalidate", **arguments)
    machine.guest["vda"].write(memoryview(b"y"), 9 * GRAIN)
    told = {b["name"]: b for b in machine("query-block")[0]["inserted"]["dirty-bitmaps"]}
    assert (told["kept"]["inconsistent"], told["kept"]["recording"]) == (True, False)
    assert (told["kept"]["x-incbak-reason"], told["memory"].get("x-incbak-reason")) == ("audit", None)
    for change, error in (({"name": "memory"}, "is not persistent"), ({"name": "none"}, "not found"), ({}, "incons")):
        with pytest.raises(QmpError, match=error):
            machine("x-incbak-bitmap-invalidate", **(arguments | change))
    machine("block-dirty-bitmap-remove", node="vda", name="kept")
    assert "kept" not in machine.tracked["vda"].bitmaps


def test_two_backups_of_which_the_second_cannot_begin(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from incbak.serve.backup_job import BackupJob

    before = _picture(machine)
    real = BackupJob.begin

    def begin(self: BackupJob) -> None:
        real(self)
        if self.id == "t1":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(BackupJob, "begin", begin)
    with pytest.raises(QmpError):
        machine("transaction", actions=[_backup("t0"), _backup("t1", "vdb")])
    wait_until(lambda: _picture(machine) == before, "the picture is as before")


def test_what_takes_time_fails_the_transaction_before_the_guest_is_held(machine: Machine) -> None:
    """A persistent bitmap whose file cannot be made: the bitmap before it is not there either."""
    before = _picture(machine)
    durable.arm(fault_at="durable.synced:1:ENOSPC")
    with pytest.raises(QmpError, match="No space left"):
        machine("transaction", actions=[_add("a"), _add("b", persistent=True)])
    assert _picture(machine) == before


@pytest.mark.parametrize("order", [1, -1])
def test_a_write_in_flight_that_does_not_end_fails_the_transaction(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """Every disk is drained, whichever comes first; that is bounded; then the guest goes on, nothing has happened."""
    monkeypatch.setattr(module, "DRAIN_TIMEOUT", 0.2)
    before = _picture(machine)
    faults = machine.disks["vda"].faults  # type: ignore[attr-defined]
    faults.stall["write"] = threading.Event()
    guest = threading.Thread(target=machine.guest["vda"].write, args=(memoryview(b"x"), 3 * GRAIN))
    guest.start()
    try:
        wait_until(lambda: faults.seen.get("write", 0) > 1, "the write is under way")
        actions = [_add("new", persistent=True), _backup("t0"), _backup("t1", "vdb")]
        with pytest.raises(QmpError, match="a write in flight does not end"):
            machine("transaction", actions=actions[::order])
    finally:
        faults.stall["write"].set()
        guest.join(10)
    wait_until(lambda: _picture(machine) == before, "the picture is as before")


def test_all_disks_are_copied_at_one_instant(tmp_path: Path) -> None:
    """A guest writes a counter to disk A, then the same to disk B: in every backup A >= B and A <= B + 1."""
    disks = {"vda": MemoryDisk(SIZE), "vdb": MemoryDisk(SIZE)}
    with Machine(tmp_path, disks) as machine:
        stop = threading.Event()

        def count() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for name in ("vda", "vdb"):
                    machine.guest[name].write(memoryview(struct.pack("<Q", number)), 5 * GRAIN)

        guest = threading.Thread(target=count)
        guest.start()
        try:
            for turn in range(8):
                peers = [machine.target(f"{disk}{turn}", SIZE) for disk in disks]
                both = [_backup(f"{disk}{turn}", disk) for disk in disks]
                machine("transaction", actions=both if turn % 2 else both[::-1])
                for disk in disks:
                    assert "error" not in machine.ended(f"{disk}{turn}")
                a, b = (struct.unpack_from("<Q", p.disk.data, 5 * GRAIN)[0] for p in peers)  # type: ignore[union-attr]
                assert b <= a <= b + 1
        finally:
            stop.set()
            guest.join(10)


def test_a_bitmap_and_a_backup_of_one_transaction_share_their_instant(tmp_path: Path) -> None:
    """I2: whatever is not in the backup is in the bitmap that begins with it, however the guest hurries."""
    disk = MemoryDisk(SIZE)
    with Machine(tmp_path, {"vda": disk}) as machine:
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                machine.guest["vda"].write(memoryview(struct.pack("<Q", number)), number * 7 % 64 * GRAIN)

        guest = threading.Thread(target=write)
        guest.start()
        backups, turns = [], 6
        try:
            for turn in range(turns):
                peer = machine.target(f"t{turn}", SIZE)
                machine("transaction", actions=[_add(f"b{turn}"), _backup(f"t{turn}")])
                machine.ended(f"t{turn}")
                backups.append(bytes(peer.disk.data))  # type: ignore[union-attr]
        finally:
            stop.set()
            guest.join(10)
        for turn in range(turns):
            bitmap = machine.tracked["vda"].bitmaps[f"b{turn}"]
            for cluster in range(64):
                part = slice(cluster * GRAIN, (cluster + 1) * GRAIN)
                if backups[turn][part] != disk.data[part]:
                    assert bitmap.is_dirty(cluster * GRAIN, 1)


def test_a_group_swaps_bitmaps_over_at_once(machine: Machine) -> None:
    """What a runner asks for: the next bitmap begins where the last is read, in one step."""
    machine(
        "transaction",
        actions=[
            _add("next", persistent=True),
            _backup("t0", sync="bitmap", bitmap="kept", bitmap_mode="never"),
            _add("next", "vdb", persistent=True),
            _backup("t1", "vdb"),
        ],
    )
    machine.guest["vda"].write(memoryview(b"x"), 20 * GRAIN)
    assert machine.ended("t0")["len"] == 2 * GRAIN
    machine.ended("t1")
    assert machine.tracked["vda"].bitmaps["next"].runs().tolist() == [[20, 1]]
    assert machine.tracked["vda"].bitmaps["kept"].runs().tolist() == [[3, 2], [20, 1]]


def test_later_actions_see_what_earlier_ones_prepare(machine: Machine) -> None:
    merge = _action("block-dirty-bitmap-merge", node="vda", target="sum", bitmaps=["kept"])
    machine("transaction", actions=[_add("sum"), merge, _action("block-dirty-bitmap-disable", node="vda", name="sum")])
    assert machine.bitmap("vda", "sum")["count"] == 2 * GRAIN
    assert not machine.bitmap("vda", "sum")["recording"]
    gone = _action("block-dirty-bitmap-remove", node="vda", name="sum")
    with pytest.raises(QmpError, match="'sum' not found"):
        machine("transaction", actions=[gone, merge])
    assert machine.bitmap("vda", "sum")["count"] == 2 * GRAIN


def test_a_bitmap_that_a_job_uses_is_left_alone(machine: Machine) -> None:
    """As QEMU: busy bitmaps are neither cleared, removed, switched, merged into, nor used by a second job."""
    machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="kept", bitmap_mode="never", speed=1)
    for kind in ("clear", "remove", "disable", "enable"):
        with pytest.raises(QmpError, match="currently in use by another operation"):
            machine(f"block-dirty-bitmap-{kind}", node="vda", name="kept")
    with pytest.raises(QmpError, match="currently in use"):
        machine("block-dirty-bitmap-merge", node="vda", target="kept", bitmaps=["memory"])
    with pytest.raises(QmpError, match="currently in use"):
        machine("transaction", actions=[_backup("t1", sync="bitmap", bitmap="kept", bitmap_mode="never")])


def test_merging_keeps_what_was_dirty_across_granularities(machine: Machine) -> None:
    for grain, wanted in ((4096, [[3 * 16, 32]]), (1 << 20, [[0, 1]])):
        machine("block-dirty-bitmap-add", node="vda", name=f"g{grain}", granularity=grain)
        machine("block-dirty-bitmap-merge", node="vda", target=f"g{grain}", bitmaps=[{"node": "vda", "name": "kept"}])
        assert machine.tracked["vda"].bitmaps[f"g{grain}"].runs().tolist() == wanted


@pytest.mark.parametrize("undone", [False, True])
def test_a_clear_counts_only_once_the_transaction_has_happened(machine: Machine, undone: bool) -> None:
    """A kill while it is applied must not leave a bitmap that is believed and has forgotten the old marks."""
    bitmap = machine.tracked["vda"].bitmaps["kept"]
    assert isinstance(bitmap, Bitmap)
    before = bitmap.runs().tolist()
    flags: list[Flag] = []

    class Look(module.Action):
        def apply(self) -> None:
            slot, _both = fmt.newest(bitmap.path.read_bytes())
            assert isinstance(slot, Slot)
            flags.append(slot.flags)
            bitmap.mark(9 * GRAIN, 1)
            if undone:
                raise QmpError("no")

    actions = [Clear(machine.vm, {"node": "vda", "name": "kept"}), Look()]
    if undone:
        with pytest.raises(QmpError, match="no"):
            module.Transaction(machine.vm).run(actions)
    else:
        module.Transaction(machine.vm).run(actions)
    assert flags[0] & Flag.INVALID
    slot, _both = fmt.newest(bitmap.path.read_bytes())
    assert isinstance(slot, Slot)
    assert not slot.flags & Flag.INVALID
    assert bitmap.state is State.DIRTY
    assert bitmap.runs().tolist() == ([*before, [9, 1]] if undone else [[9, 1]])
