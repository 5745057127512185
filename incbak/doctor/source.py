"""A monitor or an image: its disks, what becomes of their bitmaps at a restart, and what is left out."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from incbak.backup.sources import check_names
from incbak.backup.vm import vm_name
from incbak.bitmap.look import owned
from incbak.bitmap.store import BitmapStore
from incbak.doctor import places
from incbak.doctor.finding import Finding, Level, fault, ok, warning
from incbak.engine.base import Description, Engine, EngineDisk, Leftover, is_bitmap_name
from incbak.engine.detect import Source, open_engine
from incbak.engine.qemu import QemuEngine
from incbak.engine.qemu_storing import why_in_memory
from incbak.engine.session import Address
from incbak.errors import IncbakError, UsageError
from incbak.units import format_size

_TESTED = ("7.2",)


async def look_at_source(source: Source) -> list[Finding]:
    """What `incbak full` of it would meet. Changes nothing in the engine or the image."""
    what = source.text
    found = _monitor(what) if what.startswith("qmp:") else []
    try:
        engine = await open_engine(source)
    except IncbakError as e:
        return [*found, fault(what, str(e), e.hint)]
    try:
        description = await engine.describe()
        called = await _name(engine, source.name)
        leftovers = await engine.leftovers()
    except IncbakError as e:
        return [*found, fault(what, str(e), e.hint)]
    finally:
        await engine.close()
    try:
        check_names(description)
    except IncbakError as e:
        found.append(fault(what, str(e), e.hint))
    found.append(ok(what, f"{description.engine or engine.kind}, disks: {len(description.disks)}"))
    found.append(called)
    if isinstance(engine, QemuEngine):
        found += _qemu(source, description)
    found += [_leftover(what, each) for each in leftovers]
    vm = called.text if called.level is Level.OK else source.name or ""
    found += [_disk(engine.kind, d, watched=bool(vm) and _held(source.state_dir, vm, d)) for d in description.disks]
    found += [warning(f"disk {each.name}", f"is left out: {each.why}") for each in description.left_out]
    if not description.disks:
        found.append(fault(what, "there is no disk that could be backed up", "Why the disks are left out is above."))
    return found + [ok(what, note) for note in description.notes]


def _monitor(text: str) -> list[Finding]:
    address = Address.parse(text)
    if not address.is_unix:
        hint = "Use a Unix socket: a monitor has no password, and rules the VM and the files of its user."
        return [warning(text, f"whoever reaches {address} owns the VM", hint)]
    path = Path(address.path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return []
    way = path.absolute().parent
    if mode & stat.S_IWOTH and way.stat().st_mode & stat.S_IXOTH:
        return [warning(text, "every user of this host can connect, and so owns the VM", f"chmod 700 {way}")]
    return []


async def _name(engine: Engine, name: str | None) -> Finding:
    try:
        return ok("name", await vm_name(engine, name))
    except UsageError as e:
        return warning("name", str(e), e.hint)


def _qemu(source: Source, description: Description) -> list[Finding]:
    version = str(description.config.get("qemu", ""))
    found = []
    if version.rpartition(".")[0] not in _TESTED:
        text = f"QEMU {version} is not among those that incbak is tested with ({', '.join(_TESTED)})"
        found.append(warning("QEMU", text, "Make a backup and compare what it restores."))
    where = source.qemu_options().scratch_dir
    found += places.works("scratch directory", where)
    return found + _room(where, description.disks)


def _room(where: Path, disks: Sequence[EngineDisk]) -> list[Finding]:
    """A tenth of the disks may be overwritten during a backup, as a rule of thumb, and half of what is free is used."""
    return places.roomy("scratch directory", where, sum(d.size for d in disks) // 5) if where.exists() else []


def _leftover(what: str, each: Leftover) -> Finding:
    if each.at_work:
        return ok(what, f"a backup is at work: {each}")
    text = f"a backup run that was killed has left {each} in QEMU, and a migration of the VM fails"
    return warning(what, text, f"incbak clean {what} removes them, and so does the next backup into its repository.")


def _held(state_dir: Path, vm: str, disk: EngineDisk) -> bool:
    """Whether another process holds the disk's bitmaps in the state directory: of a VM in QEMU that is incbak watch."""
    try:
        return owned(BitmapStore(state_dir, vm, disk.name).directory)
    except (OSError, UsageError):
        return False


def _disk(kind: str, disk: EngineDisk, *, watched: bool) -> Finding:
    what, size = f"disk {disk.name}", f"{disk.format}, {format_size(disk.size)}"
    unsound = [(b.name, b.trouble(b.granularity)) for b in disk.bitmaps if is_bitmap_name(b.name)]
    if bad := [f"{name} [{reason}]" for name, reason in unsound if reason]:
        return warning(
            what, f"{size}; bitmaps that cannot be used: {', '.join(bad)}", "The next backup reads it whole."
        )
    if kind in ("serve", "image") or disk.can_persist:
        return ok(what, f"{size}; its bitmaps outlast a restart")
    if why := why_in_memory(disk):
        hint = "Give the disk another cache mode, as cache=none."
        return warning(what, f"{size}; its bitmaps are in memory, and end with the engine: {why}", hint)
    if kind == "qemu" and watched:
        return ok(what, f"{size}; its bitmaps are in QEMU's memory, and incbak watch keeps them over shutdowns")
    if kind == "qemu":
        hint = "Run the VM under incbak watch, on incbak serve, or on qcow2 of version 3."
        return warning(what, f"{size}; its bitmaps are in QEMU's memory, and end with it", hint)
    return warning(what, f"{size}; it holds no bitmaps: each backup reads it whole")
