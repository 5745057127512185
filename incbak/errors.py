"""Every error that incbak raises on purpose.

::

    IncbakError                     exit code 1, unless the class says otherwise
    +-- UsageError                  2   an argument that cannot be right
    +-- IncompleteError             3   some disks were done, some were not
    +-- FallbackRefusedError        4   a fallback was needed and --no-fallback was given
    +-- NoRepositoryError           10  nothing there, or not a repository
    |   +-- LostConfigError         14  a repository's files are there, and its config is not
    +-- LockedError                 11  somebody else is at it
    +-- WrongPassphraseError        12
    +-- DamagedError                13  stored data does not verify
    |   +-- FormatTooNewError       13  written by a newer incbak
    +-- DurabilityError                 a write, sync or rename failed
    +-- StorageError                    a repository's files cannot be read; they may be whole
    +-- DiskError                       an image or device cannot be used
    |   +-- ImageInUseError             another process holds its lock, or has it open
    |   +-- ImageChangedError           another program wrote to it during a backup
    |   +-- FormatError                 an image is not of the format that it should be, or of none that is supported
    +-- BitmapError                     a bitmap cannot be used; ``reason`` says why
    |   +-- AuditError              5   a bitmap calls clean what has changed
    +-- NbdError                        the peer, or the wire
    |   +-- NbdProtocolError            the peer does not keep to the protocol
    |   +-- NbdRequestError             the server refused one request; ``errno`` is its error
    |   +-- NbdSilentError              the peer owes an answer and sends nothing
    +-- EngineError                     an engine refused or failed a QMP command
    |   +-- RunStateError           6   the VM migrates, or has moved away
    +-- BackupError                     a backup could not be made
    +-- RestoreError                    a restore could not be made
    +-- SyncError                       a backup could not be copied to another repository
    +-- DrillError                      a restore was tried, and something was wrong

Each carries ``code`` (a short word for scripts and logs), ``exit_code``, and a ``hint``: a sentence that
says what to do next. The message is lower case, names the object and the cause, and has no full stop.
``retry`` is true where the same call may work later without anything being changed.
"""

from __future__ import annotations

from incbak.reasons import Reason


class IncbakError(Exception):
    """The root: a failure that incbak understands and can explain."""

    code = "failed"
    exit_code = 1
    retry = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def text_of(error: BaseException) -> str:
    """Return what an exception says, never nothing: many have no text of their own (`MemoryError`, `TimeoutError`)."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if text := str(error).strip():
        return text
    return f"{type(error).__name__}, with no further text"


class UsageError(IncbakError):
    """An argument, or a combination of them, that cannot be right; nothing was changed."""

    code = "usage"
    exit_code = 2


class IncompleteError(IncbakError):
    """Some disks were backed up or restored, some were not."""

    code = "incomplete"
    exit_code = 3


class FallbackRefusedError(IncbakError):
    """An incremental would have to read everything, and ``--no-fallback`` forbids it."""

    code = "fallback-refused"
    exit_code = 4

    def __init__(self, message: str, *, reason: Reason, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class NoRepositoryError(IncbakError):
    """The path holds no repository."""

    code = "no-repository"
    exit_code = 10


class LostConfigError(NoRepositoryError):
    """The path holds a repository's files without its config; nothing was changed."""

    code = "lost-config"
    exit_code = 14


class LockedError(IncbakError):
    """A live process holds the lock; nothing was changed."""

    code = "locked"
    exit_code = 11
    retry = True


class WrongPassphraseError(IncbakError):
    """The passphrase does not open the repository's key; nothing was touched."""

    code = "wrong-passphrase"
    exit_code = 12


class DamagedError(IncbakError):
    """Stored data is missing, malformed or does not match its digest."""

    code = "damaged"
    exit_code = 13


class FormatTooNewError(DamagedError):
    """The format is of a newer incbak; it is left alone."""

    code = "format-too-new"


class DurabilityError(IncbakError):
    """Something could not be made durable. The first failure of a sync is final."""

    code = "durability"


class StorageError(IncbakError):
    """Files of a repository cannot be read, for a reason that says nothing of their content."""

    code = "storage"
    retry = True


class DiskError(IncbakError):
    """An image or device cannot be opened, read or written as needed."""

    code = "disk"


class ImageInUseError(DiskError):
    """Another process holds the image's lock."""

    code = "image-in-use"
    retry = True


class FormatError(DiskError):
    """An image is not of the format that its owner or its history says, or of one that is not supported."""

    code = "format"


class ImageChangedError(DiskError):
    """An image was written by another program while it was read."""

    code = "image-changed"
    retry = True


class BitmapError(IncbakError):
    """A bitmap cannot be used or changed; ``reason`` is set where it makes the bitmap invalid."""

    code = "bitmap"

    def __init__(self, message: str, *, reason: Reason | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class AuditError(BitmapError):
    """Clusters that a bitmap calls clean are not what they were: somebody wrote and nobody tracked it."""

    code = "audit"
    exit_code = 5


class NbdError(IncbakError):
    """An NBD connection failed."""

    code = "nbd"
    retry = True


class NbdProtocolError(NbdError):
    """The peer does not keep to the NBD protocol; the connection is of no more use."""

    code = "nbd-protocol"
    retry = False


class NbdRequestError(NbdError):
    """The server answered one request with an error; the connection can go on."""

    code = "nbd-request"
    retry = False

    def __init__(self, message: str, *, errno: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class NbdSilentError(NbdError):
    """The peer owes an answer, or has to take what is sent, and does neither for too long."""

    code = "nbd-silent"


class EngineError(IncbakError):
    """An engine refused or failed a command, or went away."""

    code = "engine"


class RunStateError(EngineError):
    """The VM is in a state in which no backup of it can be made: it migrates, or has moved to another host."""

    code = "run-state"
    exit_code = 6
    retry = True


class BackupError(IncbakError):
    """A backup could not be made; none is listed."""

    code = "backup"


class RestoreError(IncbakError):
    """A restore could not be made; the target is not to be used."""

    code = "restore"


class DrillError(IncbakError):
    """A drill found something wrong, and no damage in the repository."""

    code = "drill"


class SyncError(IncbakError):
    """A backup could not be copied to another repository; it is not listed there."""

    code = "sync"
