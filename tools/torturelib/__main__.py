"""``tools/torture``: see the package docstring."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from torturelib import bitmapcut, fscut, mounted, planted, powercut
from torturelib.rounds import ROUNDS
from torturelib.world import LostError, Outcomes, World

if TYPE_CHECKING:
    from torturelib.live import LiveWorld

ROUNDS_PER_WORLD = 25
MEMORY = Path("/dev/shm")
"""Worlds are made there where it is: a killed process leaves the same in memory as on a disk, only sooner."""
SCHEDULES = 6
"""Random power-cut schedules at each moment that has too many to try them all."""

CUTS = 20
"""Cuts of the disk below one story on a file system."""

SESSIONS = 300
"""Sessions of a tracked disk, most of which end in a power cut, for each disk that is backed up under strace."""


def main() -> int:
    """Run the campaign; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(prog="tools/torture")
    parser.add_argument("--target", choices=[*ROUNDS, "power", "filesystem", "live", "all"], default="all")
    parser.add_argument("--kind", choices=[kind.name for kind in mounted.KINDS], help="of file system (default: any)")
    parser.add_argument("--rounds", type=int, help="stop after so many rounds (default: by time)")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="leave the evidence here (default: a new temporary directory)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"{options.keep} is not empty")
    outcomes = Outcomes()
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    lost = campaign(options, outcomes)
    result = {"seed": options.seed, "lost": int(lost), **outcomes.counts, "reasons": outcomes.reasons}
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    return int(lost)


def campaign(options: argparse.Namespace, outcomes: Outcomes) -> bool:
    """Worlds of a few rounds each until time or rounds are up; true when something was lost, or a command hung."""
    targets = [*ROUNDS, "power", "filesystem"] if options.target == "all" else [options.target]
    if shutil.which("strace") is None:
        print("without strace there are no power cuts", file=sys.stderr)
        targets = [t for t in targets if t != "power"]
    kinds = [kind for kind in mounted.available() if options.kind in (None, kind.name)]
    if not kinds:
        print("no power cuts under a file system: they need root, nbdfuse, loop devices and mkfs", file=sys.stderr)
        targets = [t for t in targets if t != "filesystem"]
    if not targets:
        raise SystemExit(2)
    if "filesystem" in targets:
        mounted.private_mounts()
    end = time.monotonic() + options.seconds
    top = options.keep or Path(tempfile.mkdtemp(prefix="incbak-torture-", dir=MEMORY if MEMORY.is_dir() else None))
    done = number = 0
    while (done < options.rounds) if options.rounds else (time.monotonic() < end):
        target = targets[number % len(targets)]
        rng = Random(f"{options.seed}/{number}")
        world: World | LiveWorld | None = None
        step = 0
        try:
            if target == "power":
                powercut.campaign(top / f"world-{number}", f"{options.seed}/{number}", SCHEDULES, outcomes)
                bitmapcut.campaign(top / f"world-{number}/bitmap", f"{options.seed}/{number}", SESSIONS, outcomes)
                done += 1
            elif target == "filesystem":
                fscut.campaign(top / f"world-{number}", rng, CUTS, outcomes, kinds)
                done += 1
            else:
                world, hurt = _begin(target, top / f"world-{number}", rng, outcomes)
            while world and step < ROUNDS_PER_WORLD:
                step += 1
                hurt(world)
                done += 1
                outcomes.add("rounds")
                if (done >= options.rounds) if options.rounds else (time.monotonic() > end):
                    break
            if world:
                _finish(world)
        except (LostError, TimeoutError) as e:
            what = "HUNG" if isinstance(e, TimeoutError) else "LOST"
            print(f"{what}: seed {options.seed} world {number} ({target}) round {step}: {e}", file=sys.stderr)
            print(f"evidence: {top / f'world-{number}'}", file=sys.stderr)
            return True
        finally:
            if world and world.serve:
                world.serve.kill()
        shutil.rmtree(top / f"world-{number}")
        number += 1
    if not options.keep:
        shutil.rmtree(top)
    return False


def _begin(target: str, root: Path, rng: Random, outcomes: Outcomes) -> tuple[World | LiveWorld, Callable[[Any], None]]:
    if target == "live":
        from torturelib.live import LiveWorld, live_round  # needs what the tests need, which the others do not

        return LiveWorld(root, rng, outcomes), live_round
    return World(root, rng, outcomes), ROUNDS[target]


def _finish(world: World | LiveWorld) -> None:
    if world.serve:
        world.gone()
    world.verify_all()


sys.exit(planted.main(sys.argv[2:]) if sys.argv[1:2] == ["--planted"] else main())
