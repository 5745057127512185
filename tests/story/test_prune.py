"""``incbak prune``, ``pin`` and ``unpin`` as a user runs them."""

from __future__ import annotations

import os
import pty
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from incbak.errors import NbdRequestError
from incbak.nbd.client import NbdClient
from incbak.repo.record import decode, encode
from incbak.repo.repository import Repository
from tests.kit.cli import DEADLINE, Content, Incbak, Ran, content, differing
from tests.kit.serve import raw_image

CLUSTER = 65536
CLUSTERS = 64


class Scene:
    """An image, and a repository that knows what each backup must be."""

    def __init__(self, root: Path) -> None:
        self.incbak = Incbak(root)
        self.image = raw_image(root / "web1.raw", CLUSTERS * CLUSTER)
        self.held: dict[str, Content] = {}
        self.incbak("init")

    def back_up(self, *clusters: int, argv: tuple[str, ...] = ()) -> str:
        """A backup after new content came to these clusters."""
        with self.image.open("r+b") as f:
            for number in clusters:
                f.seek(number * CLUSTER)
                f.write(os.urandom(CLUSTER))
        ident = str(self.incbak("--json", "incremental", self.image, *argv).objects()[0]["id"])
        self.held[ident] = content(self.image)
        return ident

    def right(self, *idents: str) -> None:
        """These are listed, and restore."""
        assert [entry["id"] for entry in self.incbak.list()] == list(idents)
        for ident in idents:
            assert differing(self.incbak.restored(ident), self.held[ident]) == []
        self.incbak("check", "--read-data")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_the_life_of_backups(scene: Scene) -> None:
    """Tags, pins, a dry run, a prune, and one when the grace is over."""
    incbak = scene.incbak
    first = scene.back_up(*range(20), argv=("--tag", "before upgrade", "--tag", "gold"))
    second = scene.back_up(*range(10))
    third = scene.back_up(*range(20))
    last = scene.back_up(1)
    assert "before upgrade,gold" in incbak("list").out
    assert incbak.list()[0]["tags"] == ["before upgrade", "gold"]
    assert incbak("pin", second[:12]).out == f"{second[:8]} pinned\n"
    assert [e["pinned"] for e in incbak.list()] == [False, True, False, False]
    assert "(pinned)" in incbak("list").out
    assert "pinned" in incbak("show", second).out
    assert incbak("--json", "show", second).objects()[0]["pinned"] is True
    rules = ("--keep-last", "1", "--keep-tag", "gold")
    told = incbak("--json", "prune", *rules, "--dry-run").objects()
    assert [(t["id"], t["vm"], t["action"], t["reasons"]) for t in told[:-1]] == [
        (first, "web1", "keep", ["tag gold"]),
        (second, "web1", "keep", ["pinned"]),
        (third, "web1", "remove", []),
        (last, "web1", "keep", ["last", "last good"]),
    ]
    assert (told[-1]["summary"], told[-1]["kept"], told[-1]["removed"], told[-1]["freed"]) == (True, 3, 1, 0)
    assert "would keep 3 backups and remove 1" in incbak("prune", *rules, "--dry-run").out
    scene.right(first, second, third, last)
    assert "web1: 3 backups kept, 1 removed" in incbak("prune", *rules).out
    scene.right(first, second, last)
    assert incbak("unpin", second).out == f"{second[:8]} is not pinned any more\n"
    assert "will be when the grace is over" in incbak("prune", "--keep-last", "1").out
    scene.right(last)
    freed = incbak("--json", "prune", "--keep-last", "1", "--grace", "0").objects()[-1]["freed"]
    assert freed > 20 * CLUSTER
    assert incbak("-q", "prune", "--keep-last", "1", "--grace", "0").out == ""
    scene.right(last)
    scene.right(last, scene.back_up(5))


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--keep-last", "0"),
        ("--keep-last", "-1"),
        ("--keep-within", "soon"),
        ("--keep-within", "30"),
        ("--keep-within", "5min"),
        ("--keep-last", "1", "--grace", "x"),
        ("--keep-last", "1", "--repack-below", "101"),
        ("--keep-last", "1", "--name", "nobody"),
    ],
)
def test_what_cannot_be_right_changes_nothing(scene: Scene, argv: tuple[str, ...]) -> None:
    ident = scene.back_up(1)
    other = scene.back_up(2)
    assert scene.incbak.run("prune", *argv).code == 2
    scene.right(ident, other)


