"""Encrypted repositories: nothing of the content can be read, nothing that was changed passes, keys come and go."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incbak.errors import DamagedError, FormatTooNewError, UsageError, WrongPassphraseError
from incbak.repo import blob, keys, pack
from incbak.repo.check import check, rebuild_index
from incbak.repo.cipher import Cipher
from incbak.repo.prune import Options, prune
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.repo.seal import PLAIN
from incbak.repo.storage.local import LocalStorage
from tests.unit.repo.scene import CHEAP, CLUSTER, PASSPHRASE, back_up, cluster, new, opened, restore

MASTER = bytes(range(32))
NUMBERS = [1, 2, 3, 0, 5]
CONTENT = [cluster(n) for n in NUMBERS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An encrypted repository with one backup."""
    where = tmp_path / "repo"
    back_up(new(where, encrypted=True), NUMBERS)
    return where


@given(st.binary(min_size=1, max_size=9000), st.integers(1, 19))
def test_a_blob_comes_back_and_only_as_what_it_was(data: bytes, level: int) -> None:
    seal = Cipher(MASTER)
    digest = seal.digest(data)
    codec, stored = seal.encode(digest, data, level)
    assert bytes(seal.decode(digest, codec, stored, len(data))) == data
    for other in (
        lambda: seal.decode(seal.digest(data + b"x"), codec, stored, len(data)),
        lambda: seal.decode(digest, codec ^ 1, stored, len(data)),
        lambda: seal.decode(digest, codec, stored, len(data) + 1),
        lambda: seal.decode(digest, codec, stored[:-1], len(data)),
        lambda: seal.decode(digest, codec, stored[:20], len(data)),
        lambda: seal.decode(digest, codec, b"", len(data)),
        lambda: Cipher(bytes(32)).decode(digest, codec, stored, len(data)),
    ):
        with pytest.raises(DamagedError, match="does not verify"):
            other()


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_changed_bit_is_noticed(data: bytes, draw: st.DataObject) -> None:
    seal = Cipher(MASTER)
    digest = seal.digest(data)
    codec, stored = seal.encode(digest, data)
    at = draw.draw(st.integers(0, len(stored) * 8 - 1))
    changed = bytearray(stored)
    changed[at // 8] ^= 1 << at % 8
    with pytest.raises(DamagedError):
        seal.decode(digest, codec, bytes(changed), len(data))
    file = bytearray(seal.close("backups", "a", data))
    file[at % len(file)] ^= 1
    with pytest.raises(DamagedError):
        seal.open("backups", "a", bytes(file))


def test_names_and_ciphertexts_tell_nothing_of_the_content() -> None:
    one, two = Cipher(MASTER), Cipher(bytes(32))
    data = CONTENT[0]
    assert len({one.digest(data), two.digest(data), blob.digest_of(data)}) == 3
    digest = one.digest(data)
    assert one.encode(digest, data)[1] != one.encode(digest, data)[1]
    assert len({one.check(data), two.check(data), PLAIN.check(data), one.digest(data)}) == 4
    digests = one.digests(memoryview(b"".join(CONTENT) + bytes(100)), CLUSTER)
    assert [d.any() for d in digests] == [True, True, True, False, True, False]
    assert digests[1].tobytes() == one.digest(CONTENT[1])


def test_a_file_is_bound_to_its_kind_and_name() -> None:
    seal = Cipher(MASTER)
    file = seal.close("backups", "a", b"text")
    assert seal.open("backups", "a", file) == b"text"
    for kind, name in (("backups", "b"), ("damaged", "a")):
        with pytest.raises(DamagedError, match=f"{kind}/{name} does not verify"):
            seal.open(kind, name, file)
    with pytest.raises(DamagedError, match="is not encrypted"):
        seal.open("backups", "a", b"text")
    plain = blob.encode(b"x" * 100)
    with pytest.raises(DamagedError, match="is not encrypted"):
        seal.decode(seal.digest(b"x" * 100), *plain, 100)


def test_nothing_of_what_is_stored_can_be_read(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()]
    whole = b"".join(p.read_bytes() for p in files)
    for secret in (*(c[:16] for c in CONTENT if any(c)), b"vda", b'"vm"', b"zstd", PASSPHRASE):
        assert secret not in whole
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_dir()} == {0o700}


