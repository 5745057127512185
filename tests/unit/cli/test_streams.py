"""Standard streams that are closed, full, or read by nobody; ignored signals: the exit code says what was done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from incbak.errors import UsageError
from incbak.newfile import refuse_irreplaceable
from tests.kit.cli import Incbak
from tests.kit.serve import Serve, raw_image, wait_until

SIZE = 1 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    raw_image(tmp_path / "d.raw", SIZE, os.urandom(SIZE))
    return made


def _closing(*numbers: int) -> dict[str, Any]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    kept = {1: "stdout", 2: "stderr"}
    return {"preexec_fn": close} | {name: None for number, name in kept.items() if number in numbers}


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "fifo"])
@pytest.mark.parametrize("what", ["full {}/d.raw --metrics", "drill --metrics", "report --html"])
def test_what_is_replaced_in_one_step_is_no_pipe(incbak: Incbak, tmp_path: Path, name: str, what: str) -> None:
    """Reading what is there would wait for ever, and a file would take the place of the device's name."""
    os.mkfifo(tmp_path / "fifo")
    incbak("full", tmp_path / "d.raw")
    ran = incbak.run(*what.format(tmp_path).split(), tmp_path / name)
    assert (ran.code, "no file is made" in ran.err or "no regular file" in ran.err) == (2, True), ran
    assert Path("/dev/stdout").is_symlink()
    assert len(incbak.list()) == 1


def test_a_file_behind_stdout_is_no_file_to_replace() -> None:
    """The link in /dev would become the file."""
    with pytest.raises(UsageError, match="below /dev"):
        refuse_irreplaceable(Path("/dev/nothing-is-here"))
    refuse_irreplaceable(Path("/dev/shm/nothing-is-here"))


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)], ids=repr)
def test_closed_streams_change_nothing(incbak: Incbak, tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """And nothing that is printed gets into a file that was given their number."""
    process = incbak.popen("-v", "full", tmp_path / "d.raw", **_closing(*numbers))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(incbak.list()) == 1
    incbak("check", "--read-data")
    process = incbak.popen("restore", "latest", tmp_path / "out.raw", **_closing(*numbers))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "d.raw").read_bytes()


PRINTED = """
import os, sys
os.close(1)
os.close(2)
from incbak.cli import streams
streams.adopt()
streams.output_is_beside_the_point()
fds = [os.open(sys.argv[1], os.O_RDWR | os.O_CREAT) for _ in range(3)]
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
sys.exit(7 if min(fds) > 2 else 1)
"""


def test_nothing_that_is_printed_gets_into_a_file(tmp_path: Path) -> None:
    """A file that is opened does not get the number of a stream that was closed."""
    ran = subprocess.run([sys.executable, "-c", PRINTED, tmp_path / "file"], timeout=60, check=False)
    assert ran.returncode == 7
    assert (tmp_path / "file").read_bytes() == b""


def test_a_closed_output_is_no_place_for_a_stream(incbak: Incbak, tmp_path: Path) -> None:
    incbak("full", tmp_path / "d.raw")
    process = incbak.popen("restore", "latest", "-", **_closing(1))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "standard output is closed" in err) == (2, True)


@pytest.mark.parametrize("json", [True, False])
def test_an_output_that_is_full_fails_only_what_prints(incbak: Incbak, tmp_path: Path, json: bool) -> None:
    flag = ["--json"] if json else []
    with open("/dev/full", "wb") as full:
        process = incbak.popen(*flag, "full", tmp_path / "d.raw", stdout=full)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "cannot write to standard output: No space left" in err) == (0, True), err
        assert len(incbak.list()) == 1
        process = incbak.popen(*flag, "list", stdout=full)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "No space left" in err, "Traceback" in err) == (1, True, False), err


def test_errors_that_cannot_be_written_change_nothing(incbak: Incbak, tmp_path: Path) -> None:
    """Here: that a disk is read whole."""
    incbak("full", tmp_path / "d.raw")
    (tmp_path / "d.raw").write_bytes(os.urandom(SIZE))
    with open("/dev/full", "wb") as full:
        process = incbak.popen("incremental", tmp_path / "d.raw", stderr=full)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, "read 1.0 MiB" in out) == (0, True)


def test_a_reader_that_has_gone(incbak: Incbak, tmp_path: Path) -> None:
    """A backup is made whether or not somebody reads that it is; a list that nobody reads is none."""
    for argv, code in ((["full", tmp_path / "d.raw"], 0), (["list"], 1)):
        reader, writer = os.pipe()
        os.close(reader)
        process = incbak.popen(*argv, stdout=writer)
        os.close(writer)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, "")


def test_what_the_terminal_cannot_show_is_escaped(incbak: Incbak, tmp_path: Path) -> None:
    incbak("full", tmp_path / "d.raw", "--name", "w\u00e9b\u4e16")
    process = incbak.popen("list", env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "w\u00e9b\\u4e16" in out


# -- signals -----------------------------------------------------------------------------------------------------------


def _ignoring() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("ignored", [True, False])
def test_an_ignored_hangup_stays_ignored(incbak: Incbak, tmp_path: Path, ignored: bool) -> None:
    """``nohup incbak full``; without it, the backup ends in an orderly way."""
    more = {"preexec_fn": _ignoring} if ignored else {}
    raw_image(tmp_path / "big.raw", 4 << 20, os.urandom(4 << 20))
    process = incbak.popen("full", tmp_path / "big.raw", "--speed-limit", "2M", **more)
    wait_until(lambda: list((incbak.repo / "packs").iterdir()), "the backup is under way")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert (process.returncode, len(incbak.list())) == ((0, 1) if ignored else (130, 0))


@pytest.mark.parametrize("ignored", [True, False])
def test_so_does_that_of_an_export(incbak: Incbak, tmp_path: Path, ignored: bool) -> None:
    incbak("full", tmp_path / "d.raw")
    more = {"preexec_fn": _ignoring} if ignored else {}
    process = incbak.popen("export", "latest", "--socket", tmp_path / "s", **more)
    assert process.stdout
    assert process.stdout.readline().startswith("ready:")
    process.send_signal(signal.SIGHUP)
    if ignored:
        subprocess.run([sys.executable, "-c", "import signal"], check=True)  # something takes its time
        assert process.poll() is None
        process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_server_whose_terminal_goes_ends_cleanly(tmp_path: Path) -> None:
    serve = Serve(tmp_path, {"vda": raw_image(tmp_path / "vda.raw", SIZE)})
    assert serve.stop(signal.SIGHUP) == 0
