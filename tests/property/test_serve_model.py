"""`incbak serve` against a model: several guests write at once, and each backup is the disk at one instant.

Each guest has a range of its own, and one range belongs to all. A guest has one request in flight, so the disk's
content in its range, at any instant, is that after some number of its requests; and that number lies between those
answered before the transaction was sent and those sent before it was answered.
"""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest

from incbak.disk.memory import MemoryDisk
from incbak.nbd.client import NbdClient
from tests.kit.serve import Peer, raw_image, serving

BLOCK = 4096
GUESTS = 3
OWN = 192
"""Blocks of each guest: 12 clusters of 64 KiB."""
COMMON = 48
SIZE = (GUESTS * OWN + COMMON) * BLOCK + 512
ROUNDS = 6


class Guest:
    """Writes, zeroes and trims in its own blocks, and whole blocks in the common ones; keeps a log."""

    def __init__(self, number: int, client: NbdClient, seed: int) -> None:
        self.number, self._client, self._random = number, client, random.Random(seed)
        self.first = number * OWN
        self.log: list[tuple[int, int, bytes]] = []
        """(first block, count, what each block holds then) of requests to the own range, in order."""
        self.answered = self.common = 0
        self._stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._request()
        except BaseException as e:  # noqa: BLE001 (told by `stop`)
            self.error = e

    def _request(self) -> None:
        rng = self._random
        if rng.random() < 0.2:
            self.common += 1
            at = GUESTS * OWN + rng.randrange(COMMON)
            self._client.write(struct.pack("<QQ", self.number + 1, self.common) * (BLOCK // 16), at * BLOCK)
            return
        first = rng.randrange(OWN)
        count = min(rng.choice((1, 1, 1, 2, 5, 20)), OWN - first)
        kind = rng.choice(("write", "write", "write", "zero", "trim"))
        stamp = struct.pack("<Q", len(self.log) + 1) * (BLOCK // 8) if kind == "write" else bytes(BLOCK)
        self.log.append((first, count, stamp))
        offset, length = (self.first + first) * BLOCK, count * BLOCK
        if kind == "write":
            self._client.write(stamp * count, offset)
        elif kind == "zero":
            self._client.write_zeroes(offset, length)
        else:
            self._client.trim(offset, length)
        self.answered = len(self.log)

    def stop(self) -> None:
        """End the thread and the connection; raises what went wrong in it."""
        self._stop.set()
        self._thread.join(20)
        self._client.close()
        if self.error:
            raise self.error

    def explains(self, found: bytes, low: int, high: int) -> bool:
        """Whether the own range held ``found`` after some number of requests from ``low`` to ``high``."""
        blocks = [found[i : i + BLOCK] for i in range(self.first * BLOCK, (self.first + OWN) * BLOCK, BLOCK)]
        state = [bytes(BLOCK)] * OWN
        for first, count, stamp in self.log[:low]:
            state[first : first + count] = [stamp] * count
        if state == blocks:
            return True
        for first, count, stamp in self.log[low:high]:
            state[first : first + count] = [stamp] * count
            if state == blocks:
                return True
        return False


def _check_common(found: bytes, guests: list[Guest]) -> None:
    """Every common block is whole, and somebody's."""
    for block in range(GUESTS * OWN, GUESTS * OWN + COMMON):
        content = found[block * BLOCK : (block + 1) * BLOCK]
        assert content == content[:16] * (BLOCK // 16), "a block is torn"
        who, count = struct.unpack("<QQ", content[:16])
        assert (who, count) == (0, 0) or count <= guests[who - 1].common


@pytest.mark.parametrize("seed", [1, 2])
def test_every_backup_is_the_disk_at_one_instant(tmp_path: Path, seed: int) -> None:
    """I1, I2: a full, then incrementals from bitmap to bitmap into the same target, with the guests never stopping."""
    pause = random.Random(seed)
    peer = Peer(tmp_path / "t.sock", MemoryDisk(SIZE))
    image = raw_image(tmp_path / "a.raw", SIZE)
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("blockdev-add", peer.blockdev("t0"))
        guests = [Guest(i, serve.connect("vda"), seed * 100 + i) for i in range(GUESTS)]
        try:
            for turn in range(ROUNDS):
                threading.Event().wait(pause.random() * 0.15)
                which: dict[str, object] = {"sync": "full"}
                if turn:
                    which = {"sync": "bitmap", "bitmap": f"b{turn - 1}", "bitmap-mode": "never"}
                job = {"device": "vda", "target": "t0", "job-id": f"j{turn}", **which}
                new = {"node": "vda", "name": f"b{turn}", "persistent": bool(turn % 2)}
                low = [g.answered for g in guests]
                qmp(
                    "transaction",
                    actions=[
                        {"type": "block-dirty-bitmap-add", "data": new},
                        {"type": "blockdev-backup", "data": job},
                    ],
                )
                high = [len(g.log) for g in guests]
                assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED", device=f"j{turn}")["data"]
                found = bytes(peer.disk.data)  # type: ignore[union-attr]
                for guest, least, most in zip(guests, low, high, strict=True):
                    assert guest.explains(found, least, most), f"round {turn}, guest {guest.number}"
                _check_common(found, guests)
                if turn:
                    qmp("block-dirty-bitmap-remove", node="vda", name=f"b{turn - 1}")
        finally:
            for guest in guests:
                guest.stop()
        qmp.close()
        assert serve.stop() == 0
        whole = image.read_bytes()
        assert all(g.explains(whole, len(g.log), len(g.log)) for g in guests)
    peer.stop()
