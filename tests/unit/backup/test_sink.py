"""The sink: writes in any order and shape end as the disk's content in the repository, or as an error."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from incbak import durable
from incbak.backup import pipeline as module
from incbak.backup.partial import Partials
from incbak.backup.pipeline import Pipeline
from incbak.backup.sink import DiskSink
from incbak.backup.target import SinkServer, SinkTarget
from incbak.errors import BackupError, DurabilityError, IncbakError, NbdError, NbdRequestError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.repo import blob
from incbak.repo.record import DiskRecord
from incbak.repo.repository import Repository
from tests.unit.repo.scene import record_of

CLUSTER = 4096
SIZE = 9 * CLUSTER + 700


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()


@contextmanager
def sinking(
    repo: Repository, size: int = SIZE, base: DiskRecord | None = None, *, full: bool = True, threads: int = 2
) -> Iterator[DiskSink]:
    """A sink of disk ``vda`` with all that is behind it; `keep` commits."""
    with repo.vm_lock("vm") as still, repo.writer(still) as writer:
        pipeline = Pipeline(writer, repo.cluster_size, threads=threads)
        try:
            yield DiskSink(repo, writer, pipeline, "vda", size, base, full)
        finally:
            pipeline.close()


def keep(repo: Repository, sink: DiskSink) -> DiskRecord:
    """Finish, commit, and return the disk's record."""
    made = record_of(repo, {"vda": (sink.size, sink.finish())})
    sink._pipeline.writer.commit(made)
    return made.disks[0]


