"""Before anything is set up: a closer look at the bitmaps that a run is to build on, by a sample or by an audit."""

from __future__ import annotations

from incbak.backup.audit import Slice, audit_disk
from incbak.backup.plan import Planned, distrust
from incbak.backup.sample import sample_disk
from incbak.errors import BitmapError, DiskError
from incbak.events import Notice, Reporter, Warned
from incbak.extents import total
from incbak.reasons import Reason
from incbak.repo.repository import Repository


def provisional(planned: Planned) -> bool:
    """Return whether the bitmap that is built on has to be sampled first."""
    bitmap = planned.plan.disk.bitmap(planned.plan.base_bitmap or "")
    return bitmap is not None and bitmap.provisional


def look_by_sample(repo: Repository, planned: Planned, report: Reporter) -> tuple[str, str]:
    """Sample a provisional bitmap. Returns a note for the record, and the bitmap that was found wrong; or "" for each.

    A disk whose bitmap is not used is read whole.
    """
    name = planned.plan.base_bitmap or ""
    try:
        found = sample_disk(repo, planned)
    except (BitmapError, DiskError) as e:
        distrust(planned, f"no sample could be taken: {e}", Reason.UNPROVEN)
        return "", ""
    if found.wrong:
        first = found.wrong[0].offset
        text = f"{total(found.wrong)} bytes of {found.compared} random clusters differ from the base but are not marked"
        distrust(planned, f"{text}, the first at {first}")
        return "", name
    if not found.enough:
        distrust(planned, "there is too little unmarked data to compare with the base", Reason.UNPROVEN)
        return "", ""
    note = f"disk {planned.name}: the device was set up again after its bitmap was closed; the bitmap was used because"
    note += f" {found.compared} random clusters match the base"
    report(Notice(note))
    return note, ""


def look_by_audit(repo: Repository, planned: Planned, slices: int, report: Reporter) -> None:
    """Compare a slice of the unchanged clusters with the base, the next slice in each run."""
    last = planned.before.audit_turn if planned.before else None
    turn = 0 if last is None else last + 1
    try:
        found = audit_disk(repo, planned, Slice(slices, turn), report)
    except (BitmapError, DiskError) as e:
        report(Warned(f"disk {planned.name} is not audited: {e}"))
        return
    if found:
        planned.audited, planned.audit_turn = found.compared, turn
        if found.wrong:
            distrust(planned, found.told())
