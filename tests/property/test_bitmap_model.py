"""A bitmap is a set of clusters, whatever is done to it, and a power cut at any moment leaves no less (I2)."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incbak import durable, host
from incbak.bitmap import bits as kernels
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import REGION, SECTOR
from incbak.bitmap.store import BitmapStore
from incbak.errors import BitmapError, DurabilityError
from incbak.fingerprint import Fingerprint
from incbak.reasons import Reason

NAME = "incbak-00000001-00000002"
SIZE = 5 * REGION + 12_345
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

offsets = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, 5).flatmap(lambda r: st.integers(max(r * REGION - 70_000, 0), min(r * REGION + 70_000, SIZE - 1))),
)
lengths = st.one_of(st.integers(1, 200_000), st.integers(1, SIZE))
spans = st.tuples(offsets, lengths).map(lambda t: (t[0], min(t[1], SIZE - t[0])))
operations = st.one_of(
    st.tuples(st.just("mark"), spans),
    st.tuples(st.just("mark"), spans),
    st.tuples(st.just("merge"), st.lists(spans, max_size=3)),
    st.tuples(st.just("keep"), st.lists(spans, max_size=3)),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("enable"), st.booleans()),
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("kill"), st.none()),
    st.tuples(st.just("cut"), st.none()),
)
common = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


class World:
    """A bitmap in its store, the model beside it, and what would be on the disk if the power failed now."""

    def __init__(self, directory: Path, granularity: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.boots = 1
        monkeypatch.setattr(host, "boot_id", lambda: self.boots.to_bytes(16, "big"))
        monkeypatch.setattr(durable, "sync_file", self._sync)
        self.fail_at = self.syncs = 0
        self.granularity = granularity
        self.disk = Fingerprint(SIZE, 0, 0, bytes(16))
        self.store = BitmapStore(directory / "state", "vm", "disk")
        self.store.lock()
        self.probe = BitmapStore(directory / "after", "vm", "disk")
        self.bitmap = self.store.create(NAME, SIZE, granularity, self.disk)
        self.model: set[int] = set()
        self.touched: set[int] = set()
        self.enabled = True
        self.required: set[int] = set()
        self.synced = self.store.path(NAME).read_bytes()

    def clusters(self, *ranges: tuple[int, int]) -> set[int]:
        """What the ranges touch."""
        g = self.granularity
        return {c for o, n in ranges for c in range(o // g, (o + n - 1) // g + 1)}

    def regions(self, members: set[int]) -> set[int]:
        """What clusters touch, a last partial one being cut at the end of the disk."""
        g = self.granularity
        return {r for c in members for r in range(c * g // REGION, (min((c + 1) * g, SIZE) - 1) // REGION + 1)}

    def whole_regions(self) -> set[int]:
        """All clusters of the touched regions."""
        return self.clusters(*((r * REGION, min(REGION, SIZE - r * REGION)) for r in self.touched))

    def packed(self, members: set[int]) -> kernels.Bits:
        """A set as bits."""
        flags = np.zeros(-(-SIZE // self.granularity), dtype=np.uint8)
        flags[sorted(members)] = 1
        return np.packbits(flags, bitorder="little")

    def _sync(self, fd: int, what: str) -> None:
        """Every sync may be the last thing that happened, and so may the moment before it."""
        self.syncs += 1
        self.check_power_cut()
        if self.syncs == self.fail_at:
            raise DurabilityError("cannot sync: injected")
        self.synced = self._now()
        self.check_power_cut()

    def _now(self) -> bytes:
        path = self.store.path(NAME)
        return path.read_bytes() if path.exists() else self.synced

    def survivor(self) -> bytes:
        """faults rows 17, 18: of what was not synced, any subset of sectors."""
        now, then = self._now(), self.synced
        pick = self.random.choice([lambda: True, lambda: False, lambda: self.random.random() < 0.5])
        pieces = [now[i : i + SECTOR] if pick() else then[i : i + SECTOR] for i in range(0, len(now), SECTOR)]
        return b"".join(pieces)

    def check_power_cut(self) -> None:
        """What the next boot would make of it has all that it must have, or is not believed."""
        shutil.rmtree(self.probe.directory, ignore_errors=True)
        self.probe.directory.mkdir(parents=True)
        shutil.copy(self.store.directory / "disk.json", self.probe.directory)
        self.probe.path(NAME).write_bytes(self.survivor())
        self.boots += 1
        sync, durable.sync_file = durable.sync_file, lambda fd, what: None
        try:
            self.probe.lock()
            found = self.probe.open(NAME, self.disk)
            if isinstance(found, Bitmap):
                assert self.required <= self.dirty(found), "a power cut here loses a mark"
                found.close(None)
            self.probe.unlock()
        finally:
            durable.sync_file = sync
            self.boots -= 1

    @staticmethod
    def dirty(bitmap: Bitmap) -> set[int]:
        """The marked clusters."""
        return set(kernels.clusters_of(bitmap.runs()).tolist())

    def change(self, what: str, argument: object) -> None:
        """Do one operation that does not end the session, to bitmap and model."""
        before = set(self.model)
        if what == "mark":
            self.model |= self.clusters(argument)  # type: ignore[arg-type]
            self.touched |= self.regions(self.clusters(argument)) & self._written(argument)  # type: ignore[arg-type]
        elif what == "merge":
            self.model |= self.clusters(*argument)  # type: ignore[misc]
            self.touched |= self.regions(self.clusters(*argument))  # type: ignore[misc]
        elif what == "keep":
            self.model &= self.clusters(*argument)  # type: ignore[misc]
        elif what == "clear":
            self.model, self.touched = set(), set()
        self.required = before & self.model
        if what == "mark":
            self.bitmap.mark(*argument)  # type: ignore[misc]
        elif what == "merge":
            self.bitmap.merge_bits(self.packed(self.clusters(*argument)))  # type: ignore[misc]
        elif what == "keep":
            self.bitmap.keep_bits(self.packed(self.clusters(*argument)))  # type: ignore[misc]
        elif what == "clear":
            self.bitmap.clear()
        else:
            self.bitmap.set_enabled(bool(argument))
            self.enabled = bool(argument)
        self.required = set(self.model)

    @staticmethod
    def _written(span: tuple[int, int]) -> set[int]:
        return set(range(span[0] // REGION, (span[0] + span[1] - 1) // REGION + 1))

    def reopen(self, how: str) -> None:
        """End the session in one of three ways, and begin the next."""
        if how == "end":
            self.bitmap.close(self.disk)
            expected = Found.CLEAN
        else:
            expected = Found.RECOVERED if self.bitmap.state is State.DIRTY else Found.CLEAN
            self.bitmap.close(None)
        if how == "cut":
            self.store.path(NAME).write_bytes(self.survivor())
            self.boots += 1
            if expected is Found.RECOVERED:
                expected, self.model = Found.COARSE, self.whole_regions()
        found = self.store.open(NAME, self.disk)
        assert isinstance(found, Bitmap), found
        assert found.found is expected
        self.bitmap = found
        self.required = set(self.model)

    def check(self) -> None:
        """The bitmap is the model."""
        assert self.dirty(self.bitmap) == self.model
        assert self.bitmap.enabled == self.enabled
        ends = {c: min((c + 1) * self.granularity, SIZE) for c in self.model}
        assert self.bitmap.count() == sum(end - c * self.granularity for c, end in ends.items())
        self.check_power_cut()


@common
@given(
    st.sampled_from([65536, 1 << 20, REGION, 2 * REGION]),
    st.lists(operations, min_size=1, max_size=9),
    st.integers(0, 1 << 32),
)
def test_a_bitmap_is_a_set_of_clusters(granularity: int, plan: list[tuple[str, object]], seed: int) -> None:
    """Marks, merges and clears; sessions that end well, are killed, or lose their host with any subset of pages."""
    with TemporaryDirectory(dir=MEMORY) as directory, pytest.MonkeyPatch.context() as patch:
        world = World(Path(directory), granularity, patch, seed)
        for what, argument in plan:
            if what in ("end", "kill", "cut"):
                world.reopen(what)
            else:
                world.change(what, argument)
            world.check()
        world.bitmap.close(None)
        world.store.unlock()


@common
@given(
    st.sampled_from([65536, REGION]),
    st.lists(operations.filter(lambda o: o[0] not in ("kill", "cut")), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 1 << 32),
)
def test_after_a_failed_sync_it_is_invalid_or_whole(
    granularity: int, plan: list[tuple[str, object]], nth: int, seed: int
) -> None:
    """faults rows 26, 31: whichever sync fails, nobody ever finds a bitmap that lacks a mark."""
    with TemporaryDirectory(dir=MEMORY) as directory, pytest.MonkeyPatch.context() as patch:
        world = World(Path(directory), granularity, patch, seed)
        world.fail_at = nth
        try:
            for what, argument in plan:
                if what == "end":
                    world.reopen(what)
                else:
                    world.change(what, argument)
        except BitmapError:
            assert world.bitmap.state in (State.INVALID, State.CLOSED)
            world.bitmap.close(world.disk)
            assert world.store.open(NAME, world.disk) is Reason.TRACKING_FAILED
        except DurabilityError:
            found = world.store.open(NAME, world.disk)
            assert isinstance(found, Bitmap)
            assert world.model <= world.dirty(found)
            found.close(None)
        else:
            world.check()
            world.bitmap.close(None)
        world.store.unlock()
