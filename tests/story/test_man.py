"""The manual page is made of the texts of --help: all of them are in it, and programs that format pages take it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from incbak.cli.main import cli
from tests.kit.cli import Incbak
from tests.kit.need import need


@pytest.fixture(scope="module")
def roff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("man")
    path = where / "incbak.1"
    path.write_text(Incbak(where)("man").out)
    return path


def _commands(ctx: click.Context) -> Iterator[click.Context]:
    yield ctx
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            assert command
            if not command.hidden:
                yield from _commands(click.Context(command, info_name=name, parent=ctx))


ALL = list(_commands(click.Context(cli, info_name="incbak")))


def _plain(roff: Path) -> str:
    """As it is read, without line breaks."""
    text = re.sub(r"\\f[BR]", "", roff.read_text()).replace("\\-", "-").replace("\\(aq", "'").replace("\\(ga", "`")
    return " ".join(text.replace("\\&", "").replace("\\e", "\\").split())


def _words(text: str) -> str:
    return " ".join(text.replace("\b", "").replace("``", "").split())


def test_every_command_and_option_is_in_it(roff: Path) -> None:
    page = _plain(roff)
    assert len(ALL) > 25
    for ctx in ALL:
        assert ctx.command_path in page
        for block in re.split(r"\n\s*\n", ctx.command.help or ""):
            lines = [_words(line) for line in block.split("\n")]
            assert all(line in page for line in lines), (ctx.command_path, lines)
        for param in ctx.command.params:
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                assert _words(record[0]) in page, (ctx.command_path, record)
                assert _words(record[1]) in page, (ctx.command_path, record)


def test_every_command_has_an_example() -> None:
    without = [c.command_path for c in ALL if not isinstance(c.command, click.Group) and "Example" not in
               (c.command.help or "")]  # fmt: skip
    assert without == []


def test_exit_codes_and_environment(roff: Path) -> None:
    text = roff.read_text()
    codes = re.findall(r"^\\fB(\d+)\\fR$", text, flags=re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "10", "11", "12", "13", "14", "130"]
    rows = re.findall(r"^\| (\d+) \|", (Path(__file__).parents[2] / "README.md").read_text(), flags=re.MULTILINE)
    assert [row for row in rows if row in codes] == codes, "the table of the README"
    assert "\\fBINCBAK_REPOSITORY\\fR" in text


def test_it_hides_itself(roff: Path) -> None:
    assert "incbak man" not in _plain(roff).replace("incbak manual", "")


@pytest.mark.parametrize("argv", [["groff", "-man", "-Tutf8", "-z", "-ww"], ["man", "--warnings", "-l"]])
def test_it_is_well_formed(roff: Path, argv: list[str]) -> None:
    need(argv[0])
    done = subprocess.run([*argv, str(roff)], check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    if argv[0] == "man":
        text = re.sub(".\b", "", done.stdout)
        assert "EXIT STATUS" in text
        assert re.search(r"^\s+incbak -r /backup restore latest web1\.raw$", text, flags=re.MULTILINE)
