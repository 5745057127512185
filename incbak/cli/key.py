"""``incbak key``: the passphrases of an encrypted repository."""

from __future__ import annotations

from pathlib import Path

import click

from incbak import durable
from incbak.cli.settings import Settings, common, one_line, settings
from incbak.errors import UsageError
from incbak.opening import open_text
from incbak.repo import keys
from incbak.repo.repository import Config, Repository
from incbak.repo.storage.local import LocalStorage
from incbak.report.backups import table


@click.group(short_help="The passphrases of an encrypted repository.")
@common
def key() -> None:
    """Each key file in the repository holds its master key, wrapped by one passphrase. Any of them opens it.

    \b
    Example:
      incbak -r /backup key add
      incbak -r /backup key export /root/incbak-backup.key
    """


@key.command("list", short_help="List the keys.")
@common
def list_keys() -> None:
    """List the keys. No passphrase is needed.

    \b
    Example:
      incbak -r /backup key list
    """
    here = settings()
    storage, _config = _encrypted(here)
    found, bad = keys.read_keys(storage)
    for each in found if here.json else ():
        here.tell({"id": each.id, "created": each.created, "label": each.label})
    here.say(table([["ID", "CREATED", "LABEL"], *[[k.id[:8], k.created, k.label] for k in found]]), lines=True)
    for why in bad.values():
        click.echo(one_line(f"incbak: {why}"), err=True)


@key.command(short_help="Add a passphrase.")
@click.option("--label", metavar="TEXT", default="", help="What it is for.")
@common
def add(label: str) -> None:
    """Add a passphrase. It is asked for twice, or comes from INCBAK_NEW_PASSWORD_FILE, _COMMAND or _FD. To change one,
    add the new one and remove the old.

    \b
    Example:
      incbak -r /backup key add --label office
    """
    here = settings()
    storage, config = _encrypted(here)
    master = Repository.unlock(storage, config, here.passphrase).master
    made = keys.add_key(storage, config.id, master, here.passphrase.new(), label=label[:200])
    _told(here, made, "added")


@key.command(short_help="Remove a passphrase.")
@click.argument("ident", metavar="ID")
@common
def remove(ident: str) -> None:
    """Remove the key with that ID, or a prefix of one. The passphrase that is given must open another key, so that one
    is left that is known to work. Who has read the file, and knows its passphrase, still has the master key.

    \b
    Example:
      incbak -r /backup key remove 1f2e3d4c
    """
    here = settings()
    storage, config = _encrypted(here)
    Repository.unlock(storage, config, here.passphrase)
    _told(here, keys.remove_key(storage, config.id, ident, here.passphrase(), config.opens), "removed")


@key.command(short_help="Write a key to a file, for the day when the repository's are lost.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--id", "ident", metavar="ID", help="Which, if there are several.  [default: what the passphrase opens]")
@common
def export(file: Path, ident: str | None) -> None:
    """Write a key to FILE, which must not exist. It still needs its passphrase: keep both, and not together.

    \b
    Example:
      incbak -r /backup key export /root/incbak-backup.key
    """
    here = settings()
    here.refuse_own(file)
    storage, config = _encrypted(here)
    passphrase = here.passphrase()
    opened = [k for k in keys.read_keys(storage)[0] if ident is None or k.id.startswith(ident)]
    for each in opened:
        if keys.open_key(each, config.id, passphrase) is not None:
            try:
                durable.write_new(file, [storage.read(keys.KIND, each.id, 1 << 20), b"\n"])
            except FileExistsError as e:
                raise UsageError(f"{file} exists already") from e
            _told(here, each.id, f"written to {file}")
            return
    keys.unlock(storage, config.id, passphrase)  # says what is wrong with the passphrase
    raise UsageError(f"the passphrase does not open key {str(ident)[:64]!r}", hint="See: incbak key list")


@key.command("import", short_help="Bring back a key that was exported.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@common
def import_(file: Path) -> None:
    """Put the key in FILE into the repository, if the passphrase opens it and it is the repository's.

    \b
    Example:
      incbak -r /backup key import /root/incbak-backup.key
    """
    here = settings()
    storage, config = _encrypted(here)
    try:
        with open_text(file) as stream:
            data = stream.read(1 << 20).rstrip(b"\n")
    except OSError as e:
        raise UsageError(f"cannot read the key {file}: {e.strerror}") from e
    _told(here, keys.import_key(storage, config.id, data, here.passphrase(), config.opens), "is in the repository")


def _encrypted(here: Settings) -> tuple[LocalStorage, Config]:
    """Raises `UsageError` for a repository that has no keys."""
    path = here.repository_path()
    storage, config = Repository.look(path)
    if not config.cipher:
        raise UsageError(f"the repository {path} is not encrypted", hint="incbak init --encrypt makes one that is.")
    return storage, config


def _told(here: Settings, ident: str, what: str) -> None:
    if here.json:
        here.tell({"id": ident})
    here.say(f"key {ident[:8]} {what}")
