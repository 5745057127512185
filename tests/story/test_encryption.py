"""Encrypted repositories as a user has them: where passphrases come from, keys, and what a host notices."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, content, differing
from tests.kit.live import eventually
from tests.kit.serve import raw_image

SIZE = 4 << 20
SECRET = "correct horse battery"


class Encrypted(Incbak):
    """An encrypted repository, an image, and files with passphrases."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.passphrase = self.secret("pass", SECRET)
        self.image = raw_image(root / "web1.raw", SIZE, b"something to find" * (SIZE // 17))

    def secret(self, name: str, text: str) -> Path:
        """A file with a passphrase."""
        path = self.root / name
        path.write_text(text + "\n")
        path.chmod(0o600)
        return path

    def environment(self, extra: object = None) -> dict[str, str]:
        found = {"INCBAK_PASSWORD_FILE": str(self.passphrase), **(extra or {})}  # type: ignore[dict-item]
        return {k: v for k, v in super().environment(found).items() if v}


@pytest.fixture
def incbak(tmp_path: Path) -> Encrypted:
    made = Encrypted(tmp_path)
    made("init", "--encrypt")
    return made


def test_a_disk_is_backed_up_and_restored(incbak: Encrypted) -> None:
    incbak("full", incbak.image, "--attach", incbak.secret("web1.xml", "<domain/>"))
    (made,) = incbak("--json", "incremental", incbak.image).objects()
    assert made["disks"][0]["reason"] is None
    assert differing(incbak.restored(), content(incbak.image)) == []
    assert "all data was read" in incbak("check", "--read-data").out
    whole = b"".join(p.read_bytes() for p in incbak.repo.rglob("*") if p.is_file())
    for clear in (b"something to find", b"web1", b"<domain/>", SECRET.encode()):
        assert clear not in whole
    assert "encrypted" in incbak("doctor").out


def test_where_a_passphrase_comes_from(incbak: Encrypted) -> None:
    incbak("full", incbak.image)
    nothing = {"INCBAK_PASSWORD_FILE": ""}
    ran = incbak.run("list", env=nothing)
    assert (ran.code, ran.out, "no passphrase was given" in ran.err) == (12, "", True)
    ran = incbak.run("list", env={"INCBAK_PASSWORD_FILE": str(incbak.secret("wrong", "wrong"))})
    assert (ran.code, ran.out, "does not open" in ran.err) == (12, "", True)
    command = {**nothing, "INCBAK_PASSWORD_COMMAND": f"cat '{incbak.passphrase}'"}
    assert len(incbak("list", env=command).out.splitlines()) == 2
    with incbak.passphrase.open("rb") as file:
        argv, env = ("list",), {**nothing, "INCBAK_PASSWORD_FD": str(file.fileno())}
        process = incbak.popen(*argv, env=env, pass_fds=(file.fileno(),))
        out, err = process.communicate(timeout=60)
    assert (process.returncode, len(out.splitlines()), err) == (0, 2, "")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"INCBAK_PASSWORD_COMMAND": "true"}, "INCBAK_PASSWORD_FILE and INCBAK_PASSWORD_COMMAND are set"),
        ({"INCBAK_PASSWORD_FILE": "/no/such/file"}, "cannot read the passphrase from /no/such/file"),
        ({"INCBAK_PASSWORD_FILE": "/dev/null"}, "from /dev/null: it is not a regular file"),
        ({"INCBAK_PASSWORD_FILE": "/dev/zero"}, "from /dev/zero: it is not a regular file"),
        ({"INCBAK_PASSWORD_FILE": "", "INCBAK_PASSWORD_COMMAND": "false"}, "false, failed with exit code 1"),
        ({"INCBAK_PASSWORD_FILE": "", "INCBAK_PASSWORD_COMMAND": "/no/such"}, "cannot run the command"),
        ({"INCBAK_PASSWORD_FILE": "", "INCBAK_PASSWORD_COMMAND": "'"}, "INCBAK_PASSWORD_COMMAND is no command"),
        ({"INCBAK_PASSWORD_FILE": "", "INCBAK_PASSWORD_FD": "x"}, "the descriptor in INCBAK_PASSWORD_FD"),
        ({"INCBAK_PASSWORD_FILE": "", "INCBAK_PASSWORD_FD": "99"}, "the descriptor in INCBAK_PASSWORD_FD"),
    ],
)
def test_a_source_that_gives_none_is_named(incbak: Encrypted, env: dict[str, str], said: str) -> None:
    ran = incbak.run("list", env=env)
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_a_passphrase_that_anybody_can_read_is_told(incbak: Encrypted) -> None:
    incbak.passphrase.chmod(0o644)
    assert "anybody can read the passphrase" in incbak.run("list").err


