"""What holds bytes of a disk, what is known of it, and when that is enough to believe a bitmap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from incbak import device
from incbak.backup import facts
from incbak.backup.facts import Peer, leaves
from incbak.backup.plan import Known
from incbak.backup.sources import Sources, unproven
from incbak.engine.base import BitmapInfo, Description, EngineDisk
from incbak.engine.qemu_disks import keeps_bitmaps
from incbak.errors import ImageChangedError
from incbak.reasons import Reason
from incbak.repo.record import Record
from tests.kit.devices import loop_device, written

SIZE = 1 << 20


def graph(*nodes: tuple[str, str, dict[str, str]], **more: Any) -> Description:
    """Nodes as (name, driver, children). A node without children is a file of its own name below ``/``."""
    blocks = [
        {"node": n, "driver": d, "file": "" if c else f"/{n}", "children": c, "read_only": n not in ("top", "data")}
        for n, d, c in nodes
    ]
    return Description("vm", (EngineDisk("vda", SIZE, "top"),), config={"blocks": blocks}, **more)


def found(description: Description) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"image": [], "data": [], "below": []}
    for leaf in leaves(description, "top"):
        parts[leaf.part].append(leaf.name)
    return parts


FILE = ("f", "file", {})
CASES = {
    "plain": ([("top", "qcow2", {"file": "f"}), FILE], ["/f"], [], []),
    "protocol": ([("top", "file", {})], ["/top"], [], []),
    "backing": (
        [("top", "qcow2", {"file": "f", "backing": "b"}), FILE, ("b", "raw", {"file": "c"}), ("c", "host_device", {})],
        ["/f"], [], ["/c"],
    ),
    "data file": (
        [("top", "qcow2", {"file": "f", "data-file": "d"}), FILE, ("d", "raw", {"file": "e"}), ("e", "file", {})],
        ["/f"], ["/e"], [],
    ),
    "data file of a backing file": (
        [("top", "qcow2", {"file": "f", "backing": "b"}), FILE, ("b", "qcow2", {"file": "c", "data-file": "d"}),
         ("c", "file", {}), ("d", "file", {})],
        ["/f"], [], ["/c", "/d"],
    ),
    "extents": (
        [("top", "vmdk", {"file": "f", "extents.0": "x", "extents.1": "y"}), FILE, ("x", "file", {}),
         ("y", "file", {})],
        ["/f"], ["/x", "/y"], [],
    ),
    "detached header": (
        [("top", "luks", {"file": "f", "header": "h"}), FILE, ("h", "file", {})], ["/f"], ["/h"], [],
    ),
    "quorum below": (
        [("top", "qcow2", {"file": "f", "backing": "q"}), FILE, ("q", "quorum", {"children.0": "x", "children.1": "y"}),
         ("x", "file", {}), ("y", "nbd", {})],
        ["/f"], [], ["/x", "/y"],
    ),
    "filters": (
        [("top", "mirror_top", {"backing": "a"}), ("a", "copy-before-write", {"file": "b", "target": "t"}),
         ("b", "blklogwrites", {"file": "c", "log": "t"}), ("c", "qcow2", {"file": "f", "backing": "l"}), FILE,
         ("l", "commit_top", {"backing": "m"}), ("m", "file", {}), ("t", "file", {})],
        ["/f"], [], ["/m"],
    ),
    "a node of our own in between": (
        [("top", "qcow2", {"file": "f", "backing": "incbak-1"}), FILE], ["/f"], [], ["incbak-1"],
    ),
    "a cycle": ([("top", "qcow2", {"file": "f", "backing": "b"}), FILE, ("b", "raw", {"file": "b"})], ["/f"], [], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_everything_below_a_node_holds_bytes_of_it(case: str) -> None:
    nodes, image, data, below = CASES[case]
    assert found(graph(*nodes)) == {"image": image, "data": data, "below": below}


def test_a_chain_of_any_length_is_followed() -> None:
    nodes = [(f"n{n}", "qcow2", {"file": f"f{n}", "backing": f"n{n + 1}"}) for n in range(3000)]
    files = [(f"f{n}", "file", {}) for n in range(3000)]
    chain = [("top", "qcow2", {"file": "f0", "backing": "n1"}), *nodes[1:], ("n3000", "file", {}), *files]
    assert len(found(graph(*chain))["below"]) == 3000


FACTS = ["/d", 10, 20, 30, 40]


def _reason(persistent: bool, before: list[Any] | None, now: list[Any]) -> Reason | None:
    config = {} if before is None else {"data": {"vda": before}}
    record = Record(
        id="1" * 32, seq=1, vm="vm", kind="full", base=None, started="", finished="", cluster_size=65536, disks=(),
        engine="", host="", config=config,
    )  # fmt: skip

    known = Known("a" * 32, 65536, [], data={"vda": now}, trusted={"/d"})  # trusted: of what is below only
    return unproven(EngineDisk("vda", SIZE, "top"), record, BitmapInfo("b", 65536, 0, persistent=persistent), known)


@pytest.mark.parametrize(
    ("persistent", "before", "now", "reason"),
    [
        (True, [FACTS], [FACTS], None),
        (True, [["/d", 10, 20, 31, 40]], [FACTS], Reason.DISK_CHANGED),
        (True, [["/d", 10, 20, 30, 41]], [FACTS], Reason.DISK_CHANGED),
        (True, [["/d", 10, 21, 30, 40]], [FACTS], Reason.DISK_CHANGED),
        (True, None, [FACTS], Reason.UNPROVEN),
        (True, [], [FACTS], Reason.UNPROVEN),
        (True, ["rubbish"], [FACTS], Reason.DISK_CHANGED),
        (True, [["/d", None]], [["/d", None]], Reason.UNPROVEN),
        (True, [["/d", "boot:1;2:3"]], [["/d", "boot:1;2:3"]], None),
        (True, [["/d", "boot:1;2:3"]], [["/d", "boot:1;2:4"]], Reason.DISK_CHANGED),
        (False, [["/d", 11, 20, 31, 41]], [FACTS], None),
        (False, [["/d", 10, 21, 30, 40]], [FACTS], Reason.DISK_CHANGED),
        (False, [["/e", 10, 20, 30, 40]], [FACTS], Reason.DISK_CHANGED),
        (False, [["/d", "boot:1;2:3"]], [["/d", "boot:1;2:4"]], None),
        (False, [["/d", "boot:1;2:3"]], [["/d", "boot:2;2:3"]], Reason.DISK_CHANGED),
        (False, [["/d", None]], [["/d", None]], None),
        (False, None, [FACTS], Reason.UNPROVEN),
        (False, ["rubbish"], [FACTS], Reason.DISK_CHANGED),
        (True, None, [], None),
    ],
)
def test_when_a_bitmap_is_believed_beside_a_data_file(
    persistent: bool, before: list[Any] | None, now: list[Any], reason: Reason | None
) -> None:
    """A stored one if nobody wrote at all, one in an engine's memory if the engine has the same files."""
    assert _reason(persistent, before, now) is reason