def _dated(incbak: Incbak, ident: str, when: str) -> None:
    """Date a backup as one whose host had a wrong clock."""
    path = incbak.repo / "backups" / ident
    record = msgspec.structs.replace(decode(ident, path.read_bytes()), started=when, finished=when)
    path.chmod(0o600)
    path.write_bytes(encode(record))


def test_backups_from_a_clock_that_is_ahead_take_no_place_and_are_not_young(scene: Scene) -> None:
    incbak = scene.incbak
    idents = [scene.back_up(n) for n in range(4)]
    for number, ident in enumerate(idents[2:]):
        _dated(incbak, ident, f"2099-01-0{number + 1}T00:00:00+00:00")
    assert "dated ahead" in incbak("prune", "--keep-daily", "1", "--dry-run").out
    assert "3 backups kept, 1 removed" in incbak("prune", "--keep-daily", "1").out
    assert [entry["id"] for entry in incbak.list()] == idents[1:]
    ran = incbak.run("status", scene.image, "--max-age", "1d")
    assert (ran.code, "dated ahead" in ran.out, "without a backup of the last" in ran.err) == (1, True, True)
    assert incbak("--json", "status", scene.image).objects()[0]["age"] is None


def test_what_may_not_be_pruned_now(scene: Scene) -> None:
    """Exit codes: 11 beside another prune, or a backup; 13 where something cannot be read."""
    incbak = scene.incbak
    kept = [scene.back_up(n) for n in range(2)]
    repo = Repository.open(incbak.repo)
    with repo.storage.lock("prune.lock", exclusive=True, wait=0):
        ran = incbak.run("prune", "--keep-last", "1", "--lock-wait", "0")
        assert (ran.code, "prune.lock" in ran.err) == (11, True)
    scene.right(*kept)
    with repo.vm_lock("another VM"):
        ran = incbak.run("prune", "--keep-last", "1", "--lock-wait", "0.3s", "--repack-below", "100")
        assert (ran.code, "a backup is running" in ran.err, "1 removed" in ran.out) == (11, True, True)
    scene.right(kept[-1])
    kept.append(scene.back_up(3))
    record = incbak.repo / "backups" / kept[-1]
    record.write_bytes(b"x" + record.read_bytes())
    ran = incbak.run("prune", "--keep-last", "1")
    assert (ran.code, "nothing was removed" in ran.err) == (13, True)
    ran = incbak.run("--json", "prune", "--keep-last", "1", "--dry-run")
    assert ran.code == 13
    assert [t.get("reasons") for t in ran.objects()] == [["last", "last good"], ["unreadable"], None]
    assert sorted(p.name for p in (incbak.repo / "backups").iterdir()) == sorted(kept[1:])


@contextmanager
def exported(incbak: Incbak, backup: str) -> Iterator[NbdClient]:
    """A client of ``incbak export``."""
    process = incbak.popen("export", backup)
    try:
        assert process.stdout
        client = NbdClient.connect(process.stdout.readline().split()[1], timeout=60)
        yield client
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _read(client: NbdClient, held: Content, numbers: range) -> None:
    for number in numbers:
        found = bytearray(CLUSTER)
        client.read_into(memoryview(found), number * CLUSTER)
        assert bytes(found) == held.get(number * CLUSTER, bytes(CLUSTER))


