"""Builds the guest's initramfs without root: busybox, the host's python3, kernel modules for its disks, our program."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import stat
import subprocess
from pathlib import Path

_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_scsi", "sd_mod", "ata_piix", "ahci", "nvme", "ext4")
_MODULES += ("pvpanic_mmio",)
_PYTHON = "/usr/bin/python3"
_IMPORTS = "fcntl, json, mmap, os, struct, sys, threading, time, zlib, encodings.ascii, encodings.latin_1"
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done < /modules/list
exec /usr/bin/python3 -I -S -c 'import sys; sys.path.insert(0, "/incbak"); import guest_program as p; p.Guest().serve()'
"""
_MOUNTS = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done < /modules/list
/bin/busybox mount -t ext4 /dev/vda /mnt && /bin/busybox cat /mnt/greeting && echo x > /mnt/new && /bin/busybox sync &&
    echo "vm login:"
/bin/busybox sleep 1000
"""


def kernel() -> Path | None:
    """A kernel for guests, with its modules: Debian's cloud kernel, else any; ``None`` if there is none."""
    found = sorted(Path("/boot").glob("vmlinuz-*"), key=lambda p: ("cloud" in p.name, p.name), reverse=True)
    usable = [p for p in found if _modules_of(p).is_dir() and p.stat().st_size]
    return usable[0] if usable else None


def _modules_of(image: Path) -> Path:
    return Path("/lib/modules") / image.name.removeprefix("vmlinuz-")


def busybox() -> str | None:
    """A statically linked busybox."""
    for path in filter(None, (shutil.which("busybox"), "/bin/busybox")):
        if Path(path).exists() and subprocess.run(["ldd", path], capture_output=True, check=False).returncode:
            return path
    return None


def build(target: Path) -> Path:
    """Write the initramfs (an uncompressed newc archive) to ``target``."""
    image, shell = kernel(), busybox()
    assert image is not None, "no kernel"
    assert shell is not None, "no busybox"
    archive = _Archive()
    archive.file("/init", _INIT.encode(), 0o755)
    archive.file("/bin/busybox", Path(shell).read_bytes(), 0o755)
    _add_modules(archive, _modules_of(image))
    for path in _python_files():
        archive.file(path, Path(path).read_bytes(), 0o755)
    for name in ("guest_program.py", "records.py"):
        archive.file(f"/incbak/{name}", (Path(__file__).parent / name).read_bytes())
    archive.node("/dev/console", 5, 1)
    target.write_bytes(archive.finish())
    return target


def build_mounting(target: Path) -> Path:
    """One whose guest mounts the first disk (ext4), shows its file ``greeting``, writes to it, and says ``login:``."""
    image, shell = kernel(), busybox()
    assert image is not None, "no kernel"
    assert shell is not None, "no busybox"
    archive = _Archive()
    archive.file("/init", _MOUNTS.encode(), 0o755)
    archive.file("/bin/busybox", Path(shell).read_bytes(), 0o755)
    _add_modules(archive, _modules_of(image))
    archive.node("/dev/console", 5, 1)
    target.write_bytes(archive.finish())
    return target


def _python_files() -> list[str]:
    """The interpreter, its libraries and the modules that our program imports, found by asking them."""
    ask = f"import {_IMPORTS}\nprint(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)))"
    out = subprocess.run([_PYTHON, "-I", "-S", "-c", ask], capture_output=True, text=True, check=True, timeout=30)
    modules = out.stdout.split()
    binaries = [_PYTHON, *(m for m in modules if m.endswith(".so"))]
    ldd = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=True, timeout=30).stdout
    return sorted({_PYTHON, *modules, *re.findall(r"(?:=> |\t)(/\S+)", ldd)})


def _add_modules(archive: _Archive, top: Path) -> None:
    depends = {}
    for line in (top / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        depends[path] = needs.split()
    by_name = {_stem(path): path for path in depends}
    order: list[str] = []

    def take(path: str) -> None:
        for need in depends[path]:
            take(need)
        if path not in order:
            order.append(path)

    for name in _MODULES:
        if name in by_name:  # else built in, or not in this kernel
            take(by_name[name])
    for path in order:
        archive.file(f"/modules/{_stem(path)}.ko", _unpacked(top / path))
    archive.file("/modules/list", "".join(f"{_stem(p)}.ko\n" for p in order).encode())


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True, timeout=30).stdout
    return data


class _Archive:
    """A cpio archive in the newc format, which may hold device nodes although nobody made them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def node(self, path: str, major: int, minor: int) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFCHR | 0o600, b"", major, minor)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _parents(self, path: str) -> None:
        for parent in reversed(Path(path).parents):
            if str(parent) not in self._seen and str(parent) != "/":
                self._seen.add(str(parent))
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")

    def _entry(self, path: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        name = path.lstrip("/").encode() + b"\0"
        number = len(self._parts)
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + name
        self._parts.append(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))
