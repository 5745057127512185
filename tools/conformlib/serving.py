"""``incbak serve`` of one new disk on TCP, for programs that are told a host and a port."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from conformlib.cache import Place


@contextmanager
def served(place: Place, export: str, size: int, *options: str) -> Iterator[tuple[str, int]]:
    """Host and port of a server of zeroes."""
    with tempfile.TemporaryDirectory(dir=place.work) as name:
        directory = Path(name)
        with (directory / "image").open("wb") as f:
            f.truncate(size)
        command = [sys.executable, "-m", "incbak", "serve", "--name", "conformance", "--state-dir", name]
        command += ["--socket", f"{name}/nbd", "--monitor", f"{name}/qmp", "--tcp", "127.0.0.1:0"]
        command += [*filter(None, options), f"{export}={directory / 'image'}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            words = server.stdout.readline().split()
            (uri,) = [w for w in words if w.startswith("nbd://")]
            place_of = urlsplit(uri)
            yield place_of.hostname or "", place_of.port or 0
        finally:
            server.terminate()
            server.communicate(timeout=60)