@pytest.mark.parametrize(
    ("data", "keeps"),
    [({"compat": "1.1"}, True), ({"compat": "1.1", "data-file": "d.raw"}, False), ({"compat": "0.10"}, False)],
)
def test_a_running_engine_stores_no_bitmap_beside_a_data_file(data: dict[str, str], keeps: bool) -> None:
    assert bool(keeps_bitmaps({"drv": "qcow2", "image": {"format-specific": {"data": data}}})) is keeps


class Elsewhere:
    """A process that has files open, as an engine has, in a directory of its own."""

    def __init__(self, directory: Path, *names: str) -> None:
        code = "import sys; f = [open(n) for n in sys.argv[1:]]; print(flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", code, *names]
        self.process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.process.stdout.readline()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "vm").mkdir()
    for name in ("top", "base", "closed"):
        (tmp_path / "vm" / name).write_bytes(b"x")
    return tmp_path / "vm"


@pytest.fixture
def engine(directory: Path) -> Iterator[Elsewhere]:
    made = Elsewhere(directory, "top", "base")
    yield made
    made.process.communicate()


def test_what_an_engine_has_open_is_known(directory: Path, engine: Elsewhere) -> None:
    """Also under a name that is relative to where it was started; not what it does not have open."""
    peer = Peer(engine.process.pid, ["top", "base"])
    for name in ("base", f"{directory}/base"):
        looked = peer.look(name)
        assert looked
        assert os.path.samestat(looked[1], (directory / "base").stat())
    assert [peer.look(n) for n in ("closed", f"{directory}/closed", "none", "", "nbd:base", "a:b", "\0")] == [None] * 7


