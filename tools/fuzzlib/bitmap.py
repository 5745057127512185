"""Bitmap files: one that is not what its owner left is refused with a reason, and never believed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

from blake3 import blake3
from click.testing import CliRunner

from fuzzlib import mutate
from fuzzlib.case import FuzzTarget, allowed, demand
from incbak.bitmap import format as fmt
from incbak.bitmap.disown import disown
from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.format import Flag, Slot
from incbak.bitmap.store import BitmapStore, get_dirty_blocks, view, views
from incbak.cli.main import cli
from incbak.errors import IncbakError
from incbak.fingerprint import Beat, Fingerprint
from incbak.reasons import Reason

SIZE = (65 << 20) + 12345
FINGERPRINT = Fingerprint(SIZE, 77, 0, b"s" * 16)
NAME = "b0"
_IDENTITY = '{"uuid":"6f1e8d3a-5b0c-4f6e-9a4d-2c7b1e0f9a55","image":"/nowhere"}'
RAW, SEALED, IDENTITY = 0, 1, 2
"""Which kind of input it is, in its first byte."""


class BitmapTarget(FuzzTarget):
    """Input: a kind, and the bitmap file, or the file ``disk.json``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.state = directory / "state"
        os.environ["INCBAK_BOOT_ID_FILE"] = str(directory / "boot-id")
        (directory / "boot-id").write_text("3b1d0c52-7f7b-4c5e-8f60-8a3a7c0b7f11\n")
        self.store = BitmapStore(self.state, "vm", "disk")
        self.store.directory.mkdir(parents=True)
        (self.store.directory / "disk.json").write_text(_IDENTITY)
        self.store.lock()
        self.path = self.store.path(NAME)
        self.identity = (self.store.directory / "disk.json").read_bytes()
        self.clean = self._sample(65536, clean=True)
        self.samples = [self.clean, self._sample(65536, clean=False), self._sample(512, clean=True)]
        self.bodies = {s[fmt.HEADER :] for s in self.samples}
        self.runner = CliRunner()
        self._turn = 0

    def _sample(self, granularity: int, *, clean: bool) -> bytes:
        self.path.unlink(missing_ok=True)
        bitmap = self.store.create(NAME, SIZE, granularity, FINGERPRINT)
        bitmap.mark(70000, 200_000)
        bitmap.mark(SIZE - 5, 5)
        bitmap.close(FINGERPRINT if clean else None)
        return _without_time(self.path.read_bytes())

    def make(self, rng: Random) -> bytes:
        sample = rng.choice(self.samples)
        choice = rng.random()
        if choice < 0.1:
            return bytes([IDENTITY]) + _identity(rng, self.identity)
        if choice < 0.5:
            return bytes([SEALED]) + self._sealed(rng, sample)
        head = rng.random() < 0.6
        part = mutate.mutated(rng, sample[: fmt.HEADER] if head else sample, rng.choice(self.samples)[:8192])
        return bytes([RAW]) + (part[: fmt.HEADER].ljust(fmt.HEADER, b"\0") + sample[fmt.HEADER :] if head else part)

    def _sealed(self, rng: Random, sample: bytes) -> bytes:
        """Headers with extreme fields and right checksums; often a file of the size that they ask for."""
        slot, _both = fmt.newest(sample[:1024])
        assert isinstance(slot, Slot)
        for _ in range(rng.choice((1, 1, 2, 4))):
            slot = _changed(rng, slot)
        other = slot if rng.random() < 0.7 else _changed(rng, slot)
        head = b"".join(fmt.encode(s) for s in ((slot, other) if rng.random() < 0.5 else (other, slot)))
        body = sample[1024:]
        if rng.random() < 0.7 and 512 <= slot.granularity <= 1 << 31 and fmt.layout(slot)[2] < 4 << 20:
            _bits, coarse, end = fmt.layout(slot)
            body = body.ljust(coarse - 1024, b"\0")[: coarse - 1024] + b"\x5a" * (end - coarse)
        return head + body

    def run(self, data: bytes) -> None:
        (self.store.directory / "disk.json").write_bytes(data[1:] if data[0] == IDENTITY else self.identity)
        content = self.clean if data[0] == IDENTITY else data[1:]
        self.path.write_bytes(content)
        self._look()
        if data[0] == IDENTITY:
            self._reopen()
        found = self.store.open(NAME, FINGERPRINT)
        if isinstance(found, Bitmap):
            try:
                self._believed(found, content, data[0])
            finally:
                found.close(FINGERPRINT)
            again = self.store.open(NAME, FINGERPRINT)
            if isinstance(again, Bitmap):
                demand(again.found is Found.CLEAN, f"not clean after a clean end: {again.found}")
                again.close(None)
            else:
                demand(found.slot.sequence > fmt.SEQUENCE_LIMIT - 99, f"not believed after a clean end: {again}")
        else:
            demand(isinstance(found, Reason), f"opened as {found!r}")
            allowed(lambda: self.store.give_up(NAME, Reason.INVALIDATED))
            demand(isinstance(self.store.open(NAME, FINGERPRINT), Reason), "believed after it was given up")
        for bitmap in self.store.open_all(FINGERPRINT)[0]:
            bitmap.close(None)
        for left in self.store.directory.iterdir():
            if left.name not in ("disk.json", "lock"):
                left.unlink()

    def _believed(self, found: Bitmap, content: bytes, kind: int) -> None:
        slot = found.slot
        demand(slot.size == SIZE and slot.disk_uuid == self.store.uuid, "a bitmap of another disk is believed")
        if found.found is Found.CLEAN:
            demand(blake3(content[fmt.HEADER :]).digest() == slot.digest, "believed though the digest differs")
            if kind == RAW:
                demand(content[fmt.HEADER :] in self.bodies, "flipped bits are believed")
        found.mark(0, 1)
        found.mark(SIZE - 1, 1)

    def _look(self) -> None:
        allowed(lambda: get_dirty_blocks(self.state, "vm", "disk", NAME))
        allowed(lambda: view(self.state, "vm", "disk", NAME))
        views(self.state)
        self._turn += 1
        for command in (["show", "vm"], ["list"], ["dirty", "vm"])[self._turn % 3 :][:1]:
            options = ["--json"] if self._turn & 4 else []
            ran = self.runner.invoke(cli, ["--state-dir", str(self.state), *options, "bitmap", *command])
            if ran.exception and not isinstance(ran.exception, (IncbakError, SystemExit, OSError)):
                raise ran.exception

    def _reopen(self) -> None:
        """What reads ``disk.json``."""
        self.store.unlock()
        allowed(lambda: disown(self.state, self.directory / "image"))
        self.store.lock()
        self.store.note_image(self.directory / "image")

    def close(self) -> None:
        self.store.unlock()
        shutil.rmtree(self.state)


