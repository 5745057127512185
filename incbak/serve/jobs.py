r"""Jobs and their life, as QEMU tells it: states, verbs, events, and the table of those that are there.

::

    created -> running -> waiting -> pending -> concluded -> null        done
                      \-> aborting -----------> concluded -> null        failed, or cancelled (also from pending)

``running`` may be ``paused`` and resumed. ``waiting`` waits for the other jobs of a `group`, ``pending`` for `finalize`
unless `auto_finalize`, ``concluded`` for `dismiss` unless `auto_dismiss`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from incbak.errors import NbdError, NbdRequestError, text_of
from incbak.serve.group import JobGroup
from incbak.serve.on_error import RETRY, Action, OnError
from incbak.serve.schema import QmpError

log = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, object]], None]


class Status(StrEnum):
    """QEMU's JobStatus."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


_ALLOWED = {
    "cancel": {Status.CREATED, Status.RUNNING, Status.PAUSED, Status.WAITING, Status.PENDING},
    "pause": {Status.CREATED, Status.RUNNING, Status.PAUSED},
    "resume": {Status.CREATED, Status.RUNNING, Status.PAUSED},
    "set-speed": {Status.CREATED, Status.RUNNING, Status.PAUSED},
    "complete": set(),
    "finalize": {Status.PENDING},
    "dismiss": {Status.CONCLUDED},
}
"""QEMU's table, for jobs that are never ``ready``: so none can be told to complete."""


class CancelledError(Exception):
    """The job was told to stop."""


class TargetError(OSError):
    """The target, not the source, cannot be written."""


@dataclass(frozen=True)
class JobOptions:
    """What any job takes; ``speed`` in bytes per second, 0 for no limit."""

    id: str
    auto_finalize: bool = True
    auto_dismiss: bool = True
    speed: int = 0


def code_of(error: Exception) -> int:
    """The errno that tells ``error`` best."""
    if isinstance(error, OSError | NbdRequestError) and error.errno:
        return error.errno
    return errno.EIO


