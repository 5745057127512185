"""What one ``incbak serve`` serves: disks, targets and jobs by name, and where their events go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from incbak.bitmap.file import State
from incbak.reasons import Reason
from incbak.serve.disk_target import DiskTarget
from incbak.serve.exports import ExportTable
from incbak.serve.io_errors import IoErrors
from incbak.serve.jobs import Job, JobTable
from incbak.serve.memory_bitmap import AnyBitmap
from incbak.serve.point_in_time import PointInTime
from incbak.serve.schema import QmpError
from incbak.serve.scratch import Budget
from incbak.serve.targets import Target
from incbak.serve.tracker import TrackedDisk


class Vm:
    """Changed by one command at a time (`commands.Dispatcher` sees to that), and by jobs that end."""

    def __init__(self, name: str, scratch_dir: Path, scratch_limit: int | None = None) -> None:
        self.name = name
        self.disks: dict[str, TrackedDisk] = {}
        self.lost: dict[str, dict[str, Reason]] = {}
        """Per disk, bitmap files that may not be believed, and why not."""
        self.targets: dict[str, Target] = {}
        self.points: dict[str, PointInTime] = {}
        self.credentials: dict[str, Path] = {}
        """Directories of certificates for targets."""
        self.jobs = JobTable()
        self.exports = ExportTable(self.emit)
        """What a monitor has added; the disks are exported without."""
        self.budget = Budget(scratch_dir, scratch_limit)
        self.shutdown_reason: str | None = None
        self.shutdown_wanted = threading.Event()
        self._listeners: list[Callable[[str, dict[str, object]], None]] = []

    def add_disk(self, disk: TrackedDisk) -> None:
        """One more disk, before anybody is served."""
        self.disks[disk.name] = disk
        disk.on_error = IoErrors(disk.name, self.emit).tell
        self.lost.setdefault(disk.name, {})

    # -- events ---------------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[str, dict[str, object]], None]) -> None:
        """``listener`` gets each event, from any thread."""
        self._listeners.append(listener)

    def emit(self, event: str, data: dict[str, object]) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener(event, data)

    def request_shutdown(self, reason: str) -> None:
        """End soon; the first reason (QEMU's ShutdownCause) counts."""
        if self.shutdown_reason is None:
            self.shutdown_reason = reason
            self.emit("SHUTDOWN", {"guest": False, "reason": reason})
        self.shutdown_wanted.set()

    # -- look-ups, with QEMU's errors -----------------------------------------------------------------------------

    def device(self, name: str) -> TrackedDisk:
        """The disk ``name``."""
        if name not in self.disks:
            raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self.disks[name]

    def node(self, name: str) -> TrackedDisk:
        """The disk ``name``, as the commands on bitmaps put it."""
        if name not in self.disks:
            raise QmpError(f"Node '{name}' not found")
        return self.disks[name]

    def target(self, name: str) -> Target | DiskTarget:
        """The target node ``name``: that of another server, or another disk."""
        if name in self.disks:
            return DiskTarget(self.disks[name])
        if name not in self.targets:
            raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self.targets[name]

    def check_node_name(self, name: str) -> None:
        """Raises `QmpError` when something has that name."""
        if name in self.disks or name in self.targets or name in self.points:
            raise QmpError(f"Duplicate nodes with node-name='{name}'")

    def job(self, name: str) -> Job:
        """The job ``name``."""
        job = self.jobs.find(name)
        if job is None:
            raise QmpError("Job not found")
        return job

    def block_job(self, name: str) -> Job:
        """The job ``name``, as the commands on block jobs put it."""
        job = self.jobs.find(name)
        if job is None:
            raise QmpError(f"Block job '{name}' not found", cls="DeviceNotActive")
        return job


def check_usable(tracked: TrackedDisk, bitmap: AnyBitmap) -> None:
    """Raises `QmpError` when a job uses the bitmap, or it is invalid."""
    if bitmap.name in tracked.busy:
        raise QmpError(f"Bitmap '{bitmap.name}' is currently in use by another operation and cannot be used")
    if bitmap.state is State.INVALID:
        raise inconsistent(bitmap.name)


def inconsistent(name: str) -> QmpError:
    """QEMU's text."""
    return QmpError(f"Bitmap '{name}' is inconsistent and cannot be used")