def test_it_is_asked_for_on_a_terminal_and_nowhere_else(incbak: Encrypted) -> None:
    """Typed without an echo; a wrong one is exit code 12."""
    for typed, code in ((SECRET, 0), ("wrong", 12)):
        child, terminal = pty.fork()
        if not child:
            os.execvpe("python", ["python", "-m", "incbak", "list"], incbak.environment({"INCBAK_PASSWORD_FILE": ""}))
        shown = b""
        deadline = time.monotonic() + 60
        sent = False
        with suppress(OSError):
            while time.monotonic() < deadline:
                if not select.select([terminal], [], [], 1)[0]:
                    continue
                shown += os.read(terminal, 4096)
                if not sent and b"passphrase of the repository: " in shown:
                    os.write(terminal, typed.encode() + b"\n")
                    sent = True
        assert sent, shown
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        assert typed.encode() not in shown
        os.close(terminal)


def test_a_passphrase_is_seen_in_no_process(incbak: Encrypted) -> None:
    """faults row 80: not on a command line, not in an environment, also of what it starts."""
    process = incbak.popen("full", incbak.image, "--speed-limit", "100k")
    eventually(lambda: list((incbak.repo / "packs").glob(".*.tmp")), 60, "a pack")
    seen = b""
    for pid in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            seen += (pid / "cmdline").read_bytes() + (pid / "environ").read_bytes()
    process.send_signal(signal.SIGTERM)
    _out, err = process.communicate(timeout=60)
    assert str(incbak.passphrase).encode() in seen
    assert SECRET.encode() not in seen
    assert SECRET not in err


def test_keys_on_the_command_line(incbak: Encrypted) -> None:
    incbak("full", incbak.image)
    new = incbak.secret("new", "another")
    incbak("key", "add", "--label", "office", env={"INCBAK_NEW_PASSWORD_FILE": str(new)})
    keys = {k["label"]: k["id"] for k in incbak("--json", "key", "list").objects()}
    assert set(keys) == {"", "office"}
    exported = incbak.root / "web.key"
    incbak("key", "export", exported, "--id", keys[""])
    assert (exported.stat().st_mode & 0o777, incbak.run("key", "export", exported).code) == (0o600, 2)
    assert incbak.run("key", "export", incbak.root / "x", "--id", keys["office"]).code == 2
    with_new = {"INCBAK_PASSWORD_FILE": str(new)}
    ran = incbak.run("key", "remove", keys[""][:8])
    assert (ran.code, f"opens no key but {keys[''][:8]}" in ran.err) == (2, True)
    incbak("key", "remove", keys[""][:8], env=with_new)
    assert incbak.run("list").code == 12
    assert len(incbak("list", env=with_new).out.splitlines()) == 2
    ran = incbak.run("key", "remove", keys["office"], env=with_new)
    assert (ran.code, "which stays" in ran.err) == (2, True)
    incbak("key", "import", exported)
    assert len(incbak("list").out.splitlines()) == 2
    assert incbak.run("key", "add", env={"INCBAK_NEW_PASSWORD_FILE": ""}).code == 2
    plain = incbak.root / "plain"
    incbak("init", plain)
    ran = incbak.run("key", "list", "-r", plain)
    assert (ran.code, "is not encrypted" in ran.err) == (2, True)


def test_without_a_passphrase_nothing_is_made(incbak: Encrypted) -> None:
    ran = incbak.run("init", "--encrypt", incbak.root / "other", env={"INCBAK_PASSWORD_FILE": ""})
    assert (ran.code, (incbak.root / "other").exists()) == (2, False)


def test_all_vms_of_a_configuration(incbak: Encrypted) -> None:
    """Each process gets the passphrase: from the configuration, or of a descriptor that can be read but once."""
    shutil.copy(incbak.image, incbak.root / "web2.raw")
    text = f'[defaults]\nrepository = "{incbak.repo}"\n'
    vms = "".join(f'[vms.{n}]\nsource = "{incbak.root}/{n}.raw"\n[vms.{n}.keep]\nlast = 1\n' for n in ("web1", "web2"))
    config = incbak.secret("incbak.toml", text + f'password-file = "{incbak.passphrase}"\n' + vms)
    nothing = {"INCBAK_PASSWORD_FILE": "", "INCBAK_REPOSITORY": "", "INCBAK_CONFIG": str(config)}
    assert len(incbak("full", "--all", env=nothing).out.splitlines()) == 2
    assert "2 backups kept" not in incbak("prune", "--all", env=nothing).out
    config.write_text(text + vms)
    assert incbak.run("incremental", "--all", env=nothing).code == 1
    with incbak.passphrase.open("rb") as file:
        env = {**nothing, "INCBAK_PASSWORD_FD": str(file.fileno())}
        process = incbak.popen("incremental", "--all", env=env, pass_fds=(file.fileno(),))
        out, err = process.communicate(timeout=120)
    assert (process.returncode, len(out.splitlines()), err) == (0, 2, "")


