"""The stored formats: ids, blobs, packs, index, records, and the directory they are in."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak import durable
from incbak.errors import DamagedError, DurabilityError, FormatTooNewError, LockedError, StorageError
from incbak.repo import blob, index, pack, record, tree
from incbak.repo.ids import is_id, new_id
from incbak.repo.index import Index, IndexFile
from incbak.repo.merge import FILES, merge_small
from incbak.repo.repository import Repository
from incbak.repo.storage.base import KINDS
from incbak.repo.storage.local import STALE_TEMPORARY, LocalStorage
from tests.unit.repo.scene import back_up, new, restore, store, writing

# -- ids and blobs -------------------------------------------------------------------------------------------------


def test_ids() -> None:
    assert len({new_id() for _ in range(100)}) == 100
    assert is_id(new_id())
    for text in ("", "../../../../etc/passwd", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n", "٠" * 32):
        assert not is_id(text)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(min_size=1, max_size=5000), st.integers(1, 9000).map(lambda n: b"ab" * n)))
def test_blobs_come_back(data: bytes) -> None:
    codec, stored = blob.encode(data)
    assert bytes(blob.decode(codec, stored, len(data))) == data
    assert len(stored) <= len(data)


def test_a_decompression_bomb_is_refused() -> None:
    """faults row 76: neither a frame that tells its size, nor one that does not, makes more than was recorded."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    with pytest.raises(DamagedError, match="another size than recorded"):
        blob.decode(blob.ZSTD, bomb, 65536)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
    with pytest.raises(DamagedError):
        blob.decode(blob.ZSTD, silent, 65536)
    with pytest.raises(DamagedError, match="over the limit"):
        blob.decode(blob.ZSTD, bomb, 1 << 28)


@pytest.mark.parametrize(("codec", "stored", "raw"), [(0, b"abc", 4), (2, b"abc", 3), (255, b"", 0), (1, b"abc", 3)])
def test_blobs_that_cannot_be(codec: int, stored: bytes, raw: int) -> None:
    with pytest.raises(DamagedError):
        blob.decode(codec, stored, raw)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.binary(max_size=64), st.integers(0, 1 << 40))
def test_garbage_blobs_raise_damaged_only(codec: int, stored: bytes, raw: int) -> None:
    try:
        assert len(blob.decode(codec, stored, raw)) == raw
    except DamagedError:
        pass


# -- packs ---------------------------------------------------------------------------------------------------------


def _pack(path: Path, entries: np.ndarray, body: bytes, version: int = pack.VERSION) -> str:
    data, name = pack.tail(entries, pack.HEAD.size + len(body))
    if version != pack.VERSION:
        data = data[: -pack.FOOT.size] + pack.FOOT.pack(
            pack.FOOT_MAGIC, version, len(entries), pack.HEAD.size + len(body), blake3(entries.tobytes()).digest(), b""
        )
    (path / "packs" / name).write_bytes(pack.head() + body + data)
    return name


def _entries(*rows: tuple[bytes, int, int, int, int]) -> np.ndarray:
    made = np.zeros(len(rows), dtype=pack.ENTRY)
    for i, row in enumerate(rows):
        for field, value in zip(("digest", "offset", "stored", "raw", "codec"), row, strict=True):
            made[field][i] = value
    return made


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    made = LocalStorage(tmp_path)
    made.make_directories()
    return made


def test_a_pack_table_is_read_back_and_two_of_the_same_content_have_two_names(storage: LocalStorage) -> None:
    rows = [(bytes([i]) * 32, 16 + i, 1, 1, 0) for i in range(5)]
    first, second = (_pack(storage.root, _entries(*rows), b"12345") for _ in range(2))
    assert first != second
    size = storage.list("packs")[first]
    table = pack.read_table(storage, first, size)
    assert table["digest"].tobytes() == b"".join(r[0] for r in rows)
    assert table["offset"].tolist() == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("all_at_once", [False, True])
def test_what_is_removed_is_not_held_open(storage: LocalStorage, all_at_once: bool) -> None:
    """A file that is open takes space for as long as it is, and a prune on a full disk makes none."""
    name = _pack(storage.root, _entries(), b"12345")
    storage.read_range("packs", name, 0, 1)

    def held() -> list[str]:
        links = [os.readlink(f.path) for f in os.scandir("/proc/self/fd") if os.path.islink(f.path)]
        return [link for link in links if f"/packs/{name}" in link]

    assert held()
    if all_at_once:
        storage.remove_all("packs", [name])
    else:
        storage.remove("packs", name)
    assert held() == []