def test_every_command_of_a_repository_works_on_it(path: Path) -> None:
    """Deduplication, check, a new index, prune with its copying: as in a plain one."""
    (first,) = opened(path).backups()
    second = back_up(opened(path), [1, 2, 7, 8, 10])
    repo = opened(path)
    assert restore(repo, first) == CONTENT
    assert restore(repo, second) == [cluster(n) for n in [1, 2, 7, 8, 10]]
    assert check(repo, read_data=True).problems == []
    assert rebuild_index(repo) > 0
    assert restore(opened(path), second)[0] == CONTENT[0]
    prune(opened(path), Policy(last=1), options=Options(grace=0.0, repack_below=1.0))
    repo = opened(path)
    assert [r.id for r in repo.backups()] == [second.id]
    assert restore(repo, second)[4] == cluster(10)
    assert check(opened(path), read_data=True).problems == []


def test_a_wrong_passphrase_touches_nothing(path: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}
    with pytest.raises(WrongPassphraseError):
        Repository.open(path, lambda: b"wrong")
    with pytest.raises(WrongPassphraseError):
        Repository.open(path)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("folder", ["backups", "index", "packs"])
def test_what_another_key_wrote_is_refused(path: Path, tmp_path: Path, folder: str) -> None:
    """Somebody who can write, and has a key of his own, makes a file that looks right."""
    other = tmp_path / "other"
    back_up(new(other, encrypted=True), NUMBERS)
    for ours in (path / folder).iterdir():
        (theirs,) = list((other / folder).iterdir())[:1]
        shutil.copy(theirs, ours)
    found = check(opened(path), read_data=True)
    assert found.problems


def test_tables_of_another_key_are_not_believed(path: Path, tmp_path: Path) -> None:
    """An index could say that content is there which is not; a pack's table, that nothing needs what is in it."""
    other = new(tmp_path / "other", encrypted=True)
    back_up(other, [11, 13])
    (index,), (name,) = other.storage.list("index"), other.storage.list("packs")
    for kind, file in (("index", index), ("packs", name)):
        shutil.copy(tmp_path / "other" / kind / file, path / kind / file)
    repo = opened(path)
    assert repo.index.damaged == [index]
    with pytest.raises(DamagedError, match="does not match its digest"):
        pack.read_table(repo.storage, name, repo.storage.list("packs")[name])


def test_a_swapped_record_is_refused(path: Path) -> None:
    """An old record under the name of the newest would be restored as the newest."""
    (first,) = opened(path).backups()
    second = back_up(opened(path), [9, 9, 9, 9, 9])
    shutil.copy(path / "backups" / first.id, path / "backups" / second.id)
    repo = opened(path)
    assert [r.id for r in repo.backups()] == [first.id]
    assert "does not verify" in repo.unreadable[second.id]


def test_swapped_blobs_are_noticed(path: Path) -> None:
    """The table of a pack is authenticated; the blobs are bound to their digests."""
    (name,) = (path / "packs").iterdir()
    whole = bytearray(name.read_bytes())
    table = bytes(whole)
    index = opened(path).index
    one, two = (next(index.places(opened(path).seal.digest(CONTENT[i]))) for i in (0, 1))
    assert one.stored == two.stored
    whole[one.offset : one.offset + one.stored] = table[two.offset : two.offset + two.stored]
    name.write_bytes(whole)
    with pytest.raises(DamagedError):
        opened(path).reader().read(opened(path).seal.digest(CONTENT[0]))
    at = table.index(opened(path).seal.digest(CONTENT[0]))
    whole = bytearray(table)
    whole[at] ^= 1
    name.write_bytes(whole)
    assert any("pack" in p.what for p in check(opened(path), read_data=True).problems)


