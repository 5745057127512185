"""Debian's source packages in a directory of our own, and what their programs need to be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIRROR = "http://deb.debian.org"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LATER = ("stable", "testing")
"""Releases in which a source package is looked for when the installed release has it no more."""


class Unavailable(Exception):
    """A suite cannot be fetched or built here; says what is missing."""


@dataclass(frozen=True)
class Row:
    """One test: ``outcome`` is passed, failed or n/a; ``why`` is empty for the first only."""

    suite: str
    name: str
    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Place:
    """``cache`` outlives a run, ``work`` does not."""

    cache: Path
    work: Path
    mirror: str = MIRROR

    def source(self, package: str, version: str = "") -> Path:
        """The unpacked source of a package, of that version, or of the newest one that can be had."""
        if version and (unpacked := self.cache / f"{package}_{version.replace(':', '-')}").is_dir():
            return unpacked
        tried = []
        for release in (codename(), *LATER):
            if not version and (unpacked := self.cache / f"{package}_{release}").is_dir():
                return unpacked
            try:
                return self._fetch(package, release, f"={version}" if version else "", unpacked)
            except subprocess.CalledProcessError as e:
                tried.append(f"{release}: {complaint(e.stderr)}")
            if version:
                break
        wanted = " ".join(filter(None, [package, version]))
        raise Unavailable(f"no source package {wanted} from {self.mirror} ({'; '.join(tried)})")

    def _fetch(self, package: str, release: str, exact: str, into: Path) -> Path:
        need("apt-get", "dpkg-source")
        apt = self.cache / f"apt-{release}"
        for directory in ("lists/partial", "archives/partial", "sources"):
            (apt / directory).mkdir(parents=True, exist_ok=True)
        lines = [f"deb-src [signed-by={KEYRING}] {self.mirror}/debian {release} main"]
        if release == codename():
            lines.append(f"deb-src [signed-by={KEYRING}] {self.mirror}/debian {release}-updates main")
            lines.append(f"deb-src [signed-by={KEYRING}] {self.mirror}/debian-security {release}-security main")
        (apt / "sources.list").write_text("\n".join(lines) + "\n")
        options = {"Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "/dev/null"}
        options |= {"Dir::State::lists": apt / "lists", "Dir::Cache": apt}
        get = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
        if not (apt / "updated").exists():
            run([*get, "-oAPT::Update::Error-Mode=any", "update"], apt)
            (apt / "updated").touch()
        wanted = f"{package}{exact}"
        run([*get, "source", "--download-only", wanted], apt / "sources")
        (found,) = sorted((apt / "sources").glob(f"{package}_*.dsc"))[-1:]
        part = into.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        run(["dpkg-source", "--no-check", "--no-copy", "-x", str(found), str(part)], apt)
        part.rename(into)
        return into

    def library(self, package: str) -> Path:
        """The files of a binary package, such as headers, unpacked beside the sources and installed nowhere."""
        into = self.cache / package
        if not into.is_dir():
            need("apt-get", "dpkg-deb")
            with_archive = self.work / package
            with_archive.mkdir()
            try:
                run(["apt-get", "-q", "download", package], with_archive)
            except subprocess.CalledProcessError as e:
                raise Unavailable(f"no package {package}: {last_line(e.stderr)}") from e
            (archive,) = with_archive.glob("*.deb")
            run(["dpkg-deb", "-x", str(archive), str(into.with_suffix(".part"))], with_archive)
            into.with_suffix(".part").rename(into)
        return into

    def script(self, name: str, text: str) -> Path:
        """An executable shell script in the work directory."""
        path = self.work / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path


def codename() -> str:
    """The installed release."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise Unavailable("the sources are Debian's, and this is another system")


def installed(package: str) -> str:
    """The version of the source that an installed package was made from."""
    need("dpkg-query")
    show = ["dpkg-query", "-W", "-f", "${source:Version}", package]
    done = subprocess.run(show, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise Unavailable(f"package {package} is not installed")
    return done.stdout


def need(*programs: str) -> None:
    """Raises `Unavailable` when one is not on the PATH."""
    if lacking := [p for p in programs if not shutil.which(p)]:
        raise Unavailable(f"missing programs: {' '.join(lacking)}")


def run(command: Sequence[str | Path], where: Path, timeout: float = 600) -> str:
    """What it prints. Raises `subprocess.CalledProcessError`."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=where,
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    return done.stdout


def complaint(text: str) -> str:
    """The first line in which apt says what is wrong."""
    return next((line.strip()[:160] for line in text.splitlines() if line.startswith("E: ")), last_line(text))


def last_line(text: str) -> str:
    """The last line that is not empty, cut short."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1][:160]


def compile_c(place: Place, name: str, sources: Sequence[Path], *options: str) -> Path:
    """An executable in the work directory. Raises `Unavailable` with the compiler's complaint."""
    need("cc")
    into = place.work / name
    try:
        run(["cc", "-O1", "-w", "-o", into, *sources, *options], place.work)
    except subprocess.CalledProcessError as e:
        errors = [line for line in e.stderr.splitlines() if "error" in line]
        raise Unavailable(f"cannot compile {name}: {(errors or [last_line(e.stderr)])[0][-160:]}") from e
    return into


def runtime_library(name: str) -> str:
    """The path of an installed shared library, which has no development files."""
    found = sorted(Path("/usr/lib").glob(f"*/{name}.so.*"))
    if not found:
        raise Unavailable(f"{name} is not installed")
    return str(found[0])
