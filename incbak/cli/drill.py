"""``incbak drill``."""

from __future__ import annotations

import re
import secrets
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from incbak.cli.configured import Configured, judge, run_all
from incbak.cli.given import VM_NAME, refuse_without
from incbak.cli.settings import Settings, common, one_line, settings
from incbak.cli.signals import interrupt_on_ending
from incbak.cli.surroundings import refuse_own_metrics
from incbak.drill.boot import BUSES, Boot
from incbak.drill.drill import NotWrittenError, Options, drill, place_of
from incbak.errors import DamagedError, DrillError, DurabilityError, IncbakError, UsageError
from incbak.fleet.metrics import write_drill_metrics
from incbak.repo.drills import Drill, drills_of, read_drills
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.report.proof import drill_json
from incbak.units import format_duration, parse_duration, parse_size


@click.command("drill", cls=Configured, short_help="Try a restore, and write down how it went.")
@click.argument("source", metavar="[VM]", required=False)
@click.option("--all", "all_vms", is_flag=True, help="Every VM of the configuration.")
@click.option("--jobs", type=click.IntRange(1, 64), default=1, help="With --all: so many at once.  [default: 1]")
@click.option("--name", type=VM_NAME, help="Only this VM.  [default: every VM in the repository]")
@click.option("--backup", metavar="BACKUP", default="latest", show_default=True, help="Which backup.")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk, and write nothing down.")
@click.option("--full", is_flag=True, help="Restore every cluster; the default.")
@click.option("--sample", metavar="PERCENT", help="Compare so much of the data only, and check no file systems: 5%.")
@click.option("--seed", type=click.IntRange(0), help="Draw the sample as the run that printed this.")
@click.option("--no-fsck", is_flag=True, help="Do not check file systems.")
@click.option("--boot", "boots", is_flag=True, help="Boot a guest from the backup with QEMU, without a network.")
@click.option(
    "--boot-expect",
    metavar="REGEX",
    default="login:",
    show_default=True,
    help="What it writes to its serial console when it is up.",
)
@click.option("--boot-timeout", metavar="TIME", default="5m", show_default=True, help="Wait for it so long.")
@click.option("--boot-memory", metavar="SIZE", default="1G", show_default=True, help="The guest's memory.")
@click.option(
    "--boot-bus", type=click.Choice(BUSES), default="virtio", show_default=True, help="What its disks are on."
)
@click.option("--qemu", metavar="PROGRAM", help="QEMU.  [default: qemu-system of this host's processor]")
@click.option(
    "--qemu-arg", "qemu_args", multiple=True, metavar="ARG", help="One more argument for it; may be repeated."
)
@click.option(
    "--scratch-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default="/var/tmp",
    show_default=True,
    help="Where file systems are copied to, and what the guest writes is kept.",
)
@click.option(
    "--metrics",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write how it went here, for Prometheus.  [default: as the configuration says]",
)
@common
def drill_command(source: str | None, all_vms: bool, jobs: int, name: str | None, **options: Any) -> None:
    """Restore the latest backup of each VM into nothing, and compare what came of it with the record, down to the root
    digest of each disk; check the file systems on it; with --boot, boot it.

    File systems are checked on copies, whose journals are replayed first: ext2 to ext4, FAT and NTFS, in partitions or
    not. How it went is kept in the repository, and shown by status and report. Exits with 1 when something is wrong,
    with 13 when it is the repository; then the next backup stores anew what it can.

    \b
    Examples:
      incbak -r /backup drill --name web1
      incbak -r /backup drill --sample 5%
      incbak drill web1 --boot --boot-bus scsi --qemu-arg=-bios --qemu-arg=/usr/share/ovmf/OVMF.fd
    """  # fmt: skip
    here = settings()
    if all_vms:
        if source or name:
            raise UsageError("--all is for all VMs of the configuration, and one was named")
        results = []
        for done in run_all(here, "drill", jobs):
            results.append(done)
            click.echo(done.out, nl=False)
            done.say_errors()
        judge(results, "passed its drill")
        return
    if source and name and not here.vm:
        raise UsageError("the VM is named twice", hint="Leave out --name.")
    interrupt_on_ending()
    _drill(here, name or source, **options)


