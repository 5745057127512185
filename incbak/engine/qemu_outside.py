"""Devices of a running QEMU that hold the guest's data and are not in its block layer.

Neither a bitmap nor a point in time nor a copy can be had of them, and ``query-block`` does not list them. So a backup
lacks them, and says so. They are found by their type among the devices that were created (``-device``, ``device_add``).
"""

from __future__ import annotations

from incbak.engine.base import LeftOut
from incbak.engine.session import CommandFailed, Session

_PLACES = ("/machine/peripheral", "/machine/peripheral-anon")
_MOST = 4096
_KINDS = {
    "vhost-user-blk": "another process serves it (vhost-user)",
    "vhost-user-scsi": "another process serves its disks (vhost-user)",
    "vhost-scsi": "the kernel serves its disks (vhost-scsi)",
    "nvdimm": "it is memory of the guest (NVDIMM)",
    "virtio-pmem": "it is memory of the guest (virtio-pmem)",
}
_MAYBE = {
    "vfio-pci": "a device of the host is passed through, which may be a disk",
    "usb-host": "a USB device of the host is passed through, which may be a disk",
    "usb-redir": "a USB device of another host is passed through, which may be a disk",
}


async def find_outside(session: Session) -> list[LeftOut]:
    """Return these devices, by their ids. Raises `EngineError`."""
    found: list[LeftOut] = []
    for place in _PLACES:
        try:
            listed = await session.execute("qom-list", {"path": place})
        except CommandFailed:  # nothing of the kind was created
            continue
        for each in list(listed)[:_MOST]:
            name, kind = str(each["name"]), str(each["type"]).removeprefix("child<").removesuffix(">")
            for prefix, why in {**_KINDS, **_MAYBE}.items():
                if kind == prefix or kind.startswith(f"{prefix}-"):
                    text = f"{why}: its data does not pass through QEMU's block layer"
                    found.append(LeftOut(name, text, expected=prefix in _MAYBE))
    return found
