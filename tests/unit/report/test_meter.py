"""The line of progress, with a clock of its own."""

from __future__ import annotations

import io

from incbak.events import Notice, Progress, Warned
from incbak.report.console import Console
from incbak.report.meter import Meter

MiB = 1 << 20


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def test_rate_and_time_left() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.line() == ""
    meter.take(Progress("vda", 0, 100 * MiB))
    assert meter.line() == "  0% 0 B of 100.0 MiB"
    for done in (10, 20, 30):
        clock.now += 1
        meter.take(Progress("vda", done * MiB, 100 * MiB))
    assert meter.line() == " 30% 30.0 MiB of 100.0 MiB, 10.0 MiB/s, 7.00 s left"


def test_the_rate_is_of_late() -> None:
    """What was quick at first does not promise an end that never comes."""
    clock = Clock()
    meter = Meter(clock)
    for second in range(61):
        done = 1000 * second if second <= 10 else 10_000 + 10 * (second - 10)
        meter.take(Progress("vda", done, 20_000))
        clock.now += 1
    clock.now -= 1
    assert meter.line().endswith("10 B/s, 15m50s left")


def test_several_disks_are_one_line() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.take(Progress("vda", MiB, 2 * MiB))
    meter.take(Progress("vdb", MiB, 6 * MiB))
    clock.now += 2
    meter.take(Progress("vda", 2 * MiB, 2 * MiB))
    assert meter.line().startswith(" 37% 3.0 MiB of 8.0 MiB, ")


def test_what_is_not_known_is_not_said() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.take(Progress("", 0, 0))
    clock.now += 2
    meter.take(Progress("", 4 * MiB, 0))
    assert meter.line() == "4.0 MiB, 2.0 MiB/s"
    clock.now += 20
    meter.take(Progress("", 4 * MiB, 8 * MiB))
    clock.now += 20
    meter.take(Progress("", 4 * MiB, 8 * MiB))
    assert meter.line() == " 50% 4.0 MiB of 8.0 MiB, 0 B/s"


def test_another_thing_begins_anew() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.take(Progress("", 5, 10, "looking through", "backups"))
    clock.now += 2
    meter.take(Progress("", 9, 10, "looking through", "backups"))
    assert meter.line() == "looking through:  90% 9 of 10 backups, 2/s, 0.50 s left"
    meter.take(Progress("", 0, MiB, "copying what is needed"))
    assert meter.line() == "copying what is needed:   0% 0 B of 1.0 MiB"


def test_a_warning_stands_alone_and_does_nothing_to_the_terminal() -> None:
    clock, terminal = Clock(), Terminal()
    console = Console(0, terminal, clock)
    console(Progress("vda", 1, 2))
    console(Warned("bad \x1b[31mname"))
    console(Notice("not told"))
    console.end()
    text = terminal.getvalue()
    assert text.endswith("\rincbak: warning: bad \ufffd[31mname\n")
    assert "\x1b" not in text


def test_it_is_not_drawn_more_often_than_an_eye_follows() -> None:
    clock, terminal = Clock(), Terminal()
    console = Console(0, terminal, clock)
    for n in range(1000):
        clock.now += 0.01
        console(Progress("vda", n, 1000))
    assert 40 <= terminal.getvalue().count("\r") <= 60


def test_quiet_or_no_terminal_draws_nothing() -> None:
    for console_of in (lambda t: Console(-1, t), lambda t: Console(0, io.StringIO())):
        terminal = Terminal()
        console = console_of(terminal)
        console(Progress("vda", 1, 2))
        console.end()
        assert terminal.getvalue() == ""
