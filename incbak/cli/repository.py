"""``incbak init``, ``list``, ``show``, ``diff`` and ``check``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click
import msgspec

from incbak.cli.given import VM_NAME, refuse_tree
from incbak.cli.settings import Settings, common, one_line, printable, settings
from incbak.errors import DamagedError, DurabilityError, UsageError
from incbak.repo import check as checks
from incbak.repo import outputs
from incbak.repo.pins import read_pins
from incbak.repo.record import Record
from incbak.repo.repository import DEFAULT_CLUSTER, Repository
from incbak.repo.tree import differing
from incbak.report.backups import as_json, details, listing
from incbak.report.proof import coverage_json, coverage_text
from incbak.units import counted, format_size, parse_duration, parse_size


@click.command(short_help="Make a new repository.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--cluster-size", metavar="SIZE", default=str(DEFAULT_CLUSTER), help="4K to 4M.  [default: 64K]")
@click.option("--encrypt", is_flag=True, help="Encrypt what is stored, with a passphrase.")
@common
def init(path: Path | None, cluster_size: str, encrypt: bool) -> None:
    """Make a repository in PATH (or where -r says), which must be missing or empty.

    With --encrypt nobody reads the backups without the passphrase: a command asks for it on a terminal, or takes it
    from INCBAK_PASSWORD_FILE, INCBAK_PASSWORD_COMMAND or INCBAK_PASSWORD_FD. Who forgets it has lost the backups. Keep
    a copy of the key elsewhere, too: incbak key export.

    \b
    Example:
      incbak init /backup
      INCBAK_PASSWORD_FILE=/root/backup.pass incbak init /backup --encrypt
    """
    here = settings()
    where = path or here.repository_path()
    outputs.refuse_own(where.absolute().parent, {})
    if path and "repository" in here.typed:
        raise UsageError(f"two places for the repository: {path} and -r {here.repository}", hint="Leave one of them.")
    refuse_tree("the repository", where)
    if not encrypt and (source := here.passphrase.source):
        said = f"incbak: it will not be encrypted, though {source} is set; with it, other commands will refuse it"
        click.echo(said, err=True)
    repo = Repository.init(where, parse_size(cluster_size), here.passphrase.first() if encrypt else None)
    with suppress(DurabilityError):
        here.memory.forget_place(where)
        if encrypt:
            here.memory.note_place(where, repo.config, repo.key)
    if here.json:
        here.tell({"repository": str(where), "id": repo.id, "cluster_size": repo.cluster_size, "encrypted": encrypt})
    how = ", encrypted" if encrypt else ""
    here.say(f"made repository {repo.id[:8]} in {where}, clusters of {format_size(repo.cluster_size)}{how}")


@click.command("list", short_help="List the backups.")
@click.option("--name", type=VM_NAME, help="Only of this VM.")
@common
def list_backups(name: str | None) -> None:
    """List the backups, oldest first.

    \b
    Example:
      incbak -r /backup list --name web1
    """
    here = settings()
    repo = here.open()
    records = repo.backups(name)
    pins = read_pins(repo.storage)
    if here.json:
        for record in records:
            here.tell(as_json(record) | {"pinned": record.id in pins})
    elif records:
        click.echo(printable(listing(records, pins)))
    elif not here.quiet:
        click.echo("no backups")
    if repo.unreadable:
        why = "; ".join(repo.unreadable.values())
        raise DamagedError(f"{counted(len(repo.unreadable), 'record')} cannot be read: {why}", hint="Run: incbak check")


@click.command(short_help="Show one backup in full.")
@click.argument("backup")
@click.option("--name", type=VM_NAME, help="Which VM's latest.")
@click.option("--vm", is_flag=True, help="Show what the engine said of the VM, as JSON.")
@click.option("--attachment", metavar="FILE", help="Print a file that was attached.")
@common
def show(backup: str, name: str | None, vm: bool, attachment: str | None) -> None:
    """Show a backup: an id, a unique prefix of one, or "latest".

    \b
    Example:
      incbak -r /backup show latest --name web1
    """
    here = settings()
    repo = here.open()
    record = repo.find(backup, name)
    pinned = record.id in read_pins(repo.storage)
    if attachment is not None:
        if attachment not in record.attachments:
            have = ", ".join(record.attachments) or "none"
            raise UsageError(f"backup {record.id[:8]} has no attachment {attachment!r}", hint=f"It has: {have}.")
        click.echo(record.attachments[attachment], nl=False)
    elif vm:
        click.echo(msgspec.json.format(msgspec.json.encode(record.config)).decode())
    elif here.json:
        here.tell(as_json(record) | {"config": record.config, "host": record.host, "program": record.program,
                                   "attachments": list(record.attachments), "pinned": pinned})  # fmt: skip
    else:
        click.echo(printable(details(record, pinned=pinned)))


@click.command(short_help="List the clusters that differ between two backups.")
@click.argument("a")
@click.argument("b")
@click.option("--disk", metavar="DISK", help="Only this disk.")
@click.option("--name", type=VM_NAME, help="Which VM's latest.")
@common
def diff(a: str, b: str, disk: str | None, name: str | None) -> None:
    """List the ranges that differ between backups A and B: disk, offset, length, in bytes.

    Only the pages of the two trees that differ are read.

    \b
    Example:
      incbak -r /backup diff 1f2e3d4c latest --disk vda
    """
    here = settings()
    repo = here.open()
    left, right = repo.find(a, name), repo.find(b, name)
    names = [d.name for d in left.disks if right.disk(d.name)] if disk is None else [disk]
    if not names:
        raise UsageError(f"backups {left.id[:8]} and {right.id[:8]} have no disk in common")
    total = 0
    for each in names:
        for offset, length in _differing(repo, left, right, each):
            total += length
            if here.json:
                here.tell({"disk": each, "offset": offset, "length": length})
            else:
                click.echo(f"{printable(each)} {offset} {length}")
    if not here.json and not here.quiet:
        click.echo(f"{format_size(total)} differ", err=True)


def _differing(repo: Repository, left: Record, right: Record, name: str) -> list[tuple[int, int]]:
    x, y = left.disk(name), right.disk(name)
    if x is None or y is None:
        raise UsageError(f"not both backups have a disk {name!r}", hint="See: incbak show BACKUP")
    if x.size != y.size:
        raise UsageError(f"disk {name} has {x.size} bytes in the one and {y.size} in the other backup")
    step = left.cluster_size
    runs = differing(repo.tree(x, step), repo.tree(y, step))
    return [(first * step, min(count * step, x.size - first * step)) for first, count in runs]


@click.command(short_help="Verify the repository.")
@click.option("--read-data", is_flag=True, help="Read and verify every blob.")
@click.option("--read-data-subset", metavar="PERCENT", help="Read and verify such a part of the packs, drawn anew.")
@click.option(
    "--max-duration", metavar="TIME", help="With --read-data: read for so long, and go on there next time: 30m."
)
@click.option("--rebuild-index", is_flag=True, help="First make the index anew from the packs.")
@common
def check(read_data: bool, read_data_subset: str | None, max_duration: str | None, rebuild_index: bool) -> None:
    """Verify config, packs, index, records and trees; with --read-data the digest of everything that is stored.

    With --max-duration it reads what was read longest ago, and stops: each night a part, and it says within which time
    all has been read. Exits with 13 when something is damaged. What is damaged is stored again by the next backup that
    reads it.

    \b
    Example:
      incbak -r /backup check
      incbak -q check --read-data --max-duration 30m
    """
    here = settings()
    if read_data and read_data_subset:
        raise UsageError("--read-data and --read-data-subset exclude each other", hint="All of it, or a part.")
    duration = parse_duration(max_duration) if max_duration else None
    if read_data and read_data_subset:
        hint = "Leave out --read-data to read a part."
        raise UsageError("--read-data reads everything, --read-data-subset a part", hint=hint)
    if duration is not None and (not read_data or read_data_subset):
        raise UsageError("--max-duration goes with --read-data alone", hint="It reads what was read longest ago.")
    repo = here.open()
    fraction = _fraction(read_data_subset) if read_data_subset else 1.0
    if rebuild_index:
        with repo.storage.lock("repository.lock", exclusive=True, wait=0):
            here.say(f"made the index anew: {counted(checks.rebuild_index(repo), 'blob')}")
    console = here.reporter()
    try:
        found = checks.check(
            repo,
            read_data=read_data or bool(read_data_subset),
            fraction=fraction,
            max_duration=duration,
            report=console,
        )
    except checks.NotNotedError as e:
        click.echo(printable(f"incbak: warning: {e}"), err=True)
        found = e.report
    finally:
        console.end()
    found.problems += [checks.Problem(what) for what in here.memory.troubles(repo)]
    _tell(here, found)


def _tell(here: Settings, found: checks.Report) -> None:
    if here.json:
        problems = [{"what": p.what, "backups": list(p.backups), "harmless": p.harmless} for p in found.problems]
        here.tell({"problems": problems, "backups": found.backups, "packs": found.packs, "blobs": found.blobs,
                   "bytes_read": found.bytes_read, "packs_read": found.packs_read,
                   "coverage": coverage_json(found.coverage)})  # fmt: skip
    for problem in found.problems:
        click.echo(one_line(f"incbak: {problem.what}"), err=True)
    if found.serious:
        if found.packs_read:
            here.say(coverage_text(found.coverage))
        hurt = sorted({b[:8] for p in found.problems for b in p.backups})
        what = f"backups that are not whole: {', '.join(hurt)}" if hurt else "every backup is whole"
        raise DamagedError(f"{counted(len(found.serious), 'problem')}; {what}", hint=found.hint)
    read = f", {format_size(found.bytes_read)} read" if found.bytes_read else ""
    looked = [counted(found.backups, "backup"), counted(found.packs, "pack"), counted(found.blobs, "blob")]
    here.say(f"no problems: {', '.join(looked)}{read}")
    if found.packs_read or found.coverage.read_packs:
        here.say(coverage_text(found.coverage))


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UsageError(f"not a percentage: {text!r}", hint="Write for example 5%.")
    return value
