"""One VM, watched over its starts and ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from incbak.bitmap.lost import note_end, note_left, note_saved, note_watched
from incbak.engine.session import Address, CommandFailed, EngineGone, EngineSilent, Session
from incbak.errors import EngineError, IncbakError, UsageError
from incbak.reasons import Reason
from incbak.watch.disks import Watched, find_watched, lock_store, unlock_stores
from incbak.watch.loading import Outcome, distrust, load, why_written
from incbak.watch.saving import RAN, SHUT_DOWN, RanAgainError, save_and_quit
from incbak.watch.transfer import remove_leftovers

_OLDEST = (7, 1)
_LOOK_SECONDS = 2.0
_RETRY_SECONDS = 0.2
_GREETING_SECONDS = 5.0
_PANICKED = "guest-panicked"
_DEVICES = ("/machine/peripheral", "/machine/peripheral-anon")

Tell = Callable[[str, str, Mapping[str, Any]], None]
"""Takes an event's name, what people read, and facts for scripts."""


@dataclass(frozen=True)
class WatchOptions:
    """``start``: give ``cont`` when the bitmaps are loaded. ``once``: end with the VM. ``backup_wait``: seconds for
    which a VM that has shut down is kept for a backup that runs.
    ``keep_panicked``: a guest's panic is not the end. ``ignore_ctime``: see `incbak.bitmap.continuity`."""

    address: Address
    name: str | None
    state_dir: Path
    tell: Tell
    start: bool = False
    once: bool = False
    backup_wait: float = 60.0
    keep_panicked: bool = False
    ignore_ctime: bool = False


class Watcher:
    """One run of ``incbak watch``. `stop` may be called in the event loop at any time."""

    def __init__(self, options: WatchOptions) -> None:
        self.options = options
        self._stopping = asyncio.Event()
        self._said = ""

    def stop(self) -> None:
        """Leave the VM alone and end."""
        self._stopping.set()

    async def run(self) -> bool:
        """Watch until `stop`, or with ``once`` until the VM has ended; whether all bitmaps were saved.

        Raises `EngineError` when the monitor is not one, or is busy, at the first try; `LockedError`, `UsageError`.
        """
        first = True
        while not self._stopping.is_set():
            session = await self._connect(first)
            if session is None:
                continue
            first = False
            attached = _Attached(session, self.options, self._stopping)
            try:
                saved = await attached.run()
            except EngineGone as e:
                saved = attached.gone(e)
            except EngineSilent as e:
                self.options.tell("waiting", f"the VM is not watched while its monitor is silent: {e}", {})
                continue
            finally:
                await session.close()
            if self.options.once:
                return saved
        return True

    async def _connect(self, first: bool) -> Session | None:
        """A session, or ``None`` when nobody listens yet: then some time has passed."""
        address = self.options.address
        try:
            if Path(address.path).is_socket():
                return await Session.connect(address, timeout=_GREETING_SECONDS)
            why = f"there is no socket {address}"
        except EngineSilent as e:
            if first:
                raise
            why = str(e)
        except EngineError as e:
            why = str(e)
        if why != self._said:
            self._said = why
            self.options.tell("waiting", f"waiting for the VM: {why}", {})
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_SECONDS):
                await self._stopping.wait()
        return None