def test_the_config_is_proven(path: Path) -> None:
    """Another cluster size, or none at all of the cipher, is noticed when it is opened."""
    config = Repository.look(path)[1]
    for changed in (
        msgspec.structs.replace(config, cluster_size=2 * CLUSTER).sealed(),
        msgspec.structs.replace(config, proof="00" * 32).sealed(),
    ):
        (path / "config").write_bytes(msgspec.json.encode(changed))
        with pytest.raises(DamagedError, match="does not verify with its key"):
            opened(path)
    (path / "config").write_bytes(msgspec.json.encode(msgspec.structs.replace(config, cipher="rot13").sealed()))
    with pytest.raises(FormatTooNewError, match="rot13"):
        opened(path)


def test_keys_come_and_go(path: Path) -> None:
    storage, config = Repository.look(path)
    master = keys.unlock(storage, config.id, PASSPHRASE).master
    second = keys.add_key(storage, config.id, master, b"another", label="x", cost=CHEAP)
    assert keys.unlock(storage, config.id, b"another") == keys.Unlocked(master, second)
    (first,) = {k.id for k in keys.read_keys(storage)[0]} - {second}
    with pytest.raises(UsageError, match=f"opens no key but {first[:8]}"):
        keys.remove_key(storage, config.id, first, PASSPHRASE, config.opens)
    assert keys.remove_key(storage, config.id, first[:8], b"another", config.opens) == first
    with pytest.raises(WrongPassphraseError):
        keys.unlock(storage, config.id, PASSPHRASE)
    with pytest.raises(UsageError, match="which stays"):
        keys.remove_key(storage, config.id, second, b"another", config.opens)
    with pytest.raises(UsageError, match="no key begins"):
        keys.remove_key(storage, config.id, "zz", b"another", config.opens)
    with pytest.raises(UsageError, match="empty"):
        keys.add_key(storage, config.id, master, b"", cost=CHEAP)
    assert len(Repository.open(path, lambda: b"another").backups()) == 1


