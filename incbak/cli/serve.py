"""``incbak serve``: parse, run the daemon, return its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from incbak import host
from incbak.bitmap.store import component
from incbak.cli.encodable import refuse_unencodable, refuse_unencodable_path
from incbak.cli.given import VM_NAME, refuse_tree, refuse_unfit_name
from incbak.cli.settings import common, ignores_ctime, settings
from incbak.cli.tls import serves_tls, tls_of
from incbak.errors import UsageError
from incbak.serve.daemon import Daemon, ServeOptions
from incbak.units import parse_size


@click.command("serve", short_help="Export raw images over NBD, with persistent dirty bitmaps and a QMP monitor.")
@click.option("--name", required=True, type=VM_NAME, help="The VM whose disks these are: names its bitmaps.")
@click.option("--socket", "nbd", type=click.Path(path_type=Path), metavar="PATH", help="Unix socket for NBD.")
@click.option("--monitor", type=click.Path(path_type=Path), metavar="PATH", help="Unix socket for QMP.")
@click.option("--tcp", metavar="HOST:PORT", help="Serve NBD on TCP too. Without --tls-certs: trusted networks only.")
@serves_tls
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option("--stdio", is_flag=True, help="Serve one NBD connection on stdin and stdout, then end.")
@click.option(
    "--scratch-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),
    show_default=True,
    metavar="DIR",
    help="Where old content waits for a backup while the guest writes.",
)
@click.option("--scratch-limit", metavar="SIZE", help="At most so much of it.  [default: half of what is free]")
@click.option(
    "--max-connections", type=click.IntRange(1, 10000), default=100, show_default=True, metavar="N",
    help="Clients at once: so many local ones, and so many over TCP.",
)  # fmt: skip
@ignores_ctime
@click.argument("disks", nargs=-1, required=True, metavar="DISK=IMAGE...")
@common
def serve(
    name: str,
    nbd: Path | None,
    monitor: Path | None,
    tcp: str | None,
    tls_certs: Path | None,
    tls_verify_peer: bool,
    read_only: bool,
    stdio: bool,
    scratch_dir: Path,
    scratch_limit: str | None,
    max_connections: int,
    ignore_ctime: bool,
    disks: tuple[str, ...],
) -> None:
    """Export each IMAGE, a raw file or block device, under the name DISK, and for reading only as DISK:ro.

    Every write is recorded in the disk's bitmaps before it is issued. A line on stdout says when and where the disks
    and the monitor can be reached; systemd is told too. SIGTERM ends cleanly; a second one within 5 seconds.

    \b
    Example:
      incbak serve --name web1 vda=/srv/web1.raw vdb=/dev/vg/web1-data
    """
    refuse_unencodable("a name or address", [name, tcp or "", *(text.partition("=")[0] for text in disks)])
    refuse_unencodable_path("a path", [*(text.partition("=")[2] for text in disks), *filter(None, [nbd, monitor])])
    refuse_unfit_name(name, settings().state_dir)
    for each in filter(None, [nbd, monitor]):
        refuse_tree("the directory of a socket,", each.parent)
        settings().refuse_own(each, socket=True)
    runtime = host.runtime_dir() / component(name)
    options = ServeOptions(
        name=name,
        disks=[_disk(d) for d in disks],
        state_dir=settings().state_dir,
        nbd_socket=nbd or runtime / "nbd.sock",
        monitor_socket=monitor or (None if stdio else runtime / "qmp.sock"),
        tcp=parse_tcp(tcp) if tcp else None,
        tls=tls_of(tls_certs, tls_verify_peer),
        read_only=read_only,
        stdio=stdio,
        scratch_dir=scratch_dir,
        scratch_limit=parse_size(scratch_limit) if scratch_limit else None,
        max_connections=max_connections,
        ignore_ctime=ignore_ctime,
    )
    sys.exit(Daemon(options).run())


def _disk(text: str) -> tuple[str, Path]:
    name, equals, image = text.partition("=")
    if not equals or not name or not image:
        raise UsageError(f"not DISK=IMAGE: {text}", hint="Write for example vda=/srv/web1.raw.")
    component(name)
    return name, Path(image)


def parse_tcp(text: str) -> tuple[str, int]:
    """The address to listen on. Raises `UsageError`."""
    host_name, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"not HOST:PORT: {text}", hint="Write for example 127.0.0.1:10809.")
    return host_name.strip("[]") or "127.0.0.1", int(port)
