"""Where a passphrase comes from: a file, a command, a descriptor, or a prompt; never from the command line."""

from __future__ import annotations

import getpass
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from incbak import programs
from incbak.errors import UsageError, WrongPassphraseError
from incbak.opening import open_text

FD = "INCBAK_PASSWORD_FD"
_NEW = "INCBAK_NEW_PASSWORD_"
_LIMIT = 4096
_KINDS = ("FILE", "COMMAND", "FD")
_REPOSITORY = "the repository"
_PREFIX = "INCBAK_PASSWORD_"
TARGET_PREFIX = "INCBAK_TARGET_PASSWORD_"
"""Of the other repository, where a command has two."""
_DEADLINE = 60.0


@dataclass
class Passphrase:
    """Where the passphrase of a repository is; asked once. Line ends behind it do not count.

    ``file`` and ``command`` are what the configuration says; the environment wins.
    """

    file: str = ""
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    prefix: str = _PREFIX
    """Of the variables in the environment."""
    what: str = _REPOSITORY
    _known: bytes | None = None

    def __call__(self) -> bytes:
        """Raises `WrongPassphraseError` where there is none, `UsageError` for a source that does not give one."""
        if self._known is None:
            self._known = self._find()
        return self._known

    @property
    def source(self) -> str:
        """What says where the passphrase is, for people; empty where nothing does. Nothing is read or run."""
        if kind := next((kind for kind in _KINDS if self.environment.get(self.prefix + kind)), None):
            return self.prefix + kind
        return "password_file" if self.file else "password_command" if self.command else ""

    def new(self) -> bytes:
        """One that is to be set: from ``INCBAK_NEW_PASSWORD_FILE`` and so on, or typed twice. Raises as a call."""
        found = _from_environment(self.environment, _NEW)
        return found if found is not None else _typed_twice()

    def first(self) -> bytes:
        """That of a repository that is made. Raises as a call."""
        found = self._given()
        self._known = found if found is not None else _typed_twice()
        return self._known

    def _find(self) -> bytes:
        found = self._given()
        if found is None:
            found = _typed(f"passphrase of {self.what}: ", self.prefix, self.what)
        return found

    def _given(self) -> bytes | None:
        found = _from_environment(self.environment, self.prefix)
        if found is None and self.file:
            found = _from_file(self.file)
        if found is None and self.command:
            found = _from_command(self.command)
        return found

    def for_child(self) -> tuple[dict[str, str], IO[bytes] | None]:
        """What a process of ours needs more in its environment, and the file that it must inherit, if any.

        A descriptor can be read only once, so each process gets a file without a name.
        """
        if FD not in self.environment:
            return {}, None
        file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # noqa: SIM115
        file.write(self())
        file.flush()
        file.seek(0)
        return {FD: str(file.fileno())}, file


def _from_environment(environment: Mapping[str, str], prefix: str) -> bytes | None:
    given = [kind for kind in _KINDS if environment.get(prefix + kind)]
    if len(given) > 1:
        both = " and ".join(prefix + kind for kind in given)
        raise UsageError(f"{both} are set", hint="Leave one, so that it is clear which counts.")
    for kind in given:
        value = environment[prefix + kind]
        if kind == "FILE":
            return _from_file(value)
        if kind == "COMMAND":
            return _from_command(_split(prefix + kind, value))
        return _from_descriptor(prefix + kind, value)
    return None


def _from_file(path: str) -> bytes:
    try:
        with open_text(path) as file:
            info = os.fstat(file.fileno())
            data = file.read(_LIMIT + 1)
    except OSError as e:
        raise UsageError(f"cannot read the passphrase from {path}: {e.strerror}") from e
    if stat.S_ISREG(info.st_mode) and info.st_mode & 0o007:
        print(f"incbak: anybody can read the passphrase in {path}; try: chmod 600 {path}", file=sys.stderr)
    return _clean(data, path)


def _split(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UsageError(f"{name} is no command: {e}") from e


def _from_command(command: Sequence[str]) -> bytes:
    name = command[0] if command else ""
    try:
        ran = programs.run(command, err=None, kept=4 * _LIMIT, timeout=_DEADLINE, terminal=True)
    except (OSError, ValueError, IndexError) as e:
        raise UsageError(f"cannot run the command for the passphrase, {name}: {e}") from e
    except subprocess.TimeoutExpired as e:
        raise UsageError(f"the command for the passphrase, {name}, takes longer than {_DEADLINE:.0f} s") from e
    if ran.code:
        raise UsageError(f"the command for the passphrase, {name}, failed with exit code {ran.code}")
    return _clean(ran.out, name)


def _from_descriptor(name: str, text: str) -> bytes:
    try:
        with os.fdopen(int(text), "rb") as file:
            data = file.read(_LIMIT + 1)
    except (ValueError, OSError) as e:
        raise UsageError(f"cannot read the passphrase from the descriptor in {name}: {e}") from e
    return _clean(data, name)


def _clean(data: bytes, where: str) -> bytes:
    if len(data) > _LIMIT:
        raise UsageError(f"the passphrase from {where} is longer than {_LIMIT} bytes")
    found = data.rstrip(b"\r\n")
    if not found:
        raise UsageError(f"the passphrase from {where} is empty")
    return found


def _hint(prefix: str) -> str:
    return f"Set {prefix}FILE, {prefix}COMMAND or {prefix}FD, or run it on a terminal."


def _typed(prompt: str, prefix: str = _PREFIX, what: str = _REPOSITORY) -> bytes:
    if not (sys.stdin and sys.stdin.isatty()):
        raise WrongPassphraseError(f"{what} is encrypted, and no passphrase was given", hint=_hint(prefix))
    try:
        found = getpass.getpass(prompt)
    except EOFError:
        found = ""
    return _clean(found.encode(errors="surrogateescape"), "the prompt")


def _typed_twice() -> bytes:
    if not (sys.stdin and sys.stdin.isatty()):
        raise UsageError("no passphrase was given for what is to be encrypted", hint=_hint(_PREFIX))
    first = _typed("new passphrase: ")
    if _typed("the same again: ") != first:
        raise UsageError("the two passphrases differ", hint="Nothing was changed.")
    return first
