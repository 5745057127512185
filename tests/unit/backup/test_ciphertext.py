"""A disk whose engine has the key is stored decrypted: that is said, and never shares a chain with ciphertext."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from incbak.backup.plan import Known, Request, decrypted, make_plan
from incbak.engine.base import EngineDisk
from incbak.engine.detect import Source, open_engine
from incbak.errors import FormatError
from tests.kit.need import need
from tests.kit.qmp import Qmp
from tests.unit.backup.test_plan import CLUSTER, NEW, OLD, REPOSITORY, SIZE, _record


def _disk(form: str) -> EngineDisk:
    return EngineDisk("vda", SIZE, "vda", format=form)


def _known(form: str) -> Known:
    record = _record(OLD, 1)
    disks = tuple(msgspec.structs.replace(disk, format=form) for disk in record.disks)
    return Known(REPOSITORY, CLUSTER, [msgspec.structs.replace(record, disks=disks)])


@pytest.mark.parametrize(
    ("now", "before"),
    [("luks, decrypted", "raw"), ("raw", "luks, decrypted"), ("qcow2, decrypted", "qcow2")],
)
def test_ciphertext_and_content_never_share_a_chain(now: str, before: str) -> None:
    with pytest.raises(FormatError, match=f"disk vda is {now}, and was {before} in its backups"):
        make_plan([_disk(now)], _known(before), Request(True, NEW))


@pytest.mark.parametrize(
    ("now", "before"), [("raw", ""), ("luks, decrypted", ""), ("raw", "qcow2"), ("luks, decrypted", "luks, decrypted")]
)
def test_what_is_no_contradiction(now: str, before: str) -> None:
    assert make_plan([_disk(now)], _known(before), Request(True, NEW))


def test_it_is_noted() -> None:
    disks = [replace(_disk("raw"), name="vdb"), _disk("luks, decrypted")]
    (note,) = decrypted(disks, False)
    assert note == "the content of disk vda is decrypted in the backup, and the repository is not encrypted"
    assert "encrypted itself" in decrypted(disks, True)[0]


@pytest.mark.qemu
def test_an_engine_that_has_the_key_says_so(tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img")
    image, secret = tmp_path / "disk.luks", ["--object", "secret,id=s,data=geheim"]
    create = ["qemu-img", "create", "-q", *secret, "-f", "luks", "-o", "key-secret=s,iter-time=10", str(image), "1M"]
    for _ in range(20):
        run = subprocess.run(create, check=False, timeout=60, capture_output=True, text=True)
        if "accurate CPU usage" not in run.stderr:  # its measurement of the CPU, on a machine that has much to do
            break
    assert run.returncode == 0, run.stderr
    file = {"driver": "file", "filename": str(image)}
    node = {"driver": "luks", "node-name": "web", "key-secret": "s", "file": file}
    monitor = tmp_path / "qsd"
    chardev = f"socket,id=m,server=on,wait=off,path={monitor}"
    command = ["qemu-storage-daemon", *secret, "--blockdev", json.dumps(node), "--chardev", chardev]
    with subprocess.Popen([*command, "--monitor", "chardev=m"]) as process:
        try:
            Qmp(monitor).close()
            assert asyncio.run(_format(f"qmp:{monitor}", tmp_path)) == "luks, decrypted"
        finally:
            process.terminate()
    assert asyncio.run(_format(str(image), tmp_path)) == "raw"


async def _format(source: str, state: Path) -> str:
    engine = await open_engine(Source(source, state))
    try:
        (disk,) = (await engine.describe()).disks
        return disk.format
    finally:
        await engine.close()
