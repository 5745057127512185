"""A real guest under QEMU that writes all the time: every backup holds what was acknowledged before its instant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.guest import Guest, GuestDisk, Target, need_guest
from tests.kit.live import Chain, Writes, bitmaps_of, ours_in, qcow2_image, running, unharmed
from tests.kit.need import need
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 64 << 20
BOTH = Writes("both", 1, [Target("vda", spacing=3 * 65536), Target("vdb", spacing=3 * 65536)], slots=211)
ALONE = Writes("alone", 2, [Target("vda", base=48 << 20, spacing=65536)], slots=199)
DISKS = {"vda-dev", "vdb-dev"}


class Scene:
    """A VM with a raw disk vda and a qcow2 disk vdb. One repository has both, another only the raw disk."""

    def __init__(self, root: Path, iothread: bool) -> None:
        self.root, self.iothread, self.boots = root, iothread, 0
        self.images = {"vda": raw_image(root / "vda.raw", SIZE), "vdb": qcow2_image(root / "vdb.qcow2", SIZE)}
        self.both = Chain(self._repository("both"), BOTH)
        self.alone = Chain(self._repository("alone"), ALONE, ["--disk", "vda-dev"])

    def _repository(self, name: str) -> Incbak:
        (self.root / name).mkdir()
        incbak = Incbak(self.root / name)
        incbak("init")
        return incbak

    def guest(self, *arguments: str) -> Guest:
        """Start QEMU; with ``-S`` the guest does not run."""
        self.boots += 1
        forms = {"vda": "raw", "vdb": "qcow2"}
        disks = [GuestDisk(n, i, format=forms[n], iothread=self.iothread) for n, i in self.images.items()]
        return Guest(self.root / f"guest{self.boots}", disks, arguments=arguments)


@pytest.fixture(params=["plain", "iothread"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    need_guest()
    need("qemu-img")
    return Scene(tmp_path, request.param == "iothread")


def test_a_guest_writes_all_the_time(scene: Scene) -> None:
    both, alone = scene.both, scene.alone
    with scene.guest() as guest:
        for writes in (BOTH, ALONE):
            writes.start(guest)
        assert {d["reason"] for d in both.back_up(guest, "full").values()} == {None}
        alone.back_up(guest, "full")
        for _ in range(3):
            for chain in (both, alone):
                guest.wait_more(chain.writes.name, 20)
                for name, disk in chain.back_up(guest).items():
                    assert (name, disk["kind"], disk["reason"]) == (name, "incremental", None)
                    assert 0 < disk["read"] < SIZE
        _control_run(scene, guest)
        figures = guest.figures("both")
        assert figures["max"] < 5.0
        assert guest.quit() == 0
    both.check()
    alone.check()
    _restarts(scene)


def _control_run(scene: Scene, guest: Guest) -> None:
    """Stopped by somebody else, the disks are known; the VM stays stopped, and nothing of ours stays in it."""
    guest.qmp("stop")
    for chain in (scene.both, scene.alone):
        chain.back_up(guest)
        assert not running(guest)
    assert scene.both.differs(scene.images) == {}
    assert scene.alone.differs({"vda": scene.images["vda"]}) == {}
    assert ours_in(guest) == []
    guest.qmp("cont")
    unharmed(guest, "both")
    scene.both.back_up(guest)
    scene.alone.back_up(guest)
    assert ours_in(guest) == []


def _restarts(scene: Scene) -> None:
    """A clean end keeps the bitmap that qcow2 holds; after a kill it is inconsistent, goes, and all is read."""
    with scene.guest("-S") as guest:
        _expect(scene, guest, None)
        assert guest.quit() == 0
    scene.guest("-S").kill()
    with scene.guest("-S") as guest:
        kept = _expect(scene, guest, "bitmap-inconsistent")
        assert bitmaps_of(guest, "vdb") == [kept]
        assert scene.both.back_up(guest)["vdb-dev"]["read"] == 0
        guest.kill()
    with scene.guest("-S") as guest:
        _expect(scene, guest, "bitmap-missing")  # that one was never stored
        assert guest.quit() == 0
    assert scene.both.differs(scene.images) == {}


def _expect(scene: Scene, guest: Guest, reason: str | None) -> str:
    """Back up a VM that has just begun, and stays paused; the name of the new bitmap of vdb."""
    made = scene.both.back_up(guest)
    assert not running(guest)
    assert {n: d["reason"] for n, d in made.items()} == {"vda-dev": "bitmap-missing", "vdb-dev": reason}
    assert (made["vdb-dev"]["kind"] == "incremental") == (reason is None)
    name: str = made["vdb-dev"]["bitmap"]
    return name