def test_a_repository_that_was_put_back_is_told(incbak: Encrypted) -> None:
    """faults rows 53 and 79: by every backup and check of this host, and in the next record."""
    incbak("full", incbak.image)
    older = incbak.root / "older"
    shutil.copytree(incbak.repo, older)
    (last,) = incbak("--json", "incremental", incbak.image).objects()
    shutil.rmtree(incbak.repo)
    older.rename(incbak.repo)
    said = f"backup {last['id'][:8]} of web1, which this host made last, is gone"
    ran = incbak.run("check")
    assert (ran.code, said in ran.err) == (13, True)
    assert said in incbak.run("doctor").out
    ran = incbak.run("incremental", incbak.image)
    assert (ran.code, said in ran.err) == (0, True)
    assert said in incbak("show", "latest").out
    assert "no problems" in incbak("check").out
    assert differing(incbak.restored(), content(incbak.image)) == []


def test_one_that_is_not_encrypted_any_more_is_not_used(incbak: Encrypted) -> None:
    incbak("full", incbak.image)
    incbak.repo.rename(incbak.root / "away")
    incbak("init", "--state-dir", incbak.root / "elsewhere")
    ran = incbak.run("full", incbak.image)
    assert (ran.code, "was encrypted when this host used it last" in ran.err) == (13, True)
    plain = {"INCBAK_PASSWORD_FILE": ""}
    assert incbak("list", "--state-dir", incbak.root / "elsewhere", env=plain).out == "no backups\n"


@pytest.mark.parametrize("how", ["FILE", "COMMAND", "configured"])
def test_a_plain_one_is_not_used_where_a_passphrase_is_configured(incbak: Encrypted, how: str) -> None:
    """Also by a host that was never here: what it is told it needs a passphrase for was encrypted."""
    none = {"INCBAK_PASSWORD_FILE": ""}
    evil = incbak.root / "evil"
    incbak("init", evil, env=none)
    incbak("full", incbak.image, "-r", evil, env=none)
    env = {"INCBAK_PASSWORD_FILE": str(incbak.passphrase)}
    if how == "COMMAND":
        env = {**none, "INCBAK_PASSWORD_COMMAND": "touch " + str(incbak.root / "ran")}
    if how == "configured":
        config = incbak.root / "incbak.toml"
        config.write_text(f'[defaults]\npassword-file = "{incbak.passphrase}"\n')
        env = {**none, "INCBAK_CONFIG": str(config)}
    for command in (("restore", "latest", incbak.root / "x.raw"), ("incremental", incbak.image), ("check",), ("list",)):
        ran = incbak.run("-r", evil, "--state-dir", incbak.root / "new", *command, env=env)
        assert (ran.code, "is not encrypted, and a passphrase is configured" in ran.err) == (12, True)
    assert not (incbak.root / "x.raw").exists()
    assert not (incbak.root / "ran").exists()


def test_who_has_only_read_it_notices_too(incbak: Encrypted) -> None:
    incbak("full", incbak.image)
    incbak("list", "--state-dir", incbak.root / "reader")
    shutil.rmtree(incbak.repo)
    none = {"INCBAK_PASSWORD_FILE": ""}
    incbak("init", "--state-dir", incbak.root / "elsewhere", env=none)
    ran = incbak.run("list", "--state-dir", incbak.root / "reader", env=none)
    assert (ran.code, "was encrypted when this host used it last" in ran.err) == (13, True)


def test_the_key_that_opened_it_is_remembered(incbak: Encrypted) -> None:
    """So keys that somebody plants cost no time."""
    (key,) = (incbak.repo / "keys").iterdir()
    for number in range(100):
        (incbak.repo / "keys" / f"{number:032x}").write_bytes(b"{}")
    assert incbak("list").out == "no backups\n"
    key.rename(incbak.root / "key")
    assert incbak.run("list").code == 13


def test_a_prune_on_this_host_is_no_alarm(incbak: Encrypted) -> None:
    incbak("full", incbak.image, "--tag", "keep")
    incbak("full", incbak.image)
    incbak("prune", "--keep-tag", "keep", "--keep-last", "1")
    assert "no problems" in incbak("check").out
