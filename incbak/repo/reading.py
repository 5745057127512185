"""Reading packs and comparing every blob in them with its digest, the pack that was read longest ago first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from incbak.errors import DamagedError, DurabilityError
from incbak.events import Progress, Reporter, Warned
from incbak.repo import pack
from incbak.repo.repository import Repository
from incbak.repo.verified import Verified

_BATCH = 4 << 20
_THREADS = 2
_SAVE = 60.0
"""Seconds after which a check that is killed has not read in vain."""


@dataclass(frozen=True)
class PackRead:
    """One pack that was read to its end. ``at``: when that began; ``file``: what its file was then."""

    name: str
    bad: list[bytes]
    size: int
    at: float
    file: str


def read_packs(
    repo: Repository,
    packs: Mapping[str, int],
    table: Callable[[str], pack.Entries],
    verified: Verified | None,
    report: Reporter,
    *,
    duration: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[PackRead]:
    """Read these packs (bytes of blobs by name) in this order, and mark those that are whole (none without
    ``verified``). ``table`` gives what is in one; a pack that has none any more is passed over, with a warning.

    After ``duration`` seconds no other pack is begun; one is read in any case, or a short time would never do. The
    marks are saved now and then; what is found damaged is for the caller to note, and to mark after that.
    """
    deadline = None if duration is None else time.monotonic() + duration
    total = sum(packs.values())
    done, saved = 0, time.monotonic()
    first = next(iter(packs), None)

    def one(name: str) -> PackRead | None:
        if name != first and deadline is not None and time.monotonic() >= deadline:
            return None
        at, file = clock(), verified.look(name) if verified else ""
        try:
            entries = table(name)
        except (DamagedError, OSError) as e:
            report(Warned(f"pack {name} is not read: {e}"))
            return None
        bad, size = _one_pack(repo, name, entries)
        return PackRead(name, bad, size, at, file)

    pool = ThreadPoolExecutor(_THREADS, "check")
    try:
        for found in pool.map(one, packs):
            if found is None:
                continue
            done += found.size
            report(Progress("", done, total))
            if verified and not found.bad:
                verified.add(found.name, found.at, found.file, whole=True)
            if verified and time.monotonic() >= saved + _SAVE:
                save(verified, report)
                saved = time.monotonic()
            yield found
    finally:
        pool.shutdown(cancel_futures=True)
        if verified and done:
            save(verified, report)


def save(verified: Verified, report: Reporter) -> None:
    """Where the repository cannot be written, the next check begins where this one did; that is told."""
    try:
        verified.save(verified.last)
    except DurabilityError as e:
        report(Warned(f"what was read is not remembered: {e}"))


def _one_pack(repo: Repository, name: str, entries: pack.Entries) -> tuple[list[bytes], int]:
    """The digests of what is damaged, and how much was read."""
    bad, count = [], 0
    for batch, data in _ranges(repo, name, entries):
        base = int(batch[0]["offset"])
        for entry in batch:
            digest, size = entry["digest"].tobytes(), int(entry["stored"])
            start = int(entry["offset"]) - base
            try:
                stored, codec = data[start : start + size], int(entry["codec"])
                content = repo.seal.decode(digest, codec, stored, int(entry["raw"]))
                if repo.seal.digest(content) != digest:
                    bad.append(digest)
            except DamagedError:
                bad.append(digest)
            count += size
    return bad, count


def _ranges(repo: Repository, name: str, entries: pack.Entries) -> Iterator[tuple[pack.Entries, memoryview]]:
    start = 0
    ends = entries["offset"] + entries["stored"]
    while start < len(entries):
        stop = max(int(np.searchsorted(ends, entries["offset"][start] + _BATCH)), start + 1)
        batch = entries[start:stop]
        base = int(batch[0]["offset"])
        try:
            data = repo.storage.read_range("packs", name, base, int(ends[stop - 1]) - base)
        except OSError:
            data = b""
        yield batch, memoryview(data)
        start = stop
