"""`incbak sync`, as a user runs it."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from incbak.repo.repository import Repository
from tests.kit.cli import Incbak

SIZE = 8 << 20


class Two:
    """A repository with backups of an image, and another one."""

    def __init__(self, root: Path) -> None:
        self.incbak, self.image, self.other = Incbak(root), root / "web1.raw", root / "offsite"
        self.rng = random.Random(1)
        self.image.write_bytes(self.rng.randbytes(SIZE))
        self.incbak("init")
        self.incbak("init", self.other)
        self.contents: dict[str, bytes] = {}

    def back_up(self) -> str:
        """A full after some change; its id."""
        with self.image.open("r+b") as f:
            f.seek(self.rng.randrange(SIZE))
            f.write(b"changed")
        (made,) = self.incbak("--json", "full", self.image).objects()
        self.contents[made["id"]] = self.image.read_bytes()
        return str(made["id"])

    def restored(self, ident: str, **more: str) -> bytes:
        """From the other repository."""
        target = self.incbak.root / "restored.raw"
        self.incbak("-r", self.other, "restore", ident, target, "--force", env=more)
        return target.read_bytes()


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


def test_what_is_printed(two: Two) -> None:
    first, second = two.back_up(), two.back_up()
    said = two.incbak("sync", two.other, "--dry-run").out.splitlines()
    assert [line.split()[1] for line in said[:-1]] == [first[:8], second[:8]]
    assert said[-1] == "would copy 2 backups"
    assert two.incbak("-r", two.other, "list", "--json").objects() == []
    said = two.incbak("sync", two.other).out.splitlines()
    assert said[0].startswith(f"web1: {first[:8]} of 20")
    assert said[-1].startswith("2 backups copied, 8.1 MiB")
    assert two.incbak("sync", two.other).out == "0 backups copied, 0 B stored\n"
    assert two.incbak("-q", "sync", two.other).out == ""
    third = two.back_up()
    (told,) = two.incbak("--json", "sync", two.other).objects()
    assert (told["id"], told["vm"], told["action"]) == (third, "web1", "copied")
    assert 0 < told["stored"] < 1 << 20
    for ident, content in two.contents.items():
        assert two.restored(ident) == content
    source = Repository.open(two.incbak.repo).id[:8]
    shown = two.incbak("-r", two.other, "show", "latest").out
    assert f"copied    from repository {source}, where it is number 3\n" in shown


def test_an_encrypted_target(two: Two, tmp_path: Path) -> None:
    ident = two.back_up()
    secret, wrong = tmp_path / "secret", tmp_path / "wrong"
    for path in (secret, wrong):
        path.write_text(path.name)
        path.chmod(0o600)
    two.other = tmp_path / "sealed"
    ours = {"INCBAK_PASSWORD_FILE": str(secret)}
    two.incbak("init", "--encrypt", two.other, env=ours)
    for environment, said in (
        ({}, "the target is encrypted, and no passphrase was given"),
        (ours, "the target is encrypted, and no passphrase was given"),
        ({"INCBAK_TARGET_PASSWORD_FILE": str(wrong)}, "passphrase"),
    ):
        ran = two.incbak.run("sync", two.other, env=environment)
        assert (ran.code, said in ran.err) == (12, True), ran
    two.incbak("sync", two.other, env={"INCBAK_TARGET_PASSWORD_FILE": str(secret)})
    assert two.restored(ident, **ours) == two.contents[ident]
    assert two.incbak.run("-r", two.other, "list").code == 12


def test_wrong_arguments(two: Two, tmp_path: Path) -> None:
    two.back_up()
    two.incbak("init", tmp_path / "coarse", "--cluster-size", "128K")
    for argv, code, said in (
        (["sync"], 2, "missing argument TARGET"),
        (["sync", tmp_path / "nowhere"], 10, "does not exist"),
        (["sync", tmp_path], 10, "is not a repository"),
        (["sync", two.incbak.repo], 2, "the two are the same repository"),
        (["sync", tmp_path / "coarse"], 2, "clusters of 65536 and 131072 bytes"),
        (["sync", two.other, "--name", "web2"], 2, "there is no backup of 'web2'"),
        (["sync", two.other, "--last", "0"], 2, "--last"),
        (["sync", two.other, "--lock-wait", "soon"], 2, "soon"),
        (["-r", tmp_path / "nowhere", "sync", two.other], 10, "does not exist"),
    ):
        ran = two.incbak.run(*argv)
        assert (ran.code, said in ran.err) == (code, True), ran
    assert two.incbak("-r", two.other, "list", "--json").objects() == []


def test_one_that_is_damaged(two: Two) -> None:
    """The others are copied, and the exit code says that not all are."""
    first = two.back_up()
    (pack,) = [p for p in (two.incbak.repo / "packs").iterdir() if not p.name.startswith(".")]
    second = two.back_up()
    for path in (two.incbak.repo / "packs").iterdir():
        if path != pack and not path.name.startswith("."):
            path.unlink()
    ran = two.incbak.run("sync", two.other)
    assert ran.code == 3
    assert f"incbak: not copied: backup {second[:8]} of web1: blob" in ran.err
    assert f"error: not copied: {second[:8]}" in ran.err
    assert [b["id"] for b in two.incbak("-r", two.other, "list", "--json").objects()] == [first]
    ran = two.incbak.run("--json", "sync", two.other)
    assert ran.code == 13
    assert [(o["what"], o["action"]) for o in ran.objects()] == [(second, "failed")]
    two.incbak.run("check")
    third = two.back_up()
    assert two.incbak.run("sync", two.other).code == 3
    again = two.incbak.run("sync", two.other)
    assert (again.code, "not in the repository" in again.err) == (13, True), "it is tried again, and told"
    assert two.restored(third) == two.contents[third]
    (two.incbak.repo / "backups" / second).unlink()
    assert two.incbak.run("sync", two.other).code == 0


def test_a_vm_that_is_being_backed_up_there(two: Two) -> None:
    two.back_up()
    with Repository.open(two.other).vm_lock("web1"):
        ran = two.incbak.run("sync", two.other)
        assert ran.code == 11
        waiting = two.incbak.popen("sync", two.other, "--lock-wait", "1m")
        time.sleep(0.5)
        assert waiting.poll() is None
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out.splitlines()[-1][:16]) == (0, "1 backup copied,"), err


def test_interrupted_it_goes_on_the_next_time(two: Two) -> None:
    made = [two.back_up() for _ in range(3)]
    process = two.incbak.popen("sync", two.other)
    while not any((two.other / "packs").iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode in (0, 130)
    two.incbak("sync", two.other)
    assert [b["id"] for b in two.incbak("-r", two.other, "list", "--json").objects()] == made
    assert all(two.restored(ident) == two.contents[ident] for ident in made)


def test_a_prune_beside_it(two: Two) -> None:
    """Neither disturbs the other: what is gone when its turn comes is not an error."""
    for _ in range(6):
        two.back_up()
    running = two.incbak.popen("sync", two.other)
    two.incbak("prune", "--keep-last", "1", "--grace", "1h")
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    listed = [b["id"] for b in two.incbak("-r", two.other, "list", "--json").objects()]
    assert listed[-1] == list(two.contents)[-1]
    assert all(two.restored(ident) == two.contents[ident] for ident in listed)
    two.incbak("-r", two.other, "check", "--read-data")
