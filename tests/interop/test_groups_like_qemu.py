"""Grouped transactions of ``incbak serve`` and of QEMU: the story of QEMU's test 124, told to both."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from incbak.disk.faults import Faults
from tests.kit.serve import wait_until
from tests.kit.twins import DRIVES, GRAIN, Engine, alike, both

pytestmark = pytest.mark.qemu
DIRTY = (0, 5, 20)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    with both(tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")) as found:
        yield found


def begin(engine: Engine, mode: str = "grouped", **more: Any) -> Any:
    """Jobs j0 and j1, incrementals of the two drives, in one transaction."""
    common: dict[str, Any] = {"sync": "incremental", "bitmap": "b", **{k.replace("_", "-"): v for k, v in more.items()}}
    if engine.name == "qemu":
        common["x-perf"] = {"max-workers": 1}
    actions = [
        {"type": "blockdev-backup", "data": {"device": drive, "target": f"t{n}", "job-id": f"j{n}", **common}}
        for n, drive in enumerate(DRIVES)
    ]
    return engine.ask("transaction", actions=actions, properties={"completion-mode": mode})


def prepared(engine: Engine, faults: Faults | None = None) -> None:
    """Both bitmaps dirty at `DIRTY`; the second target with ``faults``."""
    engine.clear()
    for drive in DRIVES:
        guest = engine.connect(drive)
        for cluster in DIRTY:
            guest.write(b"\x11" * GRAIN, cluster * GRAIN)
        guest.close()
    engine.target("t0")
    engine.target("t1", faults)


def statuses(engine: Engine) -> dict[str, str]:
    return {job["id"]: job["status"] for job in engine.jobs()}


def by_job(engine: Engine) -> dict[str, list[Any]]:
    """The events of each job in order; what is in flight between the two, nobody orders.

    Without the pauses that are QEMU's own, and without how far a job got that did not end well.
    """
    found: dict[str, list[Any]] = {"j0": [], "j1": []}
    for event, data in engine.events():
        told = {k: v for k, v in data.items() if k not in ("offset", "id", "device")}
        seen = found[str(data.get("device", data.get("id")))]
        if told == {"status": "running"} and seen and seen[-1] == (event, {"status": "paused"}):
            seen.pop()
        elif not (seen and seen[-1] == (event, told)):
            seen.append((event, told))
    return found


def outcome(engine: Engine) -> list[Any]:
    wait_until(lambda: not engine.jobs(), "the jobs are gone")
    return [by_job(engine), *((engine.bitmap(drive), engine.digest(drive)) for drive in DRIVES)]


def test_both_succeed(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        prepared(engine)
        return [begin(engine), *outcome(engine)]

    told = alike(engines, run)
    assert [bitmap["count"] for bitmap, _digest in told[2:]] == [0, 0]


@pytest.mark.parametrize("nth", [1, 2])
def test_one_fails_and_is_tried_again(engines: tuple[Engine, Engine], nth: int) -> None:
    """The other waits, is cancelled, and both bitmaps are as before; then all that, and what came after, is copied."""

    def run(engine: Engine) -> list[Any]:
        stall = threading.Event()
        prepared(engine, Faults(stall={"write": stall}, fail={"write": (nth, errno.EIO)}, once=True))
        told: list[Any] = [begin(engine)]
        wait_until(lambda: statuses(engine).get("j0") == "waiting", "the first waits")
        stall.set()
        told += outcome(engine)
        engine.write((30,), 0x22)
        return [*told, begin(engine), *outcome(engine)]

    told = alike(engines, run)
    assert [bitmap["count"] for bitmap, _ in told[2:4]] == [len(DIRTY) * GRAIN] * 2
    assert [bitmap["count"] for bitmap, _ in told[-2:]] == [0, 0]


def test_one_fails_of_its_own(engines: tuple[Engine, Engine]) -> None:
    """Ungrouped, the other goes its way."""

    def run(engine: Engine) -> list[Any]:
        prepared(engine, Faults(fail={"write": (1, errno.EIO)}, once=True))
        return [begin(engine, "individual"), *outcome(engine)]

    told = alike(engines, run)
    assert [bitmap["count"] for bitmap, _ in told[2:]] == [0, len(DIRTY) * GRAIN]


@pytest.mark.parametrize("verb", ["job-cancel", "job-finalize"])
@pytest.mark.parametrize("mode", ["never", "on-success", "always"])
def test_what_is_said_to_one_that_is_pending_is_said_to_both(
    engines: tuple[Engine, Engine], mode: str, verb: str
) -> None:
    def run(engine: Engine) -> list[Any]:
        prepared(engine)
        told = [begin(engine, sync="bitmap", bitmap_mode=mode, auto_finalize=False, auto_dismiss=False)]
        wait_until(lambda: statuses(engine) == {"j0": "pending", "j1": "pending"}, "both are pending")
        engine.write((7,), 0x33)
        told.append(engine.ask(verb, id="j1"))
        wait_until(lambda: set(statuses(engine).values()) == {"concluded"}, "both have ended")
        told.append(sorted(engine.jobs(), key=lambda job: str(job["id"])))
        told += [engine.ask("job-dismiss", id=job) for job in ("j0", "j1")]
        return [*told, *outcome(engine)]

    alike(engines, run)


def test_what_cannot_be_grouped_is_refused_in_qemus_words(engines: tuple[Engine, Engine]) -> None:
    """Of the actions on bitmaps those at which QEMU 7.2 does not crash."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        bitmap = {"node": "drive0", "name": "b"}
        asked = [
            ("abort", {}),
            ("block-dirty-bitmap-add", {"node": "drive0", "name": "c"}),
            ("block-dirty-bitmap-remove", bitmap),
            ("block-dirty-bitmap-disable", bitmap),
            ("block-dirty-bitmap-merge", {"node": "drive0", "target": "b", "bitmaps": []}),
        ]
        grouped = {"completion-mode": "grouped"}
        told = [
            engine.ask("transaction", actions=[{"type": kind, "data": data}], properties=grouped)
            for kind, data in asked
        ]
        return [*told, engine.ask("transaction", actions=[], properties={"completion-mode": "some"})]

    assert all(isinstance(reply, str) for reply in alike(engines, run))
