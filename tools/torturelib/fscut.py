"""Power cuts under a whole host: repository, state directory and the guest's image on a real file system (`mounted`).

A story is a few rounds of the campaign (`rounds`: writes, backups, prunes, kills), on ext4, XFS or btrfs. Then the disk
is put together as it may be after a cut at random places of the story, mounted, and examined:

- every backup that a command had reported, and that no prune was taking away, is listed;
- what is listed restores to what it held (I3);
- what the guest had flushed is in the image;
- `serve` starts, and the next incremental restores to exactly the image as it is now, so the bitmap said no less than
  the truth (I2); so does one after more writes;
- prune and check do their work.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from incbak.errors import IncbakError
from torturelib.model import State, Write, blocks_of, difference
from torturelib.mounted import Disk, Kind, Log, MountError, mount, recording
from torturelib.pruning import prune_round
from torturelib.rounds import restore_round, runner_round, serve_round
from torturelib.world import LostError, Outcomes, World

_ROUNDS: tuple[Callable[[World], None], ...] = (serve_round, runner_round, prune_round, prune_round, restore_round)
STORY = 5
"""Rounds on one file system."""


@dataclass
class Story:
    """What had been promised when the log had so many bytes, or records (`settle`)."""

    contents: dict[str, State] = field(default_factory=dict)
    listed: list[tuple[int, set[str]]] = field(default_factory=list)
    """Behind each round."""
    issued: list[tuple[int, set[int]]] = field(default_factory=list)
    """Each write of the guest: when it was sent, and its blocks."""
    flushed: list[tuple[int, State, int]] = field(default_factory=list)
    """When a flush had returned, the disk then, and how many writes had been issued."""

    def settle(self, log: Log) -> None:
        """From bytes to records."""
        self.listed = [(log.position(size), idents) for size, idents in self.listed]
        self.issued = [(log.position(size), blocks) for size, blocks in self.issued]
        self.flushed = [(log.position(size), state, count) for size, state, count in self.flushed]

    def must_list(self, number: int) -> set[str]:
        """Backups that were there behind a round, and still are behind the next one, in which a prune may run."""
        past = [i for i, (position, _) in enumerate(self.listed) if position <= number]
        if not past:
            return set()
        return self.listed[past[-1]][1] & self.listed[min(past[-1] + 1, len(self.listed) - 1)][1]

    def lost(self, image: State, number: int) -> str | None:
        """A block that the guest had flushed, and that is not in ``image``, in words."""
        past = [each for each in self.flushed if each[0] <= number]
        if not past:
            return None
        _, state, count = past[-1]
        later = {b for position, blocks in self.issued[count:] if position <= number for b in blocks}
        here = {b: data for b, data in image.items() if b not in later}
        return difference({b: data for b, data in state.items() if b not in later}, here)


class _World(World):
    """Writes down when what was promised."""

    def __init__(self, root: Path, rng: Random, outcomes: Outcomes, aside: Path, story: Story, log: Path) -> None:
        super().__init__(root, rng, outcomes, aside)
        subprocess.run(["sync", "-f", root], check=True)
        self._story, self._log = story, log

    def _now(self) -> int:
        return self._log.stat().st_size

    def issue(self, write: Write) -> bool:
        """As `World`; now and then with a flush behind it."""
        self._story.issued.append((self._now(), set(blocks_of(write))))
        if not super().issue(write):
            return False
        if self.rng.random() < 0.2:
            assert self.client
            try:
                self.client.flush()
            except (IncbakError, OSError):
                return False
            self._flushed()
        return True

    def _flushed(self) -> None:
        state = self.model.state(self.model.acknowledged)
        self._story.flushed.append((self._now(), state, len(self._story.issued)))

    def stop(self) -> None:
        """A clean shutdown has flushed."""
        super().stop()
        self._flushed()

    def new_backups(self, low: int, high: int) -> list[str]:
        """As `World`; what they hold is kept, also when they are pruned."""
        fresh = super().new_backups(low, high)
        self._story.contents |= {ident: self.backups[ident] for ident in fresh}
        return fresh

    def mark(self) -> None:
        """The round is over."""
        self._story.listed.append((self._now(), {str(entry["id"]) for entry in self.listed()}))


def campaign(top: Path, rng: Random, sample: int, outcomes: Outcomes, kinds: list[Kind]) -> None:
    """One story on a file system of ``kinds``, and so many cuts. Raises `LostError`."""
    kind = rng.choice(kinds)
    options = rng.choice(kind.options)
    top.mkdir(parents=True)
    boots = top / "boot-id"
    with _boot(boots):
        story = Story()
        with recording(top, kind, options) as place:
            _tell(story, place / "host", top / "aside", top / "log", rng, outcomes)
        log = Log(top / "log")
        story.settle(log)
        begin = story.listed[0][0]
        disk = Disk(log, top / "durable", kind.size)
        for number in sorted(rng.randrange(begin, len(log) + 1) for _ in range(sample)):
            disk.forward(number)
            boots.write_text(str(uuid.UUID(int=rng.getrandbits(128))))
            pending = disk.cut(top / "cut", rng)
            try:
                with mount(top / "cut", kind, options, top / "again"):
                    _examine(World(top / "again/host", rng, outcomes, top / "aside"), story, number)
            except MountError:
                outcomes.add(f"cuts that {kind.name} itself did not survive")
                continue
            except (LostError, TimeoutError) as e:
                where = f"{kind.name} ({options}), power cut behind record {number} of {len(log)}, {pending} open"
                raise type(e)(f"{where}: {e}") from e
            outcomes.add(f"cuts of {kind.name}")
        disk.close()


@contextmanager
def _boot(path: Path) -> Iterator[None]:
    """Commands believe that the host's boot is that of ``path``."""
    path.write_text(str(uuid.UUID(int=1)))
    os.environ["INCBAK_BOOT_ID_FILE"] = str(path)
    try:
        yield
    finally:
        del os.environ["INCBAK_BOOT_ID_FILE"]


