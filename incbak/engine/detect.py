"""From what a user writes as SOURCE to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from incbak.disk.file import probe_format
from incbak.engine.base import Engine
from incbak.engine.image import ImageEngine
from incbak.engine.served import ServedEngine
from incbak.engine.session import Address, Session
from incbak.errors import UsageError


@dataclass(frozen=True)
class Source:
    """``qmp:...`` or an image; ``name`` of the VM and ``disks`` as the user gave them."""

    text: str
    state_dir: Path
    name: str | None = None
    disks: Sequence[str] = ()


async def open_engine(source: Source) -> Engine:
    """Connect to the monitor or open the image. Raises `EngineError`, `DiskError`, `UsageError`."""
    if source.text.startswith("qmp:"):
        session = await Session.connect(Address.parse(source.text))
        try:
            return await _over_qmp(session)
        except BaseException:
            await session.close()
            raise
    path = Path(source.text)
    if (found := probe_format(path)) != "raw":
        raise UsageError(f"{path} is a {found} image", hint="Only raw images can be read directly for now.")
    if len(source.disks) > 1:
        raise UsageError("an image is one disk", hint="Give one --disk at most.")
    return ImageEngine(path, source.state_dir, source.name or path.stem, source.disks[0] if source.disks else None)


async def _over_qmp(session: Session) -> Engine:
    version = await session.execute("query-version")
    if str(version.get("package", "")).startswith("incbak"):
        return ServedEngine(session)
    raise UsageError(f"monitor {session.address} is not of incbak serve")