def content(repo: Repository, disk: DiskRecord) -> bytes:
    """The disk, through tree and reader."""
    fresh = Repository.open(repo.storage.root)
    tree, parts = fresh.tree(disk), []
    for number in range(-(-disk.size // CLUSTER)):
        length = min(CLUSTER, disk.size - number * CLUSTER)
        digest = tree.digests(number, 1)[0].tobytes()
        parts.append(bytes(length) if digest == blob.ZERO_DIGEST else bytes(fresh.reader().read(digest)))
    return b"".join(parts)


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return Repository.init(tmp_path / "repo", CLUSTER)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One repository for all examples of a property."""
    return Repository.init(tmp_path_factory.mktemp("sink") / "repo", CLUSTER)


@st.composite
def _pieces(draw: st.DrawFn) -> list[tuple[int, int]]:
    """The whole disk cut anywhere, in any order."""
    cuts = draw(st.sets(st.one_of(st.integers(1, SIZE - 1), st.integers(1, 9).map(lambda n: n * CLUSTER)), max_size=14))
    edges = [0, *sorted(cuts), SIZE]
    return draw(st.permutations(list(pairwise(edges))))


def _disk(seed: int) -> bytearray:
    data = bytearray(np.random.default_rng(seed).bytes(SIZE))
    for number in range(10):
        if seed >> number & 1:
            data[number * CLUSTER : (number + 1) * CLUSTER] = bytes(min(CLUSTER, SIZE - number * CLUSTER))
    return data


@settings(max_examples=60, deadline=None)
@given(pieces=_pieces(), seed=st.integers(0, 1023), zero=st.sets(st.integers(0, 14)))
def test_a_full_in_any_order_cut_anywhere(
    shared: Repository, pieces: list[tuple[int, int]], seed: int, zero: set[int]
) -> None:
    model = _disk(seed)
    with sinking(shared) as sink:
        for i, (start, end) in enumerate(pieces):
            if i in zero:
                model[start:end] = bytes(end - start)
                sink.write_zeroes(start, end - start)
            else:
                buffer = bytearray(model[start:end])
                sink.write(start, memoryview(buffer))
                buffer[:] = b"\xaa" * len(buffer)
        sink.flush()
        made = keep(shared, sink)
        assert sink.counts.written + sink.counts.zeroed == SIZE
    assert content(shared, made) == bytes(model)


_CHANGE = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER), st.integers(0, 3))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1023), changes=st.lists(_CHANGE, max_size=8))
@example(seed=0, changes=[(CLUSTER, 2 * CLUSTER, 0)])
@example(seed=0, changes=[(CLUSTER + 10, 5, 0), (SIZE - 700, 700, 0)])
@example(seed=1023, changes=[(CLUSTER, 2 * CLUSTER, 1), (2 * CLUSTER, CLUSTER, 0)])
def test_an_incremental_lays_any_writes_over_its_base(
    shared: Repository, seed: int, changes: list[tuple[int, int, int]]
) -> None:
    """Also parts of clusters, and clusters that come twice: right, or refused, never wrong."""
    model = _disk(seed)
    with sinking(shared) as sink:
        sink.write(0, memoryview(bytes(model)))
        sink.flush()
        base = keep(shared, sink)
    came, whole = bytearray(SIZE), set[int]()
    doubtful = False
    with sinking(shared, base=base, full=False) as sink:
        for offset, length, kind in changes:
            end = min(offset + length, SIZE)
            clusters = range(offset // CLUSTER, -(-end // CLUSTER))
            inside = {c for c in clusters if c * CLUSTER >= offset and min((c + 1) * CLUSTER, SIZE) <= end}
            doubtful |= bool((set(clusters) - inside) & whole)
            came[offset:end] = b"\1" * (end - offset)
            whole |= {c for c in clusters if came.find(b"\0", c * CLUSTER, (c + 1) * CLUSTER) < 0}
            if kind:
                sink.write(offset, memoryview(bytes([kind]) * (end - offset)))
            else:
                sink.write_zeroes(offset, end - offset)
            model[offset:end] = bytes([kind]) * (end - offset)
        sink.flush()
        try:
            made = keep(shared, sink)
        except BackupError as e:
            if doubtful and "came again" in e.message:
                return
            raise
    assert content(shared, made) == bytes(model)


def test_a_part_and_then_the_whole(repo: Repository) -> None:
    """What came whole replaces the parts that came before, also in an incremental."""
    with sinking(repo) as sink:
        sink.write(0, memoryview(b"a" * SIZE))
        sink.flush()
        base = keep(repo, sink)
    for full in (True, False):
        with sinking(repo, base=base, full=full) as sink:
            sink.write(CLUSTER + 10, memoryview(b"old"))
            sink.write(0, memoryview(b"b" * SIZE))
            sink.flush()
            assert content(repo, keep(repo, sink)) == b"b" * SIZE


def test_the_whole_and_then_a_part_is_refused(repo: Repository) -> None:
    """The whole is on its way already, and perhaps in no readable pack: an error, never the base's content."""
    with sinking(repo) as sink:
        sink.write(0, memoryview(b"a" * SIZE))
        sink.flush()
        base = keep(repo, sink)
    for full in (True, False):
        for zeroes in (True, False):
            with sinking(repo, base=base, full=full) as sink:
                sink.write(0, memoryview(b"b" * SIZE))
                if zeroes:
                    sink.write_zeroes(CLUSTER + 10, 5)
                else:
                    sink.write(CLUSTER + 10, memoryview(b"later"))
                sink.flush()
                with pytest.raises(BackupError, match="part of cluster 1 came again"):
                    sink.finish()


def test_the_later_of_two_writes_counts(repo: Repository) -> None:
    with sinking(repo, threads=4) as sink:
        for turn in range(30):
            sink.write(0, memoryview(bytes([turn]) * SIZE))
        sink.write_zeroes(CLUSTER, CLUSTER)
        sink.write_zeroes(2 * CLUSTER, CLUSTER)
        sink.write(2 * CLUSTER, memoryview(b"z" * CLUSTER))
        sink.flush()
        model = bytearray([29]) * SIZE
        model[CLUSTER : 2 * CLUSTER], model[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER), b"z" * CLUSTER
        assert content(repo, keep(repo, sink)) == bytes(model)


def test_an_earlier_write_that_is_slow_does_not_win(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second write of a cluster waits until the first is through."""
    real, second, begun = Pipeline._batch, threading.Event(), []

    def slow(self: Pipeline, *args: object) -> None:
        begun.append(args)
        if len(begun) == 1:
            second.wait(0.3)
        real(self, *args)  # type: ignore[arg-type]
        second.set()

    monkeypatch.setattr(Pipeline, "_batch", slow)
    with sinking(repo, CLUSTER) as sink:
        sink.write(0, memoryview(b"a" * CLUSTER))
        sink.write(0, memoryview(b"b" * CLUSTER))
        sink.flush()
        assert content(repo, keep(repo, sink)) == b"b" * CLUSTER


@pytest.mark.parametrize(
    ("ranges", "flush", "text"),
    [
        ([(0, SIZE)], False, "without a flush"),
        ([(0, SIZE - 1)], True, "part of cluster 9 never came"),
        ([(1, SIZE)], True, "part of cluster 0 never came"),
        ([(0, CLUSTER), (2 * CLUSTER, SIZE)], True, "1 of 10 clusters never came"),
        ([], True, "10 of 10 clusters never came"),
    ],
)
def test_a_full_that_is_not_whole_is_no_backup(
    repo: Repository, ranges: list[tuple[int, int]], flush: bool, text: str
) -> None:
    """I1: the peer must have flushed, and sent every byte."""
    with sinking(repo) as sink:
        for start, end in ranges:
            sink.write(start, memoryview(b"x" * (end - start)))
        if flush:
            sink.flush()
        with pytest.raises(BackupError, match=text):
            sink.finish()
    assert repo.backups() == []


def test_writes_past_the_end_are_refused(repo: Repository) -> None:
    with sinking(repo) as sink:
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (-1, 1)):
            with pytest.raises(BackupError, match="past the end"):
                sink.write(offset, memoryview(bytes(length)))
            with pytest.raises(BackupError, match="past the end"):
                sink.write_zeroes(offset, length)


def test_clusters_as_in_the_base_are_not_stored_again(repo: Repository) -> None:
    data = _disk(0)
    with sinking(repo) as sink:
        sink.write(0, memoryview(bytes(data)))
        sink.flush()
        base = keep(repo, sink)
    data[3 * CLUSTER] ^= 1
    with sinking(repo, base=base, full=False) as sink:
        sink.write(2 * CLUSTER, memoryview(data[2 * CLUSTER : 5 * CLUSTER]))
        sink.flush()
        made = keep(repo, sink)
        assert sink.counts.stored == CLUSTER
    assert content(repo, made) == bytes(data)


def test_where_anything_is_damaged_clusters_as_in_the_base_are_looked_up(repo: Repository) -> None:
    """The base may name content that is there no more: what is read again is stored again (faults row 24)."""
    data = _disk(0)
    with sinking(repo) as sink:
        sink.write(0, memoryview(bytes(data)))
        sink.flush()
        base = keep(repo, sink)
    lost = repo.tree(base).digests(3, 1)[0].tobytes()
    repo.storage.write("damaged", "0" * 32, b'{"digests":["%s"],"backups":[]}' % lost.hex().encode())
    with sinking(repo, base=base) as sink:
        sink.write(0, memoryview(bytes(data)))
        sink.flush()
        keep(repo, sink)
        assert sink.counts.stored == CLUSTER
    assert len(list(Repository.open(repo.storage.root).index.places(lost))) == 2


# -- the pipeline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["repo.append", "durable.synced"])
def test_a_failure_behind_reaches_the_writer_in_front(
    repo: Repository, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """faults row 28: whichever thread fails, the job hears of it, at the flush at the latest or at the end."""
    monkeypatch.setattr("incbak.repo.pack.TARGET", 3 * CLUSTER)
    with sinking(repo) as sink:
        durable.arm(fault_at=f"{point}:1+:ENOSPC")
        with pytest.raises(DurabilityError, match="No space left"):
            for start in range(0, SIZE, CLUSTER):
                sink.write(start, memoryview(os.urandom(min(CLUSTER, SIZE - start))))
            sink.flush()
            keep(repo, sink)
        with pytest.raises(IncbakError):
            keep(repo, sink)
    assert repo.backups() == []


def test_a_cluster_that_does_not_decompress_to_itself_stops_the_run(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 86, L16."""
    real = blob.encode

    def faulty(data: memoryview, level: int = 1) -> tuple[int, bytes | memoryview]:
        return real(b"y" * len(data), level)

    monkeypatch.setattr(blob, "encode", faulty)
    with sinking(repo) as sink, pytest.raises(BackupError, match="came out wrong"):
        sink.write(0, memoryview(b"x" * SIZE))
        sink.flush()


def test_what_is_in_flight_is_bounded(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends faster than is stored has to wait: memory stays bounded."""
    monkeypatch.setattr(module, "IN_FLIGHT", 4 * CLUSTER)
    hold = threading.Event()
    real = Pipeline._batch
    most = 0

    def slow(self: Pipeline, *args: object) -> None:
        nonlocal most
        hold.wait(10)
        most = max(most, self._bytes)
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "_batch", slow)
    with sinking(repo, 64 * CLUSTER) as sink:
        sent: list[int] = []

        def send() -> None:
            for number in range(64):
                sink.write(number * CLUSTER, memoryview(os.urandom(CLUSTER)))
                sent.append(number)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(0.2)
        before = len(sent)
        hold.set()
        sender.join(10)
        sink.flush()
        assert before == 4
        assert most <= 4 * CLUSTER
        sink.finish()


def test_closing_ends_the_threads_also_after_a_failure(repo: Repository) -> None:
    before = threading.active_count()
    with sinking(repo) as sink, pytest.raises(BackupError, match="cannot store the backup: broken"):
        sink._pipeline.submit(0, memoryview(b"x"), lambda f, d: None, lambda f, d, s: 1 / 0)  # type: ignore[arg-type]
        while not sink._pipeline.failure:
            time.sleep(0.01)
        sink._pipeline._failure = ValueError("broken")
        sink.flush()
    assert threading.active_count() <= before


# -- parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(list(range(24))), memory=st.sampled_from([0, 2 * 64, 1 << 20]))
def test_parts_become_whole_within_memory_and_spool(order: list[int], memory: int) -> None:
    size, step = 6 * 64 - 20, 64
    data = os.urandom(size)
    parts = Partials(step, size, memory=memory, spool=1 << 20)
    found: dict[int, bytes] = {}
    for piece in order:
        start, end = piece * 16, min((piece + 1) * 16, size)
        if start < end:
            for number, whole in parts.add(start, memoryview(data[start:end])):
                assert number not in found
                found[number] = whole
            assert len(parts._held) * step <= memory
    assert b"".join(found[n] for n in sorted(found)) == data
    assert parts.rest() == []


def test_too_many_parts_are_refused() -> None:
    parts = Partials(64, 1 << 20, memory=64, spool=2 * 64)
    for number in range(3):
        assert list(parts.add(number * 64, memoryview(b"x"))) == []
    with pytest.raises(BackupError, match="too many parts"):
        list(parts.add(3 * 64, memoryview(b"x")))
    assert list(parts.add(1, memoryview(b"y" * 63))) == [(0, b"x" + b"y" * 63)]


# -- over NBD ------------------------------------------------------------------------------------------------------


def test_a_job_over_nbd_by_path_and_by_socket(repo: Repository) -> None:
    data = bytes(_disk(5))
    for by_path in (True, False):
        with sinking(repo) as sink, SinkServer({"vda": sink}) as server:
            target = SinkTarget(sink, server)
            if by_path:
                path, name = target.address()
                assert path.stat().st_mode & 0o777 == 0o600
                assert path.parent.stat().st_mode & 0o777 == 0o700
                client = NbdClient.connect(NbdUri(name, path=str(path)))
            else:
                ours, theirs = socket.socketpair()
                target.serve(theirs)
                client = NbdClient.connect(ours, "vda")
            client.write(data[: 5 * CLUSTER + 9], 0)
            client.write(data[5 * CLUSTER + 9 :], 5 * CLUSTER + 9)
            with pytest.raises(NbdRequestError) as refused:
                client.read(0, 1)
            assert refused.value.errno == errno.EPERM
            client.flush()
            client.close()
            assert content(repo, keep(repo, sink)) == data
        assert not by_path or not path.parent.exists()


def test_a_failed_backup_is_an_io_error_for_the_job(repo: Repository) -> None:
    with sinking(repo) as sink, SinkServer({"vda": sink}) as server:
        ours, theirs = socket.socketpair()
        server.serve(theirs)
        client = NbdClient.connect(ours, "vda")
        sink._pipeline._failure = BackupError("no more")
        for call in (lambda: client.write(b"x" * CLUSTER, 0), client.flush):
            with pytest.raises(NbdRequestError) as refused:
                call()
            assert refused.value.errno == errno.EIO
        client.close()


def test_an_unknown_disk_is_refused(repo: Repository) -> None:
    with sinking(repo) as sink, SinkServer({"vda": sink}) as server:
        with pytest.raises(NbdError):
            NbdClient.connect(NbdUri("other", path=str(server.path())))
