"""Power cuts while the repository is written: what is listed afterwards must restore, and the next backup must do.

A small disk is backed up once fully and once incrementally under strace, and then the first backup is pruned; from what
the commands did to the repository, states after a cut at every moment are built (`storage`), and examined: every backup
that is listed restores to what its disk held (I3), every backup whose command had returned is listed unless it is
being pruned, the next prune does its work, and another full can be made and restored.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torturelib import trace
from torturelib.children import spawn
from torturelib.model import State, difference, read_state
from torturelib.storage import cuts, materialize
from torturelib.world import LostError, Outcomes

CLUSTER = 65536
PRUNE = ("-q", "prune", "--keep-last", "1", "--grace", "0", "--repack-below", "100")


@dataclass
class Recorded:
    """A run under strace: its effects, where each command ended, and what each backup holds."""

    ops: list[trace.Op]
    ends: list[int]
    contents: dict[str, State]
    order: list[str]


def _incbak(root: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "incbak", "-r", str(root / "repo"), "--state-dir", str(root / "state"), *argv]


def record(root: Path, rng: Random) -> Recorded:
    """Make a disk, back it up, change it, back it up again, prune; all under strace."""
    root.mkdir(parents=True)
    image, repo = root / "disk.raw", root / "repo"
    image.write_bytes(b"".join(rng.randbytes(CLUSTER) if rng.random() < 0.7 else bytes(CLUSTER) for _ in range(6)))
    found = Recorded([], [], {}, [])
    commands = [
        ("init", str(repo)),
        ("-q", "full", "--name", "vm", str(image)),
        ("-q", "incremental", "--name", "vm", str(image)),
        PRUNE,
    ]
    for number, argv in enumerate(commands):
        if number == 2:
            with image.open("r+b") as f:
                f.seek(CLUSTER + 512)
                f.write(rng.randbytes(CLUSTER))
        command = _incbak(root, *argv)
        if argv[0] == "init":
            command = [sys.executable, "-m", "incbak", *argv]
        status, ops = trace.run(command, repo, root / f"strace.{number}")
        if status:
            raise LostError(f"incbak {' '.join(argv)} exited {status} under strace")
        if number == 0:
            ops.insert(0, trace.Op("syncdir", "."))
        found.ops += ops
        found.ends.append(len(found.ops))
        for ident in _list(root):
            if ident not in found.contents:
                found.contents[ident] = read_state(image)
                found.order.append(ident)
    return found


def _list(root: Path) -> list[str]:
    child = spawn(["-r", str(root / "repo"), "--json", "list"], root / "list")
    if child.wait() != 0:
        raise LostError(f"list exited {child.status}: {child.err.read_text()[-400:]}")
    return [json.loads(line)["id"] for line in child.out.read_text().splitlines()]


def examine(root: Path, recorded: Recorded, position: int) -> None:
    """Look at one state, materialized below ``root``; raises `LostError`."""
    if position < recorded.ends[0]:
        return
    listed = _list(root)
    pruning = position >= recorded.ends[-2]
    for number, ident in enumerate(recorded.order, start=1):
        going = pruning and ident != recorded.order[-1]
        if position >= recorded.ends[number] and ident not in listed and not going:
            raise LostError(f"backup {ident} was reported done and is not listed after the cut")
    for ident in listed:
        _restores(root, ident, recorded.contents[ident])
    if pruning:
        _run(root, *PRUNE)
        _restores(root, recorded.order[-1], recorded.contents[recorded.order[-1]])
        _run(root, "-q", "check", "--read-data")
    image = root / "disk.raw"
    image.write_bytes(b"after the cut" * 20_000)
    _run(root, "-q", "full", "--name", "vm", "--disk", "disk0", str(image))
    _restores(root, "latest", read_state(image))


def _run(root: Path, *argv: str) -> None:
    child = spawn(["-r", str(root / "repo"), "--state-dir", str(root / "state"), *argv], root / "cmd")
    if child.wait() != 0:
        raise LostError(f"incbak {' '.join(argv)} exited {child.status}: {child.err.read_text()[-400:]}")


def _restores(root: Path, ident: str, content: State) -> None:
    target = root / "restored.raw"
    target.unlink(missing_ok=True)
    _run(root, "-q", "restore", ident, str(target))
    if problem := difference(content, read_state(target)):
        raise LostError(f"backup {ident} is listed and wrong: {problem}")


def campaign(top: Path, seed: str, sample: int, outcomes: Outcomes) -> None:
    """One recorded run and its cuts; ``sample`` random schedules at each moment with many choices."""
    rng = Random(f"{seed}/power")
    recorded = record(top / "recorded", rng)
    place = top / "cut"

    def look(state: dict[str, bytes | None], position: int) -> None:
        place.mkdir(mode=0o700)
        materialize(state, place / "repo")
        try:
            examine(place, recorded, position)
        except LostError as e:
            raise LostError(f"power cut behind effect {position} of {len(recorded.ops)}: {e}") from e
        shutil.rmtree(place)

    schedules, states = cuts(recorded.ops, recorded.ends, rng, sample, look)
    outcomes.add("power-cut schedules", schedules)
    outcomes.add("different states examined", states)
