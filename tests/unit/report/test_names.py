"""A name is a part of one line, wherever it is shown: in a table, a warning, an error, a log, a metric."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest

from incbak.cli import main
from incbak.events import Warned
from incbak.fleet.metrics import write_metrics
from incbak.repo.record import DiskRecord, Record
from incbak.repo.retention import Decision
from incbak.report.backups import details, disk_line, listing, pruning, table
from incbak.report.console import Console

HOSTILE = "a\nincbak: all is well\x1b]0;x\x07\x85\u2028\r\x0b\u202eb"


def _record(name: str = HOSTILE) -> Record:
    disk = DiskRecord(name=name, size=1, kind="full", base=None, reason=name, read=1, stored=1, root="0" * 64)
    return Record(
        id="1" * 32, seq=1, vm=name, kind="full", base=None, started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:00+00:00", cluster_size=65536, disks=(disk,), engine=name, host=name, tags=(name,),
        attachments={name: ""}, notes=(name,),
    )  # fmt: skip


def _harmless(text: str, lines: int) -> None:
    assert len(text.splitlines()) == lines
    assert all(c.isprintable() or c == "\n" for c in text)


def test_in_tables_and_lines() -> None:
    record = _record()
    _harmless(table([["NAME"], [HOSTILE]]), 2)
    _harmless(listing([record]), 2)
    _harmless(pruning([Decision(record, (HOSTILE,))]), 2)
    _harmless(disk_line(record, record.disks[0]), 1)
    _harmless(details(record), len(details(_record("name")).splitlines()))


def test_in_what_is_said_meanwhile() -> None:
    stream = io.StringIO()
    Console(stream=stream)(Warned(HOSTILE))
    _harmless(stream.getvalue(), 1)


def test_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    main._say_error(HOSTILE, "")
    _harmless(capsys.readouterr().err, 1)


def test_in_a_log() -> None:
    said = main._OneLine("incbak: %(message)s").format(
        logging.LogRecord("incbak", logging.WARNING, "", 0, "%s is gone", (HOSTILE,), None)
    )
    _harmless(said, 1)


@pytest.mark.parametrize("name", [HOSTILE, "d\u2028e", 'a"b\\c', "x\x85y\x0bz"])
def test_in_a_metrics_file_that_is_written_again(tmp_path: Path, name: str) -> None:
    """What is kept of the file that was there is what was there."""
    path = tmp_path / "m.prom"
    write_metrics(path, name, 0, _record(name))
    first = path.read_bytes().decode().split("\n")
    write_metrics(path, name, 1, None)
    again = path.read_bytes().decode().split("\n")
    assert len(first) == len(again)
    assert [x for x in first if "backup" in x] == [x for x in again if "backup" in x]
    for line in filter(None, again):
        assert line.startswith("# ") or (line.startswith("incbak_") and line.rpartition("} ")[2])


def test_the_metrics_can_be_read_by_everybody(tmp_path: Path) -> None:
    for mask in (0o000, 0o077):
        before = os.umask(mask)
        try:
            write_metrics(tmp_path / "m.prom", "vm", 0, None)
        finally:
            os.umask(before)
        assert (tmp_path / "m.prom").stat().st_mode & 0o777 == 0o644
