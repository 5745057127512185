"""A running QEMU as an engine. The guest comes first: see `QemuEngine.run` for the order of things, and why."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from incbak.durable import crash_point, declare
from incbak.engine.agent import Agent, Frozen, connected, frozen_inside
from incbak.engine.base import (
    BitmapInfo,
    Description,
    DiskPlan,
    DiskResult,
    Engine,
    EngineDisk,
    Leftover,
    ProgressCallback,
    RunResult,
    Target,
    end_mark_of,
    superseded,
)
from incbak.engine.end_mark import add_end_mark
from incbak.engine.headway import STALL_SECONDS, Headway
from incbak.engine.jobs import cancel_jobs, refuse_beside_backup, without_padding
from incbak.engine.leftovers import find_leftovers
from incbak.engine.qemu_disks import bitmaps_by_node, find_disks, layout
from incbak.engine.qemu_filter import DiskFilter
from incbak.engine.qemu_graph import qom_path, read_graph, unguarded
from incbak.engine.qemu_guard import Guard
from incbak.engine.qemu_jobs import CopyJob
from incbak.engine.qemu_leftovers import remove_leftovers
from incbak.engine.qemu_migration import MigrationBlocker
from incbak.engine.qemu_outside import find_outside
from incbak.engine.qemu_storing import remove_unbelieved, sync_files, why_in_memory
from incbak.engine.qemu_window import stopped
from incbak.engine.run_state import check_run_state, until_refused
from incbak.engine.session import CommandFailed, EngineGone, EngineSilent, Session
from incbak.errors import EngineError, IncbakError

T = TypeVar("T")

log = logging.getLogger(__name__)

declare("qemu.prepared", "qemu.recording", "qemu.filtering", "qemu.instant", "qemu.copying", "qemu.copied")

DEFAULT_SCRATCH = Path("/var/tmp")
OLDEST = (7, 1)
_NO_LOCKS = 9  # from this major version on, nodes can be added beside running I/O threads
_FLUSH_SECONDS = 600.0
_SYNC_SECONDS = 30.0
_SILENT_SECONDS = 5.0  # longer than that QEMU's main loop, and so the guest, does not wait for a target


@dataclass(frozen=True)
class QemuOptions:
    """How to treat the guest.

    ``scratch_limit``: bytes per disk of old content that may wait to be copied (``None``: half of the free space,
    shared by the disks). ``stall``: seconds after which a copy that does not get on is given up. ``speed``: bytes per
    second and disk, 0 for no limit. ``agent``: the guest agent's socket; with one, file systems are frozen at the point
    in time.
    """

    scratch_dir: Path = DEFAULT_SCRATCH
    scratch_limit: int | None = None
    stall: float = STALL_SECONDS
    speed: int = 0
    agent: Path | None = None


class QemuEngine(Engine):
    """See `Engine`. Owns the session."""

    kind = "qemu"

    def __init__(self, session: Session, options: QemuOptions | None = None) -> None:
        self._session, self._options = session, options or QemuOptions()

    # -- what there is --------------------------------------------------------------------------------------------

    async def describe(self) -> Description:
        state = await check_run_state(self._session)
        version = await self._session.execute("query-version")
        name = (await self._session.execute("query-name")).get("name")
        devices = await self._session.execute("query-block")
        graph = await read_graph(self._session)
        disks, left_out = find_disks(devices, graph, await unguarded(self._session, devices))
        left_out += await find_outside(self._session)
        number = version["qemu"]
        config = {
            "qemu": f"{number['major']}.{number['minor']}.{number['micro']}",
            "name": name,
            "package": str(version.get("package", "")),
            "machine": await self._machine(),
            "uuid": (await self._session.execute("query-uuid"))["UUID"],
            "images": {d.name: d.extra["image"] for d in disks},
            "blocks": layout(graph),
            "devices": await self._devices(devices),
        }
        peer = self._session.peer_pid()
        return Description(name, tuple(disks), f"QEMU {config['qemu']}", config, tuple(left_out), state.notes, peer)

    async def _machine(self) -> str:
        try:
            return str(await self._session.execute("qom-get", {"path": "/machine", "property": "type"}))
        except CommandFailed:
            return ""

    async def _devices(self, blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """The guest's devices that somebody named, and those with a medium."""
        listed = await self._session.execute("qom-list", {"path": "/machine/peripheral"})
        named = [
            {"id": d["name"], "type": d["type"].removeprefix("child<")[:-1]} for d in listed if d["name"] != "type"
        ]
        disks = [{"block": qom_path(b), "drive": str(b.get("device", ""))} for b in blocks if b.get("qdev")]
        return named + disks

    async def bitmaps(self) -> list[tuple[EngineDisk, BitmapInfo]]:
        return bitmaps_by_node(await self._session.execute("query-block"), await read_graph(self._session))

    async def leftovers(self) -> list[Leftover]:
        return await find_leftovers(self._session)

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        await refuse_beside_backup(self._session)
        for disk, name in bitmaps:
            await self._remove_bitmap(disk.node, name)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        return await remove_leftovers(self._session, prefix, keep)

    # -- the backup -----------------------------------------------------------------------------------------------

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        """See `Engine.run`.

        0. The VM's state allows it, and a migration cannot be completed from here on: see `incbak.engine.run_state`.
        1. Connect to the targets, make the scratch files and the filters: trouble here does not touch the guest.
        2. The new bitmaps begin to record.
        3. The guest's devices are moved to the filters; with more than one disk, or with I/O threads, the VM is stopped
           meanwhile. A write between 2 and 3 is both copied and marked, which is safe.
        4. The jobs run. Each disk's filter goes as soon as its job is over.
        """
        limit = self._limit(len(plans))
        disks = [DiskFilter(self._session, plan, n, self._options.scratch_dir, limit) for n, plan in enumerate(plans)]
        blocker = MigrationBlocker(self._session, f"{plans[0].run}-")
        notes: list[str] = []
        frozen = Frozen()
        await check_run_state(self._session)
        try:
            async with AsyncExitStack() as stack:
                agent = await stack.enter_async_context(connected(self._options.agent, frozen))
                guard = await stack.enter_async_context(self._guard(disks, agent))
                await blocker.add()
                for disk in disks:
                    await disk.connect(guard, targets[disk.disk])
                    await disk.prepare()
                crash_point("qemu.prepared")
                for disk in disks:
                    await remove_unbelieved(disk.plan, self._remove_bitmap)
                    notes += await self._add_bitmap(disk.plan, disk.number)
                await self._flush(disks)
                crash_point("qemu.recording")
                async with frozen_inside(agent, guard, frozen):
                    await self._point_in_time(disks, guard)
                crash_point("qemu.instant")
                await check_run_state(self._session)
                jobs = [{"type": "blockdev-backup", "data": await d.job(self._options.speed)} for d in disks]
                copies = [CopyJob(self._session, d.ident, d.disk) for d in disks]
                async with self._watched(disks):
                    await self._session.execute("transaction", {"actions": jobs})
                    crash_point("qemu.copying")
                    results = await _unless(
                        until_refused(self._session),
                        _together(
                            self._copy(disk, copy, targets[disk.disk], progress)
                            for disk, copy in zip(disks, copies, strict=True)
                        ),
                    )
                left = [text for disk in disks for text in disk.left] + await blocker.remove()
        except BaseException:
            await self._abandon(disks, blocker)
            raise
        finally:
            for disk in disks:
                disk.close()
            if frozen.why:
                log.warning("the guest was not frozen: %s", frozen.why)
        copied = {d.disk: r for d, r in zip(disks, results, strict=True)}
        return RunResult(copied, frozen.state, tuple(notes), tuple(left))

    def _limit(self, count: int) -> int:
        if self._options.scratch_limit is not None:
            return self._options.scratch_limit
        try:
            free = os.statvfs(self._options.scratch_dir)
        except OSError as e:
            raise EngineError(f"scratch directory {self._options.scratch_dir}: {e.strerror}") from e
        return free.f_bavail * free.f_frsize // 2 // max(count, 1)

    def _guard(self, disks: Sequence[DiskFilter], agent: Agent | None) -> Guard:
        """The guard has QEMU's connections to the targets from the first moment on."""
        listeners = [disk.open_door() for disk in disks]
        return Guard(self._session.duplicate(), listeners, agent.duplicate() if agent else None)

    async def _add_bitmap(self, plan: DiskPlan, number: int) -> list[str]:
        text = f"disk {plan.disk.name}: its bitmap is lost when QEMU ends"
        one = {"node": plan.disk.node, "name": plan.new_bitmap}
        add = one | {"granularity": plan.granularity, "persistent": plan.disk.can_persist}
        try:
            await self._session.execute("block-dirty-bitmap-add", add)
            await add_end_mark(self._session, plan, number, persistent=plan.disk.can_persist)
        except CommandFailed as e:
            if not plan.disk.can_persist:
                raise
            await self._session.execute("block-dirty-bitmap-add", add | {"persistent": False})
            await add_end_mark(self._session, plan, number, persistent=False)
            return [f"{text}, the image cannot store it: {e}"]
        return [f"{text}: {why}"] if (why := why_in_memory(plan.disk)) else []

    async def _flush(self, disks: Sequence[DiskFilter]) -> None:
        """Stopping a VM flushes its disks while the guest waits; so get most of that done before."""
        if len(disks) > 1 or await self._must_be_still():
            paths = [str(disk.plan.disk.extra.get("image", "")) for disk in disks]
            with suppress(TimeoutError):
                async with asyncio.timeout(_SYNC_SECONDS):
                    await asyncio.to_thread(sync_files, paths)

    async def _point_in_time(self, disks: Sequence[DiskFilter], guard: Guard) -> None:
        still = await self._must_be_still()
        before, inside, after = (lambda d: d.add_filter()), (lambda d: d.insert()), (lambda d: d.add_access())
        if not still:
            await _each(disks, before)
        async with stopped(self._session, guard) if still or len(disks) > 1 else nullcontext():
            for step in (before, inside, after) if still else (inside,):
                await _each(disks, step)
                crash_point("qemu.filtering")
        if not still:
            await _each(disks, after)

    async def _must_be_still(self) -> bool:
        """Whether nodes can be added only while the VM is stopped: see `incbak.engine.qemu_filter`."""
        version = (await self._session.execute("query-version"))["qemu"]
        return version["major"] < _NO_LOCKS and bool(await self._session.execute("query-iothreads"))

    async def _copy(self, disk: DiskFilter, copy: CopyJob, target: Target, progress: ProgressCallback) -> DiskResult:
        """Wait for one disk's job, and take its filter out."""
        headway = disk.headway = Headway(self._options.stall, self._options.speed)
        headway.begin()

        def moved(name: str, done: int, whole: int) -> None:
            headway.took(done)
            progress(name, done, whole)

        result = await copy.wait(moved)
        headway.end()
        if result.error:
            result = DiskResult(result.copied, _explain(disk, result.error))
        crash_point("qemu.copied")
        result = await without_padding(self._session, disk.ident + "t", disk.plan.disk.size, result)
        disk.left = await disk.remove()
        if result.error is None:
            result = await _flush_target(target, result)
        return result

    @asynccontextmanager
    async def _watched(self, disks: Sequence[DiskFilter]) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch(disks))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait([watch])

    async def _watch(self, disks: Sequence[DiskFilter]) -> None:
        """Cut targets off that do not get on, and all of them when QEMU does not answer: it may be waiting for them."""
        while True:
            await asyncio.sleep(min(1.0, self._options.stall / 4))
            for disk in disks:
                if disk.headway and disk.headway.stalled:
                    disk.cut(str(disk.headway))
            try:
                await self._session.execute("query-status", timeout=_SILENT_SECONDS)
            except EngineSilent:
                for disk in disks:
                    disk.cut(f"QEMU did not answer for {_SILENT_SECONDS:g} s, so it may have been waiting for the copy")
            except EngineError:
                return

    async def _abandon(self, disks: Sequence[DiskFilter], blocker: MigrationBlocker) -> None:
        """Undo what was set up, as far as QEMU answers."""
        for disk in disks:
            disk.cut()
        for disk in disks:
            try:
                await cancel_jobs(self._session, disk.ident)
                for text in await disk.remove():
                    log.warning("%s", text)
            except (EngineGone, EngineSilent) as e:
                log.warning("cannot clean up: %s", e)
                return
            except EngineError as e:
                log.warning("cannot clean up: %s", e)
        with suppress(EngineError):
            for text in await blocker.remove():
                log.warning("%s", text)
            await self.rollback([disk.plan for disk in disks])

    async def confirm(self) -> None:
        await check_run_state(self._session)

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in superseded(plan):
                await self._remove_bitmap(plan.disk.node, name)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in (plan.new_bitmap, end_mark_of(plan.new_bitmap)):
                await self._remove_bitmap(plan.disk.node, name)

    async def _remove_bitmap(self, node: str, name: str) -> None:
        try:
            await self._session.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
        except CommandFailed as e:
            if "not found" not in str(e) and "Cannot find" not in str(e):
                raise EngineError(f"cannot remove bitmap {name} of {node}: {e}") from e

    async def close(self) -> None:
        await self._session.close()


