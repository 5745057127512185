"""Faults in copying single files out of a disk that a stranger wrote."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_COPY, _LIBRARY, _WORKER = "incbak/files/copy.py", "incbak/files/library.py", "incbak/files/worker.py"


def _hostile(*tests: str) -> tuple[str, ...]:
    return unit("files/test_hostile", *tests)


FAULTS = (
    Fault(
        "files-any-name",
        _COPY,
        "if not _is_safe(node.name):",
        "if False:",
        _hostile("test_a_name_leads_nowhere"),
    ),
    Fault(
        "files-through-a-link",
        _COPY,
        "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC",
        _hostile("test_a_link_that_was_there_is_not_followed"),
    ),
    Fault(
        "files-over-what-is-there",
        _COPY,
        "                self._refuse_taken(fd, wanted)\n",
        "                pass\n",
        ("tests/story/test_files.py::test_what_is_there_is_left_alone",),
    ),
    Fault(
        "files-setuid",
        _COPY,
        "self._mask = 0o777 & ~_umask() | (0o6000 if setuid else 0)",
        "self._mask = 0o777 & ~_umask() | 0o6000",
        _hostile("test_no_devices_and_no_setuid"),
    ),
    Fault(
        "files-larger-than-the-disk",
        _COPY,
        "if node.size > self._limit:",
        "if False:",
        _hostile("test_a_size_beyond_the_disk_is_refused"),
    ),
    Fault(
        "files-more-than-the-disk",
        _COPY,
        "if self._written > self._limit:",
        "if False:",
        _hostile("test_no_more_is_written_than_the_disk_has"),
    ),
    Fault(
        "files-round-in-circles",
        _COPY,
        "        self._entered.add(node.inode)\n",
        "",
        _hostile("test_a_loop_ends"),
    ),
    Fault(
        "files-damage-passed-over",
        _LIBRARY,
        "                    self._raise_damage()\n",
        "                    pass\n",
        _hostile("test_what_cannot_be_read_is_damage_whatever_the_library_makes_of_it"),
    ),
    Fault(
        "files-worker-with-all-rights",
        _WORKER,
        "    give_up_rights(memory)\n",
        "",
        _hostile("test_the_worker_can_do_little"),
    ),
    Fault(
        "files-out-of-step",
        _LIBRARY,
        "            if not done:\n                self.close()\n",
        "            pass\n",
        _hostile("test_a_question_that_is_given_up_does_not_mix_with_the_next"),
    ),
)
