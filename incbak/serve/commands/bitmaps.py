"""``block-dirty-bitmap-*``: each command is a transaction of one action."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import NAME_LIMIT
from incbak.errors import IncbakError
from incbak.reasons import Reason
from incbak.serve.commands.registry import Args, command
from incbak.serve.memory_bitmap import AnyBitmap, MemoryBitmap
from incbak.serve.regrain import regrain
from incbak.serve.schema import BOOL, STR, UINT32, Alternate, Enum, Fields, List, Opt, QmpError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.transaction import Action, Transaction, log
from incbak.serve.vm import Vm, check_usable

ONE: Fields = {"node": STR, "name": STR}
ADD: Fields = {**ONE, "granularity": Opt(UINT32), "persistent": Opt(BOOL), "disabled": Opt(BOOL)}
MERGE: Fields = {"node": STR, "target": STR, "bitmaps": List(Alternate(ONE, "BlockDirtyBitmapOrStr"))}
DEFAULT_GRANULARITY = 65536


class Add(Action):
    """A new bitmap. A persistent one has its file, durable, before the guest is stopped for its sake."""

    def __init__(self, vm: Vm, args: Args) -> None:
        self.vm, self.args = vm, args
        self.tracked = vm.device(args["node"])
        self.disks = (self.tracked,)
        self.name: str = args["name"]

    def prepare(self, transaction: Transaction) -> None:
        """Check; create the file."""
        granularity = self.args.get("granularity", DEFAULT_GRANULARITY)
        self._check(transaction, granularity)
        enabled = not self.args.get("disabled", False)
        self.bitmap: AnyBitmap
        if self.args.get("persistent", False):
            self.bitmap = self._create(granularity, enabled)
        else:
            self.bitmap = MemoryBitmap(self.name, self.tracked.size, granularity, enabled=enabled)
        transaction.will_have(self.tracked, self.name, self.bitmap)

    def _check(self, transaction: Transaction, granularity: int) -> None:
        if not self.name:
            raise QmpError("Bitmap name cannot be empty")
        if len(self.name.encode()) > NAME_LIMIT:
            raise QmpError(f"Bitmap name too long: {self.name}")
        if granularity < 512 or granularity & (granularity - 1):
            raise QmpError("Granularity must be power of 2 and at least 512")
        if transaction.find(self.tracked, self.name) or self.name in self.vm.lost[self.tracked.name]:
            raise QmpError(f"Bitmap already exists: {self.name}")

    def _create(self, granularity: int, enabled: bool) -> Bitmap:
        store, disk = self.tracked.store, self.tracked.disk
        if store is None or self.tracked.read_only:
            raise QmpError(f"Can't store persistent bitmaps to {self.tracked.name}: Operation not supported")
        return store.create(self.name, disk.size, granularity, disk.fingerprint(), enabled=enabled)

    def apply(self) -> None:
        """Record from now on."""
        self.tracked.bitmaps[self.name] = self.bitmap

    def undo(self) -> None:
        """Be gone."""
        self.tracked.bitmaps.pop(self.name, None)

    def discard(self) -> None:
        """The file goes."""
        _let_go(self.tracked, self.bitmap)


class Remove(Action):
    """A bitmap goes, also one that is invalid."""

    def __init__(self, vm: Vm, args: Args) -> None:
        self.vm = vm
        self.tracked = vm.node(args["node"])
        self.disks = (self.tracked,)
        self.name: str = args["name"]
        self.bitmap: AnyBitmap | None = None

    def prepare(self, transaction: Transaction) -> None:
        """Check."""
        self.lost = self.name in self.vm.lost[self.tracked.name]
        if not self.lost:
            self.bitmap = transaction.bitmap(self.tracked, self.name)
            if self.bitmap.state is not State.INVALID:
                check_usable(self.tracked, self.bitmap)
        transaction.will_have(self.tracked, self.name, None)

    def apply(self) -> None:
        """Record no more."""
        self.tracked.bitmaps.pop(self.name, None)

    def undo(self) -> None:
        """Be there again: nothing was written meanwhile."""
        if self.bitmap:
            self.tracked.bitmaps[self.name] = self.bitmap

    def finish(self) -> None:
        """The file goes."""
        self.vm.lost[self.tracked.name].pop(self.name, None)
        _let_go(self.tracked, self.bitmap, self.name)


class Switch(Action):
    """A bitmap records from now on, or no more."""

    def __init__(self, vm: Vm, args: Args, *, enable: bool) -> None:
        self.tracked = vm.node(args["node"])
        self.disks = (self.tracked,)
        self.name: str = args["name"]
        self.enable = enable

    def prepare(self, transaction: Transaction) -> None:
        """Check."""
        self.bitmap = transaction.bitmap(self.tracked, self.name)
        check_usable(self.tracked, self.bitmap)
        self.was = self.bitmap.enabled

    def apply(self) -> None:
        """Switch."""
        self.was = self.bitmap.enabled
        self.bitmap.set_enabled(self.enable)

    def undo(self) -> None:
        """Switch back."""
        _reluctantly(self.tracked, lambda: self.bitmap.set_enabled(self.was))


class Clear(Action):
    """A bitmap forgets what was written. Undone from a copy; nothing can be written meanwhile.

    Its file says invalid until the transaction has happened or is undone: a kill between costs a full read, no bit.
    """

    def __init__(self, vm: Vm, args: Args) -> None:
        self.tracked = vm.node(args["node"])
        self.disks = (self.tracked,)
        self.name: str = args["name"]
        self.old: kernels.Bits | None = None

    def prepare(self, transaction: Transaction) -> None:
        """Check."""
        self.bitmap = transaction.bitmap(self.tracked, self.name)
        check_usable(self.tracked, self.bitmap)

    def apply(self) -> None:
        """Forget."""
        self.old = self.bitmap.snapshot()
        self.bitmap.begin_clear()

    def undo(self) -> None:
        """Remember."""
        old = self.old
        if old is not None:
            _reluctantly(self.tracked, lambda: self.bitmap.merge_bits(old))
            self.finish()

    def finish(self) -> None:
        """The file may be believed again."""
        _reluctantly(self.tracked, self.bitmap.end_clear)


class Merge(Action):
    """What was written according to any of some bitmaps counts as written according to the target."""

    def __init__(self, vm: Vm, args: Args) -> None:
        self.vm, self.args = vm, args
        self.tracked = vm.node(args["node"])
        self.disks = (self.tracked,)
        self.old: kernels.Bits | None = None

    def prepare(self, transaction: Transaction) -> None:
        """Check; make the regions durable that the sources have now, so that little is left for the drain."""
        self.target = transaction.bitmap(self.tracked, self.args["target"])
        check_usable(self.tracked, self.target)
        self.sources = [self._source(transaction, named) for named in self.args["bitmaps"]]
        for source in self.sources:
            for extent in source.extents():
                self.target.touch(extent.offset, extent.length)

    def _source(self, transaction: Transaction, named: str | dict[str, str]) -> AnyBitmap:
        tracked = self.tracked if isinstance(named, str) else self.vm.node(named["node"])
        source = transaction.bitmap(tracked, named if isinstance(named, str) else named["name"])
        if source.state is State.INVALID:
            check_usable(tracked, source)
        if source.size != self.target.size:
            raise QmpError(
                f"Bitmaps are of different sizes (destination size is {self.target.size} and source size is "
                f"{source.size}) and can't be merged"
            )
        if tracked is not self.tracked:
            self.disks = (*self.disks, tracked)
        return source

    def apply(self) -> None:
        """Merge."""
        self.old = self.target.snapshot()
        for source in self.sources:
            bits = regrain(source.snapshot(), source.size, source.granularity, self.target.granularity)
            self.target.merge_bits(bits)

    def undo(self) -> None:
        """Back to what it was."""
        old = self.old
        if old is not None:
            _reluctantly(self.tracked, lambda: self.target.keep_bits(old))


def _reluctantly(tracked: TrackedDisk, undo: Callable[[], None]) -> None:
    """Undo must not raise; what cannot be undone leaves a bitmap that has too much, or is invalid."""
    try:
        undo()
    except (IncbakError, OSError) as e:
        log.error("disk %s: cannot undo a step of a transaction: %s", tracked.name, e)


def _let_go(tracked: TrackedDisk, bitmap: AnyBitmap | None, name: str = "") -> None:
    """Close a bitmap and remove its file, if it has one."""
    if isinstance(bitmap, MemoryBitmap):
        return
    with suppress(OSError), tracked.reading:
        if bitmap is not None:
            bitmap.close(None)
    if store := tracked.store:
        _reluctantly(tracked, lambda: store.remove(bitmap.name if bitmap else name))


@command("block-dirty-bitmap-add", ADD)
def add(vm: Vm, args: Args) -> object:
    """Make a bitmap."""
    Transaction(vm).run([Add(vm, args)])
    return None


@command("block-dirty-bitmap-remove", ONE)
def remove(vm: Vm, args: Args) -> object:
    """Remove a bitmap."""
    Transaction(vm).run([Remove(vm, args)])
    return None


@command("block-dirty-bitmap-clear", ONE)
def clear(vm: Vm, args: Args) -> object:
    """Clear a bitmap."""
    Transaction(vm).run([Clear(vm, args)])
    return None


@command("block-dirty-bitmap-enable", ONE)
def enable(vm: Vm, args: Args) -> object:
    """Let a bitmap record."""
    Transaction(vm).run([Switch(vm, args, enable=True)])
    return None


@command("block-dirty-bitmap-disable", ONE)
def disable(vm: Vm, args: Args) -> object:
    """Let a bitmap record no more."""
    Transaction(vm).run([Switch(vm, args, enable=False)])
    return None


@command("block-dirty-bitmap-merge", MERGE)
def merge(vm: Vm, args: Args) -> object:
    """Merge bitmaps into one."""
    Transaction(vm).run([Merge(vm, args)])
    return None


@command("x-incbak-bitmap-invalidate", {**ONE, "reason": Enum(*Reason)})
def invalidate(vm: Vm, args: Args) -> object:
    """Make a persistent bitmap invalid, durably; it stays to tell the reason until it is removed."""
    tracked = vm.node(args["node"])
    bitmap = Transaction(vm).bitmap(tracked, args["name"])
    if not isinstance(bitmap, Bitmap):
        raise QmpError(f"Bitmap '{bitmap.name}' is not persistent")
    check_usable(tracked, bitmap)
    bitmap.invalidate(Reason(args["reason"]))
    return None


@command("x-debug-block-dirty-bitmap-sha256", ONE)
def sha256(vm: Vm, args: Args) -> object:
    """A digest of the bits, laid out as QEMU lays them out: words of 64 bits."""
    tracked = vm.node(args["node"])
    bitmap = Transaction(vm).bitmap(tracked, args["name"])
    bits = bitmap.snapshot()
    words = np.zeros(-(-max(len(bits), 1) // 8) * 8, dtype=np.uint8)
    words[: len(bits)] = bits
    return {"sha256": hashlib.sha256(words.tobytes()).hexdigest()}
