"""Backups: of a disk to a target node, another disk, a file, or an NBD URI."""

from __future__ import annotations

import os
import re
from pathlib import Path

from incbak.disk.file import FileDisk
from incbak.disk.formats import named_format
from incbak.disk.stacking import key_of, share_bytes
from incbak.errors import IncbakError
from incbak.nbd.uri import parse_uri
from incbak.serve.backup_job import BackupJob, BackupSpec, BitmapMode
from incbak.serve.cbw import OnCbwError
from incbak.serve.commands.registry import Args, command
from incbak.serve.file_target import FileTarget
from incbak.serve.group import JobGroup
from incbak.serve.image_target import ImageTarget
from incbak.serve.jobs import JobOptions
from incbak.serve.memory_bitmap import AnyBitmap
from incbak.serve.on_error import OnError
from incbak.serve.schema import BOOL, INT, STR, Enum, Fields, Opt, QmpError
from incbak.serve.targets import JobTarget, OwnTarget
from incbak.serve.transaction import Action, Transaction
from incbak.serve.vm import Vm, check_usable

IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

NODE_NAME_LIMIT = 31

_ON_ERROR = Enum(*OnError)
BLOCKDEV: Fields = {
    "job-id": Opt(STR),
    "device": STR,
    "target": STR,
    "sync": Enum("top", "full", "none", "incremental", "bitmap"),
    "speed": Opt(INT),
    "bitmap": Opt(STR),
    "bitmap-mode": Opt(Enum("on-success", "never", "always")),
    "compress": Opt(BOOL),
    "on-source-error": Opt(_ON_ERROR),
    "on-target-error": Opt(_ON_ERROR),
    "on-cbw-error": Opt(Enum("break-guest-write", "break-snapshot")),
    "auto-finalize": Opt(BOOL),
    "auto-dismiss": Opt(BOOL),
}
DRIVE: Fields = {**BLOCKDEV, "format": Opt(STR), "mode": Opt(Enum("existing", "absolute-paths"))}


def check_node_name(vm: Vm, name: str) -> None:
    """Raises `QmpError` when it cannot be the name of a new node."""
    if not IDENTIFIER.fullmatch(name) or len(name) > NODE_NAME_LIMIT:
        raise QmpError(f"Invalid node-name: '{name}'")
    vm.check_node_name(name)


