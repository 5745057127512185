"""Each name is one directory, which tells it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.bitmap.names import component, name_of
from incbak.bitmap.store import SUFFIX, BitmapStore, views
from incbak.errors import UsageError
from incbak.fingerprint import Fingerprint

NAMES = [
    "web1",
    "a b/c",
    "..",
    ".x",
    "%41",
    "ж" * 20,
    "ж" * 64,
    "\N{SNOWMAN}" * 42,
    "ж" * 60 + "/%\n",
    "." + "ж" * 63,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_path_component(tmp_path: Path, name: str) -> None:
    """With what is put before and behind it; also of 128 bytes in any script."""
    made = component(name)
    assert name_of(made) == name
    assert "/" not in made
    assert made not in (".", "..")
    assert not made.startswith(".")
    assert made.isprintable()
    (tmp_path / f".{made}{SUFFIX}.invalid.4194304.4194304.tmp").touch()


def test_names_are_kept_apart() -> None:
    assert len({component(name) for name in NAMES}) == len(NAMES)


def test_short_names_are_where_they_were() -> None:
    assert component("ж") == "%D0%B6"
    assert component("a b") == "a%20b"


@pytest.mark.parametrize("name", ["", "x" * 129, "/" * 100, "\n" * 120])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        component(name)


def test_a_store_of_long_names(tmp_path: Path) -> None:
    store = BitmapStore(tmp_path, "ж" * 64, "\N{SNOWMAN}" * 42)
    store.lock()
    bitmap = store.create("д" * 64, 1 << 20, 65536, Fingerprint(1 << 20, 0, 0, bytes(16)))
    bitmap.close(None)
    store.unlock()
    (found,) = views(tmp_path)
    assert (found.vm, found.disk, found.name) == ("ж" * 64, "\N{SNOWMAN}" * 42, "д" * 64)