@pytest.mark.parametrize("of", ["another process", "no process", "nobody"])
def test_what_is_known_without_the_engine(directory: Path, engine: Elsewhere, of: str) -> None:
    """libvirt makes QEMU's sockets, and over TCP nobody is seen: names are ours then, if they are whole."""
    other = Elsewhere(directory)
    pid = {"another process": other.process.pid, "no process": 2**22 + 1, "nobody": None}[of]
    peer = Peer(pid, ["top", f"{directory}/base"])
    assert [bool(peer.look(n)) for n in ("base", f"{directory}/base", f"{directory}/closed")] == [False, True, True]
    other.process.communicate()


def overlay(directory: Path, **more: Any) -> Description:
    """An image that is written, on one that is not, each a file; and a data file."""
    names = {"f": "top", "c": "base", "data": "data"}
    for name in names.values():
        (directory / name).write_bytes(b"x" * 1000)
    made = graph(
        ("top", "qcow2", {"file": "f", "data-file": "data", "backing": "b"}), FILE, ("b", "qcow2", {"file": "c"}),
        ("c", "file", {}), ("data", "file", {}), **more,
    )  # fmt: skip
    for block in made.config["blocks"]:
        if block["node"] in names:
            block["file"] = str(directory / names[block["node"]])
    return made


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("which", ["top", "base", "data"])
def test_what_is_written_during_a_run(tmp_path: Path, which: str, off: bool) -> None:
    """A running engine writes to its own files, and to nothing below."""
    run = Sources(overlay(tmp_path), off=off)
    run.confirm()
    (tmp_path / which).write_bytes(b"y" * 1000)
    if off or which == "base":
        with pytest.raises(ImageChangedError, match=f"/{which} "):
            run.confirm()
    else:
        run.confirm()


def test_what_a_job_of_the_engine_writes_below(tmp_path: Path) -> None:
    """A commit, as QEMU says by having it open for writing."""
    description = overlay(tmp_path)
    next(b for b in description.config["blocks"] if b["node"] == "c")["read_only"] = False
    run = Sources(description, off=False)
    (tmp_path / "base").write_bytes(b"y" * 1000)
    run.confirm()


@pytest.mark.parametrize("ctime", [True, False])
def test_a_ctime_that_moved(tmp_path: Path, ctime: bool) -> None:
    """As by another mode, or by a write that was dated back; the owner may say that nothing else does it."""
    description = overlay(tmp_path)
    before = Sources(description, off=True, ctime=ctime)
    for name in ("base", "data"):
        (tmp_path / name).chmod(0o600)
    after = Sources(description, off=True, ctime=ctime)
    assert (after.backing != before.backing, after.data != before.data) == (ctime, ctime)
    if ctime:
        with pytest.raises(ImageChangedError):
            before.confirm()
    else:
        before.confirm()


def test_a_ctime_that_moved_below_a_running_engine(tmp_path: Path) -> None:
    """Another VM on the same backing file was started: that fails no backup."""
    run = Sources(overlay(tmp_path), off=False)
    (tmp_path / "base").chmod(0o600)
    run.confirm()


def test_a_device_below_tells_its_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the times of its node; and where it tells nothing, nothing is known."""
    description = overlay(tmp_path)
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with loop_device(tmp_path / "disk") as loop:
        next(b for b in description.config["blocks"] if b["node"] == "c")["file"] = str(loop)
        before = Sources(description, off=True)
        os.utime(loop)
        assert Sources(description, off=True).backing == before.backing
        before.confirm()
        written(loop)
        assert Sources(description, off=True).backing != before.backing
        with pytest.raises(ImageChangedError, match=str(loop)):
            before.confirm()
        monkeypatch.setattr(device, "writes", lambda _: "")
        blind = Sources(description, off=True)
        assert blind.backing == {"vda": [[str(loop), None]]}
        blind.confirm()
        (note,) = blind.notes()
        assert f"disk vda is always read whole: nothing is known of what is below it: {loop}; " in note
        assert Sources(description, off=True, trusted=[str(loop)]).notes() == []


def test_a_time_that_may_come_again_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def soon(_time: int, _now: int) -> bool:
        asked.append(1)
        return len(asked) < 5

    monkeypatch.setattr(facts.device, "may_come_again", soon)
    Sources(overlay(tmp_path), off=True)
    assert len(asked) > 5
