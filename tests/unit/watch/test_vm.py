"""A watch over several runs of a VM, whose monitor may fall silent."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import cast

import pytest

from incbak.bitmap.look import owned
from incbak.bitmap.store import BitmapStore
from incbak.disk.stacking import Key
from incbak.engine.session import Address, EngineGone, EngineSilent, Session
from incbak.errors import EngineError
from incbak.watch import vm
from incbak.watch.disks import Watched
from incbak.watch.vm import Watcher, WatchOptions


class Silent:
    """A session that is only closed."""

    closed = 0

    async def close(self) -> None:
        Silent.closed += 1


def watched(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *runs: bool | EngineError, once: bool = True
) -> tuple[bool, list[str]]:
    """What `Watcher.run` returns, when the VM's runs end as told; and the events that were told."""
    told: list[str] = []
    path = directory / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        options = WatchOptions(Address(path=str(path)), "vm", directory, lambda e, *_: told.append(e), once=once)
        watcher, left = Watcher(options), list(runs)

        async def connect(*_: object, **__: object) -> Silent:
            return Silent()

        async def run(_: object) -> bool:
            ending = left.pop(0)
            if not left and not once:
                watcher.stop()
            if isinstance(ending, EngineError):
                raise ending
            return ending

        monkeypatch.setattr(Session, "connect", connect)
        monkeypatch.setattr(vm._Attached, "run", run)
        return asyncio.run(watcher.run()), told


def test_a_monitor_that_falls_silent_is_come_back_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the guest would stay paused when it shuts down."""
    Silent.closed = 0
    assert watched(monkeypatch, tmp_path, EngineSilent("no answer"), True) == (True, ["waiting"])
    assert Silent.closed == 2


def test_a_vm_of_which_nothing_is_watched_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert watched(monkeypatch, tmp_path, EngineGone("gone")) == (True, ["ended"])


def test_without_once_the_next_run_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert watched(monkeypatch, tmp_path, False, EngineGone("gone"), True, once=False) == (True, ["ended"])


def test_a_watch_that_waited_for_another_until_the_vm_had_ended_lost_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other one has saved, and let go of the files when QEMU was gone."""
    store = BitmapStore(tmp_path / "state", "vm", "vda")
    disk = Watched("vda", "vda", 1 << 20, tmp_path / "a.raw", Key(), "raw", store)

    class Gone:
        async def execute(self, command: str, *_: object) -> list[object]:
            if command == "query-status":
                raise EngineGone("the engine went away")
            return []

    async def found(*_: object, **options: object) -> tuple[list[Watched], list[object]]:
        return [disk], []

    async def lock(each: Watched) -> None:
        each.store.lock()

    monkeypatch.setattr(vm, "find_watched", found)
    monkeypatch.setattr(vm, "lock_store", lock)
    told: list[str] = []
    options = WatchOptions(Address(path="m"), "vm", tmp_path / "state", lambda e, *_: told.append(e))
    attached = vm._Attached(cast(Session, Gone()), options, asyncio.Event())
    with pytest.raises(EngineGone) as gone:
        asyncio.run(attached._find())
    assert (attached.gone(gone.value), told) == (True, ["ended"])
    assert not owned(disk.store.directory), "the next one can have them"
    assert not (disk.store.directory / "watch.json").exists()
