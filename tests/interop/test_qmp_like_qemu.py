"""``incbak serve`` beside a real qemu-storage-daemon: the same commands, and the same replies, events and bitmaps.

Both have one disk of the same content, take the guest's writes over NBD, and back up to NBD servers of ours that can
be told to fail. The bitmaps after each pair of sync mode and bitmap mode are those of QEMU's test 257.
"""

from __future__ import annotations

import errno
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from incbak.disk.faults import Faults
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from tests.kit.need import need
from tests.kit.serve import wait_until
from tests.kit.twins import DURING, FIRST, GRAIN, SIZE, Engine, alike, both

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    with both(tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")) as found:
        yield found


# -- bitmaps -----------------------------------------------------------------------------------------------------------


CASES = [
    *((sync, mode) for sync in ("bitmap",) for mode in ("never", "on-success", "always")),
    *((sync, mode) for sync in ("full", "top") for mode in ("on-success", "always")),
    ("incremental", "on-success"),
]


@pytest.mark.parametrize("failure", ["none", "cancelled when pending", "at once", "midway"])
@pytest.mark.parametrize(("sync", "mode"), CASES)
def test_bitmaps_are_what_they_are_in_qemu(engines: tuple[Engine, Engine], sync: str, mode: str, failure: str) -> None:
    """Sync mode, bitmap mode and failure of QEMU's test 257: the digest of the bits afterwards is QEMU's.

    Only where a job fails and its bitmap says what was copied, it depends on what was in flight then, and is no more
    than a superset of what is missing; with sync mode ``bitmap`` it is exactly that on both.
    """
    nth = {"at once": 1, "midway": 3}.get(failure)

    def run(engine: Engine) -> dict[str, Any]:
        engine.clear()
        engine.write(FIRST, 0x11)
        faults = Faults(fail={"write": (nth, errno.EIO)}, once=True) if nth else None
        disk = engine.target("t0", faults).disk
        told: dict[str, Any] = {"before": engine.bitmap()}
        modes = {"sync": sync, "bitmap": "b", "bitmap_mode": mode}
        told["reply"] = engine.backup(**modes, auto_finalize=False, auto_dismiss=False)
        wait_until(lambda: engine.status() in ("pending", "concluded"), "the job is through")
        if not nth:
            told["pending"] = engine.bitmap()["busy"]
            engine.write(DURING, 0x22)
            engine.qmp("job-cancel" if failure.startswith("cancel") else "job-finalize", id="j")
            wait_until(lambda: engine.status() == "concluded", "the job has ended")
        told["error"] = engine.jobs()[0].get("error")
        engine.qmp("job-dismiss", id="j")
        copied = disk.read(0, SIZE)
        missing = {c for c in FIRST if copied[c * GRAIN] != 0x11}
        left = _dirty(engine)
        assert bool(missing) == bool(nth)
        assert missing <= left, "what is not at the target is not dirty"
        if nth and mode == "always":
            assert sync != "bitmap" or left == missing
            return told
        return {**told, "after": engine.bitmap(), "digest": engine.digest(), "left": left}

    told = alike(engines, run)
    assert (told["reply"], told["before"]["count"]) == ({}, len(FIRST) * GRAIN)
    if nth:
        assert told["error"] == "Input/output error"
        assert mode == "always" or told["left"] == set(FIRST)
    elif (failure == "none" and mode != "never") or mode == "always":
        assert told["left"] == set(DURING)
    else:
        assert told["left"] == {*FIRST, *DURING}


def _dirty(engine: Engine) -> set[int]:
    """The clusters that bitmap ``b`` calls dirty, read over NBD from a copy of it."""
    qmp, export = engine.qmp, "drive0"
    qmp("block-dirty-bitmap-add", node="drive0", name="peek", granularity=GRAIN, disabled=True)
    qmp("block-dirty-bitmap-merge", node="drive0", target="peek", bitmaps=["b"])
    if engine.name == "qemu":
        export = "peek"
        qmp("block-export-add", type="nbd", id="peek", node_name="drive0", name=export, bitmaps=["peek"])
    context = "qemu:dirty-bitmap:peek"
    client = NbdClient.connect(NbdUri(export, path=str(engine.directory / "nbd.sock")), contexts=[context])
    extents = [(o, n) for o, n, flags in client.extents(context) if flags]
    client.close()
    if engine.name == "qemu":
        engine.ask("block-export-del", id="peek", mode="hard")
        wait_until(lambda: all(e["id"] != "peek" for e in qmp("query-block-exports")), "the export is gone")
    qmp("block-dirty-bitmap-remove", node="drive0", name="peek")
    return {c for offset, length in extents for c in range(offset // GRAIN, (offset + length) // GRAIN)}


def test_the_digest_of_a_bitmap_is_qemus(engines: tuple[Engine, Engine]) -> None:
    for granularity in (512, 4096, GRAIN, 1 << 20):

        def run(engine: Engine, granularity: int = granularity) -> tuple[Any, ...]:
            engine.clear()
            engine.qmp("block-dirty-bitmap-remove", node="drive0", name="b")
            engine.qmp("block-dirty-bitmap-add", node="drive0", name="b", granularity=granularity)
            empty = engine.digest()
            for offset in (0, 777 * 512, 3 * GRAIN - 512, SIZE - 512):
                engine.guest.write(b"x" * 512, offset)
            return empty, engine.digest(), engine.bitmap()

        alike(engines, run)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "on-success", "never", "always"])
@pytest.mark.parametrize("bitmap", [None, "bitmap404", "b"])
@pytest.mark.parametrize("sync", ["incremental", "bitmap", "full", "top", "none"])
def test_what_qemu_refuses_we_refuse_in_its_words(
    engines: tuple[Engine, Engine], sync: str, bitmap: str | None, mode: str | None
) -> None:
    """The table of QEMU's test 257, and what it takes is taken."""
    given = {k: v for k, v in (("bitmap", bitmap), ("bitmap_mode", mode)) if v}

    def run(engine: Engine) -> Any:
        engine.clear()
        engine.target("t0")
        reply = engine.backup(sync=sync, auto_finalize=False, **given)
        if reply == {}:
            wait_until(lambda: engine.status() in ("pending", "running"), "the job runs")
            engine.qmp("job-cancel", id="j")
            wait_until(lambda: not engine.jobs(), "the job is gone")
        return reply

    alike(engines, run)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("no-such-command", {}),
        ("blockdev-backup", {"device": "nothing", "target": "t0", "sync": "full"}),
        ("blockdev-backup", {"device": "drive0", "target": "nothing", "sync": "full"}),
        ("blockdev-backup", {"device": "drive0", "target": "t0"}),
        ("blockdev-backup", {"device": "drive0", "target": "t0", "sync": "half"}),
        ("blockdev-backup", {"device": "drive0", "target": "t0", "sync": "full", "job_id": "1"}),
        ("blockdev-backup", {"device": "drive0", "target": "t0", "sync": "full", "job_id": "j", "speed": -1}),
        ("blockdev-backup", {"device": "drive0", "target": "t0", "sync": "full", "unknown": 1}),
        ("blockdev-backup", {"device": "drive0", "target": "t0", "sync": "full", "speed": "fast"}),
        ("block-job-cancel", {"device": "nothing"}),
        ("block-job-pause", {"device": "nothing"}),
        ("block-job-resume", {"device": "nothing"}),
        ("block-job-complete", {"device": "nothing"}),
        ("block-job-set-speed", {"device": "nothing", "speed": 1}),
        ("block-job-finalize", {"id": "nothing"}),
        ("block-job-dismiss", {"id": "nothing"}),
        ("job-cancel", {"id": "nothing"}),
        ("job-pause", {"id": "nothing"}),
        ("job-resume", {"id": "nothing"}),
        ("job-complete", {"id": "nothing"}),
        ("job-finalize", {"id": "nothing"}),
        ("job-dismiss", {"id": "nothing"}),
        ("job-dismiss", {}),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "nothing", "name": "b"}),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "drive0", "name": "nothing"}),
    ],
)
def test_errors_are_qemus(engines: tuple[Engine, Engine], command: str, arguments: dict[str, Any]) -> None:
    def run(engine: Engine) -> Any:
        engine.clear()
        engine.target("t0")
        return engine.ask(command, **arguments)

    assert isinstance(alike(engines, run), str)


