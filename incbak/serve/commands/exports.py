"""``nbd-server-*``, ``block-export-*``: disks under other names, on an NBD server that a monitor starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from incbak.nbd.protocol import MAX_NAME
from incbak.serve.commands.backup import IDENTIFIER
from incbak.serve.commands.bitmaps import ONE
from incbak.serve.commands.registry import Args, command
from incbak.serve.exports import AddedExport, ExportSpec
from incbak.serve.point_in_time import PointExport, PointInTime
from incbak.serve.schema import BOOL, STR, UINT32, Alternate, Enum, Fields, List, Opt, QmpError, Union
from incbak.serve.tracker import TrackedDisk
from incbak.serve.transaction import Transaction
from incbak.serve.vm import Vm, check_usable

_ADDRESS = Union("type", {"unix": {"path": STR}, "inet": {"host": STR, "port": STR}}, wrapped="data")
_START: Fields = {"addr": _ADDRESS, "max-connections": Opt(UINT32)}
_MODE = Opt(Enum("safe", "hard"))
_SERVER_ADD: Fields = {
    "device": STR,
    "name": Opt(STR),
    "description": Opt(STR),
    "writable": Opt(BOOL),
    "bitmap": Opt(STR),
}
_ADD: Fields = {
    "type": Enum("nbd"),
    "id": STR,
    "node-name": STR,
    "name": Opt(STR),
    "description": Opt(STR),
    "writable": Opt(BOOL),
    "writethrough": Opt(BOOL),
    "bitmaps": Opt(List(Alternate(ONE, "BlockDirtyBitmapOrStr"))),
}


@command("nbd-server-start", _START)
def nbd_server_start(vm: Vm, args: Args) -> object:
    """Listen, with no exports yet. On TCP with TLS if ``incbak serve`` was given certificates, else without."""
    data = args["addr"]["data"]
    place: Path | tuple[str, int]
    if args["addr"]["type"] == "unix":
        place = Path(data["path"])
    elif data["port"].isdecimal() and len(data["port"]) <= 5 and int(data["port"]) < 1 << 16:
        place = (data["host"], int(data["port"]))
    else:
        raise QmpError(f"Parameter 'addr.data.port' expects a number, not '{data['port'][:20]}'")
    vm.exports.start(place, args.get("max-connections", 0))
    return None


@command("nbd-server-stop")
def nbd_server_stop(vm: Vm, args: Args) -> object:
    """Cut all clients off, remove all exports that were added."""
    vm.exports.check_running()
    vm.exports.stop()
    return None


@command("nbd-server-add", _SERVER_ADD)
def nbd_server_add(vm: Vm, args: Args) -> object:
    """As `block_export_add`, with the name as the id; a disk that cannot be written is exported read-only."""
    name = str(args.get("name", args["device"]))
    tracked = vm.device(args["device"])
    writable = args.get("writable", False) and not tracked.read_only
    bitmaps = [args["bitmap"]] if "bitmap" in args else []
    _add(vm, tracked, ExportSpec(name, name, args.get("description", ""), writable, bitmaps))
    return None


@command("nbd-server-remove", {"name": STR, "mode": _MODE})
def nbd_server_remove(vm: Vm, args: Args) -> object:
    """As `block_export_del`."""
    vm.exports.remove(args["name"], hard=args.get("mode") == "hard")
    return None


@command("block-export-add", _ADD)
def block_export_add(vm: Vm, args: Args) -> object:
    """Export a disk under a name of its own; writes to it are recorded as any guest's."""
    node = args["node-name"]
    if args.get("writethrough", False):
        raise QmpError("Parameter 'writethrough' does not support 'true'")
    _check_id(vm, args["id"])
    if node in vm.points:
        _add_point(vm, vm.points[node], args)
        return None
    if node not in vm.disks:
        raise QmpError(f"Cannot find device='' nor node-name='{node}'")
    tracked, writable = vm.disks[node], args.get("writable", False)
    if writable and tracked.read_only:
        raise QmpError("Cannot export read-only node as writable")
    bitmaps = [_name_of(vm, tracked, given) for given in args.get("bitmaps", [])]
    name = str(args.get("name", node))
    spec = ExportSpec(args["id"], name, args.get("description", ""), writable, bitmaps)
    _add(vm, tracked, spec)
    return None


def _check_id(vm: Vm, ident: str) -> None:
    if not IDENTIFIER.fullmatch(ident):
        raise QmpError("Invalid block export id")
    vm.exports.check_id(ident)


def _name_of(vm: Vm, tracked: TrackedDisk, given: str | dict[str, str]) -> str:
    """The name of a bitmap, of this disk: a bitmap of another one is not found."""
    if isinstance(given, str):
        return given
    found = Transaction(vm).bitmap(vm.node(given["node"]), given["name"])
    if given["node"] != tracked.name:
        raise QmpError(f"Bitmap '{found.name}' is not found")
    return found.name


def _add(vm: Vm, tracked: TrackedDisk, spec: ExportSpec) -> None:
    _check_id(vm, spec.id)
    vm.exports.check_running()
    _check_texts(spec.name, spec.description)
    for name in spec.bitmaps:
        bitmap = tracked.bitmaps.get(name)
        if bitmap is None and name not in vm.lost[tracked.name]:
            raise QmpError(f"Bitmap '{name}' is not found")
        if bitmap is None:
            raise QmpError(f"Bitmap '{name}' is inconsistent and cannot be used")
        check_usable(tracked, bitmap)
        if bitmap.enabled and not spec.writable and not tracked.read_only:
            raise QmpError(f"Enabled bitmap '{name}' incompatible with readonly export")
    vm.exports.add(spec, partial(AddedExport, tracked, spec))


def _check_texts(name: str, description: str) -> None:
    for word, text in (("export name", name), ("description", description)):
        if len(text.encode()) > MAX_NAME:
            raise QmpError(f"{word} '{text}' too long")


def _add_point(vm: Vm, point: PointInTime, args: Args) -> None:
    if args.get("writable", False):
        raise QmpError("Cannot export read-only node as writable")
    for given in args.get("bitmaps", []):
        raise QmpError(f"Bitmap '{given if isinstance(given, str) else given['name']}' is not found")
    name = str(args.get("name", point.name))
    _check_texts(name, args.get("description", ""))
    spec = ExportSpec(args["id"], name, args.get("description", ""))
    vm.exports.add(spec, partial(PointExport, point, spec))


@command("block-export-del", {"id": STR, "mode": _MODE})
def block_export_del(vm: Vm, args: Args) -> object:
    """Remove an export that was added; ``hard`` cuts its clients off."""
    vm.exports.remove(args["id"], hard=args.get("mode") == "hard")
    return None


@command("query-block-exports")
def query_block_exports(vm: Vm, args: Args) -> object:
    """Those that were added; what ``incbak serve`` exports by itself is not told."""
    return [{"id": e.spec.id, "type": "nbd", "node-name": e.node, "shutting-down": e.closing} for e in vm.exports.all()]
