"""Moving a guest's device in QEMU's graph, and disks that others write to; QEMU is a few dictionaries here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from incbak.engine.qemu_disks import find_disks
from incbak.engine.qemu_graph import Graph, StillUsedError, move, take_out, unguarded
from incbak.engine.qemu_leftovers import remove_leftovers
from incbak.engine.qemu_outside import find_outside
from incbak.engine.qemu_shared import why_shared
from incbak.engine.session import CommandFailed, Session

FILTER = "incbak-1-2-0f"
DISK = "/machine/peripheral/v/virtio-backend"


class Qemu:
    """Nodes by driver, and who uses them: [kind, parent, edge, child, permissions]."""

    def __init__(self, drivers: Mapping[str, str], *links: tuple[str, str, str, str, str]) -> None:
        self.drivers, self.links = dict(drivers), [list(x) for x in links]
        self.told: list[tuple[str, str]] = []
        self.properties: dict[str, Any] = {}

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        answer = getattr(self, "do_" + command.replace("-", "_"))
        return answer(**{k.replace("-", "_"): v for k, v in (arguments or {}).items()})

    def do_query_named_block_nodes(self, flat: bool) -> Any:
        image = {"virtual-size": 1 << 20}
        return [{"node-name": n, "drv": d, "ro": False, "image": image} for n, d in self.drivers.items()]

    def do_x_debug_query_block_graph(self) -> Any:
        nodes = sorted({(k, p) for k, p, *_ in self.links} | {("block-driver", n) for n in self.drivers})
        ids = {node: number for number, node in enumerate(nodes)}
        edges = [
            {"parent": ids[k, p], "name": e, "child": ids["block-driver", c], "perm": perm.split()}
            for k, p, e, c, perm in self.links
        ]
        return {"nodes": [{"id": i, "type": k, "name": n} for (k, n), i in ids.items()], "edges": edges}

    def do_query_block(self) -> Any:
        devices = [(p, c) for k, p, _, c, _ in self.links if k == "block-backend" and p.startswith("/")]
        return [{"device": "", "qdev": p, "inserted": {"node-name": c}} for p, c in devices]

    def do_qom_set(self, path: str, property: str, value: str) -> None:
        (link,) = [x for x in self.links if x[1] == path and property == "drive"]
        assert link[3] != value, "QEMU 7.2 aborts"
        self.told.append((path, value))
        link[3] = value

    def do_qom_get(self, path: str, property: str) -> Any:
        if property not in self.properties:
            raise CommandFailed("qom-get", "GenericError", f"Property '{path}.{property}' not found")
        return self.properties[property]

    def do_block_stream(self, device: str, base_node: str, **_: Any) -> None:
        (link,) = [x for x in self.links if x[1] == device and x[2] == "backing"]
        self.told.append((device, base_node))
        link[3] = base_node

    def do_query_jobs(self) -> Any:
        return []

    async def try_execute(self, *_: Any) -> bool:
        return True

    def graph(self) -> Graph:
        return Graph.of(self.do_query_named_block_nodes(True), self.do_x_debug_query_block_graph())


def filtered(*links: tuple[str, str, str, str, str], **drivers: str) -> Qemu:
    """A filter above the overlay ``ov`` that somebody has put on ``d`` meanwhile, and whatever else."""
    own = {FILTER: "copy-before-write", "ov": "qcow2", "d": "qcow2"}
    below = [
        ("block-driver", FILTER, "file", "ov", "write"),
        ("block-driver", "ov", "backing", "d", "consistent-read"),
    ]
    return Qemu({**own, **drivers}, *below, *links)  # type: ignore[arg-type]


def session(qemu: Qemu) -> Session:
    return cast(Session, qemu)


def test_a_device_is_never_moved_to_where_it_stands() -> None:
    qemu = filtered(("block-backend", DISK, "root", "ov", "write"))
    asyncio.run(move(session(qemu), DISK, DISK, "ov"))
    assert qemu.told == []
    asyncio.run(move(session(qemu), DISK, DISK, FILTER))
    assert qemu.told == [(DISK, FILTER)]


def test_a_filter_goes_by_what_stands_below_it_now() -> None:
    qemu = filtered(("block-backend", DISK, "root", FILTER, "write"))
    assert asyncio.run(take_out(session(qemu), FILTER))
    assert qemu.told == [(DISK, "ov")]
    assert not asyncio.run(take_out(session(qemu), FILTER))
    assert qemu.told == [(DISK, "ov")]


def test_an_overlay_of_the_filter_gets_what_is_below_it_as_its_backing_node() -> None:
    top = ("block-backend", DISK, "root", "snap", "write")
    qemu = filtered(top, ("block-driver", "snap", "backing", FILTER, "consistent-read"), snap="qcow2")
    assert asyncio.run(take_out(session(qemu), FILTER))
    assert qemu.told == [("snap", "ov")]


@pytest.mark.parametrize("user", [("block-driver", "limit", "file"), ("block-job", "copy", "main node")])
def test_a_filter_that_another_program_uses_is_said_to_be_left(user: tuple[str, str, str]) -> None:
    qemu = filtered((*user, FILTER, "write"), limit="throttle")
    with pytest.raises(StillUsedError, match=user[1]):
        asyncio.run(take_out(session(qemu), FILTER))
    assert qemu.told == []


@pytest.mark.parametrize(
    ("link", "named"),
    [
        (("block-backend", "/machine/peripheral/w", "root", "a", "write"), "/machine/peripheral/w"),
        (("block-backend", "export", "root", "a", "consistent-read write"), "export"),
        (("block-driver", "twin", "file", "f", "write"), "twin"),
        (("block-job", "mirror", "target", "a", "write"), "mirror"),
        (("block-backend", "export", "root", "a", "consistent-read"), ""),
    ],
)
def test_a_second_writer_anywhere_below_the_device_is_found(link: tuple[str, str, str, str, str], named: str) -> None:
    own = [("block-backend", DISK, "root", "a", "write"), ("block-driver", "a", "file", "f", "write")]
    qemu = Qemu({"a": "raw", "f": "file", "twin": "raw"}, *own, link)  # type: ignore[arg-type]
    assert named in why_shared(qemu.graph(), "a", "a")
    assert bool(why_shared(qemu.graph(), "a", "a")) == bool(named)


def test_a_filter_of_a_dead_run_is_no_second_writer() -> None:
    own = [("block-backend", DISK, "root", FILTER, "write"), ("block-driver", FILTER, "file", "d", "write")]
    qemu = Qemu({FILTER: "copy-before-write", "d": "qcow2"}, *own)  # type: ignore[arg-type]
    assert why_shared(qemu.graph(), FILTER, "d") == ""
    disks, left_out = find_disks(qemu.do_query_block(), qemu.graph())
    assert ([d.extra["top"] for d in disks], left_out) == (["d"], [])


def test_a_disk_that_may_be_shared_is_left_out_with_the_reason() -> None:
    qemu = Qemu({"d": "raw"}, ("block-backend", DISK, "root", "d", "write"))
    disks, left_out = find_disks(qemu.do_query_block(), qemu.graph(), {DISK: "other programs may write to it"})
    assert disks == []
    assert [(x.name, "other programs may write" in x.why) for x in left_out] == [("v", True)]


@pytest.mark.parametrize(
    ("properties", "how"),
    [
        ({"type": "virtio-blk-device", "scsi": False, "share-rw": True}, "share-rw=on"),
        ({"type": "virtio-blk-device", "scsi": True, "share-rw": False}, "scsi=on"),
        ({"type": "scsi-block", "share-rw": False}, "scsi-block"),
        ({"type": "scsi-generic"}, "scsi-generic"),
        ({"type": "virtio-blk-device", "scsi": False, "share-rw": False}, ""),
        ({"type": "floppy"}, ""),
    ],
)
def test_devices_that_are_written_past_the_block_layer_are_known(properties: dict[str, Any], how: str) -> None:
    qemu = Qemu({"d": "raw"}, ("block-backend", DISK, "root", "d", "write"))
    qemu.properties = properties
    found = asyncio.run(unguarded(session(qemu), qemu.do_query_block()))
    assert list(found) == ([DISK] if how else [])
    assert how in found.get(DISK, "")


class Listing:
    """A QEMU that has devices of these types."""

    def __init__(self, *types: str) -> None:
        self.types = types

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if arguments["path"].endswith("-anon"):
            raise CommandFailed(command, "GenericError", "no such path")
        return [{"name": f"d{n}", "type": f"child<{kind}>"} for n, kind in enumerate(self.types)]


def test_disks_outside_of_the_block_layer_are_known_by_their_type() -> None:
    disks = [
        "vhost-user-blk-pci",
        "vhost-user-scsi-pci",
        "vhost-scsi-pci",
        "nvdimm",
        "virtio-pmem-pci",
        "vhost-user-blk",
    ]
    others = ["virtio-blk-pci", "vhost-user-fs-pci", "pc-dimm", "virtio-net-pci", "vhost-vsock-pci", "nvdimms"]
    maybe = ["vfio-pci", "vfio-pci-nohotplug", "usb-host", "usb-redir"]
    found = asyncio.run(find_outside(cast(Session, Listing(*disks, *others, *maybe, "usb-storage", "usb-hub"))))
    assert [x.name for x in found if not x.expected] == [f"d{n}" for n in range(len(disks))]
    assert [x.name for x in found if x.expected] == ["d12", "d13", "d14", "d15"]


def test_an_implicit_filter_stays_between_the_device_and_its_image() -> None:
    """``query-block`` does not tell of it; a device that is moved past it would bypass a mirror."""
    links = [("block-backend", DISK, "root", "#m", "write"), ("block-driver", "#m", "backing", "d", "write")]
    qemu = Qemu({"#m": "mirror_top", "d": "raw"}, *links)  # type: ignore[arg-type]
    devices = [{"device": "", "qdev": DISK, "inserted": {"node-name": "d"}}]
    (disk,) = find_disks(devices, qemu.graph())[0]
    assert (disk.extra["top"], disk.node) == ("#m", "d")


def test_a_dead_runs_filter_in_a_backing_chain_goes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> list[str]:
        return []

    for name in ("cancel_jobs", "remove_fds"):
        monkeypatch.setattr(f"incbak.engine.qemu_leftovers.{name}", nothing)
    top = ("block-backend", DISK, "root", "snap", "write")
    qemu = filtered(top, ("block-driver", "snap", "backing", FILTER, "consistent-read"), snap="qcow2")
    done = asyncio.run(remove_leftovers(session(qemu), "incbak-1-", ()))
    assert done == [f"filter {FILTER}", f"node {FILTER}"]
    assert qemu.told == [("snap", "ov")]