# -- the life of a job -------------------------------------------------------------------------------------------------


def test_a_job_by_hand_is_told_as_in_qemu(engines: tuple[Engine, Engine]) -> None:
    """Every verb in every state, what the queries say, and the events in their order."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write(FIRST, 0x33)
        engine.target("t0")
        told: list[Any] = [engine.backup(sync="bitmap", bitmap="b", bitmap_mode="never", auto_finalize=False,
                                         auto_dismiss=False)]  # fmt: skip
        wait_until(lambda: engine.status() == "pending", "the job is pending")
        told += [engine.jobs(), _block_jobs(engine)]
        told += [engine.ask(f"job-{verb}", id="j") for verb in ("pause", "resume", "complete", "dismiss")]
        told += [engine.ask("block-job-set-speed", device="j", speed=1)]
        told += [engine.ask("block-job-finalize", id="j")]
        wait_until(lambda: engine.status() == "concluded", "the job has ended")
        told += [engine.jobs(), _block_jobs(engine)]
        told += [engine.ask(f"job-{verb}", id="j") for verb in ("pause", "resume", "complete", "cancel", "finalize")]
        told += [engine.ask("block-job-dismiss", id="j"), engine.jobs(), engine.events()]
        return told

    alike(engines, run)


def _block_jobs(engine: Engine) -> list[dict[str, Any]]:
    return [{k: v for k, v in job.items() if not k.startswith("x-")} for job in engine.qmp("query-block-jobs")]


@pytest.mark.parametrize("end", ["resume", "cancel"])
def test_a_paused_job_is_told_as_in_qemu(engines: tuple[Engine, Engine], end: str) -> None:
    """Held up by its target until it is to rest; nothing goes on until it is told to."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write(FIRST, 0x44)
        stall = threading.Event()
        engine.target("t0", Faults(stall={"write": stall}))
        told: list[Any] = [engine.backup(sync="bitmap", bitmap="b", bitmap_mode="on-success", speed=GRAIN)]
        told += [engine.ask("block-job-pause", device="j"), engine.ask("job-pause", id="j")]
        stall.set()
        wait_until(lambda: engine.status() == "paused", "the job rests")
        told += [[(j["paused"], j["busy"], j["status"], j["speed"]) for j in engine.qmp("query-block-jobs")]]
        told += [engine.ask("block-job-cancel", device="j"), engine.ask("block-job-complete", device="j")]
        if end == "resume":
            told += [engine.ask("block-job-set-speed", device="j", speed=0), engine.ask("block-job-resume", device="j")]
        else:
            told += [engine.ask("block-job-cancel", device="j", force=True)]
        wait_until(lambda: not engine.jobs(), "the job is gone")
        told += [engine.bitmap(), engine.digest()]
        events = engine.events()
        for event, data in events:
            if event == "BLOCK_JOB_CANCELLED":
                assert data.pop("offset") <= data["len"]
        return [*told, events]

    alike(engines, run)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failing_target_is_told_as_in_qemu(engines: tuple[Engine, Engine], nth: int) -> None:
    """Events in order: how far the job got, QEMU and we count differently."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write(FIRST, 0x55)
        engine.target("t0", Faults(fail={"write": (nth, errno.EIO)}, once=True))
        reply = engine.backup(sync="bitmap", bitmap="b", bitmap_mode="on-success")
        wait_until(lambda: not engine.jobs(), "the job is gone")
        events = engine.events()
        for event, data in events:
            if event == "BLOCK_JOB_COMPLETED":
                assert 0 <= data.pop("offset") <= data["len"]
        return [reply, events, engine.bitmap(), engine.digest()]

    alike(engines, run)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("policy", ["stop", "enospc", "ignore", "auto", "report"])
def test_error_policies_are_told_as_in_qemu(engines: tuple[Engine, Engine], policy: str, code: int) -> None:
    """A target that refuses one write: rest and be resumed, try again, or fail; and where the bitmap is then."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write(FIRST, 0x55)
        disk = engine.target("t0", Faults(fail={"write": (2, code)}, once=True)).disk
        told = [engine.backup(sync="incremental", bitmap="b", on_target_error=policy)]
        if policy == "stop" or (policy in ("enospc", "auto") and code == errno.ENOSPC):
            wait_until(lambda: engine.status() == "paused", "the job rests")
            told += [[(j["paused"], j["io-status"]) for j in engine.qmp("query-block-jobs")]]
            told += [engine.ask("block-job-pause", device="j"), engine.ask("block-job-cancel", device="j")]
            told += [engine.ask("block-job-resume", device="j")]
        wait_until(lambda: not engine.jobs(), "the job is gone")
        events = _told_once(engine.events())
        for event, data in events:
            if event == "BLOCK_JOB_COMPLETED":
                data.pop("offset")
        return [*told, events, engine.bitmap(), engine.digest(), "error" in str(told) or disk.read(0, GRAIN)]

    alike(engines, run)


