"""Names in the state directory: ``<state dir>/<vm>/<disk>/<name>.bitmap``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from incbak.bitmap import format as fmt
from incbak.errors import UsageError

SUFFIX = ".bitmap"
BURIED = ".invalid"
ABOUT = "disk.json"
_LONGEST = 200
"""Bytes of a name as a path component: there is room for what is put before and behind it, within 255."""


def component(name: str) -> str:
    """``name`` as one path component: a key, never a path (faults row 71). Raises `UsageError`."""
    if not 0 < len(name.encode(errors="surrogatepass")) <= fmt.NAME_LIMIT or not _is_unicode(name):
        raise UsageError(f"not a name: {name[:200]!r}", hint=f"Names have 1 to {fmt.NAME_LIMIT} bytes.")
    quoted = quote(name, safe="")
    if len(quoted) > _LONGEST:  # three bytes for one: of these names only what has to be is quoted
        quoted = "".join(c if c.isprintable() and c not in "/%" else quote(c, safe="") for c in name)
    if len(quoted.encode()) > _LONGEST:
        raise UsageError(
            f"not a name: {name[:200]!r}", hint="It is too long for a file's name. Use letters and digits."
        )
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def unfit(name: str) -> str:
    """Return why a new VM should not be called so, or an empty string: names go into lines of reports and into paths.

    `component` takes any name, so that those which there are already go on working.
    """
    if "/" in name or name in (".", ".."):
        return "it would be a path"
    return "" if name.isprintable() else "it has a control character"


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(component_: str) -> str | None:
    """The name that `component` makes this path component of; ``None`` when it is none of ours."""
    name = unquote(component_)
    try:
        return name if component(name) == component_ else None
    except UsageError:
        return None


def names_in(directory: Path) -> Iterator[str]:
    """The names of the bitmaps of a disk, whether they may be believed or not."""
    found = set()
    for path in directory.glob(f"*{SUFFIX}*"):
        stem = path.name.removesuffix(BURIED)
        if stem.endswith(SUFFIX) and path.is_file() and (name := name_of(stem.removesuffix(SUFFIX))):
            found.add(name)
    yield from found