def _tell(story: Story, root: Path, aside: Path, log: Path, rng: Random, outcomes: Outcomes) -> None:
    world = _World(root, rng, outcomes, aside, story, log)
    try:
        world.mark()
        for _ in range(STORY):
            rng.choice(_ROUNDS)(world)
            world.mark()
        if world.serve and rng.random() < 0.5:
            world.stop()
        world.mark()
    finally:
        if world.serve:
            world.serve.kill()


def _examine(world: World, story: Story, number: int) -> None:
    """One disk after a cut."""
    try:
        if problem := story.lost(world.model.base, number):
            raise LostError(f"what the guest had flushed is not in the image: {problem}")
        found = {str(entry["id"]) for entry in world.listed()}
        if missing := story.must_list(number) - found:
            raise LostError(f"backups that were reported are not listed: {sorted(missing)}")
        _compare(world, story, found)
        if world.rng.random() < 0.5:
            _prune(world)
        world.start()
        world.backup()
        for _ in range(5):
            world.write()
        world.backup()
        _prune(world)
        world.stop()
        world.command("-q", "check", "--read-data")
    finally:
        if world.serve:
            world.serve.kill()


def _compare(world: World, story: Story, found: set[str]) -> None:
    for ident in sorted(found):
        state = world.restore(ident)
        if ident in story.contents and (problem := difference(story.contents[ident], state)):
            raise LostError(f"backup {ident} is listed and wrong: {problem}")
        world.backups[ident] = state
        world.outcomes.add("restores after cuts")


def _prune(world: World) -> None:
    world.command("-q", "prune", "--keep-last", "2", "--grace", "0", "--repack-below", "100")
    left = {str(entry["id"]) for entry in world.listed()}
    for ident in left:
        if problem := difference(world.backups[ident], world.restore(ident)):
            raise LostError(f"backup {ident} is listed after a prune and wrong: {problem}")
