"""Repositories that are well-formed, with every checksum right, and absurd: what a hostile writer would make."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import zstandard
from blake3 import blake3

from fuzzlib import mutate
from incbak.repo import blob, index, pack
from incbak.repo.repository import Config
from incbak.repo.tree import FANOUT, PAGE

CLUSTER = 4096
Files = dict[str, bytes | None]

_BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
"""64 MiB of zeroes in 6 KiB, whose frame says so."""


def _silent_bomb() -> bytes:
    maker = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    return maker.compress(bytes(64 << 20)) + maker.flush()


_SILENT = _silent_bomb()
_LYING = bytes([*_BOMB[:4]]) + bytes([0x60]) + (CLUSTER - 256).to_bytes(2, "little") + _BOMB[9:]


class Forge:
    """Blobs, as the table of one pack will have them."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.body = bytearray(pack.head())
        self.rows: list[tuple[bytes, int, int, int, int]] = []

    def add(self, content: bytes, digest: bytes | None = None, **lies: Any) -> bytes:
        """A blob; ``lies`` replace codec, stored bytes, raw size or offset."""
        codec, stored = blob.encode(content)
        stored = lies.get("stored", bytes(stored))
        digest = digest or blob.digest_of(content)
        row = (
            digest,
            lies.get("offset", len(self.body)),
            lies.get("size", len(stored)),
            lies.get("raw", len(content)),
            lies.get("codec", codec),
        )
        self.rows.append(row)
        self.body += stored
        return digest

    def any_blob(self) -> bytes:
        """A cluster, honest or not."""
        rng = self.rng
        content = rng.randbytes(8) * (CLUSTER // 8)
        choice = rng.random()
        if choice < 0.5:
            return self.add(content)
        if choice < 0.7:
            stored = rng.choice((_BOMB, _SILENT, _LYING, mutate.mutated(rng, _BOMB), b"", b"\x28\xb5\x2f\xfd"))
            raw = rng.choice((CLUSTER, 64 << 20, blob.MAX_BLOB, PAGE, mutate.number(rng, 32)))
            return self.add(content, stored=stored, raw=raw, codec=1)
        if choice < 0.8:
            return self.add(rng.randbytes(rng.choice((0, 1, 511, 4095, 4097, 32768))))
        lie = rng.choice(("size", "raw", "offset", "codec"))
        return self.add(content, **{lie: mutate.number(rng, {"codec": 8, "offset": 63}.get(lie, 32))})

    def tree(self, depth: int) -> bytes:
        """A root of that depth, with few rows at odd places."""
        rng = self.rng
        page = np.zeros((FANOUT, 32), dtype=np.uint8)
        for _ in range(rng.choice((1, 2, 3))):
            row = rng.choice((0, 1, 5, 9, FANOUT - 1, rng.randrange(FANOUT)))
            choice = rng.random()
            if depth > 1 and choice < 0.9:
                digest = self.tree(depth - 1)
            elif choice < 0.93:
                digest = rng.choice([r[0] for r in self.rows] or [rng.randbytes(32)])
            else:
                digest = self.any_blob() if choice < 0.99 else rng.randbytes(32)
            page[row] = np.frombuffer(digest, dtype=np.uint8)
        raw = page.tobytes()
        if rng.random() < 0.05:
            raw = rng.choice((raw[:-1], raw + b"\0", raw[:CLUSTER], b""))
        return self.add(raw)

    def files(self) -> Files:
        """The pack, and an index of it that may lie as well."""
        entries = np.zeros(len(self.rows), dtype=pack.ENTRY)
        for i, row in enumerate(self.rows):
            entries[i] = (*row, b"")
        tail, name = _tail(entries, len(self.body))
        numbers = np.zeros(len(entries), dtype=np.uint32)
        if self.rng.random() < 0.3:
            _spoil(self.rng, entries, numbers)
        entries["offset"] &= 0xFFFFFFFF
        size = len(self.body) + len(tail)
        made: Files = {f"packs/{name}": bytes(self.body) + tail}
        made["index/" + "1" * 32] = index.encode([(name, size)], numbers, entries)
        return made


def _tail(entries: pack.Entries, offset: int) -> tuple[bytes, str]:
    """As `pack.tail`, without a random salt: a case must be the same each time."""
    table = entries.tobytes()
    digest = blake3(table).digest()
    foot = pack.FOOT.pack(pack.FOOT_MAGIC, pack.VERSION, len(entries), offset, digest, b"")
    return table + foot, digest[:16].hex()


def _spoil(rng: Random, entries: pack.Entries, numbers: Any) -> None:
    """A few extreme fields in a table."""
    for _ in range(rng.choice((1, 1, 3))):
        if not len(entries):
            return
        at = rng.randrange(len(entries))
        field = rng.choice(("offset", "stored", "raw", "codec", "pack", "digest"))
        if field == "pack":
            numbers[at] = mutate.number(rng, 32)
        elif field == "digest":
            entries["digest"][at] = entries["digest"][rng.randrange(len(entries))]
        else:
            entries[field][at] = mutate.number(rng, 8 if field == "codec" else 32)


def forged(rng: Random) -> Files:
    """A whole repository."""
    made = Forge(rng)
    disks = []
    for i in range(rng.choice((1, 1, 2, 3))):
        size, depth = rng.choice(
            ((7 * CLUSTER, 1), (CLUSTER * 5 - 1, 1), (0, 1), (FANOUT * CLUSTER + 1, 2), (1 << 40, 3))
        )
        if rng.random() < 0.3:
            size = mutate.number(rng, 57)
        root = made.tree(depth if rng.random() < 0.9 else rng.randint(1, 4))
        name = f"vd{'abc'[i]}" if rng.random() < 0.7 else mutate.text(rng)
        disks.append(_disk(name, size, root))
    files = made.files()
    files["config"] = _config(Config(1, "c" * 32, CLUSTER))
    given = _record("b" * 32, disks)
    if rng.random() < 0.3:
        _absurd(rng, given)
    files["backups/" + "b" * 32] = _seal(given)
    return files


def _disk(name: str, size: int, root: bytes) -> dict[str, object]:
    return {"name": name, "size": size, "kind": "full", "base": None, "reason": None, "read": size, "stored": 0,
            "root": root.hex()}  # fmt: skip


def _record(name: str, disks: list[dict[str, object]]) -> dict[str, Any]:
    return {"version": 1, "id": name, "seq": 1, "vm": "vm", "kind": "full", "base": None, "engine": "fuzz",
            "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:00:01Z", "cluster_size": CLUSTER,
            "disks": disks}  # fmt: skip


def _seal(given: Any) -> bytes:
    body = json.dumps(given).encode()
    return blake3(body).hexdigest().encode() + b"\n" + body


def _config(config: Config) -> bytes:
    return msgspec.json.encode(config.sealed())


def _absurd(rng: Random, given: dict[str, Any]) -> None:
    """One or more fields of a record replaced."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice([given, *[d for d in given.get("disks") or [] if isinstance(d, dict)]])
        field = rng.choice([*where, "tags", "notes", "config", "attachments", "detail", "changed", "audited", "x"])
        old = where.get(field)
        if field in ("size", "cluster_size", "seq", "read", "stored", "changed", "audited", "version"):
            where[field] = rng.choice((mutate.number(rng, 64), -1, 1 << 100, 1.5, 512, 1 << 24))
        elif isinstance(old, str):
            where[field] = mutate.text(rng)
        elif field == "disks" and old:
            where[field] = old * rng.choice((0, 2, 1025))
        else:
            deep: Any = 1
            for _ in range(rng.choice((1, 60, 900))):
                deep = [deep]
            where[field] = rng.choice((None, [], {}, {"a": "b"}, ["\x1b[31m"], deep, 10**400, {"../x": "y"}))


def sealed(rng: Random, sample: Path) -> tuple[Files, dict[str, str]]:
    """One file of a sample made anew, with right checksums and wrong content; or a link in the place of a folder."""
    files: Files = {}
    kind = rng.choice(("record", "record", "index", "index", "pack", "config", "note", "header", "link", "name"))
    if kind == "record":
        path = rng.choice(sorted((sample / "backups").iterdir()))
        given = json.loads(path.read_bytes().partition(b"\n")[2])
        _absurd(rng, given)
        files[f"backups/{path.name}"] = _seal(given)
    elif kind == "index":
        path = rng.choice(sorted((sample / "index").iterdir()))
        files[f"index/{path.name}"] = _index(rng, index.IndexFile(path.name, np.fromfile(path, dtype=np.uint8)))
    elif kind == "header":
        path = rng.choice(sorted((sample / "index").iterdir()))
        files[f"index/{path.name}"] = _header(rng, path.read_bytes())
    elif kind == "pack":
        files.update(_pack(rng, rng.choice(sorted((sample / "packs").iterdir()))))
    elif kind == "config":
        fields = {"version": mutate.number(rng, 3), "cluster_size": mutate.number(rng, 40), "id": mutate.text(rng)}
        name = rng.choice(list(fields))
        config = Config(1, "c" * 32, CLUSTER)
        changed: Any = msgspec.structs.replace(config, **{name: fields[name]})  # type: ignore[arg-type]
        if "\ud800" not in changed.id:
            files["config"] = _config(changed)
    elif kind == "note":
        files["damaged/" + "2" * 32] = _note(rng)
    elif kind == "name":
        folder = rng.choice(("backups", "index", "packs", "damaged", "locks"))
        path = rng.choice(sorted((sample / "packs").iterdir()))
        name = rng.choice(("x", "%252e%252e", "%C3%A9", "%1B%5B31m", "A" * 200, "%FF", "..x"))
        files[f"{folder}/{name}"] = path.read_bytes()
    else:
        folder = rng.choice(("backups", "index", "packs", "damaged", "locks", "config"))
        return files, {folder: rng.choice(("../outside", "/nowhere", ".", "packs"))}
    return files, {}


def _index(rng: Random, file: index.IndexFile) -> bytes:
    entries, numbers = file.entries(), file.places["pack"].astype(np.uint32)
    packs = list(zip(file.names, file.packs["size"].tolist(), strict=True))
    _spoil(rng, entries, numbers)
    if rng.random() < 0.2:
        packs = rng.choice(([], packs * 3, [(packs[0][0], mutate.number(rng, 63))]))
    if rng.random() < 0.1:
        entries, numbers = entries[:0], numbers[:0]
    return index.encode(packs, numbers, entries)


def _header(rng: Random, data: bytes) -> bytes:
    """Other counts in an index's header, or another body, all sealed."""
    magic, version, packs, count, _digest = index._HEAD.unpack_from(data)
    body = mutate.mutated(rng, data[index._HEAD_SIZE :]) if rng.random() < 0.5 else data[index._HEAD_SIZE :]
    choice = rng.random()
    if choice < 0.3:
        packs = mutate.number(rng, 32)
    elif choice < 0.6:
        count = mutate.number(rng, 64)
    elif choice < 0.65:
        version = mutate.number(rng, 32)
    if rng.random() < 0.3:
        packs = len(body) // 24
        count = (len(body) - packs * 24) // 52
        body = body[: packs * 24 + count * 52]
    head = index._HEAD.pack(magic, version, packs, count, blake3(body).digest()).ljust(112, b"\0")
    return head + blake3(head).digest(length=16) + body


def _pack(rng: Random, path: Path) -> Files:
    """A pack with a spoilt table, under the name that this gives it."""
    data = path.read_bytes()
    _magic, _version, count, offset, _digest, _zero = pack.FOOT.unpack(data[-pack.FOOT.size :])
    entries = np.frombuffer(data, dtype=pack.ENTRY, count=count, offset=offset).copy()
    _spoil(rng, entries, np.zeros(count, dtype=np.uint32))
    if rng.random() < 0.3:
        entries["offset"][rng.randrange(count)] = mutate.number(rng, 64)
    tail, name = _tail(entries, offset if rng.random() < 0.9 else mutate.number(rng, 63))
    gone: Files = {f"packs/{path.name}": None} if rng.random() < 0.5 else {}
    if rng.random() < 0.1:
        name = path.name
    return gone | {f"packs/{name}": data[:offset] + tail}


def _note(rng: Random) -> bytes:
    digest = rng.choice(("ab" * 32, "", "zz", "ab", "AB " * 32))
    if rng.random() < 0.3:
        return b'{"digests":[],"backups":[],"more":' + b"[" * rng.choice((10, 5000, 100_000)) + b"}"
    if rng.random() < 0.5:
        return mutate.mutated(rng, b'{"digests":["' + b"ab" * 32 + b'"],"backups":["' + b"c" * 32 + b'"]}')
    return json.dumps({"digests": [digest] * rng.choice((1, 9999)), "backups": [mutate.text(rng)]}).encode()
