"""Faults in what proves that backups are good: checks that go on where the last one stopped, and drills."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_VERIFIED, _READING, _CHECK = (f"incbak/repo/{name}.py" for name in ("verified", "reading", "check"))


def _verified(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_verified", *tests)


_CHECKS = (
    Fault(
        "check-order",
        _VERIFIED,
        "key=lambda name: (self.read_at(name), name)",
        "key=lambda name: name",
        _verified("test_each_night_the_pack_that_was_read_longest_ago"),
    ),
    Fault(
        "check-marks-what-time-did-not-reach",
        _READING,
        "            return None\n        at, file",
        '            return PackRead(name, [], 0, clock(), verified.look(name) if verified else "")\n        at, file',
        _verified("test_each_night_the_pack_that_was_read_longest_ago"),
    ),
    Fault(
        "check-marks-damage-as-whole",
        _READING,
        "            if verified and not found.bad:\n",
        "            if verified:\n",
        _verified("test_a_damaged_pack_is_marked_after_its_damage_is_noted"),
    ),
    Fault(
        "check-forgets-known-damage",
        _CHECK,
        "    if read_data and not whole:\n",
        "    if False:\n",
        _verified("test_a_pack_with_damage_is_not_whole_and_no_night_forgets_it"),
    ),
    Fault(
        "check-removes-a-note-it-has-not-seen",
        _CHECK,
        "affected | doubtful, before)",
        "affected | doubtful, notes(repo.storage))",
        _verified("test_a_note_that_came_meanwhile_stays"),
    ),
    Fault(
        "check-believes-a-copy",
        _VERIFIED,
        " or mark.file != self.look(pack)",
        "",
        _verified("test_a_copied_repository_was_not_read", "test_a_pack_that_was_put_back_was_not_read"),
    ),
    Fault(
        "check-believes-the-future",
        _VERIFIED,
        "mark is None or not 0 < mark.at <= self._clock() or",
        "mark is None or",
        _verified("test_a_time_in_the_future_counts_for_nothing"),
    ),
    Fault(
        "check-believes-garbage",
        _VERIFIED,
        "    if blake3(body).hexdigest().encode() != checksum:\n",
        "    if False:\n",
        _verified("test_one_flipped_bit_is_garbage"),
    ),
    Fault(
        "check-saves-nothing-when-interrupted",
        _READING,
        "        if verified and done:\n",
        "        if False:\n",
        _verified("test_an_interrupted_check_keeps_what_it_has_read"),
    ),
    Fault(
        "check-removes-before-it-writes",
        _VERIFIED,
        '        self._storage.write(KIND, fresh, blake3(body).hexdigest().encode() + b"\\n" + body)\n'
        "        self._storage.remove_all(KIND, self._replaces)\n",
        "        self._storage.remove_all(KIND, self._replaces)\n"
        '        self._storage.write(KIND, fresh, blake3(body).hexdigest().encode() + b"\\n" + body)\n',
        ("tests/story/test_check.py::test_killed_at_any_step_it_goes_on",),
    ),
)

FAULTS = _CHECKS
