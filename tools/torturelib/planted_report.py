"""Faults in what people read: what a hostile name may do, what is replaced, how much is read."""

from __future__ import annotations

from torturelib.planted import Fault, unit


def _report(test: str) -> tuple[str, ...]:
    return unit("report/test_report", test)


FAULTS = (
    Fault(
        "report-unescaped",
        "incbak/report/markup.py",
        "html.escape(printable(value), quote=True)",
        "printable(value)",
        _report("test_hostile_words_are_only_words"),
    ),
    Fault(
        "console-control-characters",
        "incbak/report/console.py",
        'print(one_line(f"incbak: {text}"), file',
        'print(f"incbak: {text}", file',
        unit("report/test_meter", "test_a_warning_stands_alone_and_does_nothing_to_the_terminal"),
    ),
    Fault(
        "report-over-any-file",
        "incbak/cli/report.py",
        'f.read(len(MARK)) in (b"", MARK.encode())',
        "True",
        _report("test_it_replaces_a_report_and_nothing_else"),
    ),
    Fault(
        "report-reads-everything",
        "incbak/report/history.py",
        "        if left < 0:\n            raise _EnoughError\n",
        "",
        _report("test_the_map_stops_where_its_budget_ends"),
    ),
)
