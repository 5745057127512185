"""No write is lost: single writes are aimed at every step of the start of each backup, while others go on all the time.

A write that is in no bitmap shows in every later incremental until its cluster is written again. So each goes to a
cluster of its own, and after some backups the VM is stopped and a last incremental compared with the disks. A write
that one backup alone lacks shows beside a later one that it has. So the writers go to clean clusters and to those that
are always dirty in turn, and some backups are restored and their records looked at.

``INCBAK_TEST_BACKUPS`` is the number of backups for a longer campaign; otherwise it is what some seconds allow.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from incbak.backup.runner import Options, run
from incbak.engine.detect import Source, open_engine
from incbak.engine.session import Session
from incbak.repo.repository import Repository
from tests.kit.cli import Incbak
from tests.kit.guest import Guest, GuestDisk, Target, need_guest
from tests.kit.live import Chain, Writes, unharmed
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SECONDS = 12
PER_ROUND = 8
CLUSTER = 65536
AIMED_AT, AIMED = 80 << 20, 768  # where single writes go, and how many clusters there are
SIZE = AIMED_AT + AIMED * CLUSTER
WRITERS = {  # by the number of disks that are backed up
    1: Writes("one", 3, [Target("vda", spacing=CLUSTER), Target("vda", base=44 << 20)], slots=701, pause=0.002),
    2: Writes("two", 4, [Target("vda", base=48 << 20, spacing=CLUSTER), Target("vdb")], slots=499, pause=0.002),
}
CHECKED = 4  # one in so many backups is restored
FIRST, LAST = "block-dirty-bitmap-add", "transaction"
DECISIVE, WIDER = {FIRST, "block-dirty-bitmap-merge", "qom-set", LAST}, 0.04  # seconds of time for writes before these


class Aim:
    """Sends a write to each disk before and after every command that an engine gives while it fixes the instant."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.count, self.active, self.stopped = guest, 0, False, False
        self.newest: int | None = None  # of the commands that were sent
        self._execute = Session.execute

    def fire(self) -> None:
        """One write of 512 bytes to each disk, in a cluster that was not written for long."""
        self.count += 1
        for disk in ("vda", "vdb"):
            offset = AIMED_AT + self.count % AIMED * CLUSTER
            self.newest = self.guest.send(
                "write", disk=disk, offset=offset, length=512, fill=self.count // AIMED % 255 + 1, sync=False
            )

    def settle(self) -> None:
        """Wait until the guest has done all writes so far.

        It reads nothing while its VM is stopped, so a backlog from earlier would fill the channel then, and `fire`
        would wait for the guest that waits for the end of the backup's window.
        """
        if self.newest is not None:
            self.guest.wait_answer(self.newest)
            self.newest = None

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Listen to what goes to the monitor."""
        aim, execute = self, Session.execute

        async def aimed(self: Session, command: str, *args: Any, **more: Any) -> Any:
            aim.active = (aim.active or command == FIRST) and not aim.stopped
            if aim.active:
                aim.fire()
                await asyncio.sleep(WIDER if command in DECISIVE else 0)
            try:
                return await execute(self, command, *args, **more)
            finally:
                if aim.active:
                    aim.fire()
                aim.active = aim.active and command != LAST

        monkeypatch.setattr(Session, "execute", aimed)


class Campaign:
    """Backups of one disk and of two in turn, each in a repository of its own."""

    def __init__(self, root: Path, guest: Guest, images: dict[str, Path]) -> None:
        self.guest, self.images, self.made = guest, images, 0
        self.aim = Aim(guest)
        self.chains = {n: Chain(Incbak(root / str(n)), writes) for n, writes in WRITERS.items()}
        for n, chain in self.chains.items():
            (root / str(n)).mkdir()
            chain.incbak("init")
            self._back_up(n, incremental=False)

    def _back_up(self, disks: int, *, incremental: bool = True) -> None:
        names, chain = ["vda-dev", "vdb-dev"][:disks], self.chains[disks]
        self.aim.settle()
        before = self.guest.acked[chain.writes.name]
        record = asyncio.run(self._run(chain.incbak, names, incremental))
        assert [d.reason for d in record.disks] == [None] * disks
        if self.made // 2 % CHECKED == 0:
            chain.acknowledged[record.id] = before
        self.made += 1

    async def _run(self, incbak: Incbak, disks: Sequence[str], incremental: bool) -> Any:
        repo = Repository.open(incbak.repo)
        engine = await open_engine(Source(f"qmp:{self.guest.monitor}", incbak.state))
        try:
            outcome = await run(repo, engine, Options(incremental, name="vm", disks=disks))
        finally:
            await engine.close()
            repo.close()
        assert not outcome.failed
        return outcome.record

    def round(self) -> None:
        """Some backups, and the truth."""
        for n in range(PER_ROUND):
            self._back_up(1 + n % 2)
        self.aim.settle()
        self.guest.qmp("stop")
        self.aim.stopped = True  # nothing reads what is sent to the guest
        for n, chain in self.chains.items():
            chain.check()
            chain.acknowledged.clear()
            self._back_up(n)
            assert chain.differs(dict(list(self.images.items())[:n])) == {}, f"after {self.made} backups"
        self.aim.stopped = False
        self.guest.qmp("cont")


@pytest.mark.parametrize("threads", ["plain", "iothread"])
def test_no_write_is_lost(tmp_path: Path, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_guest()
    images = {name: raw_image(tmp_path / f"{name}.raw", SIZE) for name in ("vda", "vdb")}
    disks = [GuestDisk(name, image, iothread=threads == "iothread") for name, image in images.items()]
    wanted = int(os.environ.get("INCBAK_TEST_BACKUPS", "0"))
    with Guest(tmp_path / "guest", disks) as guest:
        for writes in WRITERS.values():
            writes.start(guest)
        campaign = Campaign(tmp_path, guest, images)
        aim = campaign.aim
        aim.patch(monkeypatch)
        end = time.monotonic() + SECONDS
        while campaign.made < wanted or (not wanted and time.monotonic() < end):
            campaign.round()
        for writes in WRITERS.values():
            unharmed(guest, writes.name)
        print(f"{campaign.made} backups, {aim.count} writes aimed at each disk")
        assert aim.count > 10 * campaign.made
