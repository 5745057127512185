"""Keys: ``keys/ID`` holds the repository's master key, wrapped by a passphrase. Several passphrases, several files.

The passphrase goes through scrypt (RFC 7914), whose cost stands in the file and is held to limits when it is read: a
file that somebody else wrote must not fill the memory. The result wraps the master key with AES-256-GCM, bound to the
repository and to the file's name. Without any of these files the content is lost for good: `export` one.

Whoever can write to the repository can add such files. So the file that opened it last (`memory`) is tried first, then
the cheapest: files that cost more than the true one are not tried before it. At most 64 are read and 32 tried.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from incbak.errors import DamagedError, FormatTooNewError, UsageError, WrongPassphraseError
from incbak.repo import cipher
from incbak.repo.ids import is_id, new_id
from incbak.repo.storage.base import Storage

VERSION = 1
KIND = "keys"
_LIMIT = 64 << 10
_SALT = 32
MAX_KEYS = 32
_MAX_READ = 2 * MAX_KEYS
_MAX_MEMORY = 256 << 20
_MAX_PASSES = 4
_WAIT = 30.0
"""Seconds to wait for another process that removes a key, so that two do not remove the last two."""


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one guess: scrypt's parameters. 128 MiB and about half a second."""

    n: int = 1 << 17
    r: int = 8
    p: int = 1

    @property
    def memory(self) -> int:
        """Bytes."""
        return 128 * self.n * self.r

    @property
    def work(self) -> int:
        """What one guess takes, to compare costs by."""
        return self.memory * self.p

    @property
    def possible(self) -> bool:
        """Whether scrypt takes them, and within limits."""
        power = self.n > 1 and not self.n & (self.n - 1)
        return power and self.r > 0 and 0 < self.p <= _MAX_PASSES and self.memory <= _MAX_MEMORY


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file. ``salt`` and ``wrapped`` in hex; ``created``: ISO 8601 in UTC; ``label`` is for people."""

    version: int
    id: str
    repository: str
    cost: Cost
    salt: str
    wrapped: str
    created: str = ""
    label: str = ""


def add_key(
    storage: Storage, repository: str, master: bytes, passphrase: bytes, *, label: str = "", cost: Cost | None = None
) -> str:
    """Wrap ``master`` by one more passphrase, durably; the new file's id. Raises `UsageError`, `DurabilityError`."""
    if not passphrase:
        raise UsageError("the passphrase is empty")
    if len(storage.list(KIND)) >= MAX_KEYS:
        raise UsageError(f"the repository has {MAX_KEYS} keys already", hint="Remove one: incbak key remove ID")
    ident, cost, salt = new_id(), cost or Cost(), os.urandom(_SALT)
    wrapped = cipher.wrap(_stretched(passphrase, salt, cost), master, _bound(repository, ident))
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    made = KeyFile(VERSION, ident, repository, cost, salt.hex(), wrapped.hex(), now, label)
    storage.write(KIND, ident, msgspec.json.encode(made))
    return ident


def read_keys(storage: Storage, first: str = "") -> tuple[list[KeyFile], dict[str, str]]:
    """All files that can be read, oldest first; and why the others cannot, by name. ``first`` is never left out."""
    found, bad = [], {}
    for name in sorted(storage.list(KIND), key=lambda n: (n != first, n))[:_MAX_READ]:
        try:
            found.append(decode(name, storage.read(KIND, name, _LIMIT)))
        except FileNotFoundError:
            continue
        except (DamagedError, OSError) as e:
            bad[name] = str(e)
    return sorted(found, key=lambda k: (k.created, k.id)), bad


def decode(name: str, data: bytes) -> KeyFile:
    """A file's content. Raises `DamagedError` naming it for what cannot be."""
    try:
        key = msgspec.json.decode(data, type=KeyFile)
        sound = is_id(key.id) and key.id == name and key.cost.possible
        bytes.fromhex(key.salt), bytes.fromhex(key.wrapped)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise DamagedError(f"key {name} is malformed: {e}") from e
    if key.version > VERSION:
        raise FormatTooNewError(f"key {name} is of version {key.version}", hint="Use a newer incbak.")
    if not sound:
        raise DamagedError(f"key {name} is malformed: its name, or what it costs to open")
    return key


def open_key(key: KeyFile, repository: str, passphrase: bytes) -> bytes | None:
    """The master key; ``None`` when the passphrase is another key's."""
    stretched = _stretched(passphrase, bytes.fromhex(key.salt), key.cost)
    master = cipher.unwrap(stretched, bytes.fromhex(key.wrapped), _bound(repository, key.id))
    return master if master is not None and len(master) == cipher.KEY else None


