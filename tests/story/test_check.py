"""``incbak check --read-data --max-duration``: everything is read in some nights, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from incbak.repo.repository import Repository
from incbak.repo.verified import Verified
from tests.kit.cli import Incbak
from tests.kit.serve import raw_image

CLUSTER = 65536
NIGHT = ("check", "--read-data", "--max-duration", "0")


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    """A repository of three packs."""
    made = Incbak(tmp_path)
    image = raw_image(tmp_path / "web1.raw", 64 * CLUSTER)
    made("init")
    for number in range(3):
        with image.open("r+b") as f:
            f.seek(number * CLUSTER)
            f.write(os.urandom(CLUSTER))
        made("-q", "incremental", image)
    return made


def test_in_three_nights(incbak: Incbak) -> None:
    assert "read" not in incbak("check").out
    first = incbak(*NIGHT).out
    assert "(1 of 3 packs) were read within the last" in first
    assert "the rest never" in first
    told = incbak("--json", *NIGHT).objects()[0]
    assert (told["packs_read"], told["coverage"]["read_packs"], told["coverage"]["complete"]) == (1, 2, False)
    assert told["coverage"]["last"]["read"] == told["bytes_read"]
    assert "all data was read within the last" in incbak(*NIGHT).out
    assert "all data was read within the last" in incbak("check").out


@pytest.mark.parametrize("point", ["created", "written", "synced", "named", "dir-synced", "unlinked"])
def test_killed_at_any_step_it_goes_on(incbak: Incbak, point: str) -> None:
    """What was marked before is still marked; nothing is that was not read."""
    incbak(*NIGHT)
    ran = incbak.run(*NIGHT, env={"INCBAK_CRASH_AT": f"durable.{point}"})
    assert ran.code == -signal.SIGKILL
    marked = Verified(Repository.open(incbak.repo).storage).coverage().read_packs
    assert marked == (1 if point in ("created", "written", "synced") else 2)
    nights = 0
    while not incbak("--json", *NIGHT).objects()[0]["coverage"]["complete"]:
        nights += 1
        assert nights < 3
    assert len(list((incbak.repo / "verified").glob("[!.]*"))) == 1


def test_damage_is_told_each_night(incbak: Incbak) -> None:
    """The exit code of a night that reads something else is not that of a good repository."""
    for pack in (incbak.repo / "packs").iterdir():
        data = bytearray(pack.read_bytes())
        data[30] ^= 1
        pack.write_bytes(data)
    for night in range(4):
        ran = incbak.run(*NIGHT)
        assert ran.code == 13
        assert ("as an earlier check has found" in ran.err) == (night > 0)
    assert "all data was read within" in ran.out
    assert "the last reading found damage in 3 packs" in ran.out


def test_a_check_that_reads_no_data_tells_known_damage_until_it_is_stored_again(incbak: Incbak) -> None:
    image = incbak.root / "web1.raw"
    for pack in (incbak.repo / "packs").iterdir():
        data = bytearray(pack.read_bytes())
        data[30] ^= 1
        pack.write_bytes(data)
    assert incbak.run("check", "--read-data").code == 13
    for _ in range(2):
        ran = incbak.run("check")
        assert (ran.code, ran.out) == (13, "")
        assert "is damaged, as an earlier check has found" in ran.err
        assert "backups that are not whole:" in ran.err
        assert len(list((incbak.repo / "damaged").glob("[!.]*"))) == 1
    told = [o for o in incbak.run("--json", "doctor").objects() if "damaged blobs" in str(o)]
    assert ["fault" in str(o).lower() for o in told] == [True]
    incbak("-q", "full", image)
    said = incbak("check").out
    assert said.startswith("no problems: 4 backups")
    assert "the last reading found damage in 3 packs" in said
    assert "damaged blobs" not in incbak.run("doctor").out


@pytest.mark.parametrize(
    "argv",
    [
        ("--max-duration", "1m"),
        ("--max-duration", "x", "--read-data"),
        ("--read-data", "--read-data-subset", "5%"),
    ],
)
def test_wrong_arguments(incbak: Incbak, argv: tuple[str, ...]) -> None:
    assert incbak.run("check", *argv).code == 2
