"""What a command did to the files below a directory, from strace: the input of the power-cut campaign.

Only completed, successful calls count. Multi-threaded output (``<unfinished ...>`` and ``resumed``) is joined; a call
takes effect where it ended. Stores through a shared mapping cannot be seen by strace: the repository has none.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,ftruncate,fallocate,copy_file_range,sendfile,lseek,dup,dup2,dup3"
)


@dataclass(frozen=True)
class Op:
    """One effect on the file system below the root; paths are relative to it."""

    kind: str  # create, write, truncate, sync, syncdir, link, rename, unlink, mkdir, rmdir
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


def run(argv: list[str], root: Path, log: Path, env: dict[str, str] | None = None) -> tuple[int, list[Op]]:
    """Run ``argv`` under strace; its exit status and its effects below ``root``, in order."""
    command = ["strace", "-f", "-y", "-xx", "-s", "99999999", "-o", str(log), "-e", f"trace={CALLS}", *argv]
    status = subprocess.run(command, env=env, timeout=300, check=False, capture_output=True).returncode
    return status, parse(log.read_text(), root)


_LINE = re.compile(r"^(\d+) +(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"^(-?\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)")


def _joined(text: str) -> list[tuple[str, str]]:
    pending: dict[str, str] = {}
    calls = []
    for raw in text.splitlines():
        match = _LINE.match(raw)
        if not match:
            continue
        pid, rest = match.groups()
        if rest.endswith("<unfinished ...>"):
            pending[pid] = rest[: -len("<unfinished ...>")].rstrip()
        elif rest.startswith("<..."):
            calls.append((pid, pending.pop(pid, "") + rest.split("resumed>", 1)[1]))
        else:
            calls.append((pid, rest))
    return calls


def _decode(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


class _Reader:
    def __init__(self, root: Path) -> None:
        self.root = str(root.resolve())
        self.position: dict[tuple[str, str], int] = {}
        self.known: set[str] = {str(p.relative_to(root)) for p in root.rglob("*")} if root.exists() else set()
        self.ops: list[Op] = []

    def inside(self, path: str) -> str | None:
        """``path`` relative to the root, or ``None``."""
        path = path.removesuffix(" (deleted)")
        if path == self.root:
            return "."
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else None

    def paths(self, arguments: str) -> list[str | None]:
        """The path arguments, made absolute by the directory descriptor before each (or the working directory)."""
        found = []
        for match in re.finditer(r'(?:(?:AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>, )?"((?:\\x[0-9a-f]{2})*)"', arguments):
            base, name = (_decode(g or "").decode() for g in match.groups())
            found.append(self.inside(name if name.startswith("/") else f"{base}/{name}"))
        return found

    def take(self, name: str, arguments: str, result: int, key: str) -> None:
        """Add the effect of one call."""
        if name in ("openat", "creat"):
            self._open(arguments, key)
        elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
            old, new = self.paths(arguments)[:2]
            if new is not None:
                self.ops.append(Op("link" if name.startswith("link") else "rename", old or "", new))
        elif name in ("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"):
            (path, *_) = self.paths(arguments)
            kind = name.removesuffix("at")
            if path is not None:
                self.ops.append(Op("rmdir" if "AT_REMOVEDIR" in arguments else kind, path))
        else:
            self._on_descriptor(name, arguments, result)

    def _open(self, arguments: str, key: str) -> None:
        path = (self.paths(arguments) or [None])[0]
        if path is None:
            return
        if "O_TMPFILE" in arguments:
            return
        if "O_CREAT" in arguments and path not in self.known:
            self.known.add(path)
            self.ops.append(Op("create", path))
        elif "O_TRUNC" in arguments:
            self.ops.append(Op("truncate", path))
        self.position.pop((path, key), None)

    def _on_descriptor(self, name: str, arguments: str, result: int) -> None:
        match = _FD.match(arguments)
        path = self.inside(_decode(match[2]).decode()) if match else None
        if match is None or path is None:
            return
        key = (path, match[1])
        numbers = [int(n) for n in re.findall(r", (-?\d+)", arguments[match.end() :].split('"')[-1])]
        if name in ("write", "writev"):
            at = self.position.get(key, 0)
            self.position[key] = at + result
            self._write(path, at, arguments, result)
        elif name == "lseek":
            self.position[key] = result
        elif name in ("pwrite64", "pwritev", "pwritev2"):
            self._write(path, numbers[-2 if name == "pwritev2" else -1], arguments, result)
        elif name in ("fsync", "fdatasync"):
            self.ops.append(Op("syncdir" if (Path(self.root) / path).is_dir() else "sync", path))
        elif name == "ftruncate":
            self.ops.append(Op("truncate", path, offset=numbers[0]))
        elif name in ("fallocate",):
            pass
        else:
            raise ValueError(f"the power-cut model does not know {name} on {path}")

    def _write(self, path: str, offset: int, arguments: str, result: int) -> None:
        data = b"".join(_decode(s) for s in _STRING.findall(arguments))[:result]
        if len(data) != result:
            raise ValueError(f"strace shows {len(data)} of {result} bytes written to {path}")
        self.ops.append(Op("write", path, offset=offset, data=data))


def parse(text: str, root: Path) -> list[Op]:
    """The effects below ``root`` in a log of ``strace -f -y -xx``; ``root`` as it was before, or not there."""
    reader = _Reader(root)
    for _pid, call in _joined(text):
        match = _CALL.match(call)
        if match and int(match[3]) >= 0:
            opened = re.search(r"= (\d+)<", call)
            reader.take(match[1], match[2], int(match[3]), opened[1] if opened else "")
    return reader.ops