@dataclass(frozen=True)
class Unlocked:
    """The master key, and the id of the file that it was in."""

    master: bytes
    key: str


def unlock(storage: Storage, repository: str, passphrase: bytes, first: str = "") -> Unlocked:
    """The master key; the file ``first`` is tried before all others, then the cheapest. Changes nothing.

    Raises `WrongPassphraseError`; `DamagedError` when no key can be read.
    """
    found, bad = read_keys(storage, first)
    for key in _tried(found, repository, first):
        if (master := open_key(key, repository, passphrase)) is not None:
            return Unlocked(master, key.id)
    if not found:
        why = f"none of its keys can be read: {'; '.join(bad.values())}" if bad else "it has no key"
        hint = "Bring back one that was exported: incbak key import FILE"
        raise DamagedError(f"the repository is encrypted, and {why}", hint=hint)
    if bad:
        what = f"the passphrase opens none of the keys that can be read ({len(bad)} cannot: {'; '.join(bad.values())})"
        raise WrongPassphraseError(what, hint="Nothing was touched.")
    what = f"the passphrase does not open repository {repository[:8]}"
    if len(storage.list(KIND)) > MAX_KEYS:
        what += f" by any of the {MAX_KEYS} keys that were tried; there are more than a repository can have"
        hint = "Somebody may have added files to keys/: remove those that are not yours."
        raise WrongPassphraseError(what, hint=hint)
    raise WrongPassphraseError(what, hint="Nothing was touched.")


def _tried(found: Iterable[KeyFile], repository: str, first: str = "") -> list[KeyFile]:
    """The keys of a repository that are tried, in this order."""
    ours = [key for key in found if key.repository == repository]
    return sorted(ours, key=lambda key: (key.id != first, key.cost.work))[:MAX_KEYS]


def remove_key(
    storage: Storage, repository: str, start: str, passphrase: bytes, proves: Callable[[bytes], bool]
) -> str:
    """Remove the key whose id begins so, durably; its id. Raises `UsageError`.

    ``passphrase`` must open another one that ``proves`` believes: a file that is in ``keys`` may be damaged, of another
    repository, or somebody else's, and opens nothing.
    """
    with storage.lock("keys.lock", exclusive=True, wait=_WAIT):
        names = [n for n in storage.list(KIND) if is_id(n) and start and n.startswith(start)]
        if len(names) != 1:
            what = "several keys begin" if names else "no key begins"
            raise UsageError(f"{what} with {start[:64]!r}", hint="See: incbak key list")
        stay = [k for k in read_keys(storage)[0] if k.id != names[0]]
        for key in _tried(stay, repository):
            if (master := open_key(key, repository, passphrase)) is not None and proves(master):
                storage.remove(KIND, names[0])
                return names[0]
        what = f"the passphrase opens no key but {names[0][:8]}, which stays"
        raise UsageError(what, hint="Add another with incbak key add, and give its passphrase to remove this one.")


def import_key(
    storage: Storage, repository: str, data: bytes, passphrase: bytes, proves: Callable[[bytes], bool]
) -> str:
    """Put an exported key back if the passphrase opens it and ``proves`` believes the master key; the key's id.

    Raises `UsageError` for what is no key of this repository, `WrongPassphraseError`, `DurabilityError`.
    """
    try:
        name = msgspec.json.decode(data, type=KeyFile).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError("the file is no key", hint="It must be what incbak key export wrote.") from e
    try:
        key = decode(name, data)
    except DamagedError as e:
        raise UsageError(str(e), hint="Nothing was changed.") from e
    if key.repository != repository:
        what = f"the key is of repository {key.repository[:8]!r}, and this one is {repository[:8]}"
        raise UsageError(what, hint="Nothing was changed.")
    master = open_key(key, repository, passphrase)
    if master is None:
        raise WrongPassphraseError("the passphrase does not open the key", hint="Nothing was changed.")
    if not proves(master):
        raise UsageError("the key holds another master key than the repository's", hint="Nothing was changed.")
    try:
        storage.write(KIND, key.id, data)
    except FileExistsError:
        if storage.read(KIND, key.id, 2 * _LIMIT) != data:
            storage.remove(KIND, key.id)  # damaged
            storage.write(KIND, key.id, data)
    return key.id


def _stretched(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    room = cost.memory + (cost.p * cost.r * 128) + (32 << 20)
    return hashlib.scrypt(passphrase, salt=salt, n=cost.n, r=cost.r, p=cost.p, maxmem=room, dklen=cipher.KEY)


def _bound(repository: str, ident: str) -> bytes:
    return f"incbak key {repository} {ident}".encode()