def test_keys_of_other_repositories_are_not_tried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying them costs half a second each, and there may be as many as somebody likes."""
    storage, config = Repository.look(path)
    for _ in range(3):
        keys.add_key(storage, "0" * 32, MASTER, PASSPHRASE, cost=CHEAP)
    tried: list[str] = []
    real = keys.open_key
    monkeypatch.setattr(keys, "open_key", lambda key, *rest: (tried.append(key.repository), real(key, *rest))[1])
    assert keys.unlock(storage, config.id, PASSPHRASE)
    assert tried == [config.id]
    with pytest.raises(WrongPassphraseError):
        keys.unlock(storage, config.id, b"wrong")
    assert tried == [config.id] * 2


@pytest.mark.parametrize("what", ["of another repository", "of another master key", "of a damaged file", "a link"])
def test_a_key_that_opens_nothing_is_no_key_that_stays(path: Path, tmp_path: Path, what: str) -> None:
    """With the same passphrase, and named as if it were of this repository."""
    storage, config = Repository.look(path)
    (ours,) = storage.list("keys")
    master = keys.unlock(storage, config.id, PASSPHRASE).master
    if what == "of another repository":
        keys.add_key(storage, "0" * 32, master, PASSPHRASE, cost=CHEAP)
    elif what == "of another master key":
        keys.add_key(storage, config.id, bytes(32), PASSPHRASE, cost=CHEAP)
    elif what == "of a damaged file":
        added = keys.add_key(storage, config.id, master, PASSPHRASE, cost=CHEAP)
        (path / "keys" / added).write_bytes(b"")
    else:
        (path / "keys" / ("1" * 32)).symlink_to(ours)
    with pytest.raises(UsageError, match=f"opens no key but {ours[:8]}"):
        keys.remove_key(storage, config.id, ours, PASSPHRASE, config.opens)
    assert ours in storage.list("keys")


def test_an_exported_key_brings_a_repository_back(path: Path, tmp_path: Path) -> None:
    storage, config = Repository.look(path)
    (name,) = storage.list("keys")
    exported = storage.read("keys", name, 1 << 20)
    (path / "keys" / name).write_bytes(exported[:-3])
    with pytest.raises(DamagedError, match="none of its keys can be read"):
        opened(path)
    with pytest.raises(WrongPassphraseError):
        keys.import_key(storage, config.id, exported, b"wrong", config.opens)
    assert keys.import_key(storage, config.id, exported, PASSPHRASE, config.opens) == name
    assert len(opened(path).backups()) == 1
    other, theirs = Repository.look(new(tmp_path / "other", encrypted=True).storage.root)
    with pytest.raises(UsageError, match="is of repository"):
        keys.import_key(other, theirs.id, exported, PASSPHRASE, theirs.opens)
    with pytest.raises(UsageError, match="another master key"):
        keys.import_key(storage, config.id, exported, PASSPHRASE, theirs.opens)
    for bad in (b"", b"{}", exported[:-1], b"[" * 100000):
        with pytest.raises(UsageError):
            keys.import_key(storage, config.id, bad, PASSPHRASE, config.opens)


@pytest.mark.parametrize("cost", [{"n": 1 << 40}, {"n": 3}, {"r": 1 << 30}, {"p": 1 << 20}, {"n": 0}, {"p": 0}])
def test_a_key_cannot_ask_for_all_memory(path: Path, cost: dict[str, int]) -> None:
    """Of a repository that somebody else wrote (faults row 78)."""
    (file,) = (path / "keys").iterdir()
    key = msgspec.json.decode(file.read_bytes(), type=keys.KeyFile)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(key, cost=msgspec.structs.replace(key.cost, **cost))))
    with pytest.raises(DamagedError, match="what it costs"):
        opened(path)


def test_an_init_that_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        Repository.init(tmp_path / "repo", CLUSTER, b"")
    assert not (tmp_path / "repo").exists()


def test_a_tree_of_digests_of_another_repository_says_nothing(tmp_path: Path) -> None:
    """Roots of two repositories with the same content differ: who sees one learns nothing of the other."""
    one, two = (new(tmp_path / name, encrypted=True) for name in "ab")
    roots = [back_up(repo, NUMBERS).disks[0].root for repo in (one, two)]
    plain = back_up(new(tmp_path / "c"), NUMBERS).disks[0].root
    assert len({*roots, plain}) == 3
    assert np.array_equal(one.seal.digests(memoryview(bytes(CLUSTER)), CLUSTER), np.zeros((1, 32), dtype=np.uint8))


def _plant(path: Path, count: int, **more: object) -> list[str]:
    """Key files of somebody who cannot know the passphrase, older than ours."""
    (ours,) = (path / "keys").iterdir()
    key = msgspec.json.decode(ours.read_bytes(), type=keys.KeyFile)
    names = [f"{number:032x}" for number in range(count)]
    for name in names:
        fields = {"id": name, "created": "2000-01-01T00:00:00Z", "wrapped": "00" * 60, **more}
        (path / "keys" / name).write_bytes(msgspec.json.encode(msgspec.structs.replace(key, **fields)))
    return names


def _tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tried: list[str] = []

    def note(key: keys.KeyFile, repository: str, passphrase: bytes) -> bytes | None:
        tried.append(key.id)
        return _open_key(key, repository, passphrase)

    _open_key = keys.open_key
    monkeypatch.setattr(keys, "open_key", note)
    return tried


def test_planted_keys_that_cost_more_are_not_tried_before_ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = (p.name for p in (path / "keys").iterdir())
    _plant(path, 31, cost=keys.Cost(n=1 << 18))
    tried = _tried(monkeypatch)
    assert opened(path).key == ours
    assert tried == [ours]


def test_the_key_that_opened_it_last_is_tried_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = (p.name for p in (path / "keys").iterdir())
    _plant(path, 100)
    tried = _tried(monkeypatch)
    Repository.open(path, lambda: PASSPHRASE, ours)
    assert tried == [ours]


def test_only_so_many_keys_are_tried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(path, 100)
    tried = _tried(monkeypatch)
    with pytest.raises(WrongPassphraseError, match="more than a repository can have") as refused:
        opened(path)
    assert len(tried) == 32
    assert "keys/" in refused.value.hint
    assert len(keys.read_keys(LocalStorage(path))[0]) == 64


@pytest.mark.parametrize("cost", [{"n": 1 << 19}, {"p": 5}, {"r": 17, "n": 1 << 17}])
def test_a_guess_takes_256_mib_and_four_passes_at_most(cost: dict[str, int]) -> None:
    assert not keys.Cost(**cost).possible
    assert keys.Cost(n=1 << 18, p=4).possible
