"""``incbak export``."""

from __future__ import annotations

import threading
from pathlib import Path

import click

from incbak.cli.encodable import refuse_unencodable_path
from incbak.cli.given import VM_NAME, refuse_tree, refuse_without
from incbak.cli.serve import parse_tcp
from incbak.cli.settings import common, settings
from incbak.cli.signals import LOOK_SECONDS, on_ending
from incbak.cli.tls import serves_tls, tcp_uri, tls_of
from incbak.errors import UsageError
from incbak.export.image import BackupImage
from incbak.export.overlay import Overlay
from incbak.export.server import ImageExport
from incbak.nbd.server import NbdServer
from incbak.nbd.uri import NbdUri
from incbak.private import PrivateDirectory
from incbak.repo.repository import Repository
from incbak.serve.systemd import notify


@click.command(short_help="Offer a backup as an NBD export, with nothing restored first.")
@click.argument("backup")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated.")
@click.option("--name", type=VM_NAME, help="Which VM's latest, when several share the repository.")
@click.option("--socket", type=click.Path(path_type=Path), metavar="PATH", help="Unix socket.  [default: a new one]")
@click.option("--tcp", metavar="HOST:PORT", help="Serve on TCP instead. Without --tls-certs: trusted networks only.")
@serves_tls
@click.option("--writable", is_flag=True, help="Take writes, and forget them in the end: to boot a VM from it.")
@click.option(
    "--scratch-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default="/var/tmp",
    show_default=True,
    help="Where writes are kept until then.",
)
@common
def export(
    backup: str,
    disks: tuple[str, ...],
    name: str | None,
    socket: Path | None,
    tcp: str | None,
    tls_certs: Path | None,
    tls_verify_peer: bool,
    writable: bool,
    scratch_dir: Path,
) -> None:
    """Serve the disks of BACKUP over NBD until SIGTERM or Ctrl-C. All that is read is verified.

    BACKUP is an id, a unique prefix of one, or "latest". A line on stdout says where the disks are.

    \b
    Examples:
      incbak -r /backup export latest --socket /tmp/old.sock
      qemu-img map nbd+unix:///vda?socket=/tmp/old.sock
      incbak -r /backup export latest --writable --socket /tmp/old.sock    (and boot a VM from it)
    """
    here = settings()
    refuse_unencodable_path("--socket", [socket] if socket else [])
    if socket and tcp:
        raise UsageError("--socket and --tcp exclude each other", hint="An export is on one of them.")
    if socket:
        here.refuse_own(socket, socket=True)
        refuse_tree("the directory of the socket,", socket.parent)
    if not writable:
        refuse_without("--writable", "scratch_dir")
    tls = tls_of(tls_certs, tls_verify_peer)
    repo = here.open()
    exports = _exports(repo, backup, name, disks, scratch_dir if writable else None)
    server = NbdServer(lambda: exports, tls=tls)
    wanted = threading.Event()
    on_ending(wanted.set)
    with PrivateDirectory() as private:
        try:
            if tcp:
                address = server.listen_tcp(*parse_tcp(tcp))
                uris = [tcp_uri(each, address, tls) for each in exports]
            else:
                path = server.listen_unix(socket or private / "nbd.sock")
                uris = [str(NbdUri(each, path=str(path))) for each in exports]
            if here.json:
                here.tell({"uris": uris})
            else:
                click.echo("ready: " + " ".join(uris))
            notify("READY=1")
            while not wanted.wait(LOOK_SECONDS):
                pass
        finally:
            server.stop()
            repo.close()


def _exports(
    repo: Repository, backup: str, name: str | None, disks: tuple[str, ...], scratch: Path | None
) -> dict[str, ImageExport]:
    record = repo.find(backup, name)
    have = [d.name for d in record.disks]
    if unknown := [d for d in disks if d not in have]:
        raise UsageError(
            f"backup {record.id[:8]} has no disk {unknown[0]!r}", hint=f"Its disks are: {', '.join(have)}."
        )
    made = {}
    for disk in record.disks:
        if not disks or disk.name in disks:
            image = BackupImage(repo, record, disk)
            text = f"{disk.name} of {record.vm}, backup {record.id[:8]}"
            made[disk.name] = ImageExport(Overlay(image, scratch) if scratch else image, text)
    return made