def _drill(here: Settings, name: str | None, *, backup: str, metrics: Path | None, **options: Any) -> None:
    wanted = _options(**options)
    refuse_own_metrics(here, metrics)
    configured = Path(here.vm.metrics) if here.vm and here.vm.metrics else None
    with closing(here.open()) as repo:
        records = _records(repo, backup, name)
        if metrics and len(records) > 1:
            raise UsageError("--metrics is for one VM", hint="Say which with --name.")
        done, unwritten = list[Drill](), None
        for record in records:
            try:
                made = _one(here, repo, record, wanted)
            except NotWrittenError as e:
                unwritten, made = e, e.drill
            done.append(made)
            if (file := metrics or configured) and not wanted.disks:
                write_drill_metrics(file, made.vm, drills_of(read_drills(repo.storage), made.vm))
        _judge(repo, done)
        if unwritten:
            raise DurabilityError("the drills were good, and that is not written down", hint=unwritten.hint)


def _options(
    disks: tuple[str, ...],
    full: bool,
    sample: str | None,
    seed: int | None,
    no_fsck: bool,
    boots: bool,
    scratch_dir: Path,
    **of_boot: Any,
) -> Options:
    if full and sample:
        raise UsageError("--full and --sample exclude each other")
    if not sample:
        refuse_without("--sample", "seed")
    if not boots:
        refuse_without("--boot", *of_boot)
    percent = _percent(sample) if sample else 100.0
    seed = secrets.randbits(32) if seed is None else seed
    return Options(scratch_dir, percent, seed, not no_fsck, _boot(**of_boot) if boots else None, disks)


def _boot(
    boot_expect: str, boot_timeout: str, boot_memory: str, boot_bus: str, qemu: str | None, qemu_args: tuple[str, ...]
) -> Boot:
    try:
        expect = re.compile(boot_expect)
    except re.error as e:
        raise UsageError(f"not a regular expression: {boot_expect!r}: {e}") from e
    more = {"program": qemu} if qemu else {}
    wanted = Boot(expect, parse_duration(boot_timeout), parse_size(boot_memory), boot_bus, qemu_args, **more)
    wanted.check()
    return wanted


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise UsageError(f"not a percentage: {text!r}", hint="Write for example 5%.")
    return value


def _records(repo: Repository, backup: str, name: str | None) -> list[Record]:
    """The backup that was named, or the newest of each VM."""
    if name or backup != "latest":
        return [repo.find(backup, name)]
    newest = {record.vm: record for record in repo.backups()}
    if not newest and not repo.unreadable:
        raise UsageError("there is no backup in the repository", hint="See: incbak list")
    return [newest[vm] for vm in sorted(newest)]


def _one(here: Settings, repo: Repository, record: Record, wanted: Options) -> Drill:
    """Drill one backup and say how it went. Raises `NotWrittenError` after all was said."""
    console, unwritten = here.reporter(), None
    try:
        made = drill(repo, record, wanted, console)
    except NotWrittenError as e:
        made, unwritten = e.drill, e
    finally:
        console.end()
    if here.json:
        here.tell(drill_json(made))
    sampled = f", sample drawn with --seed {made.seed}" if not wanted.whole else ""
    result = "good" if made.good else "failed"
    here.say(f"{made.vm}: drill of {made.backup[:8]}: {result}, in {format_duration(made.seconds)}{sampled}")
    for disk in made.disks:
        how = "compared" if not wanted.whole else "restored"
        matches = (
            f", {disk.wrong} of them wrong" if disk.wrong else "" if not wanted.whole else ", the root digest matches"
        )
        here.say(f"{made.vm} disk {disk.name}: {disk.clusters} of {disk.of} clusters {how}{matches}")
    for row in made.systems:
        state = f"not checked: {row.why}" if row.state == "unchecked" else row.state
        here.say(f"{made.vm} {place_of(row)}: {row.name}: {state}")
    if made.boot and made.boot.good:
        here.say(f"{made.vm}: the guest was up after {format_duration(made.boot.seconds)}")
    for problem in made.problems:
        click.echo(one_line(f"incbak: {made.vm}: {problem}"), err=True)
    if unwritten:
        click.echo(one_line(f"incbak: {unwritten}"), err=True)
        raise unwritten
    return made


def _judge(repo: Repository, done: list[Drill]) -> None:
    """Raises what the worst of them calls for."""
    if repo.unreadable:
        why = "; ".join(repo.unreadable.values())
        raise DamagedError(f"{len(repo.unreadable)} records cannot be read: {why}", hint="Run: incbak check")
    failed = [each for each in done if not each.good]
    if not failed:
        return
    kind: type[IncbakError] = DrillError
    hint = "Look at the guest: an older backup may be as it should be."
    if any(each.exit_code == DamagedError.exit_code for each in failed):
        kind, hint = (
            DamagedError,
            "The next backup stores anew what it can. Try an older one; run: incbak check --read-data",
        )
    what = ", ".join(f"{each.backup[:8]} of {each.vm}" for each in failed)
    raise kind(f"{len(failed)} of {len(done)} drills failed: {what}", hint=hint)
