"""Pruning: backups that the policy does not keep are removed, and then the content that nothing listed needs.

The order, which is what makes it safe beside everything else:

1. what the backups that stay need is counted (`needs`), going on from what the last prune kept. Of a VM of which
   anything cannot be read that is counted for the first time, or that a backup which stays has in the place of what
   goes, no backup is removed: a prune must not turn damage into loss. Where that is so, or where a record cannot be
   read, of which nobody knows what it needs, content stays, too: records of the other VMs go, nothing is condemned;
2. records go, pinned ones looked at again under ``pins.lock`` (`pins`). Content that only they needed is garbage now;
3. packs that an earlier prune condemned, longer than the grace ago, are removed: first the packs, which needs no space,
   then what the index says of them, then the condemnation. Killed in between, the condemnation is still there, so all
   know that these packs are no loss, and the next prune goes on;
4. packs of which nothing is needed are *condemned* (`condemned`); then
5. of those that are mostly garbage what is needed is copied into new packs, verified, durable and indexed; then they
   are condemned too;
6. what was counted is kept for the next prune. Killed before, the next one counts from an older state, or anew.

With a grace of nothing, 3 follows 4 and 5 at once: on a full disk 5 has room only then. Where a full disk has no room
even for the condemnation, the packs are removed first, while the lock of 4 is held, and condemned when that made room;
killed in between, they are named and missing, and the next prune condemns them.

Packs in which a check found damage, that lost their table, are cut short or missing, take part in 5 whatever their
share: when all that is needed of them is whole elsewhere, they go, and with them what was healed is forgotten.

**Why no backup can need a condemned pack.** A run holds ``content.lock`` shared from before it reads a record or the
index until after its commit. Packs are condemned while a prune holds that lock exclusively: so at a moment when no run
is under way, when all listed backups are counted (those that were committed since are counted first, without the lock),
and none needs the pack. A run that begins later knows the pack as condemned and stores the content anew; what it takes
over from its base is in none either, since the base was counted, or was made by such a run itself. So a condemned pack
can be removed at any time, beside anything; the grace is for readers of pruned backups only.

The lock is held for a listing and one small file. It is tried again and again, never queued for, so a backup waits for
some milliseconds at most and a prune never holds one up. While backups overlap all the time nothing can be condemned:
the prune has removed records and what was condemned earlier, says so, and exits with 11 after ``lock_wait``. Waiting
for the runs of one moment only, as RCU does, would need a name for each run and a second look at what they based
themselves on; a moment without a backup was thought easier to have than that to be right.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from incbak import durable
from incbak.errors import DamagedError, DurabilityError, IncbakError, LockedError, UsageError
from incbak.events import Reporter, Warned, silent
from incbak.repo import pack
from incbak.repo.condemned import condemn, read_condemned
from incbak.repo.good import last_good
from incbak.repo.ids import ids, is_id
from incbak.repo.index import REBUILD, Digests
from incbak.repo.merge import drop_packs
from incbak.repo.needs import Needs
from incbak.repo.numbers import forget
from incbak.repo.pins import pins_held, read_pins
from incbak.repo.record import NotWholeError, Record
from incbak.repo.repack import Repacker
from incbak.repo.repository import CONTENT_LOCK, REPOSITORY_LOCK, Repository
from incbak.repo.retention import Decision, Policy, plan
from incbak.repo.verified import Verified
from incbak.units import counted

PRUNE_LOCK = "prune.lock"

durable.declare(
    "prune.counted",
    "prune.records-removed",
    "prune.packs-removed",
    "prune.index-done",
    "prune.expired",
    "prune.condemning",
    "prune.condemned",
    "prune.repacked",
    "prune.done",
)


@dataclass(frozen=True)
class Options:
    """``grace`` and ``lock_wait`` in seconds. ``repack_below``: the needed share of a pack below which the needed part
    is copied out of it, 0 to 1. ``clock``: seconds since 1970."""

    grace: float = 86400.0
    repack_below: float = 0.5
    lock_wait: float = 0.0
    clock: Callable[[], float] = time.time


@dataclass
class Outcome:
    """What was done. Bytes: ``freed`` now, ``condemned`` from now on. ``trouble``: why not all could be."""

    decisions: list[Decision]
    freed: int = 0
    condemned: int = 0
    repacked: int = 0
    waiting: int = 0
    """Bytes of packs that are condemned and still there."""
    trouble: IncbakError | None = None
    unreadable: dict[str, str] = field(default_factory=dict)


Rules = Policy | Mapping[str, Policy]
"""One policy for every VM, or those of some by name: the others lose nothing."""


_ANY = ("",)
"""In the place of good backups, where they do not matter."""


def decide(repo: Repository, rules: Rules, vm: str | None, now: float) -> tuple[list[Decision], list[NotWholeError]]:
    """What stays of the backups of ``vm``, or of each VM, and why; and what was found wrong with any that stays.

    ``now``: seconds since 1970.

    Raises `UsageError` for a policy that keeps nothing, and for a VM without backups.
    """
    if any(policy.empty for policy in ([rules] if isinstance(rules, Policy) else rules.values())):
        raise UsageError("no rule says what to keep", hint="Give for example --keep-daily 7 --keep-weekly 4.")
    records = repo.backups(vm)
    if vm is not None and not records:
        raise UsageError(f"there is no backup of {vm} in the repository", hint="See: incbak list")
    pins, noted = read_pins(repo.storage), repo.damage().of(r.id for r in records)
    decisions: list[Decision] = []
    broken: dict[str, NotWholeError] = {}
    for each in dict.fromkeys(r.vm for r in records):
        of_vm = [r for r in records if r.vm == each]
        if policy := rules if isinstance(rules, Policy) else rules.get(each):
            going = [d.record for d in plan(of_vm, policy, pins, _ANY, now) if not d.keep]
            good, wrong = last_good(repo, of_vm, noted, going)
            decisions += plan(of_vm, policy, pins, good, now)
            broken |= wrong
    return decisions, [broken[d.record.id] for d in decisions if d.keep and d.record.id in broken]


def dry_run(repo: Repository, rules: Rules, vm: str | None, clock: Callable[[], float] = time.time) -> Outcome:
    """What `prune` would do with the backups; changes nothing and needs no lock."""
    return Outcome(decide(repo, rules, vm, clock())[0], unreadable=dict(repo.unreadable))


def prune(
    repo: Repository,
    rules: Rules,
    vm: str | None = None,
    options: Options | None = None,
    report: Reporter = silent,
) -> Outcome:
    """Prune; see the module's docstring.

    Raises `LockedError` beside another prune or a rebuild of the index; `DamagedError` when it cannot be known what the
    backups that stay need and no other VM is there: then nothing was removed. What goes wrong later, or with other VMs,
    is `Outcome.trouble`.
    """
    options = options or Options()
    with ExitStack() as stack:
        for name, exclusive in ((PRUNE_LOCK, True), (REPOSITORY_LOCK, False)):
            stack.enter_context(repo.storage.lock(name, exclusive=exclusive, wait=options.lock_wait))
        return _Prune(repo, options, report).run(rules, vm)


class _Prune:
    def __init__(self, repo: Repository, options: Options, report: Reporter) -> None:
        self._repo, self._storage, self._options, self._report = repo, repo.storage, options, report
        self._told: set[str] = set()
        self._unsure: DamagedError | None = None
        """Why it is not known what is needed."""
        self._full: DurabilityError | None = None

    def run(self, rules: Rules, vm: str | None) -> Outcome:
        self._storage.sweep()
        self._forget_unknown()
        decisions, broken = decide(self._repo, rules, vm, self._options.clock())
        self._needs = Needs(self._repo, self._report)
        self._repacker = Repacker(self._repo, self._needs)
        decisions = self._count_the_rest(decisions, broken)
        durable.crash_point("prune.counted")
        done = Outcome(self._remove_records(decisions))
        durable.crash_point("prune.records-removed")
        lost: DamagedError | None = None
        try:
            self._expire(done)
            if self._unsure:
                raise self._unsure
            self._condemn(done, self._garbage)
            self._expire(done)
            if chosen := sorted({*self._mostly_garbage(), *self._hurt()}):
                lost = self._repacker.copy(chosen, self._report)
                done.repacked = len(chosen)
                durable.crash_point("prune.repacked")
                self._condemn(done, lambda: [p for p in chosen if self._repacker.free(p)])
            self._expire(done)
            done.trouble = self._full or lost
        except IncbakError as e:
            done.trouble = e
        if not self._unsure:
            self._keep()
        there = self._storage.list("packs")
        done.waiting = sum(there.get(p, 0) for p in read_condemned(self._storage).packs)
        durable.crash_point("prune.done")
        return done

    def _forget_unknown(self) -> None:
        """Nobody acts on a condemnation that cannot be read: its packs are judged anew."""
        for name, why in read_condemned(self._storage).unknown.items():
            self._report(Warned(f"{why}; it is removed, and its packs are judged anew"))
            self._storage.remove("condemned", name)

    def _keep(self) -> None:
        try:
            self._needs.save()
        except (DurabilityError, OSError) as e:
            self._report(Warned(f"the next prune has to count anew what is needed: {e}"))

    def _count_the_rest(self, decisions: list[Decision], broken: list[NotWholeError]) -> list[Decision]:
        """The decisions that can be carried out: nothing goes of a VM of which it cannot be known what stays needs.

        Raises `DamagedError` where that leaves nothing to be done.
        """
        repo = self._repo
        repo.index.refresh()
        if repo.index.damaged:
            nothing = "nothing" if decisions else "no content"
            what = f"index {repo.index.damaged[0]} does not verify, so {nothing} was removed"
            raise DamagedError(what, hint=REBUILD)
        records = repo.backups()
        held = self._count(records, decisions, {e.vm: e for e in broken})
        others = {d.record.vm for d in decisions} - held.keys()
        if repo.unreadable and len({r.vm for r in records}) < 2:
            others = set()
        nothing = "no content was removed" if others or not decisions else "nothing was removed"
        if repo.unreadable:
            why = "; ".join(repo.unreadable.values())
            what = f"{counted(len(repo.unreadable), 'record')} cannot be read, {nothing}: {why}"
            hint = "Nobody knows what they need. Run: incbak check; one that is given up goes with: incbak remove ID"
            self._unsure = DamagedError(what, hint=hint)
        elif held:
            error = next(iter(held.values()))
            self._unsure = DamagedError(f"{nothing}: {error}", hint=error.hint)
        if self._unsure and not others:
            raise self._unsure
        return [replace(d, reasons=d.reasons or ("not whole",)) if d.record.vm in held else d for d in decisions]

    def _count(
        self, records: list[Record], decisions: list[Decision], held: dict[str, NotWholeError]
    ) -> dict[str, NotWholeError]:
        """Count what stays; the VMs of which it cannot be known, and why."""
        going = {d.record.id for d in decisions if not d.keep}
        while True:
            try:
                self._needs.count([r for r in records if r.id not in going and r.vm not in held])
            except NotWholeError as e:
                held[e.vm] = e
            else:
                return held

    def _remove_records(self, decisions: list[Decision]) -> list[Decision]:
        """Those to go, unless they were pinned meanwhile; the decisions as they were carried out."""
        going = [d.record.id for d in decisions if not d.keep]
        if not going:
            return decisions
        with pins_held(self._storage) as pins:
            going = [ident for ident in going if ident not in pins]
            forget(self._storage, [d.record for d in decisions], going, self._report)
        return [d if d.keep or d.record.id not in pins else replace(d, reasons=("pinned",)) for d in decisions]

    # -- content --------------------------------------------------------------------------------------------------

    def _expire(self, done: Outcome) -> None:
        """Remove what was condemned longer ago than the grace."""
        now = self._options.clock()
        over = {n: c for n, c in read_condemned(self._storage).files.items() if c.over(now, self._options.grace)}
        if not over:
            return
        packs = {p for c in over.values() for p in c.packs}
        there = self._storage.list("packs")
        self._storage.remove_all("packs", sorted(packs & there.keys()))
        done.freed += sum(there[p] for p in packs & there.keys())
        durable.crash_point("prune.packs-removed")
        drop_packs(self._storage, packs)
        durable.crash_point("prune.index-done")
        self._storage.remove_all("condemned", sorted(over))
        durable.crash_point("prune.expired")
        self._repo.index.refresh()

    def _condemn(self, done: Outcome, choose: Callable[[], list[str]]) -> None:
        """Condemn what ``choose`` says, at a moment without backups, all that are listed being counted."""
        deadline = time.monotonic() + self._options.lock_wait
        while packs := choose():
            with self._without_backups(max(deadline - time.monotonic(), 0.0)):
                fresh = ids(self._storage.list("backups")).keys() - self._needs.counted
                if not fresh:
                    durable.crash_point("prune.condemning")
                    self._condemned(packs, done)
                    durable.crash_point("prune.condemned")
                    there = self._storage.list("packs")
                    done.condemned += sum(there.get(p, 0) for p in packs)
                    break
            self._needs.count([self._repo.record(name) for name in sorted(self._needs.counted | fresh)])
        self._repo.index.refresh()

    def _condemned(self, packs: list[str], done: Outcome) -> None:
        try:
            condemn(self._storage, packs, self._options.clock())
        except DurabilityError as e:
            if self._options.grace or not _is_full(e):
                raise
            there = self._storage.list("packs")
            self._storage.remove_all("packs", sorted(there.keys() & set(packs)))
            done.freed += sum(there.get(p, 0) for p in packs)
            self._storage.settle()
            what = f"the disk had no room to say which packs go, so they were removed at once: {e}"
            self._full = DurabilityError(what, hint="Run it again: it goes on.")
            condemn(self._storage, packs, self._options.clock())

    def _without_backups(self, wait: float) -> ExitStack:
        stack = ExitStack()
        try:
            stack.enter_context(self._storage.lock(CONTENT_LOCK, exclusive=True, wait=wait))
        except LockedError as e:
            why = "a backup is running, so it cannot be said yet which content is garbage; the backups are pruned"
            raise LockedError(why, hint="The next prune goes on; --lock-wait TIME waits for a moment.") from e
        return stack

    def _garbage(self) -> list[str]:
        """Packs of which nothing is needed: that the index names, there or not, and that it does not."""
        self._repo.index.refresh()
        there = self._storage.list("packs")
        weights = self._needs.weights()
        dead = [name for name, weight in weights.items() if not weight and (name not in there or self._free(name))]
        return sorted(dead + list(self._strays(there, weights)))

    def _strays(self, there: Collection[str], weights: Collection[str]) -> Iterator[str]:
        """Packs that no index names: a run was killed. One with a copy of what is noted as damaged is no garbage."""
        index = self._repo.index
        named = {name for f in index.files for name in f.names} | index.condemned.packs
        damage = self._repo.damage()
        for name in sorted(set(there) - named - set(weights)):
            digests = self._table(name) if is_id(name) else None
            if digests is None or not index.have(digests[self._needs.needed(digests)], lasting=True).all():
                continue
            if not (damage and any(damage.covers(d.tobytes()) for d in digests)):
                yield name

    def _mostly_garbage(self) -> list[str]:
        """Those of which nothing is needed have a copy of something, which may be the only whole one."""
        there = self._storage.list("packs")
        below, gone = self._options.repack_below, read_condemned(self._storage).packs
        weights = self._needs.weights().items()
        frame = pack.HEAD.size + pack.FOOT.size
        return sorted(n for n, w in weights if n not in gone and w < below * (there.get(n, 0) - frame))

    def _hurt(self) -> list[str]:
        """Those that are not as they were written, if the index names them."""
        there, index = self._storage.list("packs"), self._repo.index
        named = {name for file in index.files for name in file.names}
        lost = {n for file in index.files for n, ok in zip(file.names, file.usable.tolist(), strict=True) if not ok}
        hurt = {name for name in Verified(self._storage).hurt() if name in there}
        return sorted(((hurt | lost) & named) - read_condemned(self._storage).packs)

    def _free(self, name: str) -> bool:
        """Whether its own table too says that nothing in it is needed."""
        digests = self._table(name)
        return digests is not None and not self._needs.needed(digests).any()

    def _table(self, name: str) -> Digests | None:
        try:
            return self._repacker.table(name)
        except (DamagedError, OSError) as e:
            if name not in self._told:
                self._told.add(name)
                self._report(Warned(f"pack {name} stays, it cannot be said what it holds: {e}"))
            return None


def _is_full(error: DurabilityError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


__all__ = ["Options", "Outcome", "Rules", "decide", "dry_run", "prune"]
