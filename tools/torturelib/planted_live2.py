"""Planted faults: the reason in the record is the true one, and what is left in a QEMU can be seen and removed."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_AUDIT = "tests/story/test_audit.py::"
_LEFT = "tests/live/test_qemu_failures.py::"
_OWN = "tests/interop/test_own_bitmaps.py::"

FAULTS = [
    Fault(
        "reason: a bitmap that is found wrong is forgotten with its reason",
        "incbak/backup/verify.py",
        "await engine.invalidate(planned.plan.disk, name, Reason.AUDIT)",
        "await engine.commit([])",
        (f"{_AUDIT}test_verify_finds_it_too_and_the_bitmap_stays_invalid",),
    ),
    Fault(
        "reason: serve says that a bitmap is invalid and goes on believing it",
        "incbak/serve/commands/bitmaps.py",
        '    bitmap.invalidate(Reason(args["reason"]))\n',
        '    bitmap.reason = Reason(args["reason"])\n',
        unit("serve/test_transaction", "test_a_bitmap_that_is_found_wrong_stays_with_the_reason"),
    ),
    Fault(
        "reason: an image that is off forgets the reason when it is closed",
        "incbak/engine/image.py",
        "            bitmap.invalidate(reason)\n            bitmap.close(None)\n",
        "            bitmap.close(self._found)\n",
        (f"{_AUDIT}test_verify_finds_it_too_and_the_bitmap_stays_invalid",),
    ),
    Fault(
        "reason: a damaged file that was put aside is a failed mark",
        "incbak/bitmap/judge.py",
        "    found = read_header(path)\n    if isinstance(found, Reason):\n        return found\n    if found.length",
        "    found = read_header(path)\n    if isinstance(found, Reason):\n        return Reason.TRACKING_FAILED\n"
        "    if found.length",
        unit("bitmap/test_found_on_open", "test_a_damaged_file_that_was_put_aside_keeps_its_reason"),
    ),
    Fault(
        "reason: a clear that was killed is by hand",
        "incbak/bitmap/file.py",
        "reason=Reason.BITMAP_INCONSISTENT.value",
        "reason=Reason.INVALIDATED.value",
        unit("bitmap/test_found_on_open", "test_a_clear_that_was_killed_is_not_said_to_be_by_hand"),
    ),
    Fault(
        "reason: a QEMU that was killed under watch leaves no word",
        "incbak/watch/vm.py",
        "                note_end(disk.store.directory, Reason.UNSAVED)\n            raise\n",
        "                note_saved(disk.store.directory)\n            raise\n",
        ("tests/live/test_qemu_watch_steps.py::test_qemu_is_killed",),
    ),
    Fault(
        "reason: a dead watch is taken for one that watches",
        "incbak/bitmap/lost.py",
        "(note.state == _WATCHED and not alive)",
        "(note.state == _WATCHED and not note.boot)",
        unit("bitmap/test_lost", "test_a_watch_that_died_has_left_the_vm_alone"),
    ),
    Fault(
        "reason: a watch that comes again forgets what the last one has not told",
        "incbak/bitmap/lost.py",
        "        if before.state:\n",
        "        if False:\n",
        unit("bitmap/test_lost", "test_a_watch_that_died_has_left_the_vm_alone"),
    ),
    Fault(
        "reason: an end here explains backups of other hosts",
        "incbak/backup/plan.py",
        "record.origin is None and record.host == known.host\n    return",
        "True\n    return",
        unit("backup/test_plan", "test_only_a_backup_of_this_host_is_lost_with_its_vm"),
    ),
    Fault(
        "reason: a bitmap that was never loaded says nothing",
        "incbak/bitmap/lost.py",
        "said_invalid(header.slot) or Reason.UNWATCHED",
        "said_invalid(header.slot) or Reason.UNSAVED",
        unit("bitmap/test_lost", "test_the_file_that_a_bitmap_was_loaded_from_says_why"),
    ),
    Fault(
        "own bitmaps: another program's bitmap is removed by name",
        "incbak/engine/own_bitmaps.py",
        "    return (found[1], found[2]) if found else None",
        '    return (found[1], found[2]) if found else ("0" * 8, "0" * 8)',
        (f"{_OWN}test_a_running_qemu",),
    ),
    Fault(
        "own bitmaps: one that a job uses is chosen",
        "incbak/engine/own_bitmaps.py",
        "for b in chosen if b.info.busy]:",
        "for b in chosen if not b]:",
        (f"{_OWN}test_none_is_removed_beside_a_backup_or_while_a_job_uses_it",),
    ),
    Fault(
        "own bitmaps: removed beside a backup",
        "incbak/engine/qemu.py",
        "        await refuse_beside_backup(self._session)\n",
        "",
        (f"{_OWN}test_none_is_removed_beside_a_backup_or_while_a_job_uses_it",),
    ),
    Fault(
        "own bitmaps: an image that is dirty is opened to write",
        "incbak/engine/offline.py",
        "        if why := await asyncio.to_thread(self._image.unwritable):\n            raise",
        "        if why := '':\n            raise",
        (f"{_OWN}test_a_qcow2_that_is_not_to_be_written",),
    ),
    Fault(
        "own bitmaps: written into an image whose format is guessed",
        "incbak/engine/detect.py",
        "if source.certain and decision.guessed:",
        "if False:",
        (f"{_OWN}test_a_qcow2_that_is_not_to_be_written",),
    ),
    Fault(
        "own bitmaps: one of a repository at hand goes without a word",
        "incbak/cli/own_bitmaps.py",
        "for b in chosen if b.repository in known}):",
        "for b in chosen if b.repository in ()}):",
        (f"{_OWN}test_a_bitmap_of_the_repository_at_hand_goes_with_a_warning",),
    ),
    Fault(
        "own bitmaps: an end mark stays without its bitmap",
        "incbak/engine/own_bitmaps.py",
        "for name in (each.info.name, end_mark_of(each.info.name))]",
        "for name in (each.info.name,)]",
        (f"{_OWN}test_a_running_qemu",),
    ),
    Fault(
        "clean: a run that is at work is taken apart",
        "incbak/cli/clean.py",
        "async with locked(repo, await vm_name(engine, wanted.name), 0):",
        "async with asyncio.Lock():",
        (f"{_LEFT}test_what_a_run_into_a_repository_that_is_gone_has_left[plain]",),
    ),
    Fault(
        "clean: a run into another repository that is at work is taken apart",
        "incbak/engine/leftovers.py",
        '_WORKING = {"created", "running", "ready", "standby", "waiting"}',
        '_WORKING = {"standby"}',
        (f"{_LEFT}test_what_a_run_into_a_repository_that_is_gone_has_left[plain]",),
    ),
    Fault(
        "clean: a run whose job another program has paused is taken for a dead one",
        "incbak/engine/leftovers.py",
        'or (j["status"] == "paused" and j["id"] in sound)',
        "",
        (f"{_LEFT}test_what_a_run_into_a_repository_that_is_gone_has_left[plain]",),
    ),
    Fault(
        "clean: a dead run's job, paused with an error, counts as at work",
        "incbak/engine/leftovers.py",
        'if job["io-status"] == "ok"',
        "",
        (f"{_LEFT}test_what_a_run_into_a_repository_that_is_gone_has_left[plain]",),
    ),
    Fault(
        "clean: bitmaps go too",
        "incbak/engine/leftovers.py",
        "keep | {leftover.run})",
        "())",
        (f"{_LEFT}test_what_a_killed_run_has_left_is_told_and_taken_out[plain]",),
    ),
    Fault(
        "clean: the filter of a job that is over is said to be in use",
        "incbak/engine/qemu_leftovers.py",
        "    graph = await read_graph(session)  # the filter of a job went with it\n",
        "",
        (f"{_LEFT}test_what_a_killed_run_has_left_is_told_and_taken_out[plain]",),
    ),
    Fault(
        "watch: one that waited for another says that the bitmaps it saved are lost",
        "incbak/watch/vm.py",
        "            await self._status()\n        except BaseException:\n",
        "            await asyncio.sleep(0)\n        except BaseException:\n",
        unit("watch/test_vm", "test_a_watch_that_waited_for_another_until_the_vm_had_ended_lost_nothing"),
    ),
]
