"""Safety steps of `incbak.sync`, each of which a test must miss."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_COPY, _PLAN, _CARRY = "incbak/sync/copy.py", "incbak/sync/plan.py", "incbak/sync/carry.py"


def _copying(test: str) -> tuple[str, ...]:
    return unit("sync/test_copy", test)


FAULTS = (
    Fault(
        "sync-root-not-compared",
        _COPY,
        "and root != disk.root:",
        "and False:",
        _copying("test_a_copy_that_came_out_different_is_not_listed"),
    ),
    Fault(
        "sync-damage-passed-over",
        "incbak/repo/reader.py",
        "                raise found\n            yield row, found[0], found[2]",
        "                continue\n            yield row, found[0], found[2]",
        _copying("test_what_is_damaged_in_the_source_is_passed_over"),
    ),
    Fault(
        "sync-damage-becomes-zeroes",
        _CARRY,
        "                raise data\n",
        "                continue\n",
        _copying("test_what_is_damaged_in_the_source_is_passed_over"),
    ),
    Fault(
        "sync-on-an-unsound-base",
        _COPY,
        " and r.id not in self._unsound]",
        "]",
        _copying("test_a_base_that_is_damaged_in_the_target"),
    ),
    Fault(
        "sync-gives-up-with-the-base",
        _COPY,
        "            if not bases:\n                raise\n        return",
        "            raise\n        return",
        _copying("test_a_base_whose_page_has_rotted_in_the_target"),
    ),
    Fault(
        "sync-target-not-locked",
        _COPY,
        "            with target.vm_lock(vm, options.lock_wait) as still_locked:",
        "            for still_locked in [lambda: None]:",
        _copying("test_a_run_on_the_vm_in_the_target_stops_that_vm_only"),
    ),
    Fault(
        "sync-copies-what-is-there",
        _COPY,
        "            if record.id in self._theirs:\n",
        "            if False:\n",
        _copying("test_what_another_sync_copied_meanwhile_is_not_copied_again"),
    ),
    Fault(
        "sync-target-list-not-whole",
        _COPY,
        "    for name, why in target.unreadable.items():\n",
        "    for name, why in {}.items():\n",
        _copying("test_a_record_that_cannot_be_read_in_the_target"),
    ),
    Fault(
        "sync-bitmap-name-kept",
        _COPY,
        ", stored=writer.stored - before, bitmap=None)",
        ", stored=writer.stored - before)",
        _copying("test_a_copy_says_what_it_is"),
    ),
    Fault(
        "sync-not-remembered",
        _COPY,
        "                self._options.memory.remember(self._target, made)\n",
        "                pass\n",
        _copying("test_the_host_remembers_the_copy"),
    ),
    Fault(
        "sync-source-put-back",
        _PLAN,
        "        if why := _diverged(ours, copied, (removed or {}).get(vm, 0)):\n",
        "        if why := None:\n",
        unit("sync/test_plan", "test_a_source_that_was_put_back"),
    ),
    Fault(
        "sync-pruned-comes-back",
        _PLAN,
        "if (r.seq > reached or r.id in missed or _late(r, reached)) and r.id not in there]",
        "if r.id not in there]",
        unit("sync/test_plan", "test_what_was_pruned_from_the_target_does_not_come_back"),
    ),
)
