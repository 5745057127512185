"""From what a user writes as SOURCE to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from incbak.bitmap.remembered import remembered_format
from incbak.disk.chain import Allowed
from incbak.disk.formats import Before, decide
from incbak.engine.base import Engine
from incbak.engine.headway import STALL_SECONDS
from incbak.engine.image import ImageEngine
from incbak.engine.offline import OfflineEngine
from incbak.engine.private_daemon import DEFAULT_DISK, Image
from incbak.engine.qemu import DEFAULT_SCRATCH, OLDEST, QemuEngine, QemuOptions
from incbak.engine.served import ServedEngine
from incbak.engine.session import GREETING_SECONDS, Address, Session
from incbak.engine.storage_daemon import StorageDaemonEngine
from incbak.errors import EngineError, FormatError, UsageError


@dataclass(frozen=True)
class Source:
    """``qmp:...`` or an image; ``name`` of the VM and ``disks`` as the user gave them.

    ``speed``: bytes per second and disk, 0 for no limit. The scratch file and ``stall`` are as in `QemuOptions`.
    ``look``: nothing is to be changed or owned. ``certain``: a format that is only guessed is refused.
    ``ignore_ctime`` and ``sampling`` are as in `ImageEngine`.
    ``monitor_wait``: seconds for which another client may keep the monitor. ``agent``: see `QemuOptions`. Of an image:
    ``format`` as the user gave it, ``allow_backing`` as in `incbak.disk.chain`, ``recorded`` what the repository says.
    """

    text: str
    state_dir: Path
    name: str | None = None
    disks: Sequence[str] = ()
    scratch_dir: Path | None = None
    scratch_limit: int | None = None
    speed: int = 0
    stall: float = STALL_SECONDS
    monitor_wait: float = GREETING_SECONDS
    agent: Path | None = None
    format: str = ""
    allow_backing: Sequence[Path] = ()
    recorded: Before | None = None
    look: bool = False
    certain: bool = False
    ignore_ctime: bool = False
    sampling: bool = False

    def qemu_options(self) -> QemuOptions:
        """What of it concerns a running QEMU."""
        directory = self.scratch_dir or DEFAULT_SCRATCH
        return QemuOptions(directory, self.scratch_limit, self.stall, self.speed, self.agent)


async def open_engine(source: Source) -> Engine:
    """Connect to the monitor or open the image. Raises `EngineError`, `DiskError`, `UsageError`."""
    if source.text.startswith("qmp:"):
        if source.format or source.allow_backing:
            hint = "Leave them out: QEMU and serve know what their disks are."
            raise UsageError("a format and allowed backing files are for an image, not for a monitor", hint=hint)
        session = await Session.connect(Address.parse(source.text), timeout=source.monitor_wait)
        try:
            return await _over_qmp(session, source)
        except BaseException:
            await session.close()
            raise
    _no_agent(source)
    path = Path(source.text)
    if path.is_socket():
        raise UsageError(f"{path} is a socket, not an image", hint=f"If it is a VM's monitor, write qmp:{path}")
    if len(source.disks) > 1:
        raise UsageError("an image is one disk", hint="Give one --disk at most.")
    return await _image(source, path, source.disks[0] if source.disks else None)


async def _image(source: Source, path: Path, disk: str | None) -> Engine:
    vm = source.name or path.stem
    decision = decide(path, source.format, _before(source, vm, disk, path))
    if source.certain and decision.guessed:
        raise FormatError(f"nothing but its content says that {path} is qcow2", hint="Say so: --format qcow2")
    if decision.format == "raw":
        options = {"look": source.look, "ignore_ctime": source.ignore_ctime, "sampling": source.sampling}
        return ImageEngine(path, source.state_dir, vm, disk, source.speed, decision.note, **options)
    allowed = Allowed(source.allow_backing, beside=not decision.guessed)
    image = Image(path, decision.format, vm, disk or DEFAULT_DISK, allowed, decision.note)
    return await OfflineEngine.open(image, source.state_dir, source.speed)


def _before(source: Source, vm: str, disk: str | None, path: Path) -> Before:
    """The state directory and the repository have seen the disk; a sure word counts more than one that is not."""
    said = [Before(*remembered_format(source.state_dir, vm, disk, path, DEFAULT_DISK)), source.recorded or Before()]
    return next((b for b in sorted(said, key=lambda b: not b.same) if b.format), Before())


async def _over_qmp(session: Session, source: Source) -> Engine:
    version = await session.execute("query-version")
    if str(version.get("package", "")).startswith("incbak"):
        _no_agent(source)
        return ServedEngine(session, source.speed)
    commands = {c["name"] for c in await session.execute("query-commands")}
    number = (int(version["qemu"]["major"]), int(version["qemu"]["minor"]))
    if number < OLDEST:
        raise EngineError(
            f"monitor {session.address} is of QEMU {number[0]}.{number[1]}",
            hint=f"QEMU {OLDEST[0]}.{OLDEST[1]} is the oldest that can back up without risk to its guest.",
        )
    if "cont" in commands:
        return QemuEngine(session, source.qemu_options())
    _no_agent(source)
    return StorageDaemonEngine(session, source.speed)


def _no_agent(source: Source) -> None:
    if source.agent:
        raise UsageError(f"{source.text} has no guest that could be frozen", hint="--quiesce is for a running QEMU.")
