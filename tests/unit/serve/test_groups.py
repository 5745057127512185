"""Transactions of ``completion-mode: grouped``: the outcome of every job counts, or of none."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incbak.disk.faults import Faults
from incbak.disk.memory import MemoryDisk
from incbak.serve.backup_job import BackupJob
from incbak.serve.group import JobGroup
from incbak.serve.schema import QmpError
from tests.kit.serve import Machine, wait_until

GRAIN = 65536
SIZE = 16 * GRAIN


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Two disks, each with a bitmap in which cluster 2 is dirty."""
    with Machine(tmp_path, {"vda": MemoryDisk(SIZE), "vdb": MemoryDisk(SIZE)}) as made:
        for disk in made.tracked:
            made("block-dirty-bitmap-add", node=disk, name="b", persistent=True)
            made.guest[disk].write(memoryview(b"x"), 2 * GRAIN)
        yield made


def grouped(machine: Machine, **more: Any) -> None:
    """An incremental of vda to t0 and one of vdb to t1, as jobs of those names."""
    data = {"sync": "incremental", "bitmap": "b", **{k.replace("_", "-"): v for k, v in more.items()}}
    pairs = (("vda", "t0"), ("vdb", "t1"))
    actions = [
        {"type": "blockdev-backup", "data": {"device": disk, "target": target, "job-id": target, **data}}
        for disk, target in pairs
    ]
    machine("transaction", actions=actions, properties={"completion-mode": "grouped"})


def status(machine: Machine, job: str) -> str | None:
    found = machine.vm.jobs.find(job)
    return str(found.status) if found else None


def dirty(machine: Machine) -> dict[str, list[int]]:
    return {d: [c for c, _n in t.bitmaps["b"].runs().tolist()] for d, t in machine.tracked.items()}


def ends(machine: Machine) -> dict[str, tuple[str, object]]:
    """How each job ended."""
    for job in ("t0", "t1"):
        machine.ended(job)
    return {d["device"]: (event, d.get("error")) for event, d in machine.events if "COMPL" in event or "CANC" in event}  # type: ignore[misc]


CANCELLED = ("BLOCK_JOB_CANCELLED", None)


def test_none_counts_before_all_have_done_their_work(machine: Machine) -> None:
    stall = threading.Event()
    machine.target("t0", SIZE)
    machine.target("t1", SIZE, Faults(stall={"write": stall}))
    grouped(machine)
    wait_until(lambda: status(machine, "t0") == "waiting", "the first waits for the second")
    machine.guest["vda"].write(memoryview(b"x"), 5 * GRAIN)
    assert machine.bitmap("vda", "b")["busy"]
    assert dirty(machine) == {"vda": [2, 5], "vdb": [2]}
    stall.set()
    assert set(ends(machine).values()) == {("BLOCK_JOB_COMPLETED", None)}
    assert dirty(machine) == {"vda": [5], "vdb": []}


def test_one_that_fails_takes_the_one_that_waits_with_it(machine: Machine) -> None:
    stall = threading.Event()
    machine.target("t0", SIZE)
    machine.target("t1", SIZE, Faults(stall={"write": stall}, fail={"write": (1, errno.ENOSPC)}))
    grouped(machine)
    wait_until(lambda: status(machine, "t0") == "waiting", "the first waits for the second")
    stall.set()
    assert ends(machine) == {"t0": CANCELLED, "t1": ("BLOCK_JOB_COMPLETED", "No space left on device")}
    assert dirty(machine) == {"vda": [2], "vdb": [2]}, "as before: both have to be copied again"
    assert not machine.vm.targets["t0"].user


def test_one_that_fails_stops_the_one_that_copies(machine: Machine) -> None:
    stall = threading.Event()
    machine.target("t0", SIZE, Faults(stall={"write": stall}))
    machine.target("t1", SIZE, Faults(fail={"write": (1, errno.EIO)}))
    grouped(machine)
    assert ends(machine) == {"t0": CANCELLED, "t1": ("BLOCK_JOB_COMPLETED", "Input/output error")}
    assert dirty(machine) == {"vda": [2], "vdb": [2]}
    stall.set()


