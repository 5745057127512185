"""Planted faults: where nothing is written, and what is said of damage."""

from torturelib.planted import Fault, unit

_OUTPUTS = "cli/test_outputs"

FAULTS = [
    Fault(
        "output-in-a-repository-in-use",
        "incbak/repo/outputs.py",
        "if (there := _stat(each)) and os.path.samestat(there, info):",
        "if False:",
        unit(_OUTPUTS, "test_no_command_writes_in_the_state_directory"),
    ),
    Fault(
        "output-in-another-repository",
        "incbak/repo/outputs.py",
        "if all(os.path.isdir(each / folder) for folder in _FOLDERS):",
        "if False:",
        unit(_OUTPUTS, "test_no_command_writes_in_a_repository"),
    ),
    Fault(
        "output-by-a-link",
        "incbak/repo/outputs.py",
        "dict.fromkeys((named, Path(os.path.realpath(path)))):",
        "(named,):",
        unit(_OUTPUTS, "test_nor_by_a_link"),
    ),
    Fault(
        "output-by-a-hard-link",
        "incbak/repo/outputs.py",
        "info.st_nlink > 1:",
        "False:",
        unit(_OUTPUTS, "test_a_hard_link_of_a_bitmap", "test_nor_by_a_link"),
    ),
    Fault(
        "output-by-a-link-in-the-directory",
        "incbak/cli/restore.py",
        "    if not _SCHEME.match(where):\n        here.refuse_own(Path(where))\n",
        "",
        unit(_OUTPUTS, "test_a_name_in_the_target_directory_that_leads_into_it"),
    ),
    Fault(
        "output-of-a-restore-of-all",
        "incbak/cli/restore.py",
        "    elif not _SCHEME.match(target):\n        here.refuse_own(Path(target))\n",
        "",
        unit(_OUTPUTS, "test_no_command_writes_in_a_repository"),
    ),
    Fault(
        "output-report",
        "incbak/cli/report.py",
        "    here.refuse_own(file)\n",
        "",
        unit(_OUTPUTS, "test_no_command_writes_in_a_repository"),
    ),
    Fault(
        "output-metrics",
        "incbak/cli/surroundings.py",
        "        here.refuse_own(file)\n",
        "        pass\n",
        unit(_OUTPUTS, "test_no_command_writes_in_a_repository"),
    ),
    Fault(
        "output-copied-files",
        "incbak/files/copy.py",
        "            self._refuse(path)\n",
        "            pass\n",
        unit("files/test_hostile", "test_a_directory_in_which_nothing_is_written_is_left_out"),
    ),
    Fault(
        "plain-check-hides-known-damage",
        "incbak/repo/check.py",
        "    if not whole:\n        _look_again",
        "    if read_data and not whole:\n        _look_again",
        unit("repo/test_damage", "test_a_plain_check_tells_what_is_known_and_still_so"),
    ),
    Fault(
        "plain-check-removes-notes-it-cannot-read",
        "incbak/repo/check.py",
        "before if whole else list(known.names))",
        "before)",
        unit("repo/test_damage", "test_a_note_that_cannot_be_read_is_removed_only_by_a_check_of_everything"),
    ),
    Fault(
        "plain-check-trusts-the-rest",
        "incbak/repo/check.py",
        "doubtful = set() if whole else",
        "doubtful = set() if whole or not read_data else",
        unit("repo/test_damage", "test_a_plain_check_tells_what_is_known_and_still_so"),
    ),
    Fault(
        "prune-keeps-quiet-on-damage",
        "incbak/repo/prune.py",
        "self._full or lost",
        "self._full",
        unit("repo/test_prune", "test_damage_that_a_backup_which_stays_needs_is_told"),
    ),
]
