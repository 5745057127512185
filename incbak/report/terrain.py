"""A map of a disk in a terminal: one character for each part, the darker, the more of it, or the more often."""

from __future__ import annotations

from collections.abc import Sequence

from incbak.units import format_size

COLUMNS = 64
ROWS = 4
CELLS = COLUMNS * ROWS
"""Parts into which a disk is cut, if it has as many clusters."""
_SHADES = " .:-=+*#%@"


def draw(shares: Sequence[float], size: int, what: str) -> list[str]:
    """Lines of `COLUMNS` parts, each with where it begins; then the key. ``shares`` from 0 to 1, ``size`` in bytes.

    A part that is not 0 is never blank, and one that is not 1 never the darkest.
    """
    cells = len(shares)
    text = "".join(_shade(share) for share in shares)
    starts = [format_size(size * at // cells) for at in range(0, cells, COLUMNS)]
    width = max(map(len, starts))
    lines = [f"{start:>{width}} [{text[n * COLUMNS : (n + 1) * COLUMNS]}]" for n, start in enumerate(starts)]
    return [*lines, f"{'':{width}}  a character is {format_size(size / cells)}; '.' to '@': {what}"]


def _shade(share: float) -> str:
    if share <= 0:
        return _SHADES[0]
    return _SHADES[-1] if share >= 1 else _SHADES[1 + int(share * (len(_SHADES) - 2))]
