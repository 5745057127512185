"""Commands that take a VM by its name in the configuration, or all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import click

from incbak import programs
from incbak.cli.encodable import refuse_unencodable, refuse_unencodable_path
from incbak.cli.passphrase import Passphrase
from incbak.cli.settings import Settings, one_line
from incbak.cli.signals import LOOK_SECONDS, interruptible
from incbak.errors import IncbakError, IncompleteError, UsageError
from incbak.fleet.config import Vm

_LISTS = {
    "disks": "--disk",
    "exclude": "--exclude",
    "tags": "--tag",
    "attach": "--attach",
    "allow_backing": "--allow-backing",
    "trust_backing": "--trust-backing",
}
_TEXTS = {
    "lock_wait": "--lock-wait",
    "max_duration": "--max-duration",
    "monitor_wait": "--monitor-wait",
    "speed_limit": "--speed-limit",
    "scratch_dir": "--scratch-dir",
    "scratch_limit": "--scratch-limit",
    "audit": "--audit",
    "trust_after_boot": "--trust-after-boot",
    "agent_socket": "--agent-socket",
    "format": "--format",
}
_FLAGS = {"quiesce": "--quiesce", "strict": "--strict", "ignore_ctime": "--ignore-ctime"}


class Configured(click.Command):
    """If SOURCE is a VM of the configuration, its options stand before those of the command line, which win."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As of any command."""
        typed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        here = ctx.ensure_object(Settings)
        if typed.get("config"):
            here.config = Path(typed["config"])
        if typed.get("all_vms"):
            ctx.meta[_REST] = _without(args, "--all", "--jobs")
        elif isinstance(source := typed.get("source"), str):  # click has something else for what is missing
            args = [*self._expanded(here, source), *args]
        rest = super().parse_args(ctx, args)
        if not typed.get("all_vms") and typed.get("jobs") is not None:
            raise UsageError("--jobs has no effect without --all", hint="Leave it out.")
        return rest

    def _expanded(self, here: Settings, source: str) -> list[str]:
        if source.startswith("qmp:") or "/" in source:
            return []
        config = here.configuration()
        if source not in config.vms:
            if config.vms and not Path(source).exists():
                names = ", ".join(sorted(config.vms))
                raise UsageError(f"{source} is no VM of the configuration, and no image here", hint=f"It has: {names}.")
            return []
        here.vm = config.vm(source)
        known = {option for parameter in self.params for option in parameter.opts}
        return list(_options(here, source, here.vm, known))


_REST = "incbak.rest"
_KEPT = 16 << 20
"""Bytes of what the command of one VM prints, and its hooks."""


def _options(here: Settings, name: str, vm: Vm, known: set[str]) -> Iterator[str]:
    yield from ("--name", name)
    for field, option in (("repository", "--repository"), ("state_dir", "--state-dir")):
        given = "state" if field == "state_dir" else field
        if getattr(vm, field) and given not in here.typed:
            yield from (option, getattr(vm, field))
    for field, option in _LISTS.items():
        for value in getattr(vm, field) if option in known else ():
            yield from (option, value)
    for field, option in _TEXTS.items():
        if option in known and getattr(vm, field):
            yield from (option, getattr(vm, field))
    for field, option in _FLAGS.items():
        if option in known and getattr(vm, field):
            yield option


def _without(args: Sequence[str], flag: str, valued: str) -> list[str]:
    rest, skip = [], False
    for arg in args:
        if skip or arg in (flag, valued) or arg.startswith(f"{valued}="):
            skip = arg == valued and not skip
        else:
            rest.append(arg)
    return rest


def source_of(here: Settings, source: str | None) -> str:
    """What the engine is opened with. Raises `UsageError` when nothing was named."""
    if source is None:
        raise UsageError(
            "missing argument SOURCE", hint="Name a monitor, an image, or a VM of the configuration; or say --all."
        )
    found = here.vm.source if here.vm else source
    refuse_unencodable("SOURCE", [found]) if found.startswith("qmp:") else refuse_unencodable_path("SOURCE", [found])
    return found


@dataclass(frozen=True)
class Done:
    """How the command of one VM ended."""

    vm: str
    code: int
    out: str
    err: str

    def say_errors(self) -> None:
        """On stderr, with the VM's name."""
        for line in self.err.splitlines():
            text = line.removeprefix("incbak: ")
            click.echo(one_line(line if text == line else f"incbak: {self.vm}: {text}"), err=True)


def run_all(here: Settings, command: str, jobs: int, *, json: bool = False) -> Iterator[Done]:
    """Run ``incbak command VM`` for every VM of the configuration, so many at once, each in a process of its own.

    What they print comes with the result, in the order in which they end. SIGTERM and SIGINT end them too.
    """
    names = list(here.configuration().vms)
    if not names:
        where = here.config or "the configuration"
        raise UsageError(f"{where} has no VM", hint="Write a table [vms.NAME] with a source into it.")
    rest = click.get_current_context().meta[_REST]
    argv = [sys.executable, "-P", "-m", "incbak", *_common(here, json), command]
    children = _Children(here.passphrase)

    def one(name: str) -> Done:
        process = children.start([*argv, name, *rest])
        ended = programs.collect(process, kept=_KEPT)
        return Done(name, ended.code, programs.text(ended.out), programs.text(ended.err))

    with interruptible(), ThreadPoolExecutor(max(jobs, 1), "vm") as pool:
        work: list[Future[Done]] = []
        try:
            for name in names:
                work.append(pool.submit(one, name))
            waiting = set(work)
            while waiting:
                done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                for each in done:
                    yield each.result()
        except BaseException:
            for each in work:
                each.cancel()
            children.end()
            raise


class _Children:
    """The processes of one run. After `end` none is left that was not told to end, also none that was just starting."""

    def __init__(self, passphrase: Passphrase | None = None) -> None:
        self._passphrase = passphrase
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Raises `KeyboardInterrupt` after `end`."""
        with self._lock:
            if self._ended:
                raise KeyboardInterrupt
            more, file = self._passphrase.for_child() if self._passphrase else ({}, None)
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                env={**os.environ, **more},
                pass_fds=(file.fileno(),) if file else (),
            )
            if file:
                file.close()
            self._running.append(process)
            return process

    def end(self) -> None:
        """SIGTERM to all of them: each cleans up."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def _common(here: Settings, json: bool) -> Iterator[str]:
    for field, option in (("repository", "--repository"), ("state", "--state-dir"), ("config", "--config")):
        if getattr(here, field) and (field in here.typed or field == "config"):
            yield from (option, str(getattr(here, field)))
    if here.quiet and not json:
        yield "--quiet"
    if here.verbose:
        yield "--verbose"
    if here.json or json:
        yield "--json"


def judge(results: Sequence[Done], done: str = "is backed up") -> None:
    """Raises `IncompleteError` when some VMs failed, `IncbakError` when all did."""
    failed = [r for r in results if r.code]
    if not failed:
        return
    text = f"{len(failed)} of {len(results)} VMs: {', '.join(f'{r.vm} (exit code {r.code})' for r in failed)}"
    if all(r.code not in (0, IncompleteError.exit_code) for r in results):
        raise IncbakError(f"nothing {done}, {text}", hint="What each of them said is above.")
    raise IncompleteError(f"not all {done}, {text}", hint="What each of them said is above.")
