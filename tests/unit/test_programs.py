"""Programs that are run: what they print is bounded and read until they end, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from incbak import programs
from tests.kit.serve import wait_until


def _sh(script: str, **more: object) -> programs.Ended:
    return programs.run(["sh", "-c", script], **more)  # type: ignore[arg-type]


def _alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_tells_what_was_printed_and_how_it_ended() -> None:
    assert _sh("echo out; echo err >&2; exit 7") == programs.Ended(7, b"out\n", b"err\n")
    assert _sh("echo 'no \\377 text' >&2").said == "no \\xff text"
    assert _sh("echo both; echo ways >&2", err=subprocess.STDOUT).out == b"both\nways\n"


@pytest.mark.parametrize("leave", ["sleep 60 &", "yes & sleep 60 &"])
def test_what_it_leaves_behind_is_not_waited_for(leave: str) -> None:
    """It has inherited the output, and may go on writing to it."""
    ended = _sh(f"{leave} echo $! >&2; echo done", timeout=50)
    left = int(ended.err.split()[0])
    try:
        assert (ended.code, b"done\n" in ended.out) == (0, True)
        assert _alive(left)
    finally:
        os.kill(left, signal.SIGKILL)


def test_the_first_and_the_last_of_much_is_kept() -> None:
    ended = _sh("echo first; head -c 30000000 /dev/zero; echo last", kept=1000)
    assert len(ended.out) < 1100
    assert (ended.out[:6], ended.out[-5:]) == (b"first\n", b"last\n")
    assert b"29999011 bytes are left out" in ended.out
    assert len(_sh("head -c 1000 /dev/zero", kept=1000).out) == 1000


def test_what_is_sent_may_be_read_or_not() -> None:
    sent = os.urandom(3 << 20)
    assert programs.run(["cat"], send=sent, kept=8 << 20).out == sent
    assert programs.run(["true"], send=sent).code == 0


def test_no_more_is_kept_on_the_way() -> None:
    kept = programs._Kept(1000)
    for _ in range(1000):
        kept.add(bytes(100))
    assert sum(map(len, kept._tail)) < 700


def test_what_is_left_behind_may_print_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = list[int]()

    def endless(fd: int, output: object) -> int:
        reads.append(fd)
        assert len(reads) < 1000
        return 1 << 16

    with open("/dev/zero", "rb") as zeroes:
        monkeypatch.setattr(programs, "_read", endless)
        programs._drain(zeroes, programs._Kept(1000))
    assert len(reads) == 32


def _ended(script: str, ready: Path) -> None:
    """Start a script, and end it as at its time limit once the file is there."""
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    wait_until(ready.exists, "all of it has begun")
    programs._end(process, group=True)


DEAF = "trap '' TERM"


@pytest.mark.parametrize(("leader", "child"), [(":", ":"), (":", DEAF), (DEAF, DEAF)])
def test_it_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leader: str, child: str
) -> None:
    monkeypatch.setattr(programs, "_PATIENCE", 0.2)
    (tmp_path / "child").write_text(f"{child}\necho $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 60\n")
    _ended(f"sh {tmp_path}/child & {leader}; sleep 60; :", tmp_path / "pid")
    number = int((tmp_path / "pid").read_text())
    wait_until(lambda: not _alive(number), "the child has ended")


def test_what_it_has_started_can_end_in_peace(tmp_path: Path) -> None:
    """SIGTERM reaches all of them; they are killed when the first is gone, or after some seconds."""
    (tmp_path / "child").write_text(
        f"trap 'touch {tmp_path}/told; exit' TERM\ntouch {tmp_path}/here; sleep 60 & wait\n"
    )
    _ended(f"trap : TERM; sh {tmp_path}/child & wait; wait", tmp_path / "here")
    assert (tmp_path / "told").exists()


def test_its_time_may_be_long() -> None:
    """More than what one wait of the system can be told."""
    assert programs.run(["true"], timeout=86400.0 * 1000).code == 0


def test_a_signal_disturbs_neither_the_start_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a terminal goes: one for each, and then the one of who started us."""
    monkeypatch.setattr(programs, "_PATIENCE", 0.5)
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ours}
    real_kill, real_start, told = os.killpg, subprocess.Popen, []

    def noisy(group: int, number: int) -> None:
        real_kill(group, number)
        os.kill(os.getpid(), signal.SIGTERM)
        told.append(number)

    def start(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        process = real_start(*args, **more)
        wait_until((tmp_path / "here").exists, "it does not hear SIGTERM")
        os.kill(os.getpid(), signal.SIGINT)
        told.append(process)
        return process

    monkeypatch.setattr(os, "killpg", noisy)
    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        for number in ours:
            signal.signal(number, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            programs.run(["sh", "-c", f"{DEAF}; touch {tmp_path}/here; sleep 10; :"])
        assert [signal.getsignal(number) for number in ours] == [signal.default_int_handler] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process, *numbers = told
    assert (process.returncode, numbers) == (-signal.SIGKILL, [signal.SIGTERM, signal.SIGKILL, signal.SIGKILL])


def test_a_signal_at_its_end_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = programs.collect

    def collected(process: subprocess.Popen[bytes], **more: Any) -> programs.Ended:
        ended = real(process, **more)
        os.kill(os.getpid(), signal.SIGINT)
        return ended

    monkeypatch.setattr(programs, "collect", collected)
    with pytest.raises(KeyboardInterrupt):
        programs.run(["true"])


def test_a_handler_that_raises_nothing_ends_nothing(tmp_path: Path) -> None:
    """Serve notes that it is to end, and makes its image first."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        assert _sh(f"kill -TERM {os.getpid()}; sleep 0.5; echo out").out == b"out\n"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_without_a_descriptor_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> int:
        raise OSError(24, "too many open files")

    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    monkeypatch.setattr(os, "pidfd_open", none)
    programs._end(process, group=True)
    assert process.returncode == -signal.SIGKILL


def test_after_its_time_it_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        _sh("sleep 60", timeout=0.1)


def test_an_interrupt_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupted(process: subprocess.Popen[bytes], **_: object) -> programs.Ended:
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        programs.run(["sleep", "60"])
    assert not _alive(started[0])


def test_what_cannot_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        programs.run(["/nowhere/at/all"])
    with pytest.raises(ValueError, match="null"):
        programs.run(["a\0b"])
