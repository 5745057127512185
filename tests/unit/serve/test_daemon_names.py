"""Names of disks that would be those of other exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.errors import UsageError
from incbak.serve.daemon import Daemon, ServeOptions


@pytest.mark.parametrize(("names", "says"), [(("a", "a:ro"), "a:ro"), (("x:ro",), "x:ro"), (("a", "a"), "given twice")])
def test_a_disk_whose_name_is_that_of_another_export_is_refused(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    for number, _name in enumerate(names):
        (tmp_path / f"{number}.raw").write_bytes(bytes(4096))
    disks = [(name, tmp_path / f"{number}.raw") for number, name in enumerate(names)]
    with pytest.raises(UsageError, match=says):
        Daemon(ServeOptions("v", disks, tmp_path / "state"))._open()
    assert not (tmp_path / "state").exists()
