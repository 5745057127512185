"""``incbak full`` and ``incbak incremental``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from incbak.backup.recorded import recorded_format
from incbak.backup.runner import Options, Outcome, run
from incbak.backup.vm import refuse_unfit
from incbak.cli.attachments import read_attachments
from incbak.cli.configured import Configured, judge, run_all, source_of
from incbak.cli.encodable import refuse_unencodable
from incbak.cli.given import VM_NAME
from incbak.cli.prune import policy_of, prune_after
from incbak.cli.settings import Settings, common, ignores_ctime, settings, trusts_backing
from incbak.cli.signals import ending
from incbak.cli.surroundings import Surroundings, refuse_own_metrics
from incbak.disk.formats import OFFERED
from incbak.engine.base import Engine
from incbak.engine.detect import Source, open_engine
from incbak.errors import BackupError, IncbakError, IncompleteError, LockedError, UsageError
from incbak.fleet.config import SAMPLE, TRUST
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.report.backups import as_json, disk_line
from incbak.report.console import Console
from incbak.units import format_duration, parse_duration, parse_share, parse_size

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


_ENGINE_OPTIONS = (
    click.option("--speed-limit", metavar="RATE", default="0", help="Bytes per second and disk: 50M.  [default: none]"),
    click.option(
        "--scratch-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Of QEMU: where what the guest overwrites waits to be copied.  [default: /var/tmp]",
    ),
    click.option(
        "--scratch-limit",
        metavar="SIZE",
        help="Of QEMU: how much may wait there for each disk; more breaks the backup, never the guest.  "
        "[default: half of the free space]",
    ),
    click.option(
        "--format",
        "form",
        type=click.Choice(OFFERED),
        help="Of an image: its format, where neither its name nor an earlier backup says it.",
    ),
    click.option(
        "--allow-backing",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Of a qcow2 image: a backing or data file elsewhere, or a directory of them; may be repeated.",
    ),
    ignores_ctime,
    click.option("--quiesce", is_flag=True, help="Of QEMU: freeze the guest's file systems at the point in time."),
    click.option(
        "--agent-socket",
        type=click.Path(path_type=Path),
        metavar="SOCKET",
        help="Where the guest agent listens that does so.",
    ),
    click.option(
        "--monitor-wait", metavar="TIME", default="20", help="Wait so long while another client has the monitor."
    ),
)


def _source_options(command: C) -> C:
    options = (
        click.argument("source", metavar="SOURCE", required=False),
        click.option("--all", "all_vms", is_flag=True, help="Every VM of the configuration."),
        click.option(
            "--jobs", type=click.IntRange(1, 64), default=2, help="With --all: so many at once.  [default: 2]"
        ),
        click.option("--name", type=VM_NAME, help="What the VM is called.  [default: as the monitor or image says]"),
        click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated."),
        click.option("--exclude", multiple=True, metavar="DISK", help="Not this disk; may be repeated."),
        click.option("--lock-wait", metavar="TIME", default="0", help="Wait so long for another run of this VM."),
        click.option(
            "--max-duration",
            metavar="TIME",
            default="2d",
            show_default=True,
            help="End the backup as failed if it takes longer than TIME.",
        ),
        click.option("--tag", "tags", multiple=True, metavar="TAG", help="Note in the record; may be repeated."),
        click.option(
            "--attach",
            multiple=True,
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="A text to keep in the record, as the VM's definition; may be repeated.",
        ),
        click.option(
            "--metrics",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write how it went here, for Prometheus.  [default: as the configuration says]",
        ),
        click.option(
            "--prune", "prunes", is_flag=True, help="When it is made, prune the VM by its rules in the configuration."
        ),
        click.option(
            "--strict",
            is_flag=True,
            help="Refuse a VM whose monitor says another name or UUID, or that has backups under another name, unless "
            "this one is the monitor's; otherwise a warning.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and why."),
        trusts_backing,
        *_ENGINE_OPTIONS,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=Configured, short_help="Back up every cluster of a VM's disks.")
@_source_options
@common
def full(source: str | None, **options: Any) -> None:
    """Back up all disks of SOURCE at one point in time, reading every cluster.

    SOURCE is a monitor (qmp:/run/web1.qmp or qmp:HOST:PORT), an image that nobody has open, or the name of a VM in the
    configuration, where its options are.

    \b
    Example:
      incbak -r /backup full qmp:/run/incbak/web1/qmp.sock
    """
    _back_up(source, "full", fallback=True, **options)


@click.command(cls=Configured, short_help="Back up the clusters written since the last backup.")
@_source_options
@click.option("--no-fallback", is_flag=True, help="Exit with 4 rather than read a disk whole.")
@click.option(
    "--audit",
    metavar="PERCENT",
    default="0",
    help="Also read so much of what was not written and compare it with the base, another part each time: 1%. "
    "Of incbak serve and raw images that are off.",
)
@click.option(
    "--trust-after-boot",
    type=click.Choice(TRUST),
    default=TRUST[0],
    show_default=True,
    help="Of a block device in another boot or set-up: read it whole, or believe its bitmap after a random sample.",
)
@common
def incremental(source: str | None, no_fallback: bool, audit: str, trust_after_boot: str, **options: Any) -> None:
    """Back up what the disks' bitmaps say was written since the last backup of SOURCE.

    A disk without a bitmap that can be believed is read whole; the reason is printed and kept in the record.

    \b
    Example:
      incbak -r /backup incremental qmp:/run/incbak/web1/qmp.sock
      incbak -q incremental --all
    """
    sampling = trust_after_boot == SAMPLE
    _back_up(source, "incremental", fallback=not no_fallback, audit=parse_share(audit), sampling=sampling, **options)


def _back_up(source: str | None, kind: str, *, all_vms: bool, jobs: int, **options: Any) -> None:
    """One VM, or all."""
    here = settings()
    if not all_vms:
        _back_up_one(here, source_of(here, source), kind, **options)
        return
    if source or options["name"]:
        raise UsageError("--all is for all VMs of the configuration, and one was named")
    results = []
    for done in run_all(here, kind, jobs):
        results.append(done)
        click.echo(done.out, nl=False)
        done.say_errors()
    judge(results)


def _back_up_one(
    here: Settings,
    source: str,
    kind: str,
    *,
    fallback: bool,
    audit: int = 0,
    sampling: bool = False,
    name: str | None,
    disks: tuple[str, ...],
    exclude: tuple[str, ...],
    lock_wait: str,
    max_duration: str,
    tags: tuple[str, ...],
    attach: tuple[Path, ...],
    metrics: Path | None,
    prunes: bool,
    strict: bool,
    dry_run: bool,
    trust_backing: tuple[str, ...],
    **engine: Any,
) -> None:
    refuse_unencodable("a name or tag", [name or "", *disks, *exclude, *tags, *(path.name for path in attach)])
    refuse_own_metrics(here, metrics)
    policy = _policy(here) if prunes else None
    wait = parse_duration(lock_wait)
    longest = parse_duration(max_duration)
    options = Options(
        incremental=kind == "incremental",
        name=name,
        disks=disks,
        exclude=exclude,
        fallback=fallback,
        audit=audit,
        sampling=sampling,
        strict=strict,
        lock_wait=wait,
        dry_run=dry_run,
        tags=tags,
        attachments=read_attachments(attach),
        memory=here.memory,
        trusted=trust_backing,
        ctime=not engine["ignore_ctime"],
        state_dir=here.state_dir,
    )
    console = here.reporter()
    wanted = Source(source, here.state_dir, name, disks, look=dry_run, sampling=sampling, **engine_settings(**engine))
    with Surroundings(here.vm, name or source, kind, metrics, dry_run=dry_run) as around:
        try:
            outcome = interruptible(_run(here.open(), wanted, options, console, longest))
        finally:
            console.end()
        around.outcome = outcome
        try:
            _tell(here, outcome)
        finally:
            if policy and outcome.record:
                _prune(here, outcome.vm, policy, console)


def _policy(here: Settings) -> Policy:
    """Raises `UsageError` where the configuration has no rules for the VM."""
    if here.vm is None or here.vm.keep is None:
        raise UsageError("--prune is for a VM of the configuration that has rules", hint="Write [vms.NAME.keep].")
    return policy_of(here.vm.keep)


def _prune(here: Settings, vm: str, policy: Policy, console: Console) -> None:
    repo = here.open()
    try:
        prune_after(here, repo, vm, policy, console)
    except IncbakError as e:
        raise IncbakError(f"the backup is made, but nothing was pruned: {e}", hint=e.hint) from e
    finally:
        console.end()
        repo.close()


def engine_settings(
    speed_limit: str,
    scratch_dir: Path | None,
    scratch_limit: str | None,
    quiesce: bool,
    agent_socket: Path | None,
    monitor_wait: str,
    form: str | None = None,
    allow_backing: tuple[Path, ...] = (),
    ignore_ctime: bool = False,
) -> dict[str, Any]:
    """What the options say of how an engine is driven, as fields of `Source`."""
    if quiesce != (agent_socket is not None):
        raise UsageError("--quiesce and --agent-socket go together")
    return {
        "speed": parse_size(speed_limit.removesuffix("/s")),
        "scratch_dir": scratch_dir,
        "scratch_limit": None if scratch_limit is None else parse_size(scratch_limit),
        "agent": agent_socket,
        "format": form or "",
        "allow_backing": allow_backing,
        "ignore_ctime": ignore_ctime,
        "monitor_wait": max(parse_duration(monitor_wait), 0.5),
    }


async def _run(repo: Repository, source: Source, options: Options, console: Console, longest: float) -> Outcome:
    try:
        async with limited(longest):
            await asyncio.to_thread(refuse_unfit, repo, options.name)
            known = replace(source, recorded=await asyncio.to_thread(recorded_format, repo, source))
            engine = await open_waiting(known, options.lock_wait)
            try:
                return await run(repo, engine, options, console)
            finally:
                await engine.close()
    finally:
        repo.close()


@asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[None]:
    """Cancel the block after ``seconds``, as a signal would, so that it cleans up. Raises `BackupError` then."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as e:
        if not limit.expired():
            raise
        raise BackupError(
            f"the backup took longer than {format_duration(seconds)} and was ended",
            hint="If that is too short: --max-duration TIME, or max-duration in the configuration.",
        ) from e


