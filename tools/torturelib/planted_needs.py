"""Faults in what prunes know of what is needed: what is counted, what is kept of that, and when it is not believed."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_NEEDS, _FILE, _CHAINS, _GOOD, _PRUNE = (
    f"incbak/repo/{name}.py" for name in ("needs", "needs_file", "chains", "good", "prune")
)


def _needs(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_needs", *tests)


def _chains(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_chains", *tests)


def _prune(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_prune", *tests)


_DOUBTS = (
    Fault(
        "needs-believed-without-a-pack",
        _NEEDS,
        "self._layers and index.complete and self._packs.keys() <= named",
        "self._layers and self._packs.keys() <= named",
        _needs("test_what_is_lost_since_is_missed"),
    ),
    Fault(
        "needs-believed-without-an-index-file",
        _NEEDS,
        "self._layers and index.complete and self._packs.keys() <= named",
        "self._layers and index.complete",
        _needs("test_what_is_lost_since_is_missed"),
    ),
    Fault(
        "needs-believed-beside-unknown-condemnations",
        _NEEDS,
        "        if not index.condemned.packs <= set(self._saved.condemned):\n",
        "        if False:\n",
        _needs("test_what_is_lost_since_is_missed"),
    ),
    Fault(
        "needs-less-than-nothing",
        _NEEDS,
        "            if len(after) and after.min() < 0:\n                raise _DoubtError\n",
        "            after = np.maximum(after, 0)\n",
        _needs("test_a_count_below_nothing_is_not_believed"),
    ),
    Fault(
        "needs-forget-that-there-were-too-many",
        _NEEDS,
        "np.where(before == MOST, MOST, np.minimum(before + changes, MOST))",
        "np.minimum(before + changes, MOST)",
        _needs("test_what_was_too_much_to_count_stays_needed"),
    ),
    Fault(
        "needs-of-backups-that-cannot-be-read",
        _NEEDS,
        "        except (_DoubtError, BrokenError, DisorderError):\n",
        "        except (_DoubtError, DisorderError):\n",
        _needs("test_what_goes_need_not_be_readable"),
    ),
    Fault(
        "needs-in-another-order",
        _CHAINS,
        "    if stays != [link for link in new if link.owner in both]:\n",
        "    if False:\n",
        _chains("test_chains_that_do_not_fit"),
    ),
)

_FILES = (
    Fault(
        "needs-not-verified",
        _FILE,
        "        if number < 1 or storage.seal.check(memoryview(data[at:behind])).hex() != check:",
        "        if number < 1:",
        _needs("test_what_does_not_verify_is_not_believed"),
    ),
    Fault(
        "needs-of-another-version",
        _FILE,
        "    if manifest.version != VERSION or sum(",
        "    if sum(",
        _needs("test_another_version_is_not_believed"),
    ),
    Fault(
        "needs-of-the-older-file",
        _FILE,
        "    return max(found,",
        "    return min(found,",
        _needs("test_of_two_files_the_later_counts"),
    ),
    Fault(
        "needs-tell-names",
        _FILE,
        '        body = storage.seal.close("needs", name, digested(msgspec.json.encode(whole)))\n',
        "        body = digested(msgspec.json.encode(whole))\n",
        _needs("test_no_name_is_told_in_an_encrypted_repository"),
    ),
    Fault(
        "needs-need-room",
        _PRUNE,
        '        except (DurabilityError, OSError) as e:\n            self._report(Warned(f"the next prune',
        '        except ZeroDivisionError as e:\n            self._report(Warned(f"the next prune',
        _needs("test_a_disk_without_room_costs_the_next_prune_time_only"),
    ),
)

_COUNTED = (
    Fault(
        "needs-in-no-pack",
        _NEEDS,
        "        if any(map(len, missing)):\n",
        "        if False:\n",
        _needs("test_clusters_that_are_in_no_pack_stop_it"),
    ),
    Fault(
        "needs-in-condemned-packs-only",
        _NEEDS,
        "            found[which[file.lasting[numbers]]] = True\n",
        "            found[which[file.usable[numbers]]] = True\n",
        _prune("test_where_a_listed_backup_needs_what_is_condemned_nothing_is_removed"),
    ),
    Fault(
        "needs-of-what-comes-last",
        _CHAINS,
        "    if len(old) == 1:\n",
        "    if False:\n",
        _chains("test_whatever_joins_and_leaves"),
    ),
    Fault(
        "needs-of-equal-places-once",
        _CHAINS,
        "            self._times[key] = self._times.get(key, 0) + times\n",
        "            self._times[key] = times\n",
        _chains("test_whatever_joins_and_leaves"),
    ),
    Fault(
        "needs-of-packs-that-are-new",
        _NEEDS,
        "            unknown = np.array([name not in self._packs for name in file.names], dtype=bool)\n",
        "            unknown = np.zeros(len(file.names), dtype=bool)\n",
        _needs("test_kept_over_many_prunes"),
    ),
    Fault(
        "needs-of-a-stray-pack",
        _PRUNE,
        "            if digests is None or not index.have(digests[self._needs.needed(digests)], lasting=True).all():\n",
        "            if digests is None:\n",
        _needs("test_a_stray_pack_with_something_needed_stays"),
    ),
    Fault(
        "needs-damage-of-the-newest-passed-over",
        _PRUNE,
        "        held = self._count(records, decisions, {e.vm: e for e in broken})\n",
        "        held = self._count(records, decisions, {})\n",
        _needs("test_what_is_lost_since_is_missed", "test_a_page_that_has_rotted_since_is_missed"),
    ),
    Fault(
        "needs-clusters-of-the-last-good-not-looked-up",
        _GOOD,
        "            if lost := {digest.tobytes() for digest in wanted[~self._index.have(wanted, lasting=True)]}:\n",
        "            if lost := set[bytes]():\n",
        _needs("test_the_last_good_backup_has_all_its_clusters"),
    ),
)

FAULTS = (*_DOUBTS, *_FILES, *_COUNTED)
