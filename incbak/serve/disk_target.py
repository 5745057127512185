"""Another disk of the same VM as a job's target: written as by a guest, so that its own bitmaps and jobs see it."""

from __future__ import annotations

from collections.abc import Callable

from incbak.serve.export import TrackedDevice
from incbak.serve.jobs import TargetError
from incbak.serve.schema import QmpError
from incbak.serve.tracker import TrackedDisk


class DiskTarget:
    """See `incbak.serve.targets.JobTarget`. Guests that may write are kept out while a job has it."""

    def __init__(self, tracked: TrackedDisk) -> None:
        self.name, self.size = tracked.name, tracked.size
        self._tracked = tracked
        self._device: TrackedDevice | None = None

    def take(self, job: str) -> None:
        """Raises `QmpError` when a guest or another job may write to it."""
        if self._tracked.read_only:
            raise QmpError("Block node is read-only")
        self._tracked.take(job)
        self._device = TrackedDevice(self._tracked, job=True)

    def begin(self) -> None:
        """What is there is overwritten as the job goes on."""

    def release(self) -> None:
        """Let guests in again."""
        if self._device:
            self._device.close()
            self._device = None
            self._tracked.release()

    def write(self, data: memoryview, offset: int) -> None:
        """Record, save, write. Raises `TargetError`."""
        self._try(lambda device: device.write(data, offset))

    def zeroes(self, offset: int, length: int) -> None:
        """As `write`, of zeroes."""
        self._try(lambda device: device.write_zeroes(offset, length, unmap=True, fast=False))

    def confirm(self) -> None:
        """`write` and `zeroes` have waited."""

    def flush(self) -> None:
        """All that was written is durable. Raises `TargetError`."""
        self._try(lambda device: device.flush())

    def settle(self) -> list[tuple[int, int]]:
        """After a failure: all is durable of which `write` and `zeroes` have returned, so there is nothing to tell."""
        self.flush()
        return []

    def abort(self) -> None:
        """Nobody waits for a peer."""

    def close(self) -> None:
        """Nothing is held before `take`."""

    def _try(self, act: Callable[[TrackedDevice], object]) -> None:
        assert self._device
        try:
            act(self._device)
        except OSError as e:
            raise TargetError(e.errno, f"cannot write disk {self.name}: {e}") from e
