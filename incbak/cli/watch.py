"""``incbak watch``: parse, watch, return the exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click

from incbak.cli.encodable import refuse_unencodable
from incbak.cli.given import VM_NAME, refuse_unfit_name
from incbak.cli.settings import common, ignores_ctime, one_line, settings
from incbak.cli.signals import ending
from incbak.engine.session import Address
from incbak.errors import UsageError
from incbak.serve import systemd
from incbak.units import parse_duration
from incbak.watch.vm import Watcher, WatchOptions

_WARNINGS = {"invalid", "lost", "left-out", "resumed"}
_READY = {"ready", "waiting", "shutdown"}


@click.command("watch", short_help="Keep a VM's bitmaps over its shutdowns, for images that cannot hold them.")
@click.argument("source", metavar="qmp:SOCKET")
@click.option("--name", type=VM_NAME, help="What the VM is called.  [default: as the monitor says]")
@click.option("--start", is_flag=True, help="Start a VM that was begun with -S, when its bitmaps are loaded.")
@click.option("--once", is_flag=True, help="End with the VM; the exit code is 1 if bitmaps were lost.")
@click.option(
    "--backup-wait", metavar="TIME", default="60", help="After a shutdown, keep the VM so long for a backup that runs."
)
@click.option("--keep-panicked", is_flag=True, help="Leave a guest that panicked paused, as -action panic=pause does.")
@ignores_ctime
@common
def watch(
    source: str,
    name: str | None,
    start: bool,
    once: bool,
    backup_wait: str,
    keep_panicked: bool,
    ignore_ctime: bool,
) -> None:
    """Keep the dirty bitmaps of a running QEMU over clean shutdowns of its guest.

    QEMU stores bitmaps in qcow2 images only. Those of raw images, block devices and others are in its memory: watch
    saves them when the guest shuts down, and loads them before it starts again. So begin the VM with -S (paused), and
    let watch start it. A VM that ran before watch was there, a killed QEMU, a power cut: the next backup reads all.

    QEMU's monitor talks to one client at a time, and watch stays connected. So the VM needs a monitor of its own for
    watch, and another for backups. While it is watched, a VM that the guest shuts down is paused until watch has saved
    and ends QEMU, and so is one whose guest panicked; SIGTERM lets go of the VM. One process watches one VM.

    \b
    Example:
      qemu-system-x86_64 -S -qmp unix:/run/web1.qmp,server=on,wait=off \\
                            -qmp unix:/run/web1.watch,server=on,wait=off ...
      incbak watch qmp:/run/web1.watch --name web1 --start
    """
    refuse_unencodable("a name or path", [source, name or ""])
    address = Address.parse(source)
    if not source.startswith("qmp:") or not address.is_unix:
        raise UsageError(f"not the Unix socket of a monitor: {source}", hint="Write qmp:/path/of/socket.")
    here = settings()
    refuse_unfit_name(name, here.state_dir)

    def tell(event: str, text: str, facts: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a VM is watched whether or not somebody reads what is said
            if here.json:
                here.tell({"event": event, "text": text, **facts})
            elif event in _WARNINGS:
                print(one_line(f"incbak: {text}"), file=sys.stderr)
            else:
                here.say(text)
            sys.stdout.flush()
        if event in _READY:
            systemd.notify(f"READY=1\nSTATUS={one_line(text)}")

    wait = parse_duration(backup_wait)
    options = WatchOptions(
        address,
        name,
        here.state_dir,
        tell,
        start=start,
        once=once,
        backup_wait=wait,
        keep_panicked=keep_panicked,
        ignore_ctime=ignore_ctime,
    )
    sys.exit(0 if asyncio.run(_run(options)) else 1)


async def _run(options: WatchOptions) -> bool:
    watcher = Watcher(options)
    for number in ending():
        asyncio.get_running_loop().add_signal_handler(number, watcher.stop)
    alive = asyncio.create_task(systemd.watchdog())
    try:
        return await watcher.run()
    finally:
        alive.cancel()
