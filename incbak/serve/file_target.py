"""A raw file that one job writes to: the target of ``drive-backup``."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from incbak import durable, newfile
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.formats import named_format, recognise
from incbak.disk.users import refuse_users
from incbak.errors import DurabilityError, UsageError
from incbak.serve.jobs import TargetError
from incbak.serve.schema import QmpError


class FileTarget:
    """Has the shape of `incbak.serve.targets.Target`. What is in the file goes when the job begins, not before."""

    def __init__(self, path: Path, size: int, *, existing: bool) -> None:
        """Open ``path`` and take its lock; unless ``existing``, make it if need be. Raises `QmpError`, `DiskError`."""
        self.name, self.path, self._existing = str(path), path, existing
        _refuse_foreign_links(path)
        self._made = False if existing else _make(path)
        try:
            if not existing and not self._made:
                _refuse_anothers(path)
            if existing:
                _refuse_named(path)
            self._disk: FileDisk = open_disk(path)
            try:
                refuse_users(path)
            except BaseException:
                self._disk.close()
                raise
        except BaseException:
            self.withdraw()
            raise
        self._anew = not existing and not self._disk.is_block
        self.size = size if self._anew else self._disk.size

    def take(self, job: str) -> None:
        """It is the job's own."""

    def begin(self) -> None:
        """Now what was there goes; a new file's name is durable from here on. Raises `TargetError`."""

        def anew() -> None:
            os.ftruncate(self._disk.fd, 0)
            self._disk.resize(self.size)
            durable.sync_dir(self.path.absolute().parent)

        if self._anew:
            self._try(anew)

    def release(self) -> None:
        """Close it."""
        self._disk.close()

    def withdraw(self) -> None:
        """The job is not going to be: a file that was made for it goes."""
        if self._made:
            with suppress(OSError):
                self.path.unlink()

    def write(self, data: memoryview, offset: int) -> None:
        """Write and wait. Raises `TargetError`."""
        self._try(lambda: self._disk.write(data, offset))

    def zeroes(self, offset: int, length: int) -> None:
        """As `write`, of zeroes."""
        self._try(lambda: self._disk.write_zeroes(offset, length, unmap=True))

    def confirm(self) -> None:
        """`write` and `zeroes` have waited."""

    def flush(self) -> None:
        """All that was written is durable. Raises `TargetError`."""
        self._try(self._disk.flush)

    def settle(self) -> list[tuple[int, int]]:
        """After a failure: all is durable of which `write` and `zeroes` have returned, so there is nothing to tell."""
        self.flush()
        return []

    def abort(self) -> None:
        """Nobody waits for a peer."""

    def close(self) -> None:
        """As `release`."""
        self.release()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, DurabilityError) as e:
            cause = e if isinstance(e, OSError) else e.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            raise TargetError(number, f"cannot write {self.path}: {e}") from e


def _make(path: Path) -> bool:
    """Whether there was no such file before. Raises `QmpError`."""
    try:
        os.close(newfile.create(path))
    except FileExistsError:
        return False
    except (OSError, UsageError) as e:
        raise QmpError(f"Could not create '{path}': {e.strerror if isinstance(e, OSError) else e}") from e
    return True


def _refuse_named(path: Path) -> None:
    """What a raw disk holds is its guest's business, unless its name says the same. Raises `QmpError`, `DiskError`."""
    if (form := named_format(path)) not in ("", "raw") and form == recognise(path):
        raise QmpError(f"Image '{path}' is a {form} image, only raw ones can be written")


def _refuse_foreign_links(path: Path) -> None:
    try:
        newfile.refuse_foreign_links(path)
    except UsageError as e:
        raise QmpError(f"Could not open '{path}': {e}") from e


def _refuse_anothers(path: Path) -> None:
    """A file that another user made for us to fill would stay open to them. Raises `QmpError`."""
    with suppress(OSError):  # a dangling link, say: what opens it says so
        info = path.stat()
        if stat.S_ISREG(info.st_mode) and info.st_uid != os.geteuid():
            raise QmpError(f"'{path}' is there already, and of another user: to write to it, use mode 'existing'")