@pytest.mark.parametrize(
    "row",
    [
        (b"x" * 32, 16, 6, 6, 0),
        (b"x" * 32, 2**64 - 1, 2, 2, 0),
        (b"x" * 32, 16, 5, 2**31, 1),
        (b"x" * 32, 2**63, 2**31, 5, 0),
    ],
)
def test_a_pack_table_that_points_outside_is_refused(
    storage: LocalStorage, row: tuple[bytes, int, int, int, int]
) -> None:
    """faults row 78; the digest of such a table may be right."""
    name = _pack(storage.root, _entries(row), b"12345")
    with pytest.raises(DamagedError, match=name):
        pack.read_table(storage, name, storage.list("packs")[name])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_or_cut_pack_never_gives_a_wrong_table(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    storage = LocalStorage(tmp_path_factory.getbasetemp() / "flips")
    storage.make_directories()
    name = _pack(storage.root, _entries(*[(bytes([i]) * 32, 16 + i, 1, 1, 0) for i in range(3)]), b"123")
    path = storage.root / "packs" / name
    good = path.read_bytes()
    bad = bytearray(good)
    at = data.draw(st.integers(19, len(good) - 1))
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del bad[data.draw(st.integers(0, len(good))) :]
    path.write_bytes(bad)
    try:
        table = pack.read_table(storage, name, len(bad))
        assert table.tobytes() == good[19 : 19 + 3 * 56]
    except DamagedError:
        pass
    path.unlink()


# -- the index -----------------------------------------------------------------------------------------------------


def _index(storage: LocalStorage, digests: list[bytes], packs: list[tuple[str, int]]) -> str:
    entries = _entries(*[(d, 16 + i, i + 1, i + 2, i % 2) for i, d in enumerate(digests)])
    name = new_id()
    numbers = np.arange(len(digests), dtype=np.uint32) % len(packs)
    storage.write("index", name, index.encode(packs, numbers, entries))
    return name


def _two_packs(storage: LocalStorage) -> list[tuple[str, int]]:
    packs = [(new_id(), 100), (new_id(), 200)]
    for name, size in packs:
        (storage.root / "packs" / name).write_bytes(bytes(size))
    return packs


@settings(max_examples=60, deadline=None)
@given(
    known=st.lists(st.binary(min_size=1, max_size=2), max_size=60, unique=True),
    asked=st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=30),
    prefix=st.integers(0, 8),
)
def test_the_index_is_a_dict_also_with_equal_prefixes(
    tmp_path_factory: pytest.TempPathFactory, known: list[bytes], asked: list[bytes], prefix: int
) -> None:
    storage = LocalStorage(tmp_path_factory.mktemp("index"))
    storage.make_directories()
    packs = _two_packs(storage)

    def full(short: bytes) -> bytes:
        return (
            b"\xff" * prefix + short.ljust(32 - prefix, b"\0") if prefix < 8 else b"\xff" * 24 + short.rjust(8, b"\0")
        )

    digests = [full(k) for k in known]
    for part in (digests[::2], digests[1::2]):
        if part:
            _index(storage, part, packs)
    found = Index(storage)
    wanted = [full(a) for a in asked]
    array = np.frombuffer(b"".join(wanted), dtype=np.uint8).reshape(-1, 32)
    assert found.have(array).tolist() == [w in digests for w in wanted]
    for digest, place in zip(wanted, found.locate(array), strict=True):
        assert (place is not None) == (digest in digests)
        if place:
            i = (digests[::2] if digest in digests[::2] else digests[1::2]).index(digest)
            assert (place.offset, place.stored, place.raw, place.codec) == (16 + i, i + 1, i + 2, i % 2)
            assert place.pack == packs[i % 2][0]


