"""Planted faults: what the command line refuses before anything is done."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_NOT_OPENED = "test_a_name_of_something_else_is_not_opened"

FAULTS = [
    Fault(
        "opening-format-of-anything",
        "incbak/disk/formats.py",
        'with open(open_image(path, os.O_RDONLY), "rb") as f:\n            head',
        'with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as f:\n            head',
        unit("test_opening", _NOT_OPENED),
    ),
    Fault(
        "opening-text-of-any-fifo",
        "incbak/opening.py",
        "stat.S_ISFIFO(mode) and _nameless(info)",
        "stat.S_ISFIFO(mode)",
        unit("test_opening", "test_a_text_may_come_through_a_link_or_a_pipe_of_the_shell"),
    ),
    Fault(
        "metrics-replace-an-image",
        "incbak/fleet/metrics.py",
        "    if head and head != _MARK:\n",
        "    if False:\n",
        unit("test_opening", "test_metrics_replace_metrics_only"),
    ),
    Fault(
        "watch-twice-by-another-name",
        "incbak/watch/disks.py",
        "    disk.claim.take(disk.image)\n",
        "",
        unit("watch/test_disks", "test_an_image_is_watched_once_whatever_the_vm_is_called"),
    ),
    Fault(
        "serve-name-of-a-read-only-export",
        "incbak/serve/daemon.py",
        "if n.endswith(READ_ONLY_SUFFIX)",
        "if False",
        ("tests/unit/serve/test_daemon_names.py",),
    ),
    Fault(
        "wrong-name-speaks-for-itself",
        "incbak/backup/runner.py",
        "other_names(self._vm, description, all_backups, host_name(), self._options.disks)",
        "[]",
        ("tests/story/test_options.py::test_a_name_that_the_monitor_does_not_say",),
    ),
    Fault(
        "served-monitor-says-no-name",
        "incbak/engine/served.py",
        '{"images": images, "name": name}',
        '{"images": images}',
        ("tests/story/test_options.py::test_a_name_that_the_monitor_does_not_say",),
    ),
    Fault(
        "given-tree-is-made",
        "incbak/cli/given.py",
        "    if not directory.exists() and not parent.exists():\n",
        "    if False:\n",
        unit("cli/test_refused", "test_a_last_directory_is_made"),
    ),
    Fault(
        "given-name-is-empty",
        "incbak/cli/given.py",
        "        if not value:\n",
        "        if False:\n",
        unit("cli/test_refused", "test_it_is_a_usage_error_and_nothing_was_done"),
    ),
    Fault(
        "drill-of-a-mistyped-argument-is-stored",
        "incbak/drill/boot.py",
        "and _refused(tail, wanted.arguments):",
        "and False:",
        unit("drill/test_boot", "test_qemu_that_does_not_start"),
    ),
    Fault(
        "named-configuration-is-read-late",
        "incbak/cli/settings.py",
        "        load(value)\n",
        "        pass\n",
        unit("cli/test_refused", "test_it_is_a_usage_error_and_nothing_was_done"),
    ),
]
