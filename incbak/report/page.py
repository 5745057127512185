"""The report as one page: no script, nothing from elsewhere, light and dark, at home on a phone."""

from __future__ import annotations

from collections.abc import Iterator

from incbak.reasons import Reason
from incbak.repo.record import Record
from incbak.report import charts
from incbak.report.history import DiskMap, History, VmHistory
from incbak.report.markup import Markup, el, join
from incbak.report.proof import ago_text
from incbak.report.style import STYLE
from incbak.units import format_size

MARK = "<!doctype html>\n<!-- incbak report -->\n"
"""How every report begins: only such a file is replaced by a new one."""
LISTED = 30
"""Backups in a VM's list, the newest."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(history: History) -> str:
    """All of it. Whatever stands in the repository is text here."""
    title = f"incbak: repository {history.repository[:8]}"
    head = join([
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(STYLE)),
    ])  # fmt: skip
    body = join([
        el("header", el("h1", title), el("p", f"{history.where}, as of {_stamp(history)}", class_="quiet")),
        el("main", *_troubles(history), _repository(history), *(_vm(vm, history) for vm in history.vms)),
    ])  # fmt: skip
    return MARK + el("html", el("head", head), el("body", body), lang="en") + "\n"


def _stamp(history: History) -> str:
    return f"{history.now:%Y-%m-%d %H:%M} UTC"


def _troubles(history: History) -> Iterator[Markup]:
    if history.unreadable:
        what = f"{len(history.unreadable)} records of backups cannot be read: run incbak check."
        yield el("p", what, class_="alarm")


def _repository(history: History) -> Markup:
    records = history.records
    if not records:
        return el("section", el("p", "There are no backups yet."), _proof(history.check))
    sizes = sum(d.size for r in records for d in r.disks)
    read = sum(d.read for r in records for d in r.disks)
    tiles = [
        ("backups", str(len(records))),
        ("VMs", str(len(history.vms))),
        ("in packs", format_size(history.packs_size)),
        ("read for it", format_size(read)),
        ("read to stored", f"{read / history.packs_size:.1f} : 1" if history.packs_size else ""),
        ("disks they stand for", format_size(sizes)),
    ]
    note = "What each backup that is listed has added. Shared content counts for the backup that came first."
    return el(
        "section",
        el("div", *(el("div", el("b", value), el("span", name)) for name, value in tiles), class_="tiles"),
        el("div", _card("Growth", charts.growth(records), note), _proof(history.check), class_="cards"),
    )


def _proof(check: str) -> Markup:
    return _card("Verified", el("p", _sentence(check)))


def _vm(vm: VmHistory, history: History) -> Markup:
    last = vm.records[-1]
    when = charts.finished(last)
    age = ago_text((history.now - when).total_seconds()) if when else "at an unknown time"
    drawn, outside = charts.calendar(vm.records, history.now.date())
    keys = _keys(("incremental", "incremental"), ("full", "full"), ("fallback", "read whole for a reason"),
                 ("incomplete", "a disk failed"))  # fmt: skip
    beyond = f"{outside} of {len(vm.records)} backups are older, or their date is no date." if outside else ""
    newest = f"the newest {charts.POINTS} backups" if len(vm.records) > charts.POINTS else "each backup"
    cards = [
        _card("Calendar", drawn, keys, beyond),
        _card("Read and stored", charts.traffic(vm.records), _keys(("read", "read"), ("stored", "stored")),
              f"Bytes of {newest}, in their order; the scale is logarithmic."),
        *(_map_card(each) for each in vm.maps),
    ]  # fmt: skip
    return el(
        "section",
        el("h2", vm.name),
        el("p", f"Last backup {last.id[:8]}, {charts.kind_of(last)}, {age}."),
        el("p", _sentence(vm.drill), class_="alarm") if vm.drill_failed else el("p", _sentence(vm.drill)),
        el("div", *cards, class_="cards"),
        _list(vm, history),
    )


def _map_card(found: DiskMap) -> Markup:
    title = f"Changes on {found.disk}, {format_size(found.size)}"
    note = _sentence(found.note) if found.note else ""
    if not found.pairs:
        return _card(title, el("p", "There are no two backups to compare."), note)
    part = format_size(found.size / len(found.times))
    key = el("p", "never ", charts.shades(), f" in all {found.pairs} steps from backup to backup", class_="keys")
    return _card(title, charts.heat(found), key, f"Each cell is {part}, row by row from the start of the disk. {note}")


def _list(vm: VmHistory, history: History) -> Markup:
    shown = vm.records[: -LISTED - 1 : -1]
    numbers = ("Read", "Stored")
    names = ("Backup", "Finished", "Kind", *numbers, "Why, and notes")
    head = el("tr", *(el("th", name, class_="number") if name in numbers else el("th", name) for name in names))
    rows = [el("tr", *_row(record, record.id in history.pins)) for record in shown]
    more = f" (the newest {LISTED} of {len(vm.records)})" if len(vm.records) > LISTED else ""
    return el("details", el("summary", f"Backups{more}"), el("div", el("table", head, *rows), class_="scroll"))


def _row(record: Record, pinned: bool) -> Iterator[Markup]:
    why = [f"{d.name}: {_reason(d.reason)}" for d in record.disks if d.reason]
    why += [*record.notes[:5], *(f"tag {tag}" for tag in record.tags[:5]), *(["pinned"] if pinned else [])]
    yield el("td", el("code", record.id[:8]))
    yield el("td", record.finished[:16].replace("T", " "))
    yield el("td", charts.kind_of(record))
    yield el("td", format_size(sum(d.read for d in record.disks)), class_="number")
    yield el("td", format_size(sum(d.stored for d in record.disks)), class_="number")
    yield el("td", "; ".join(each[:200] for each in why))


def _reason(code: str) -> str:
    return Reason(code).text if code in set(Reason) else code


def _keys(*keys: tuple[str, str]) -> Markup:
    return el("p", *(el("span", el("i", "", class_=f"swatch {name}"), label) for name, label in keys), class_="keys")


def _card(title: str, *parts: str) -> Markup:
    shown = [part if isinstance(part, Markup) else el("p", part, class_="quiet") for part in parts if part]
    return el("div", el("h3", title), *shown, class_="card")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
