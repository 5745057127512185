"""HTML and SVG that cannot be broken by what stands in it: a plain string becomes text, always."""

from __future__ import annotations

import html
from collections.abc import Iterable

from incbak.report.printable import printable


class Markup(str):
    """Text that is markup already. Only `el`, `join` and constants in the program make it."""

    __slots__ = ()


def text(value: str) -> Markup:
    """``value`` as text: escaped, and without control characters."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(value), quote=True))


def join(children: Iterable[str]) -> Markup:
    """One after another."""
    return Markup("".join(text(child) for child in children))


def el(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element. ``class_`` is ``class``, ``_`` in names is ``-``; values are escaped; ``None`` leaves one out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("rect", "circle", "line", "path", "polyline", "meta") and not children:
        return Markup(f"<{name}{told}>" if name == "meta" else f"<{name}{told}/>")
    return Markup(f"<{name}{told}>{join(children)}</{name}>")


def svg(width: int, height: int, label: str, *children: str) -> Markup:
    """A drawing that scales with the page; ``label`` says what it shows to who cannot see it."""
    box = f"0 0 {width} {height}"
    return Markup(f'<svg viewBox="{box}" role="img" aria-label="{text(label)}">{join(children)}</svg>')
