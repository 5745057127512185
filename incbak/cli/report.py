"""``incbak report``."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import click

from incbak import durable
from incbak.cli.settings import common, settings
from incbak.errors import UsageError
from incbak.newfile import refuse_irreplaceable
from incbak.opening import open_text
from incbak.report.history import collect
from incbak.report.page import MARK, page


@click.command(short_help="Draw the history of all backups as a page.")
@click.option(
    "--html",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="The page; a report is replaced.",
)
@common
def report(file: Path) -> None:
    """Write one HTML page about the repository: for each VM a calendar of its backups, what they read and stored, and
    which parts of its disks change; the growth of the repository; what was verified.

    The page needs no network and no script. It is replaced in one step, so a web server may serve it. A new one is for
    you alone to read; the permissions of one that is there stay.

    \b
    Example:
      incbak -r /backup report --html /var/www/incbak.html
    """
    here = settings()
    here.refuse_own(file)
    refuse_irreplaceable(file)
    mode = _replaceable(file)
    with closing(here.open()) as repo:
        made = page(collect(repo, str(here.repository_path()), datetime.now(UTC)))
    durable.write_new(file, [made.encode("utf-8", "replace")], replace=True, mode=mode)
    if here.json:
        here.tell({"report": str(file), "bytes": len(made.encode("utf-8", "replace"))})
    here.say(f"wrote {file}")


def _replaceable(file: Path) -> int:
    """The mode of the new file: what another user has put there does not open it to others.

    Raises `UsageError` when there is something else than a report.
    """
    try:
        with open_text(file) as f:
            info = os.fstat(f.fileno())
            mode = info.st_mode if info.st_uid == os.geteuid() else 0o600
            if stat.S_ISREG(info.st_mode) and f.read(len(MARK)) in (b"", MARK.encode()):
                return mode & 0o666
    except FileNotFoundError:
        return 0o600
    except OSError as e:
        raise UsageError(f"cannot look at {file}: {e.strerror}", hint="Choose another name.") from e
    raise UsageError(f"{file} is there and no report", hint="Remove it, or choose another name.")