class _Attached:
    """One VM's run, from attaching to its end or ours."""

    def __init__(self, session: Session, options: WatchOptions, stopping: asyncio.Event) -> None:
        self._session, self._options, self._stopping = session, options, stopping
        self._vm = options.name or ""
        self._disks: dict[str, Watched] = {}
        self._devices: list[str] = []
        self._left_out: set[tuple[str, str]] = set()
        self._pausing = self._announced = False
        """Whether QEMU was told to pause at a shutdown, and whether it has announced one, or a panic."""

    async def run(self) -> bool:
        """Attach, wait, save. Whether nothing was lost."""
        await self._check_version()
        self._vm = self._vm or str((await self._session.execute("query-name")).get("name") or "")
        if not self._vm:
            raise UsageError("the monitor does not say what the VM is called", hint="Name it with --name.")
        self._down = self._session.listen("SHUTDOWN", "GUEST_PANICKED")
        self._ran = self._session.listen(*RAN)
        try:
            await self._find()
            await remove_leftovers(self._session)
            await self._attach()
            return await self._wait()
        except EngineGone:
            for disk in self._disks.values():
                note_end(disk.store.directory, Reason.UNSAVED)
            raise
        finally:
            unlock_stores(self._disks.values())

    def gone(self, error: EngineGone) -> bool:
        """QEMU has ended, and not by us. Whether nothing was lost."""
        if self._disks:
            why = "QEMU was killed or told to quit, its bitmaps are lost, and the next backup reads everything"
            self._tell("lost", f"{why}: {error}", reason=Reason.UNSAVED)
        else:
            self._tell("ended", "the VM ended")
        return not self._disks

    def _tell(self, event: str, text: str, **facts: Any) -> None:
        self._options.tell(event, f"{self._vm or 'VM'}: {text}", {"vm": self._vm, **facts})

    async def _check_version(self) -> None:
        version = (await self._session.execute("query-version"))["qemu"]
        commands = {c["name"] for c in await self._session.execute("query-commands")}
        if (version["major"], version["minor"]) < _OLDEST or not {"set-action", "cont"} <= commands:
            hint = "incbak serve and qemu-storage-daemon keep their bitmaps themselves; QEMU must be 7.1 or later."
            raise UsageError(f"{self._session.address} is not the monitor of a VM that can be watched", hint=hint)

    # -- the disks ------------------------------------------------------------------------------------------------

    async def _find(self) -> list[Watched]:
        """Look which disks there are. Those that were not there before are given, their files ours from now on."""
        self._devices = await self._plugged()
        options = self._options
        found, left_out = await find_watched(
            self._session, options.state_dir, self._vm, ignore_ctime=options.ignore_ctime
        )
        for each in left_out:
            self._leave_out(each.name, each.why)
        new: list[Watched] = []
        for disk in found:
            if known := self._disks.get(disk.name):
                self._disks[disk.name] = replace(disk, store=known.store, claim=known.claim)
                continue
            await self._own(disk)
            note_watched(disk.store.directory)
            self._disks[disk.name] = disk
            new.append(disk)
        for name in self._disks.keys() - {disk.name for disk in found}:
            unlock_stores([self._disks.pop(name)])
            self._leave_out(name, "the VM has it no more, or not with this image")
        return new

    async def _own(self, disk: Watched) -> None:
        """Lock the files of ``disk``. The watch that held them may have saved, and ended QEMU: then none is lost."""
        await lock_store(disk)
        try:
            await self._status()
        except BaseException:
            unlock_stores([disk])
            raise

    def _leave_out(self, disk: str, why: str) -> None:
        if (disk, why) not in self._left_out:
            self._left_out.add((disk, why))
            self._tell("left-out", f"disk {disk} is not watched: {why}", disk=disk, why=why)

    async def _plugged(self) -> list[str]:
        """All devices of the VM. It is asked for every two seconds, so it must not touch disks, as query-block does."""
        found: list[str] = []
        for path in _DEVICES:
            with suppress(CommandFailed):  # there may be no device without a name
                found += [str(each["name"]) for each in await self._session.execute("qom-list", {"path": path})]
        return found

    async def _look_for_new(self) -> None:
        """A disk that was plugged in is watched from now on; its files tell of another time."""
        try:
            await self._distrust(await self._find())
        except (EngineGone, EngineSilent):
            raise
        except (IncbakError, OSError) as e:
            self._leave_out("that was plugged in", str(e))
        await self._pause_at_shutdown()

    async def _distrust(self, disks: Sequence[Watched], reason: Reason = Reason.UNWATCHED, why: str = "") -> int:
        return self._report([await distrust(self._session, disk, reason) for disk in disks], why)

    # -- the beginning --------------------------------------------------------------------------------------------

    async def _attach(self) -> None:
        disks = list(self._disks.values())
        if await self._status() == SHUT_DOWN:
            await self._distrust(disks, Reason.UNSAVED)
            return
        if why := await why_written(self._session, disks):
            count = await self._distrust(disks, why=why)
        else:
            count = self._report(await load(self._session, disks))
        await self._pause_at_shutdown()
        if not why and self._options.start:
            await self._session.execute("cont")
        told = f"ready: watching {len(disks)} disks with {count} bitmaps"
        if not why and not self._options.start:
            told += "; the VM may be started now (cont)"
        self._tell("ready", told, disks=list(self._disks), bitmaps=count)

    async def _pause_at_shutdown(self) -> None:
        """A VM of which nothing is to be saved ends as it would without us."""
        if self._disks and not self._pausing:
            await self._session.execute("set-action", {"shutdown": "pause"})
            self._pausing = True

    def _report(self, outcomes: Sequence[Outcome], why: str = "") -> int:
        """How many bitmaps QEMU has."""
        for outcome in outcomes:
            for name, reason in outcome.lost.items():
                detail = outcome.detail or why
                text = f"disk {outcome.disk}: bitmap {name} cannot be used: {reason.text} [{reason}]"
                if outcome.detail:
                    text = f"disk {outcome.disk}: bitmap {name} was not given to QEMU: {detail}"
                elif why:
                    text += f": {why}"
                self._tell("invalid", text, disk=outcome.disk, bitmap=name, reason=reason, detail=detail)
        return sum(len(outcome.kept) for outcome in outcomes)

    async def _status(self) -> str:
        return str((await self._session.execute("query-status"))["status"])

    # -- while it runs --------------------------------------------------------------------------------------------

    async def _wait(self) -> bool:
        """Until the VM ends, or we do."""
        while True:
            status = await self._status_or_silent()
            if self._is_down(status):
                try:
                    return await self._save(status)
                except RanAgainError as e:
                    self._announced = False
                    self._tell("resumed", str(e))
                    continue
            if self._stopping.is_set():
                return await self._leave()
            await self._next()

    def _is_down(self, status: str) -> bool:
        """By default QEMU ends when its guest panics; told to pause at a shutdown, it pauses then too."""
        panicked = status == _PANICKED and self._announced and not self._options.keep_panicked
        return status == SHUT_DOWN or panicked

    async def _status_or_silent(self) -> str:
        """QEMU may be too busy to answer for a while, which is no reason to leave it."""
        try:
            return await self._status()
        except EngineSilent:
            return ""

    async def _next(self) -> None:
        """Until something may have happened."""
        down = asyncio.ensure_future(self._down.get())
        tasks = [down, *map(asyncio.ensure_future, (self._stopping.wait(), self._session.ended()))]
        await asyncio.wait(tasks, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        announced = down.done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if announced:
            self._announced = self._pausing
            await self._stops()
        elif not self._stopping.is_set() and await self._plugged() != self._devices:
            await self._look_for_new()

    async def _stops(self) -> None:
        """The event comes before the VM has stopped."""
        for _ in range(100):
            if self._is_down(await self._status_or_silent()):
                return
            await asyncio.sleep(0.02)

    async def _leave(self) -> bool:
        """A guest without a watch must not stay paused when it shuts down."""
        if self._pausing:
            await self._session.execute("set-action", {"shutdown": "poweroff"})
        if self._is_down(status := await self._status()):
            return await self._save(status)
        for disk in self._disks.values():
            note_left(disk.store.directory)
        self._tell("left", "left alone; if it ends now, its bitmaps are lost")
        return True

    # -- the end --------------------------------------------------------------------------------------------------

    async def _save(self, status: str) -> bool:
        self._ran.clear()
        self._tell("shutdown", "the guest has panicked" if status == _PANICKED else "the guest has shut down")
        await self._await_backups()
        await self._look_for_new()
        outcomes = await save_and_quit(self._session, list(self._disks.values()), self._ran, status=status)
        for outcome in outcomes:
            directory = self._disks[outcome.disk].store.directory
            if outcome.detail:
                note_end(directory, outcome.reason)
                self._tell("lost", f"disk {outcome.disk}: not saved: {outcome.detail}", disk=outcome.disk)
            else:
                note_saved(directory)
                text = f"disk {outcome.disk}: {len(outcome.kept)} bitmaps saved"
                self._tell("saved", text, disk=outcome.disk, bitmaps=outcome.kept)
        return not any(outcome.detail for outcome in outcomes)

    async def _await_backups(self) -> None:
        deadline = time.monotonic() + self._options.backup_wait
        while time.monotonic() < deadline and not self._stopping.is_set():
            jobs = await self._session.execute("query-jobs")
            if not any(str(job["id"]).startswith("incbak-") for job in jobs):
                return
            await asyncio.sleep(0.2)
