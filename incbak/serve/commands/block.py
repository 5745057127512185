"""Disks, targets, transactions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from incbak.bitmap.file import Bitmap, State
from incbak.nbd.uri import NbdUri, UriTls
from incbak.serve.commands import backup, bitmaps, points
from incbak.serve.commands.registry import Args, command
from incbak.serve.memory_bitmap import AnyBitmap
from incbak.serve.point_in_time import PointInTime
from incbak.serve.resize import resize
from incbak.serve.schema import BOOL, INT, STR, Enum, Fields, List, Opt, QmpError, Union
from incbak.serve.schema import Struct as Object
from incbak.serve.targets import Target
from incbak.serve.tracker import TrackedDisk
from incbak.serve.transaction import Abort, Action, Transaction
from incbak.serve.vm import Vm

_INET: Fields = {"host": STR, "port": STR}
_SERVER = Union("type", {"unix": {"path": STR}, "inet": _INET})
_NBD: Fields = {"server": _SERVER, "export": Opt(STR), "tls-creds": Opt(STR), "tls-hostname": Opt(STR)}
_COMMON: Fields = {"node-name": Opt(STR)}
_DRIVERS = {"nbd": _NBD}


@command("blockdev-add", {"driver": Enum(*_DRIVERS), **_COMMON, **_NBD})
def blockdev_add(vm: Vm, args: Args) -> object:
    """Connect to an export of another NBD server, as a target."""
    if "node-name" not in args:
        raise QmpError("'node-name' must be specified for the root node")
    name = args["node-name"]
    backup.check_node_name(vm, name)
    vm.targets[name] = Target(name, replace(_uri(args["server"], args.get("export", "")), tls=_tls(vm, args)))
    return None


def _tls(vm: Vm, args: Args) -> UriTls | None:
    if "tls-creds" not in args:
        if "tls-hostname" in args:
            raise QmpError("TLS hostname is only supported with TLS credentials")
        return None
    name = args["tls-creds"]
    if name not in vm.credentials:
        raise QmpError(f"No TLS credentials with id '{name}'")
    return UriTls(str(vm.credentials[name]), args.get("tls-hostname"))


def _uri(server: dict[str, str], export: str) -> NbdUri:
    if server["type"] == "unix":
        return NbdUri(export, path=server["path"])
    port = server["port"]
    if not port.isdecimal() or len(port) > 5 or int(port) >= 1 << 16:
        raise QmpError(f"Parameter 'server.port' expects a number, not '{port[:20]}'")
    return NbdUri(export, host=server["host"], port=int(port))


@command("blockdev-del", {"node-name": STR})
def blockdev_del(vm: Vm, args: Args) -> object:
    """Let a target go, or a point in time that is not exported."""
    name = args["node-name"]
    if name in vm.disks or any(e.node == name for e in vm.exports.all()):
        raise QmpError(f"Block device {name} is in use")
    if name in vm.points:
        vm.points.pop(name).close()
        return None
    if name not in vm.targets:
        raise QmpError(f"Failed to find node with node-name='{name}'")
    if vm.targets[name].user is not None:
        raise QmpError(f"Node '{name}' is busy: block device is in use by block job: backup")
    vm.targets.pop(name).close()
    return None


@command("block_resize", {"device": Opt(STR), "node-name": Opt(STR), "size": INT})
def block_resize(vm: Vm, args: Args) -> object:
    """Give a disk another size, by either of its names, which are the same."""
    device, node = args.get("device", ""), args.get("node-name", "")
    found = vm.disks.get(device) or vm.disks.get(node)
    if found is None:
        raise QmpError(f"Cannot find device='{device}' nor node-name='{node}'")
    resize(found, args["size"])
    return None


_ACTIONS: dict[str, Fields] = {
    "abort": {},
    "block-dirty-bitmap-add": bitmaps.ADD,
    "block-dirty-bitmap-remove": bitmaps.ONE,
    "block-dirty-bitmap-clear": bitmaps.ONE,
    "block-dirty-bitmap-enable": bitmaps.ONE,
    "block-dirty-bitmap-disable": bitmaps.ONE,
    "block-dirty-bitmap-merge": bitmaps.MERGE,
    "blockdev-backup": backup.BLOCKDEV,
    "drive-backup": backup.DRIVE,
    "x-incbak-point-in-time-add": points.ADD,
}
_TRANSACTION: Fields = {
    "actions": List(Union("type", _ACTIONS, wrapped="data")),
    "properties": Opt(Object({"completion-mode": Opt(Enum("individual", "grouped"))})),
}


@command("transaction", _TRANSACTION)
def transaction(vm: Vm, args: Args) -> object:
    """All of it at one instant, or nothing."""
    grouped = args.get("properties", {}).get("completion-mode") == "grouped"
    actions = [_action(vm, a["type"], a["data"]) for a in args["actions"]]
    for given, action in zip(args["actions"], actions, strict=True):
        if grouped and not action.grouped:
            raise QmpError(f"Action '{given['type']}' does not support Transaction property completion-mode = grouped")
    Transaction(vm, grouped=grouped).run(actions)
    return None


def _action(vm: Vm, kind: str, data: Args) -> Action:
    match kind:
        case "abort":
            return Abort()
        case "block-dirty-bitmap-add":
            return bitmaps.Add(vm, data)
        case "block-dirty-bitmap-remove":
            return bitmaps.Remove(vm, data)
        case "block-dirty-bitmap-clear":
            return bitmaps.Clear(vm, data)
        case "block-dirty-bitmap-enable" | "block-dirty-bitmap-disable":
            return bitmaps.Switch(vm, data, enable=kind.endswith("enable"))
        case "block-dirty-bitmap-merge":
            return bitmaps.Merge(vm, data)
        case "drive-backup":
            return backup.DriveBackup(vm, data)
        case "x-incbak-point-in-time-add":
            return points.AddPoint(vm, data)
        case _:
            return backup.Backup(vm, data)


# -- telling ------------------------------------------------------------------------------------------------------


@command("query-block")
def query_block(vm: Vm, args: Args) -> object:
    """Every disk, as a device."""
    return [_device(vm, d) for d in vm.disks.values()]


@command("query-named-block-nodes", {"flat": Opt(BOOL)})
def query_named_block_nodes(vm: Vm, args: Args) -> object:
    """Every disk, every target, every point in time."""
    nodes = [*(_disk_node(vm, d) for d in vm.disks.values()), *(_target_node(t) for t in vm.targets.values())]
    return [*nodes, *(_point_node(p) for p in vm.points.values())]


def _device(vm: Vm, tracked: TrackedDisk) -> dict[str, object]:
    device: dict[str, object] = {"device": tracked.name, "qdev": "", "type": "unknown", "removable": False}
    return device | {"locked": False, "io-status": "ok", "inserted": _disk_node(vm, tracked)}


def _disk_node(vm: Vm, tracked: TrackedDisk) -> dict[str, object]:
    node = _node(tracked.name, tracked.disk.name, tracked.size, "raw", tracked.read_only)
    if isinstance(path := getattr(tracked.disk, "path", None), Path):
        node["x-incbak-path"] = str(path.absolute())
    told = [*(bitmap_info(tracked, b) for b in tracked.bitmaps.values()), *_lost(vm, tracked)]
    return node | ({"dirty-bitmaps": told} if told else {})


def _target_node(target: Target) -> dict[str, object]:
    return _node(target.name, str(target.uri), target.size, "nbd", read_only=False)


def _point_node(point: PointInTime) -> dict[str, object]:
    node = _node(point.name, point.tracked.disk.name, point.size, "snapshot-access", read_only=True)
    return node | ({"x-incbak-lost": point.lost} if point.lost else {})


def _node(name: str, filename: str, size: int, driver: str, read_only: bool) -> dict[str, object]:
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    cache = {"writeback": True, "direct": False, "no-flush": False}
    image = {"filename": filename, "format": driver, "virtual-size": size}
    node: dict[str, object] = {"node-name": name, "drv": driver, "file": filename, "ro": read_only, "image": image}
    node |= {"encrypted": False, "detect_zeroes": "off", "write_threshold": 0, "backing_file_depth": 0}
    return node | {"cache": cache} | limits


def bitmap_info(tracked: TrackedDisk, bitmap: AnyBitmap) -> dict[str, object]:
    """A BlockDirtyInfo, with how the bitmap was found, and why it is invalid."""
    invalid = bitmap.state is State.INVALID
    info: dict[str, object] = {"name": bitmap.name, "granularity": bitmap.granularity}
    info |= {"count": 0 if invalid else bitmap.count(), "recording": bitmap.enabled and not invalid}
    info |= {"busy": bitmap.name in tracked.busy, "persistent": bitmap.persistent}
    info["x-incbak-found"] = str(bitmap.found)
    if isinstance(bitmap, Bitmap):
        info["x-incbak-path"] = str(bitmap.path.absolute())
    if invalid:
        info |= {"inconsistent": True, "x-incbak-reason": str(bitmap.reason or "tracking-failed")}
    return info


def _lost(vm: Vm, tracked: TrackedDisk) -> list[dict[str, object]]:
    common = {"granularity": bitmaps.DEFAULT_GRANULARITY, "count": 0, "recording": False, "busy": False}
    common |= {"persistent": True, "inconsistent": True}
    found = vm.lost[tracked.name].items()
    return [{"name": n, **common, "x-incbak-found": "invalid", "x-incbak-reason": str(r)} for n, r in found]
