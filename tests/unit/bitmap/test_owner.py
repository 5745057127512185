"""Whose a disk's bitmaps are, as the next one is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from incbak.bitmap.owner import Owner
from incbak.bitmap.store import BitmapStore
from incbak.errors import LockedError


@pytest.mark.parametrize(
    ("owner", "said", "hint"),
    [
        (Owner.RUN, "in use by a run (process {pid})", "--lock-wait TIME"),
        (Owner.SERVE, "in use by incbak serve (process {pid})", "monitor as the source"),
        (Owner.WATCH, "in use by incbak watch (process {pid})", "end its watch"),
    ],
)
def test_who_has_them_is_said(tmp_path: Path, owner: Owner, said: str, hint: str) -> None:
    first, second = (BitmapStore(tmp_path, "vm", "vda") for _ in range(2))
    first.lock(owner)
    with pytest.raises(LockedError) as caught:
        second.lock()
    assert str(caught.value).endswith(said.format(pid=os.getpid()))
    assert hint in caught.value.hint
    first.unlock()
    second.lock()
    second.unlock()


@pytest.mark.parametrize("text", [b"", b"x", b"1 somebody\n", b"\xff" * 500, b"-1 a run\n"])
def test_a_lock_that_says_nothing_sensible(tmp_path: Path, text: bytes) -> None:
    first, second = (BitmapStore(tmp_path, "vm", "vda") for _ in range(2))
    first.lock()
    (tmp_path / "vm" / "vda" / "lock").write_bytes(text)
    with pytest.raises(LockedError, match=r"are in use$"):
        second.lock()
    first.unlock()
