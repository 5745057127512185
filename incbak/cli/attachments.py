"""``--attach FILE``: what else a restore needs, such as the VM's definition, goes into the backup record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from incbak.errors import UsageError
from incbak.opening import open_text
from incbak.repo.fitting import MAX_ATTACHED, MAX_ATTACHMENTS, size_of
from incbak.units import format_size

LIMIT = 1 << 20


def read_attachments(paths: Sequence[Path]) -> dict[str, str]:
    """The files' texts by their names. Raises `UsageError` for what is no text, too large, too much, or named twice."""
    if len(paths) > MAX_ATTACHMENTS:
        raise UsageError(
            f"{len(paths)} attachments are more than {MAX_ATTACHMENTS}",
            hint="Attach an archive's listing, or fewer files.",
        )
    found: dict[str, str] = {}
    total = 0
    for path in paths:
        if path.name in found:
            raise UsageError(f"two attachments are called {path.name}", hint="Rename one of them.")
        try:
            with open_text(path) as f:
                data = f.read(LIMIT + 1)
            found[path.name] = data.decode()
        except OSError as e:
            raise UsageError(f"cannot read attachment {path}: {e.strerror}") from e
        except UnicodeDecodeError:
            raise UsageError(f"attachment {path} is not text", hint="Attach text in UTF-8 only.") from None
        if len(data) > LIMIT:
            raise UsageError(f"attachment {path} is larger than {format_size(LIMIT)}")
        total += size_of(path.name, found[path.name])
        if total > MAX_ATTACHED:
            raise UsageError(f"the attachments are larger than {format_size(MAX_ATTACHED)} together, with {path}")
    return found