def test_exports_beside_prunes(scene: Scene) -> None:
    """One of a backup that stays is not disturbed, though its content moves; one of a backup that is removed goes on
    within the grace, and then fails loudly."""
    old = scene.back_up(*range(40))
    kept = scene.back_up(*range(5, 40))
    prune = ("prune", "--keep-last", "1", "--repack-below", "100")
    with exported(scene.incbak, old) as gone, exported(scene.incbak, kept) as stays:
        _read(gone, scene.held[old], range(60, 61))
        _read(stays, scene.held[kept], range(60, 61))
        assert scene.incbak("--json", *prune).objects()[-1]["repacked_packs"] == 1
        _read(gone, scene.held[old], range(10))
        assert scene.incbak("--json", *prune, "--grace", "0").objects()[-1]["freed"] > 0
        _read(stays, scene.held[kept], range(64))
    with exported(scene.incbak, kept) as stays:
        _read(stays, scene.held[kept], range(64))
    scene.right(kept)


def test_an_export_of_a_backup_that_is_gone_fails_loudly(scene: Scene) -> None:
    old = scene.back_up(*range(40))
    scene.back_up(*range(40))
    with exported(scene.incbak, old) as gone:
        scene.incbak("prune", "--keep-last", "1", "--grace", "0")
        with pytest.raises(NbdRequestError):
            _read(gone, scene.held[old], range(40))


def _asked(incbak: Incbak, answer: bytes, *argv: str) -> Ran:
    """Run a command whose standard input is a terminal on which this was typed."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        process = incbak.popen(*argv, stdin=theirs)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Traceback" not in err
    return Ran(process.returncode, out, err)


def test_a_removal_beside_a_backup_is_done_and_told_once(scene: Scene) -> None:
    first, second = scene.back_up(0), scene.back_up(1)
    with Repository.open(scene.incbak.repo).vm_lock("another VM"):
        ran = scene.incbak.run("remove", second, "--yes", "--lock-wait", "0")
    assert (ran.code, len(ran.err.splitlines()), "is freed by a later prune" in ran.err) == (0, 1, True), ran
    scene.right(first)


def test_a_backup_is_removed_on_purpose_also_the_newest(scene: Scene) -> None:
    incbak = scene.incbak
    first, second, third = (scene.back_up(n) for n in range(3))
    ran = incbak.run("remove", third)
    assert (ran.code, "Give --yes" in ran.err, third[:8] in ran.out) == (2, True, True)
    assert incbak.run("--json", "remove", third).code == 2
    assert "would remove 1 backup" in incbak("remove", third, "--dry-run").out
    for answer in (b"no\n", b"y\n", b"\n"):
        ran = _asked(incbak, answer, "remove", third)
        assert (ran.code, "not confirmed" in ran.err) == (2, True)
    scene.right(first, second, third)
    ran = _asked(incbak, b"yes\n", "remove", third)
    assert (ran.code, "removed 1 backup" in ran.out) == (0, True)
    scene.right(first, second)
    entry = incbak("--json", "incremental", scene.image).objects()[0]
    assert (entry["disks"][0]["kind"], entry["base"]) == ("full", None)
    assert differing(incbak.restored(entry["id"]), scene.held[third]) == []


def test_all_of_a_vm_is_removed_and_raises_no_alarm(scene: Scene) -> None:
    incbak = scene.incbak
    kept = scene.back_up(1, argv=("--name", "other"))
    for n in range(2):
        scene.back_up(n, argv=("--name", "gone"))
    pinned = incbak.list()[-1]["id"]
    incbak("pin", pinned)
    ran = incbak.run("remove", "--all-of", "gone", "--yes")
    assert (ran.code, f"incbak unpin {pinned[:8]}" in ran.err, len(incbak.list())) == (2, True, 3)
    incbak("unpin", pinned)
    told = incbak("--json", "remove", "--all-of", "gone", "--yes", "--grace", "0").objects()
    assert [(o.get("action"), o.get("vm")) for o in told[:2]] == [("remove", "gone")] * 2
    assert (told[-1]["removed"], told[-1]["freed"] > 0) == (2, True)
    scene.right(kept)
    for argv in ((), ("--all-of", "gone"), (kept, "--all-of", "other"), ("latest",), (kept[:3],)):
        assert incbak.run("remove", *argv, "--yes").code == 2
    scene.right(kept)
