"""What is to be copied, from two lists of backups."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from incbak.errors import UsageError
from incbak.repo.record import Origin, Record
from incbak.sync.plan import Plan, make_plan

SOURCE, OTHER = "a" * 32, "b" * 32


def made(ident: int, seq: int, vm: str = "vm") -> Record:
    """A backup."""
    at = "2026-01-01T00:00:00Z"
    return Record(id=f"{ident:032x}", seq=seq, vm=vm, kind="full", base=None, started=at, finished=at,
                  cluster_size=4096, disks=(), engine="test")  # fmt: skip


def copy(record: Record, seq: int, repository: str = SOURCE) -> Record:
    """As it stands in the target."""
    return msgspec.structs.replace(record, seq=seq, origin=Origin(repository, record.seq))


def planned(source: Sequence[Record], target: Sequence[Record], *names: str, last: int | None = None) -> Plan:
    return make_plan(source, target, SOURCE, names, last)


def copied(plan: Plan) -> list[str]:
    """The ids, in order."""
    return [r.id for records in plan.copy.values() for r in records]


ONE, TWO, THREE = made(1, 1), made(2, 2), made(3, 3)


def test_all_is_copied_to_an_empty_target_oldest_first() -> None:
    assert copied(planned([ONE, TWO, THREE], [])) == [ONE.id, TWO.id, THREE.id]


def test_what_is_newer_than_the_last_copy_is_copied() -> None:
    plan = planned([ONE, TWO, THREE], [copy(ONE, 1)])
    assert (copied(plan), plan.held) == ([TWO.id, THREE.id], 1)


def test_what_was_pruned_from_the_target_does_not_come_back() -> None:
    assert copied(planned([ONE, TWO, THREE], [copy(TWO, 2)])) == [THREE.id]


def test_what_was_pruned_from_the_source_does_not_matter() -> None:
    assert copied(planned([THREE], [copy(ONE, 1), copy(TWO, 2)])) == [THREE.id]


def test_copies_from_elsewhere_and_own_backups_do_not_count() -> None:
    target = [copy(made(9, 7), 1, OTHER), made(8, 50)]
    assert copied(planned([ONE], target)) == [ONE.id]


def test_a_copy_of_a_copy_is_one_backup() -> None:
    assert copied(planned([ONE, TWO], [copy(made(1, 5), 1, OTHER)])) == [TWO.id]


def test_vms_are_chosen_by_name_and_each_goes_on_from_its_own() -> None:
    x, y = made(4, 4, "x"), made(5, 5, "y")
    assert copied(planned([ONE, x, y], [])) == [ONE.id, x.id, y.id]
    assert copied(planned([ONE, x, y], [copy(y, 9)], "x")) == [x.id]
    assert copied(planned([x, made(6, 6, "x"), y], [copy(y, 9)])) == [x.id, made(6, 6).id]


def test_a_vm_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no backup of 'x'") as caught:
        planned([ONE], [], "x")
    assert "vm" in caught.value.hint


def test_only_the_newest() -> None:
    assert copied(planned([ONE, TWO, THREE], [], last=2)) == [TWO.id, THREE.id]
    assert copied(planned([ONE, TWO, THREE], [], last=7)) == [ONE.id, TWO.id, THREE.id]


def test_what_was_removed_from_the_source_is_no_sign_that_it_was_put_back() -> None:
    target = [copy(ONE, 1), copy(TWO, 2)]
    for removed, refused in ((0, True), (1, True), (2, False), (9, False)):
        plan = make_plan([ONE], target, SOURCE, (), None, {"vm": removed, "other": 99})
        assert (list(plan.refused) == ["vm"]) is refused
    assert copied(make_plan([ONE, THREE], target, SOURCE, (), None, {"vm": 2})) == [THREE.id]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ([ONE, made(7, 2)], "was copied as number 2, which is 00000000 now"),
        ([ONE, made(7, 2), made(8, 3)], "was copied as number 2"),
        ([ONE], "is newer than all that the source has"),
    ],
)
def test_a_source_that_was_put_back(source: list[Record], why: str) -> None:
    """Its new backups have numbers that were used before: nothing may be taken for copied."""
    plan = planned([*source, made(5, 1, "other")], [copy(ONE, 1), copy(TWO, 2)])
    assert copied(plan) == [made(5, 1).id]
    assert why in str(plan.refused["vm"])
    assert "remove --all-of vm" in plan.refused["vm"].hint