def _without_time(data: bytes) -> bytes:
    """The same file for every run: nothing of this process and this moment in it."""
    head = b""
    for at in (0, fmt.SECTOR):
        slot = fmt.decode(data[at : at + fmt.SECTOR])
        assert isinstance(slot, Slot)
        head += fmt.encode(replace(slot, created_ns=1, owner_pid=1234, owner_start=5678))
    return head + fmt.encode_beat(Beat(1)) + data[fmt.HEARTBEAT + fmt.BEAT_SIZE :]


def _changed(rng: Random, slot: Slot) -> Slot:
    prints = slot.fingerprint
    fields = {
        "size": rng.choice((SIZE, 0, 1, mutate.number(rng, 64))),
        "granularity": rng.choice((1 << rng.randrange(32), mutate.number(rng, 32))),
        "flags": Flag(mutate.number(rng, 32) if rng.random() < 0.3 else rng.randrange(8)),
        "sequence": mutate.number(rng, 64),
        "owner_pid": mutate.number(rng, 32),
        "owner_start": mutate.number(rng, 64),
        "created_ns": mutate.number(rng, 64),
        "cache_id": rng.randbytes(16),
        "disk_uuid": rng.randbytes(16),
        "digest": rng.randbytes(32),
        "reason": rng.choice(("", "digest", "nonsense", "\x1b[1m")),
        "name": rng.choice((NAME, "", "../../x", "x" * 128, "\x1b[31m")),
        "fingerprint": Fingerprint(mutate.number(rng), prints.inode, mutate.number(rng, 63), prints.sample),
    }
    name = rng.choice(list(fields))
    return replace(slot, **{name: fields[name]})  # type: ignore[arg-type]


def _identity(rng: Random, sample: bytes) -> bytes:
    found = json.loads(sample)
    choice = rng.random()
    if choice < 0.4:
        return mutate.mutated(rng, sample)
    if choice < 0.5:
        return b'{"uuid":"x","more":' + b"[" * rng.choice((10, 1000, 100_000)) + b"}"
    found[rng.choice(("uuid", "image", "more"))] = rng.choice((mutate.text(rng), None, 1, "{" + found["uuid"] + "}"))
    return json.dumps(found).encode()