async def open_waiting(source: Source, wait: float) -> Engine:
    """An image that another run holds is waited for, as its lock in the repository is."""
    deadline = time.monotonic() + wait
    while True:
        try:
            return await open_engine(source)
        except LockedError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.2)


def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``; the signals of `ending` cancel it, so that it can clean up. Raises `KeyboardInterrupt` then."""

    async def body() -> T:
        task = asyncio.current_task()
        assert task
        for number in ending():
            with suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(body())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _tell(here: Settings, outcome: Outcome) -> None:
    record = outcome.record
    if record is None:
        for planned in outcome.planned:
            why = f" [{planned.plan.reason}]" if planned.plan.reason else ""
            how = f"incremental on {planned.base.id[:8]}" if planned.base else "full"
            if here.json:
                base = planned.base.id if planned.base else None
                kind = "incremental" if base else "full"
                here.tell({"vm": outcome.vm, "disk": planned.name, "kind": kind, "base": base,
                           "reason": planned.plan.reason, "dry_run": True})  # fmt: skip
            here.say(f"{outcome.vm} {planned.name}: would be {how}{why}")
        return
    if here.json:
        here.tell(as_json(record))
    for disk in record.disks:
        here.say(disk_line(record, disk))
    if outcome.failed:
        why = "; ".join(f"disk {name}: {error}" for name, error in outcome.failed.items())
        raise IncompleteError(f"backup {record.id[:8]} lacks disks: {why}", hint="The next run tries them again.")
    if outcome.left:
        text = f"backup {record.id[:8]} is made, but a part of it is still in the VM's QEMU: {'; '.join(outcome.left)}"
        raise IncompleteError(text, hint="End the other program's block job or filter there; the next run removes it.")
