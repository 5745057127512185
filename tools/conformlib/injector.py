"""QEMU's server that hangs up at a chosen byte, against our client: every configuration of its test 083.

The client has to end with an error that says what happened, in bounded time; where the fault is behind all that it
needs, it may succeed.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from conformlib.cache import Place, Row, installed, need
from incbak.errors import NbdError
from incbak.nbd.client import NbdClient

EVENTS = {
    "neg1": ["before", "after", "8", "16"],
    "export": ["before", "after", "4", "12", "16"],
    "neg2": ["before", "after", "8", "10"],
    "request": ["before", "after"],
    "reply": ["before", "after", "4", "8"],
    "data": ["before", "after"],
    "neg-classic": ["before", "8", "16", "24", "28", "after"],
}
PATIENCE = 20.0


def suite(place: Place) -> Iterator[Row]:
    """One row per socket family, event and byte."""
    need("/usr/bin/python3")
    program = place.source("qemu", installed("qemu-utils")) / "tests" / "qemu-iotests" / "nbd-fault-injector.py"
    for family in ("unix", "tcp"):
        for event, whens in EVENTS.items():
            for when in whens:
                outcome = _run(place, program, family, event, when)
                yield Row("injector", f"{family} {event} {when}", *outcome)


def _run(place: Place, program: Path, family: str, event: str, when: str) -> tuple[str, str]:
    rules, where = place.work / "injector.conf", place.work / "injector.sock"
    where.unlink(missing_ok=True)
    rules.write_text(f"[inject-error]\nevent={event}\nwhen={when}\n")
    command = ["/usr/bin/python3", program, *(["--classic-negotiation"] if event == "neg-classic" else [])]
    command += ["127.0.0.1:0" if family == "tcp" else where, rules]
    server = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().removeprefix("Listening on ").strip()
        uri = f"nbd://{address}/foo" if family == "tcp" else f"nbd+unix:///foo?socket={address}"
        return judge(uri, may_succeed=(event, when) in {("data", "after")})
    finally:
        server.kill()
        server.communicate()


def judge(uri: str, *, may_succeed: bool) -> tuple[str, str]:
    """What our client makes of it: (outcome, reason)."""
    found: list[tuple[str, str]] = []

    def read() -> None:
        try:
            client = NbdClient.connect(uri, timeout=PATIENCE)
            try:
                content = client.read(0, 512)
            finally:
                client.abort()
            right = may_succeed and content == bytes(512)
            found.append(("passed", "") if right else ("failed", "the client noticed nothing"))
        except NbdError as e:
            found.append(("passed", "") if len(e.message) > 10 else ("failed", f"unclear error: {e.message}"))
        except Exception as e:  # noqa: BLE001 (any other exception is the finding)
            found.append(("failed", f"{type(e).__name__}: {e}"))

    thread = threading.Thread(target=read, daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(PATIENCE + 10)
    return found[0] if found else ("failed", f"the client hangs ({time.monotonic() - began:.0f} s)")
