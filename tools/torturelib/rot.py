"""Bit rot: a file of the repository or a bitmap is damaged; nothing wrong may come out, and the next backup must do.

The repository is put back as it was afterwards, so that every round begins with a sound one. A record that is gone is
a backup that is not listed: a repository alone cannot tell, so no check is asked to.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

from torturelib.model import difference, read_state
from torturelib.world import LostError, World

TRACEBACK = "Traceback (most recent call last)"


def rot_round(world: World) -> None:
    """Damage one file, restore every backup, check, back up again."""
    rng = world.rng
    if world.serve is None:
        world.start()
    while len(world.backups) < 3 or rng.random() < 0.3:
        for _ in range(rng.randrange(1, 20)):
            world.write()
        world.backup()
    if rng.random() < 0.3:
        world.command("-q", "prune", "--keep-last", "999")  # nothing goes, but what is needed is kept
    if rng.random() < 0.25:
        _bitmap_rots(world)
    else:
        _repository_rots(world)


def _bitmap_rots(world: World) -> None:
    """Whatever the file says after a clean end or a kill: the next backup is right."""
    if world.rng.random() < 0.5:
        world.stop()
    else:
        world.gone()
    files = [p for p in (world.root / "state").rglob("*") if p.is_file() and p.name != "lock"]
    what = spoil(world.rng, sorted(files))
    world.outcomes.add(f"spoilt: {what}")
    world.start()
    for _ in range(world.rng.randrange(3)):
        world.write()
    world.backup()


def _repository_rots(world: World) -> None:
    sound = world.root / "sound"
    shutil.copytree(world.repo, sound)
    files = sorted(p for p in world.repo.rglob("*") if p.is_file() and p.parent.name != "locks")
    kind = world.rng.choice(sorted({p.parent.name for p in files}))
    what = spoil(world.rng, [p for p in files if p.parent.name == kind])
    world.outcomes.add(f"spoilt: {kind if kind != 'repo' else 'config'}, {what}")
    try:
        refused = [ident for ident in sorted(world.backups) if not _restores(world, ident)]
        status, _said = _run(world, "-q", "check", "--read-data")
        if refused and status == 0 and (kind, what) != ("backups", "gone"):
            raise LostError(f"backups {refused} do not restore, and check finds nothing: {what}")
        _backs_up(world, kind)
        if kind == "needs":
            _prunes(world)
    finally:
        shutil.rmtree(world.repo)
        sound.rename(world.repo)
    world.backup()


def _restores(world: World, ident: str) -> bool:
    """Whether a backup restores; a wrong restore is a loss."""
    target = world.root / "rotten.raw"
    target.unlink(missing_ok=True)
    status, _said = _run(world, "-q", "restore", ident, str(target))
    if status != 0:
        if target.exists():
            raise LostError(f"a refused restore of {ident} left a file under the target's name")
        world.outcomes.add("restores refused")
        return False
    if problem := difference(world.backups[ident], read_state(target)):
        raise LostError(f"backup {ident} restored wrongly from a damaged repository: {problem}")
    world.outcomes.add("restores right")
    return True


def _backs_up(world: World, kind: str) -> None:
    """The next backup is right; only a repository that does not know itself, or lost its index, may ask for help."""
    for _ in range(world.rng.randrange(4)):
        world.write()
    status, said = _run(world, "-q", "incremental", f"qmp:{world.monitor}")
    if status != 0:
        world.outcomes.add("backups refused")
        if kind == world.repo.name:
            return
        _run(world, "-q", "check", "--rebuild-index")
        status, said = _run(world, "-q", "incremental", f"qmp:{world.monitor}")
        if status != 0:
            raise LostError(f"no backup can be made any more: {said}")
    target = world.root / "rotten.raw"
    target.unlink(missing_ok=True)
    status, said = _run(world, "-q", "restore", "latest", str(target))
    if status != 0:
        raise LostError(f"a backup into a damaged repository does not restore: {said}")
    count = len(world.model.writes)
    if problem := difference(world.model.state(count), read_state(target)):
        raise LostError(f"a backup into a damaged repository is wrong: {problem}")
    world.outcomes.add("backups right after damage")


def _prunes(world: World) -> None:
    """What was kept for prunes is spoilt: the next one finds out anew what is needed."""
    world.command("-q", "prune", "--keep-last", "2", "--grace", "0", "--repack-below", "100")
    for entry in world.listed():
        if (ident := str(entry["id"])) in world.backups and not _restores(world, ident):
            raise LostError(f"backup {ident} does not restore after a prune")
    world.outcomes.add("prunes right after damage")


def _run(world: World, *argv: str) -> tuple[int, str]:
    child = world.spawn(*argv, log="rot")
    status = child.wait()
    said = child.err.read_text()
    if TRACEBACK in said or status < 0 or (status > 0 and not said.strip()):
        raise LostError(f"incbak {' '.join(argv)} exited {status}: {said[-1500:]}")
    return status, said[-500:]


def spoil(rng: Random, files: list[Path]) -> str:
    """Damage one of ``files``; what was done, in words."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    others = [p for p in files if p != path]
    kind = rng.choice(("bit", "bit", "bit", "cut", "zeroes", "gone", "grown", *(["swapped"] if others else [])))
    at = rng.randrange(len(data)) if data else 0
    if kind == "gone" or not data:
        path.unlink()
        return "gone"
    if kind == "swapped":
        other = rng.choice(others)
        mine = path.read_bytes()
        _replace(path, other.read_bytes())
        _replace(other, mine)
        return kind
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeroes":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    else:
        data += os.urandom(rng.choice((1, 512, 70_000)))
    _replace(path, bytes(data))
    return kind


def _replace(path: Path, data: bytes) -> None:
    """In place, as a disk does it: same inode."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as f:
        f.truncate(0)
        f.write(data)
    path.chmod(mode)