def _told_once(events: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Without a rest that QEMU tells twice: once of its own, once as it was asked."""
    found: list[tuple[str, dict[str, Any]]] = []
    for each in events:
        if each not in found[-2:]:
            found.append(each)
    return found


@pytest.mark.parametrize("sync", ["full", "top", "incremental"])
def test_drive_backup_is_told_as_in_qemu(engines: tuple[Engine, Engine], sync: str) -> None:
    """To a new file, then into it again where it exists; the files are alike."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write((1, 2, 60), 0x66)
        out = engine.directory / f"out-{sync}.raw"
        told: list[Any] = []
        arguments = {"device": "drive0", "target": str(out), "format": "raw", "job_id": "j"}
        for mode in ("absolute-paths", "existing"):
            more = {"bitmap": "b"} if sync == "incremental" else {}
            told.append(engine.ask("drive-backup", **arguments, sync=sync, mode=mode, **more))
            wait_until(lambda: not engine.jobs(), "the job is gone")
            told += [engine.events(), engine.bitmap(), engine.digest(), out.read_bytes()]
            engine.write((3, 61), 0x77)
        told.append(engine.ask("drive-backup", **{**arguments, "device": "nothing"}, sync=sync))
        told.append(engine.ask("drive-backup", **{**arguments, "job_id": "1"}, sync="full"))
        return told

    alike(engines, run)


def test_the_commands_are_qemus() -> None:
    """All that we have QEMU has too; nothing of ours is without its prefix."""
    from incbak.serve.commands import COMMANDS

    need("qemu-system-x86_64")
    asked = '{"execute":"qmp_capabilities"}{"execute":"query-commands"}{"execute":"quit"}'
    run = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    said = subprocess.run(run, input=asked, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [name for name in COMMANDS if not name.startswith("x-incbak-") and f'"{name}"' not in said] == []
