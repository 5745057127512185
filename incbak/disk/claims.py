"""What this host's kernel uses a device or an image for: mounts, swap, device-mapper and other holders, loop devices.

`open` with ``O_EXCL`` refuses a device that is in use, with no more than "busy"; of a regular file it says nothing. For
the message, and for files, mountinfo, ``/proc/swaps`` and sysfs are read. What cannot be read is not reported.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_BLOCK = Path("/sys/dev/block")


def claims(path: Path) -> list[str]:
    """Return what uses the device or file, each as the end of "it is ...": ``mounted at /srv``, ``used as swap``."""
    with suppress(OSError):
        info = path.stat()
        if stat.S_ISBLK(info.st_mode):
            return [what for number in _parts(info.st_rdev) for what in _of_device(number)]
        return list(_of_file(info))
    return []


def _parts(device: int) -> list[str]:
    """The numbers of a device and of its partitions."""
    number = f"{os.major(device)}:{os.minor(device)}"
    return [number, *(_text(each) for each in sorted((_BLOCK / number).glob("*/dev")) if _is_partition(each.parent))]


def _is_partition(device: Path) -> bool:
    return (device / "partition").exists()


def _of_device(number: str) -> Iterator[str]:
    name = os.path.basename(os.path.realpath(_BLOCK / number))
    seen = set()
    for at, of, source in _mounts():
        same = of == number or (source.startswith("/dev/") and _number(source) == number)
        if same and at not in seen:
            seen.add(at)
            yield f"mounted at {at}"
    for swap in _swaps():
        if _number(swap) == number:
            yield f"used as swap ({name})"
    for holder in sorted((_BLOCK / number / "holders").glob("*")):
        label = _text(holder / "dm" / "name")
        yield f"used by {holder.name}" + (f" ({label})" if label else "")


def _of_file(info: os.stat_result) -> Iterator[str]:
    for swap in _swaps():
        with suppress(OSError):
            if os.path.samestat(os.stat(swap), info):
                yield "used as swap"
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with suppress(OSError):
            if os.path.samestat(os.stat(_text(backing)), info):
                yield f"attached as /dev/{backing.parts[3]}"


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Where, the device's number, and the source of each mount in this namespace."""
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        fields, _, rest = line.partition(" - ")
        words, source = fields.split(), rest.split()
        if len(words) > 4 and len(source) > 1:
            yield _plain(words[4]), words[2], _plain(source[1])


def _swaps() -> list[str]:
    return [_plain(line.split()[0]) for line in _text(Path("/proc/swaps")).splitlines()[1:] if line.split()]


def _number(path: str) -> str:
    with suppress(OSError):
        info = os.stat(path)
        if stat.S_ISBLK(info.st_mode):
            return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    return ""


def _plain(text: str) -> str:
    """Undo the kernel's octal escapes."""
    for escape, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(escape, char)
    return text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