def test_blobs_in_packs_that_are_missing_or_cut_are_not_there(storage: LocalStorage) -> None:
    """faults rows 24, 25: nothing is deduplicated against them."""
    packs = _two_packs(storage)
    digests = [bytes([i]) * 32 for i in range(6)]
    _index(storage, digests, packs)
    array = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    (storage.root / "packs" / packs[0][0]).write_bytes(bytes(99))
    assert Index(storage).have(array).tolist() == [False, True] * 3
    (storage.root / "packs" / packs[1][0]).unlink()
    assert not Index(storage).have(array).any()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_index_file_is_named_and_left_out(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    storage = LocalStorage(tmp_path_factory.mktemp("damaged"))
    storage.make_directories()
    packs = _two_packs(storage)
    name = _index(storage, [bytes([i]) * 32 for i in range(9)], packs)
    whole = _index(storage, [b"w" * 32], packs)
    path = storage.root / "index" / name
    bad = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    path.write_bytes(bad)
    found = Index(storage)
    assert found.damaged == [name]
    assert [f.name for f in found.files] == [whole]


def test_an_index_of_a_newer_version_is_refused_and_not_called_damaged(storage: LocalStorage) -> None:
    """faults row 83."""
    name = _index(storage, [b"x" * 32], _two_packs(storage))
    path = storage.root / "index" / name
    raw = bytearray(path.read_bytes())
    raw[8] = index.VERSION + 1
    raw[112:128] = blake3(bytes(raw[:112])).digest(length=16)
    path.write_bytes(raw)
    with pytest.raises(FormatTooNewError):
        Index(storage)


def test_small_index_files_are_merged_and_nothing_is_lost(storage: LocalStorage) -> None:
    packs = _two_packs(storage)
    digests = [i.to_bytes(2, "big") * 16 for i in range(FILES + 5)]
    for digest in digests:
        _index(storage, [digest], packs)
    array = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    open_before = Index(storage)
    merge_small(storage)
    assert len(storage.list("index")) == 1
    assert Index(storage).have(array).all()
    assert open_before.have(array).all(), "a reader that has the old files open goes on"
    open_before.refresh()
    assert open_before.have(array).all()


@pytest.mark.parametrize("point", ["durable.created", "durable.written", "durable.synced"])
def test_a_merge_that_fails_loses_no_index(storage: LocalStorage, point: str) -> None:
    """The old files go only when the merged one is durable."""
    packs = _two_packs(storage)
    digests = [i.to_bytes(2, "big") * 16 for i in range(FILES + 1)]
    for digest in digests:
        _index(storage, [digest], packs)
    durable.arm(fault_at=f"{point}:1:ENOSPC")
    with pytest.raises(DurabilityError):
        merge_small(storage)
    durable.arm()
    array = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    assert Index(storage).have(array).all()
    assert len(storage.list("index")) == FILES + 1


def test_an_entry_with_a_pack_number_out_of_range_is_passed_over(storage: LocalStorage) -> None:
    entries = _entries((b"x" * 32, 16, 1, 1, 0))
    raw = index.encode(_two_packs(storage), np.array([7], dtype=np.uint32), entries)
    file = IndexFile("x", np.frombuffer(raw, dtype=np.uint8))
    wanted = np.frombuffer(b"x" * 32, dtype=np.uint8).reshape(1, 32)
    assert file.find(wanted, index.prefixes(wanted)).tolist() == [-1]


# -- records -------------------------------------------------------------------------------------------------------


def _seal(body: bytes) -> bytes:
    return blake3(body).hexdigest().encode() + b"\n" + body


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_records_raise_damaged_only(data: bytes, sealed: bool) -> None:
    """faults row 78: also garbage with the right digest, as an attacker would write it."""
    with pytest.raises(DamagedError):
        record.decode(new_id(), _seal(data) if sealed else data)


def test_one_flipped_bit_of_a_record_is_noticed(tmp_path: Path) -> None:
    """faults row 24: also where it would be a record with another size, root or name."""
    made = back_up(new(tmp_path / "repo"), [1, 2])
    whole = record.encode(made)
    assert record.decode(made.id, whole) == made
    for at in range(len(whole)):
        with pytest.raises(DamagedError):
            record.decode(made.id, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


def test_records_that_cannot_be(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    good = back_up(repo, [1, 2])
    plain = msgspec.to_builtins(good)
    disk = plain["disks"][0]
    cases: list[tuple[object, str]] = [
        (plain | {"cluster_size": 1000}, "a cluster size"),
        (plain | {"cluster_size": 1 << 30}, "a cluster size"),
        (plain | {"disks": [disk, disk]}, "its disks"),
        (plain | {"disks": [disk | {"name": str(i)} for i in range(1025)]}, "its disks"),
        (plain | {"disks": [disk | {"size": 1 << 60}]}, "a disk of"),
        (plain | {"disks": [disk | {"size": -1}]}, "a disk of"),
        (plain | {"disks": [disk | {"root": "../../x"}]}, "no digest"),
        (plain | {"id": new_id()}, "its id is not its name"),
        (plain | {"surprise": 1}, "malformed"),
        (plain | {"disks": 5}, "malformed"),
    ]
    for body, text in cases:
        with pytest.raises(DamagedError, match=text):
            record.decode(good.id, _seal(msgspec.json.encode(body)))
    with pytest.raises(DamagedError):
        record.decode(good.id, _seal(b'{"a":' * 5000 + b"1" + b"}" * 5000))
    with pytest.raises(FormatTooNewError):
        record.decode(good.id, _seal(msgspec.json.encode(plain | {"version": 2})))
    with pytest.raises(FormatTooNewError):
        record.decode(good.id, _seal(msgspec.json.encode({"version": 2, "all": "new"})))
    assert record.decode(good.id, record.encode(good)) == good


# -- the directory -------------------------------------------------------------------------------------------------


def test_links_and_other_oddities_are_not_followed(storage: LocalStorage) -> None:
    """faults row 75."""
    secret = storage.root / "secret"
    secret.write_bytes(b"secret")
    (storage.root / "packs" / "link").symlink_to(secret)
    os.mkfifo(storage.root / "packs" / "fifo")
    (storage.root / "packs" / "dir").mkdir()
    (storage.root / "packs" / ".hidden").write_bytes(b"")
    assert storage.list("packs") == {"link": 0, "fifo": 0, "dir": 0}
    for call in (lambda: storage.read("packs", "link", 100), lambda: storage.read_range("packs", "link", 0, 6)):
        with pytest.raises(OSError, match="symbolic links"):
            call()
    with pytest.raises(DamagedError):
        storage.read("packs", "fifo", 100)
    with pytest.raises(OSError):
        storage.read_range("packs", "fifo", 0, 1)
    with pytest.raises(FileExistsError):
        storage.write("packs", "link", b"x")
    assert secret.read_bytes() == b"secret"


def test_reads_are_bounded_and_short_only_at_the_end(storage: LocalStorage) -> None:
    storage.write("index", "a", b"0123456789")
    assert storage.read_range("index", "a", 8, 100) == b"89"
    assert storage.read("index", "a", 10) == b"0123456789"
    with pytest.raises(DamagedError):
        storage.read("index", "a", 9)


def test_a_missing_folder_is_damage(storage: LocalStorage) -> None:
    (storage.root / "packs").rmdir()
    with pytest.raises(DamagedError, match="packs is missing"):
        storage.list("packs")


def test_a_stream_leaves_nothing_unless_it_is_committed(storage: LocalStorage) -> None:
    for end in ("abort", "taken"):
        stream = storage.stream("packs")
        stream.append([b"abc"])
        if end == "taken":
            (storage.root / "packs" / "taken").write_bytes(b"other")
            with pytest.raises(FileExistsError):
                stream.commit("taken")
        stream.abort()
        stream.abort()
    assert [p.name for p in (storage.root / "packs").iterdir()] == ["taken"]
    stream = storage.stream("packs")
    stream.append([b"abc"])
    stream.commit("fine")
    stream.abort()
    assert storage.list("packs") == {"taken": 5, "fine": 3}


def test_only_old_temporary_files_are_swept(storage: LocalStorage) -> None:
    fresh, old = (storage.root / "packs" / f".{n}.tmp" for n in ("fresh", "old"))
    for path in (fresh, old):
        path.write_bytes(b"")
    os.utime(old, (0, fresh.stat().st_mtime - STALE_TEMPORARY - 60))
    storage.sweep()
    assert fresh.exists()
    assert not old.exists()


def test_locks_exclude_share_and_die_with_their_process(storage: LocalStorage) -> None:
    """faults rows 47, 50."""
    with storage.lock("a", exclusive=False, wait=0), storage.lock("a", exclusive=False, wait=0):
        with pytest.raises(LockedError), storage.lock("a", exclusive=True, wait=0.1):
            pass
    code = (
        "import sys, time; from pathlib import Path; from incbak.repo.storage.local import LocalStorage\n"
        "lock = LocalStorage(Path(sys.argv[1])).lock('a', exclusive=True, wait=5)\n"
        "lock.__enter__(); print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(storage.root)], stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(LockedError), storage.lock("a", exclusive=False, wait=0):
            pass
        child.kill()
    with storage.lock("a", exclusive=True, wait=5):
        pass


def test_a_planted_lock_link_is_refused(storage: LocalStorage) -> None:
    (storage.root / "locks" / "a").symlink_to(storage.root / "elsewhere")
    with pytest.raises(DurabilityError), storage.lock("a", exclusive=True, wait=0):
        pass
    assert not (storage.root / "elsewhere").exists()


def test_whoever_waits_for_a_lock_that_is_replaced_gets_the_new_one(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock the file may go: a lock on a file without a name keeps nobody out."""
    import fcntl

    path = storage.root / "locks" / "a"
    real, turns = fcntl.flock, []

    def flock(fd: int, kind: int) -> None:
        if not turns:
            path.unlink()
        turns.append(fd)
        real(fd, kind)

    monkeypatch.setattr("incbak.repo.storage.local.fcntl.flock", flock)
    with storage.lock("a", exclusive=True, wait=1):
        assert len(turns) == 2
        with pytest.raises(LockedError), storage.lock("a", exclusive=True, wait=0):
            pass


def test_a_blob_that_is_larger_than_any_cluster_or_page_is_not_even_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 76: memory is bounded by what this repository can hold, not by what its writer claims."""
    repo = new(tmp_path / "repo")
    sizes = [tree.PAGE, tree.PAGE + 1]
    with writing(repo) as writer:
        digests = [store(writer, b"x" * size) for size in sizes]
        writer.finish()
    reader = Repository.open(tmp_path / "repo").reader()
    assert len(reader.read(digests[0])) == tree.PAGE
    monkeypatch.setattr(blob, "decode", None)
    with pytest.raises(DamagedError, match=f"claims {tree.PAGE + 1} bytes"):
        reader.read(digests[1])


def test_an_open_repository_sees_what_others_commit(tmp_path: Path) -> None:
    """Records first, then the index: a reader that was open before finds every blob of what it lists."""
    repo, other = new(tmp_path / "repo"), None
    back_up(repo, [1, 2])
    other = type(repo).open(tmp_path / "repo")
    assert other.index.files
    made = back_up(repo, [3, 4, 0])
    assert [r.id for r in other.backups()][-1] == made.id
    assert restore(other, made) == restore(repo, made)


def test_empty_folders_that_a_copy_lacks_are_empty_folders(storage: LocalStorage) -> None:
    for kind in KINDS:
        for file in (storage.root / kind).iterdir():
            file.unlink()
        (storage.root / kind).rmdir()
    assert [storage.list(kind) for kind in KINDS] == [{}] * len(KINDS)
    with storage.lock("a", exclusive=True, wait=0):
        pass
    storage.write("packs", "a", b"x")
    storage.write("damaged", "a", b"{}")
    assert [len(storage.list(kind)) for kind in ("packs", "index", "backups", "damaged", "pins")] == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("kind", ["packs", "index", "backups"])
def test_a_folder_of_content_that_is_missing_beside_others_is_damage(storage: LocalStorage, kind: str) -> None:
    """Else a prune would take all content of a repository that has lost its records for garbage."""
    shutil.rmtree(storage.root / kind)
    with pytest.raises(DamagedError, match=f"{kind} is missing"):
        storage.list(kind)


def test_temporary_files_of_dead_runs_are_swept_at_once(storage: LocalStorage) -> None:
    alive = storage.stream("packs")
    dead = storage.root / "packs" / f".1-1-1{durable.HELD}"
    dead.write_bytes(b"x")
    beside = storage.root / "damaged" / f".x{durable.HELD}"
    beside.write_bytes(b"x")
    storage.sweep()
    assert (dead.exists(), beside.exists()) == (False, False)
    alive.append([b"abc"])
    alive.commit("fine")
    assert storage.list("packs") == {"fine": 3}


def test_as_many_files_stay_open_as_the_process_may_have(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(80):
        storage.write("packs", str(number), b"x")
        assert storage.read_range("packs", str(number), 0, 1) == b"x"
    assert len(os.listdir("/proc/self/fd")) - before <= 16


def test_when_there_are_no_more_descriptors_what_is_open_is_closed(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        storage.write("packs", name, name.encode())
    storage.read_range("packs", "a", 0, 1)
    real, refused = os.open, []

    def full(path: object, *args: int) -> int:
        if not refused:
            refused.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    assert storage.read_range("packs", "b", 0, 1) == b"b"
    assert len(refused) == 1


def test_a_folder_that_cannot_be_read_is_named(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*packs: Permission denied"):
        storage.list("packs")