def _explain(disk: DiskFilter, error: str) -> str:
    if disk.why_cut:
        return disk.why_cut
    if disk.scratch_full():
        return f"the scratch file was full ({disk.bound} bytes): {error}"
    if disk.scratch_dir_full():
        return f"the file system of the scratch directory {disk.scratch_dir} is full: {error}"
    return error


async def _each(disks: Sequence[DiskFilter], step: Callable[[DiskFilter], Coroutine[Any, Any, None]]) -> None:
    for disk in disks:
        await step(disk)


async def _together(copies: Iterable[Coroutine[Any, Any, DiskResult]]) -> list[DiskResult]:
    """All of them; when one raises, the others are stopped first."""
    tasks = [asyncio.ensure_future(copy) for copy in copies]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless(refused: Coroutine[Any, Any, None], copies: Coroutine[Any, Any, T]) -> T:
    """The result of ``copies``, unless ``refused`` raises before."""
    tasks = asyncio.ensure_future(copies), asyncio.ensure_future(refused)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            tasks[1].result()
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _flush_target(target: Target, result: DiskResult) -> DiskResult:
    """The job's writes have all been answered; the target takes them in, and nothing in QEMU waits for that."""
    try:
        async with asyncio.timeout(_FLUSH_SECONDS):
            await asyncio.to_thread(target.flush)
    except TimeoutError:
        return DiskResult(result.copied, f"the target did not flush within {_FLUSH_SECONDS:g} s")
    except IncbakError as e:
        return DiskResult(result.copied, str(e))
    return result