class Job(ABC):
    """One job: a thread that runs `work`, then `settle` or `undo`. Bytes are counted in `done` of `total`."""

    type = "backup"

    def __init__(
        self, options: JobOptions, emit: Emit, gone: Callable[[Job], None], group: JobGroup | None = None
    ) -> None:
        self.options, self._emit, self._gone = options, emit, gone
        self.id, self.speed = options.id, options.speed
        self.status = Status.CREATED
        self.done = self.total = 0
        self.error: str | None = None
        self.detail, self.io_status = "", "ok"
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._ended = threading.Event()
        self._group = group or JobGroup()
        self._group.join(self)

    # -- what a kind of job does ----------------------------------------------------------------------------------

    @abstractmethod
    def work(self) -> None:
        """Do it; look at `pause_point` often. Raises on failure."""

    @abstractmethod
    def end(self, *, success: bool) -> None:
        """Let everything go and settle the bitmaps; called once, before anybody is told. Must not raise."""

    @abstractmethod
    def interrupt(self) -> None:
        """Make `work` return soon from whatever it waits for; called from any thread."""

    # -- verbs ----------------------------------------------------------------------------------------------------

    def require(self, verb: str) -> None:
        """Raises `QmpError` when the job's state does not allow ``verb``."""
        if self.status not in _ALLOWED[verb]:
            raise QmpError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def start(self) -> None:
        """Run; returns at once."""
        self._turn(Status.RUNNING)
        threading.Thread(target=self._main, name=f"job-{self.id}", daemon=True).start()

    def announce(self) -> None:
        """Tell that the job is there."""
        self._emit("JOB_STATUS_CHANGE", {"status": str(self.status), "id": self.id})

    def cancel(self) -> None:
        """Stop soon, with nothing of it counting."""
        with self._lock:
            self.require("cancel")
            self._stop.set()
            self._goes_on.set()
        self._group.fail(self)
        self.interrupt()

    def abandon(self) -> None:
        """Another job of the group has failed: end as if cancelled, without a word about states."""
        with self._lock:
            self._stop.set()
            self._goes_on.set()
        self.interrupt()

    @property
    def auto_finalize(self) -> bool:
        """Whether ``pending`` waits for nobody."""
        return self.options.auto_finalize

    @property
    def paused(self) -> bool:
        """Whether somebody wants the job to rest."""
        return not self._goes_on.is_set()

    def pause(self) -> None:
        """Rest soon, until `resume`. The point in time is kept; what the guest overwrites goes to scratch."""
        with self._lock:
            self.require("pause")
            if self.paused:
                raise QmpError("Job is already paused")
            self._goes_on.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._lock:
            if not self.paused:
                raise QmpError("Can't resume a job that was not paused")
            self.require("resume")
            self.io_status = "ok"
            self._goes_on.set()

    def complete(self) -> None:
        """For jobs that go on for ever once they are ready; a backup is none."""
        self.require("complete")

    def finalize(self) -> None:
        """Go on from ``pending``."""
        with self._lock:
            self.require("finalize")
        self._group.finalize()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        with self._lock:
            self.require("dismiss")
            self._dismiss()

    def set_speed(self, speed: int) -> None:
        """Bytes per second from now on."""
        self.speed = speed

    def withdraw(self) -> None:
        """The job is not going to be; `start` was not called."""
        self._gone(self)
        self._turn(Status.NULL)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the job has concluded within ``timeout`` seconds."""
        return self._ended.wait(timeout)

    def pause_point(self, delay: float = 0.0) -> None:
        """Raises `CancelledError` once the job was cancelled; waits ``delay`` seconds for that, and while paused."""
        if self.paused:
            self._rest()
        if self._stop.wait(delay) if delay > 0 else self._stop.is_set():
            raise CancelledError

    def mend(self, operation: str, policy: OnError, error: Exception) -> None:
        """Something failed: return when it may be tried again. Raises ``error`` where it may not, `CancelledError`."""
        code = code_of(error)
        action = policy.action(code)
        if action is Action.REPORT:
            raise error
        log.warning("job %s: %s: %s", self.id, action, error)
        with self._lock:
            if not self._stop.is_set():
                self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": str(action)})
            if action is Action.STOP and not self._stop.is_set():
                self.io_status = "nospace" if code == errno.ENOSPC else "failed"
                self._goes_on.clear()
        self.pause_point(0.0 if action is Action.STOP else RETRY)

    def _rest(self) -> None:
        self._turn(Status.PAUSED)
        self._goes_on.wait()
        self.rested()
        self._turn(Status.RUNNING)

    def rested(self) -> None:  # noqa: B027 (nothing to do for most jobs)
        """The job goes on after a pause."""

    # -- life -----------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            if self._stop.is_set():
                raise CancelledError
            self.work()
            self._wait_paused()
            self._turn(Status.WAITING)
            self._wait_for_all()
        except CancelledError:
            self._conclude("BLOCK_JOB_CANCELLED", os.strerror(errno.ECANCELED))
        except Exception as e:  # noqa: BLE001 (whatever breaks the backup must not break the engine)
            self._fail(e)
        else:
            self._conclude("BLOCK_JOB_COMPLETED", None)

    def _wait_for_all(self) -> None:
        """Return when the outcome counts, of this job and of all in its group."""
        if not self._group.gather():
            raise CancelledError
        self._turn(Status.PENDING)
        if not self.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})
        if not self._group.decide():
            raise CancelledError

    def _wait_paused(self) -> None:
        """The end of the work is no way round a pause; past it there is none."""
        while True:
            self.pause_point()
            with self._lock:
                if not self.paused:
                    self.status = Status.WAITING
                    return

    def _fail(self, error: Exception) -> None:
        if self._stop.is_set():
            self._conclude("BLOCK_JOB_CANCELLED", os.strerror(errno.ECANCELED))
            return
        self.detail = text_of(error)
        expected = isinstance(error, OSError | NbdError)
        log.log(
            logging.WARNING if expected else logging.ERROR, "job %s failed: %s", self.id, error, exc_info=not expected
        )
        kind = "write" if isinstance(error, NbdError | TargetError) else "read"
        self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": kind, "action": "report"})
        self._conclude("BLOCK_JOB_COMPLETED", os.strerror(code_of(error)))

    def _conclude(self, event: str, error: str | None) -> None:
        if error is not None:
            self._group.fail(self)
            self._turn(Status.ABORTING)
        self.end(success=error is None)
        self.error = error
        facts: dict[str, object] = {"device": self.id, "type": self.type, "len": self.total, "offset": self.done}
        facts["speed"] = self.speed
        if error is not None and event == "BLOCK_JOB_COMPLETED":
            facts["error"] = error
        self._emit(event, facts)
        with self._lock:
            self._turn(Status.CONCLUDED)
            if self.options.auto_dismiss:
                self._dismiss()
        self._ended.set()

    def _dismiss(self) -> None:
        self._gone(self)
        self._turn(Status.NULL)

    def _turn(self, status: Status) -> None:
        self.status = status
        self.announce()

    # -- telling --------------------------------------------------------------------------------------------------

    def job_info(self) -> dict[str, object]:
        """A JobInfo."""
        info: dict[str, object] = {"id": self.id, "type": self.type, "status": str(self.status)}
        info |= {"current-progress": self.done, "total-progress": self.total}
        return info | self._error_info()

    def block_job_info(self) -> dict[str, object]:
        """A BlockJobInfo."""
        info: dict[str, object] = {"device": self.id, "type": self.type, "status": str(self.status)}
        info |= {"len": self.total, "offset": self.done, "speed": self.speed, "io-status": self.io_status}
        info |= {"busy": self.status is Status.RUNNING, "paused": self.paused, "ready": False}
        info |= {"auto-finalize": self.options.auto_finalize, "auto-dismiss": self.options.auto_dismiss}
        return info | self._error_info()

    def _error_info(self) -> dict[str, object]:
        info: dict[str, object] = {}
        if self.error is not None:
            info["error"] = self.error
        if self.detail:
            info["x-incbak-detail"] = self.detail
        return info


class JobTable:
    """The jobs by id. Thread safe."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def reserve(self, job: Job) -> None:
        """Enter a job. Raises `QmpError` when its id is taken."""
        with self._lock:
            if job.id in self._jobs:
                raise QmpError(f"Job ID '{job.id}' already in use")
            self._jobs[job.id] = job

    def forget(self, job: Job) -> None:
        """Take a job out."""
        with self._lock:
            self._jobs.pop(job.id, None)

    def all(self) -> list[Job]:
        """Every job, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def find(self, name: str) -> Job | None:
        """The job ``name``."""
        with self._lock:
            return self._jobs.get(name)