class Backup(Action):
    """Fix a point in time of a disk, and begin to copy it."""

    grouped = True

    def __init__(self, vm: Vm, args: Args) -> None:
        self.vm, self.args = vm, args
        self.tracked = vm.device(args["device"])
        self.disks = (self.tracked,)

    def prepare(self, transaction: Transaction) -> None:
        """Check; take target, bitmap and job id; make the scratch file."""
        self._check()
        options, spec = self._options(), self._spec(transaction)
        if self.vm.jobs.find(options.id):
            raise QmpError(f"Job ID '{options.id}' already in use")
        target = self._target()
        try:
            self._prepare(options, target, spec, transaction.group)
        except BaseException:
            self._give_back(target)
            raise

    def _prepare(self, options: JobOptions, target: JobTarget, spec: BackupSpec, group: JobGroup | None) -> None:
        if target.size != self.tracked.size:
            raise QmpError("Source and target image have different sizes")
        self.job = BackupJob(options, self.tracked, target, spec, self.vm.emit, self.vm.jobs.forget, group)
        self.vm.jobs.reserve(self.job)
        try:
            target.take(options.id)
            try:
                self.job.prepare(self.vm.budget)
            except BaseException:
                target.release()
                raise
        except BaseException:
            self.vm.jobs.forget(self.job)
            raise
        if spec.bitmap:
            self.tracked.busy[spec.bitmap.name] = options.id
        self.job.announce()

    def _check(self) -> None:
        """Raises `QmpError` for a target that cannot be, before anything else is looked at."""
        self.vm.target(self.args["target"])
        if self.args["target"] == self.args["device"]:
            raise QmpError("Source and target cannot be the same")

    def _target(self) -> JobTarget:
        return self.vm.target(self.args["target"])

    def _give_back(self, target: JobTarget) -> None:
        """Undo what `_target` did."""

    def _options(self) -> JobOptions:
        args = self.args
        name: str = args["job-id"] if "job-id" in args else args["device"]
        if not IDENTIFIER.fullmatch(name):
            raise QmpError(f"Invalid job ID '{name}'")
        if args.get("speed", 0) < 0:
            raise QmpError("Parameter 'speed' expects a non-negative value")
        if args.get("compress", False):
            raise QmpError(f"Compression is not supported for this drive {args['target']}")
        return JobOptions(name, args.get("auto-finalize", True), args.get("auto-dismiss", True), args.get("speed", 0))

    def _spec(self, transaction: Transaction) -> BackupSpec:
        """In the order in which QEMU looks at it."""
        sync, name, mode = self.args["sync"], self.args.get("bitmap"), self.args.get("bitmap-mode")
        if sync in ("bitmap", "incremental") and name is None:
            raise QmpError(f"must provide a valid bitmap name for '{sync}' sync mode")
        if sync == "incremental":
            mode = mode or "on-success"
            if mode != "on-success":
                raise QmpError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
        bitmap = self._bitmap(transaction, name, mode) if name is not None else None
        if name is None and mode is not None:
            raise QmpError("Cannot specify bitmap sync mode without a bitmap")
        if name is not None and sync == "none":
            raise QmpError("sync mode 'none' does not produce meaningful bitmap outputs")
        if name is not None and sync in ("full", "top") and mode == "never":
            raise QmpError(f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'")
        policy = OnCbwError(self.args.get("on-cbw-error", "break-snapshot"))
        whole = sync not in ("bitmap", "incremental")
        chosen = BitmapMode(mode) if mode else BitmapMode.NEVER
        return BackupSpec(
            bitmap,
            chosen,
            whole=whole,
            on_write=sync == "none",
            on_cbw_error=policy,
            on_source_error=OnError(self.args.get("on-source-error", "report")),
            on_target_error=OnError(self.args.get("on-target-error", "report")),
        )

    def _bitmap(self, transaction: Transaction, name: str, mode: str | None) -> AnyBitmap:
        if transaction.find(self.tracked, name) is None and name not in self.vm.lost[self.tracked.name]:
            raise QmpError(f"Bitmap '{name}' could not be found")
        if mode is None:
            raise QmpError("Bitmap sync mode must be given when providing a bitmap")
        bitmap = transaction.bitmap(self.tracked, name)
        check_usable(self.tracked, bitmap)
        return bitmap

    def apply(self) -> None:
        """This is the instant."""
        self.job.begin()

    def undo(self) -> None:
        """It was not."""
        self.job.retreat()

    def finish(self) -> None:
        """Go."""
        self.job.start()

    def discard(self) -> None:
        """Give back what was taken."""
        if self.job.spec.bitmap:
            self.tracked.busy.pop(self.job.spec.bitmap.name, None)
        self.job.discard()
        self.job.target.release()
        self._give_back(self.job.target)
        self.job.withdraw()


class DriveBackup(Backup):
    """As `Backup`, to a file by its path. One that is there is emptied or replaced when the job begins, not before.

    Or to an NBD export by its URI, which is overwritten.
    """

    def _check(self) -> None:
        form, target = self.args.get("format", "raw"), self.args["target"]
        if form not in ("raw", "qcow2"):
            raise QmpError(f"Parameter 'format' does not support '{form}': raw and qcow2 images can be written")
        if "://" in target and (form != "raw" or not target.startswith("nbd")):
            raise QmpError("Parameter 'target' expects the path of a file, or with format 'raw' an NBD URI")
        if self.args["sync"] == "none":
            raise QmpError("Parameter 'sync' does not support 'none': the target has no backing file")

    def _target(self) -> JobTarget:
        target = self.args["target"]
        try:
            return self._open(target)
        except ValueError as e:
            raise QmpError(f"Parameter 'target' expects a path: {e}") from e
        except QmpError:
            raise
        except IncbakError as e:
            raise QmpError(f"Could not open '{target}': {e.message}") from e

    def _open(self, target: str) -> JobTarget:
        if "://" in target:
            return OwnTarget(target, parse_uri(target))
        existing = self.args.get("mode", "absolute-paths") == "existing"
        form = self.args.get("format") or (_format_of(Path(target)) if existing else "raw")
        self._refuse_served(Path(target))
        kind = ImageTarget if form == "qcow2" else FileTarget
        return kind(Path(target), self.tracked.size, existing=existing)

    def _refuse_served(self, path: Path) -> None:
        """Raise `QmpError` for what holds bytes of a disk that is served here, under whatever name."""
        try:
            target = key_of(path.stat())
        except FileNotFoundError:
            return
        except OSError as e:
            raise QmpError(f"Could not open '{path}': {e.strerror}") from e
        for name, tracked in self.vm.disks.items():
            if isinstance(tracked.disk, FileDisk):
                served = key_of(os.fstat(tracked.disk.fd))
                if share_bytes({"disk": [served], "target": [target]}):
                    raise QmpError(f"Could not open '{path}': it is in use, for disk '{name}' is served from it")

    def _give_back(self, target: JobTarget) -> None:
        target.close()
        if isinstance(target, FileTarget | ImageTarget):
            target.withdraw()


def _format_of(path: Path) -> str:
    """What the name of an existing target says; a device is raw. Raises `QmpError` where QEMU looks at the content."""
    if form := named_format(path) or ("raw" if path.is_block_device() else ""):
        return form
    raise QmpError(f"Parameter 'format' is missing: the format of existing '{path}' is not guessed by its content")


@command("blockdev-backup", BLOCKDEV)
def blockdev_backup(vm: Vm, args: Args) -> object:
    """Back one disk up to a target."""
    Transaction(vm).run([Backup(vm, args)])
    return None


@command("drive-backup", DRIVE)
def drive_backup(vm: Vm, args: Args) -> object:
    """Back one disk up to a file."""
    Transaction(vm).run([DriveBackup(vm, args)])
    return None
