"""Backups without a repository: a target in memory that can stall and die, and a chain of backups through an engine.

::

    chain = Chain(lambda: connect(guest.monitor))
    chain.full()
    chain.incremental().images["vda-dev"]      what a restore of it would give
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incbak.engine.base import (
    Description,
    DiskPlan,
    Engine,
    EngineDisk,
    RunResult,
    bitmap_name,
    repository_prefix,
    run_name,
)
from incbak.engine.detect import Source, open_engine
from incbak.nbd.server import NbdServer
from incbak.reasons import Reason

POISON = 0xEE  # what is nowhere written shows
CLUSTER = 65536


class MemoryTarget:
    """See `incbak.engine.base.Target`. ``stalled`` and ``dead`` say how writes go; ``delay`` seconds for each."""

    read_only = False
    multi_conn = False
    description = "a test"

    def __init__(self, name: str, size: int, base: bytes | None) -> None:
        self.name, self.size = name, size
        self.image = bytearray(base) if base is not None else bytearray([POISON]) * size
        self.received = 0
        self.flushes = 0
        self.delay = 0.0
        self.dead = False
        self.began = threading.Event()  # the first write has come
        self._go = threading.Event()
        self._go.set()
        self._server = NbdServer(lambda: {name: self})
        self._directory: Path | None = None

    def stall(self) -> None:
        """Take nothing until `resume`."""
        self._go.clear()

    def resume(self) -> None:
        """Take everything again."""
        self._go.set()

    def _take(self, length: int) -> None:
        self.began.set()
        if self.delay:
            time.sleep(self.delay)
        self._go.wait(120)
        if self.dead:
            raise OSError(errno.EIO, "the target is dead")
        self.received += length

    # -- Target ---------------------------------------------------------------------------------------------------

    def write(self, offset: Any, view: Any, *, owned: bool = False) -> None:
        if isinstance(offset, memoryview):  # as a device: the buffer comes first
            offset, view = view, offset
        self._take(len(view))
        self.image[offset : offset + len(view)] = view

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False, fast: bool = False) -> None:
        self._take(length)
        self.image[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self.flushes += 1

    def serve(self, sock: socket.socket) -> None:
        self._server.start_connection(sock)

    def address(self) -> tuple[Path, str]:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="ibt"))
            self._server.listen_unix(self._directory / "s")
        return self._directory / "s", self.name

    def close(self) -> None:
        self.resume()
        self._server.stop(1)
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    # -- the export and its device --------------------------------------------------------------------------------

    def contexts(self) -> list[str]:
        return []

    def open(self) -> Any:
        return _Device(self)


class _Device:
    read_only = False

    def __init__(self, target: MemoryTarget) -> None:
        self.target, self.size = target, target.size
        self.write_zeroes = target.write_zeroes

    def may_block(self, offset: int, length: int) -> bool:
        return False

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        raise OSError(errno.EPERM, "write only")

    def read_into(self, buf: memoryview, offset: int) -> None:
        raise OSError(errno.EPERM, "write only")

    def write(self, buf: memoryview, offset: int) -> None:
        self.target.write(offset, buf)

    def trim(self, offset: int, length: int) -> None:
        pass

    def cache(self, offset: int, length: int) -> None:
        pass

    def flush(self) -> None:
        self.target.flush()

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        return [(length, 0)]

    def close(self) -> None:
        pass


@dataclass(repr=False)  # asyncio makes a text of a task's result
class Backup:
    """One link of a chain. ``images`` is what a restore gives; ``reasons`` why disks were read whole."""

    id: str
    images: dict[str, bytes]
    copied: dict[str, int]
    reasons: dict[str, Reason | None]
    result: RunResult
    description: Description


@dataclass
class Chain:
    """Backups of one VM, each on the one before: what the runner does, without a repository."""

    connect: Callable[[], Awaitable[Engine]]
    repository: str = field(default_factory=lambda: secrets.token_hex(4))
    cluster: int = CLUSTER
    backups: list[Backup] = field(default_factory=list)
    during: Callable[[Mapping[str, MemoryTarget]], None] | None = None  # called in a thread once the run begins
    removed: list[str] = field(default_factory=list)
    _ids: Any = field(default_factory=lambda: itertools.count(1))

    def full(self, *disks: str) -> Backup:
        """Read everything."""
        return asyncio.run(self._run(False, disks))

    def incremental(self, *disks: str) -> Backup:
        """Read what changed since the last one."""
        return asyncio.run(self._run(True, disks))

    @property
    def prefix(self) -> str:
        """Of all our names."""
        return repository_prefix(self.repository)

    def run(self, backup: str) -> str:
        """How the names of a backup's bitmaps begin."""
        return run_name(self.repository, backup)

    def name(self, backup: str, disk: str = "disk0") -> str:
        """The bitmap of one disk of a backup."""
        return bitmap_name(self.run(backup), disk)

    async def _run(self, incremental: bool, only: tuple[str, ...]) -> Backup:
        engine = await self.connect()
        try:
            return await self._backup(engine, incremental, only)
        finally:
            await engine.close()

    async def _backup(self, engine: Engine, incremental: bool, only: tuple[str, ...]) -> Backup:
        await engine.describe()
        self.removed = await engine.cleanup(self.prefix, {self.run(b.id) for b in self.backups})
        description = await engine.describe()
        ident = f"{next(self._ids):08x}"
        disks = [d for d in description.disks if not only or d.name in only]
        plans = [self._plan(d, ident, incremental) for d in disks]
        last = self.backups[-1].images if self.backups else {}
        bases = {p.disk.name: last[p.disk.name] if p.base_bitmap else None for p in plans}
        targets = {d.name: MemoryTarget(d.name, d.size, bases[d.name]) for d in disks}
        if self.during:
            threading.Thread(target=self.during, args=(targets,), daemon=True).start()
        try:
            result = await engine.run(plans, targets, lambda *_: None)
        finally:
            for target in targets.values():
                target.close()
        failed = {name: r.error for name, r in result.disks.items() if r.error}
        if failed:
            await engine.rollback(plans)
            raise AssertionError(f"disks failed: {failed}")
        for name, target in targets.items():
            assert target.flushes, f"{name} was never flushed"
            assert target.received == result.disks[name].copied, (name, target.received, result.disks[name].copied)
        await engine.commit(plans)
        backup = Backup(
            ident,
            {name: bytes(t.image) for name, t in targets.items()},
            {name: t.received for name, t in targets.items()},
            {p.disk.name: p.reason for p in plans},
            result,
            description,
        )
        self.backups.append(backup)
        return backup

    def _plan(self, disk: EngineDisk, ident: str, incremental: bool) -> DiskPlan:
        plan = DiskPlan(disk, self.name(ident, disk.name), self.cluster)
        if not incremental:
            return plan
        base = self.backups[-1] if self.backups else None
        bitmap = disk.bitmap(self.name(base.id, disk.name)) if base else None
        if base is None or disk.name not in base.images:
            plan.reason = Reason.NEW_DISK
        elif len(base.images[disk.name]) != disk.size:
            plan.reason = Reason.RESIZED
        else:
            plan.reason = bitmap.trouble(self.cluster) if bitmap else Reason.BITMAP_MISSING
        if plan.reason is None and base:
            plan.base_bitmap = self.name(base.id, disk.name)
        return plan


def chain_of(source: str, directory: Path, **options: Any) -> Chain:
    """A chain of backups of any SOURCE; ``directory`` takes state and scratch files."""
    wanted = Source(source, directory, scratch_dir=directory, **options)
    return Chain(lambda: open_engine(wanted))