def test_always_gives_up_only_what_was_copied(machine: Machine) -> None:
    """The one that waits has everything at its target, durably; the one that fails has nothing."""
    stall = threading.Event()
    machine.target("t0", SIZE)
    machine.target("t1", SIZE, Faults(stall={"write": stall}, fail={"write": (1, errno.EIO)}))
    grouped(machine, sync="bitmap", bitmap_mode="always")
    wait_until(lambda: status(machine, "t0") == "waiting", "the first waits for the second")
    machine.guest["vda"].write(memoryview(b"x"), 7 * GRAIN)
    stall.set()
    ends(machine)
    assert dirty(machine) == {"vda": [7], "vdb": [2]}


@pytest.mark.parametrize("state", ["waiting", "pending"])
def test_to_cancel_one_is_to_cancel_all(machine: Machine, state: str) -> None:
    stall = threading.Event()
    if state == "pending":
        stall.set()
    machine.target("t0", SIZE)
    machine.target("t1", SIZE, Faults(stall={"write": stall}))
    grouped(machine, auto_finalize=False)
    wait_until(lambda: status(machine, "t0") == state, f"the first is {state}")
    machine("job-cancel", id="t0")
    stall.set()
    assert ends(machine) == {"t0": CANCELLED, "t1": CANCELLED}
    assert dirty(machine) == {"vda": [2], "vdb": [2]}


def test_the_word_for_one_is_for_all(machine: Machine) -> None:
    machine.target("t0", SIZE)
    machine.target("t1", SIZE)
    grouped(machine, auto_finalize=False)
    for job in ("t0", "t1"):
        wait_until(lambda job=job: status(machine, job) == "pending", "both are pending")  # type: ignore[misc]
    machine("job-finalize", id="t1")
    assert set(ends(machine).values()) == {("BLOCK_JOB_COMPLETED", None)}
    assert dirty(machine) == {"vda": [], "vdb": []}


def test_a_failed_group_is_tried_again(machine: Machine) -> None:
    """124: nothing is lost by the failure, what was written meanwhile is in the second try."""
    machine.target("t0", SIZE)
    peer = machine.target("t1", SIZE, Faults(fail={"write": (1, errno.EIO)}, once=True))
    grouped(machine)
    ends(machine)
    machine.guest["vdb"].write(memoryview(b"y"), 9 * GRAIN)
    machine.events.clear()
    grouped(machine)
    assert set(ends(machine).values()) == {("BLOCK_JOB_COMPLETED", None)}
    assert peer.disk.read(0, SIZE) == machine.disks["vdb"].read(0, SIZE)
    assert dirty(machine) == {"vda": [], "vdb": []}


def test_one_that_never_began_leaves_its_file_alone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fails before the second has started: the file that was to be overwritten is as it was."""
    out = tmp_path / "out.raw"
    out.write_bytes(b"old")
    start: Callable[[BackupJob], None] = BackupJob.start

    def late(job: BackupJob) -> None:
        if job.id == "file":
            wait_until(lambda: not machine.vm.jobs.find("t0"), "the first has failed")
        start(job)

    monkeypatch.setattr(BackupJob, "start", late)
    machine.target("t0", SIZE, Faults(fail={"write": (1, errno.EIO)}))
    data = {"sync": "full"}
    machine(
        "transaction",
        actions=[
            {"type": "blockdev-backup", "data": {"device": "vda", "target": "t0", "job-id": "t0", **data}},
            {"type": "drive-backup", "data": {"device": "vdb", "target": str(out), "job-id": "file", **data}},
        ],
        properties={"completion-mode": "grouped"},
    )
    assert machine.ended("file").get("error") is None
    assert out.read_bytes() == b"old"


def test_only_jobs_can_be_grouped(machine: Machine) -> None:
    actions = [{"type": "block-dirty-bitmap-clear", "data": {"node": "vda", "name": "b"}}]
    with pytest.raises(QmpError, match="Action 'block-dirty-bitmap-clear' does not support Transaction property"):
        machine("transaction", actions=actions, properties={"completion-mode": "grouped"})
    assert dirty(machine)["vda"] == [2]


class _Member:
    def __init__(self, *, auto_finalize: bool = True) -> None:
        self.auto_finalize, self.abandoned = auto_finalize, 0

    def abandon(self) -> None:
        self.abandoned += 1


def test_what_is_decided_stays_so() -> None:
    """One member has given up its bits: another cannot be cancelled any more."""
    group, members = JobGroup(), [_Member(), _Member()]
    for member in members:
        group.join(member)
    first = threading.Thread(target=group.gather)
    first.start()
    assert group.gather()
    first.join()
    assert group.decide()
    group.fail(members[1])
    assert group.decide()
    assert [m.abandoned for m in members] == [0, 0]
