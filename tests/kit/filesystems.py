"""Images with real file systems, made without root: mkfs, mcopy, ntfscp, debugfs, sfdisk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.kit.need import missing, need

MiB = 1 << 20


def need_pytsk3() -> None:
    """Go on only with the library."""
    try:
        import pytsk3  # noqa: F401
    except ImportError:
        missing("files", "pytsk3 is not installed")


def run(*argv: str | Path) -> str:
    """A tool that must succeed."""
    need(str(argv[0]))
    done = subprocess.run(
        list(map(str, argv)), check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    assert done.returncode == 0, (argv, done.stdout)
    return done.stdout.decode(errors="replace")


def ext4(path: Path, source: Path, size: int = 16 * MiB, *options: str) -> Path:
    """With the files below ``source``; without checksums, so that a test may change what it likes."""
    path.write_bytes(b"")
    with path.open("r+b") as f:
        f.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^metadata_csum", *options, "-d", source, path)
    return path


def fat(path: Path, source: Path, size: int = 16 * MiB) -> Path:
    """With the files and directories below ``source``."""
    path.write_bytes(bytes(size))
    run("mkfs.vfat", path)
    run("mcopy", "-s", "-m", "-i", path, *sorted(source.iterdir()), "::/")
    return path


def ntfs(path: Path, source: Path, size: int = 16 * MiB) -> Path:
    """With the files directly in ``source``."""
    path.write_bytes(bytes(size))
    run("mkfs.ntfs", "-q", "-F", "-f", path)
    for each in sorted(source.iterdir()):
        if each.is_file():
            run("ntfscp", "-q", path, each, each.name)
    return path


def debugfs(image: Path, *commands: str) -> None:
    """Change an ext4 image below its own rules."""
    need("debugfs")
    for command in commands:
        subprocess.run(["debugfs", "-w", "-R", command, str(image)], check=True, capture_output=True, timeout=60)


def rename(image: Path, old: bytes, new: bytes) -> None:
    """Change a name where it stands, which must be in one place only, to any bytes of that length."""
    data = image.read_bytes()
    assert len(old) == len(new)
    assert data.count(old) == 1, (old, data.count(old))
    at = data.index(old)
    with image.open("r+b") as f:
        f.seek(at)
        f.write(new)


def partitioned(path: Path, table: str, script: str, parts: Iterable[tuple[int, Path]]) -> Path:
    """A disk of 160 MiB with a ``table`` (gpt, dos) by sfdisk's ``script``, and images at byte offsets."""
    need("sfdisk")
    with path.open("wb") as f:
        f.truncate(160 * MiB)
    text = f"label: {table}\n{script}"
    subprocess.run(["sfdisk", "-q", str(path)], input=text, text=True, check=True, capture_output=True, timeout=60)
    with path.open("r+b") as f:
        for offset, image in parts:
            f.seek(offset)
            f.write(image.read_bytes())
    return path
