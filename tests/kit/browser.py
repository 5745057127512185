"""Headless Chromium, driven over its debugging pipe: draws pages, tells what they ask for, and takes pictures."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.kit.need import need

DEADLINE = 120.0
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
          "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe")  # fmt: skip
_PIPES = (
    "import fcntl, os, sys; a, b = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 20) for n in sys.argv[1:3]); "
    "os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
"""Chromium takes commands on 3 and answers on 4."""


class Browser:
    """A context: one browser, with nothing of an earlier one. ``directory``: for its profile."""

    def __init__(self, directory: Path) -> None:
        need("chromium")
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = ["chromium", *_FLAGS, f"--user-data-dir={directory / 'chromium'}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PIPES, str(theirs_in), str(theirs_out), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs_in, theirs_out],
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._profile = directory / "chromium"
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def __call__(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept too."""
        end = time.monotonic() + DEADLINE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def show(self, page: Path, width: int, *, dark: bool, phone: bool = False) -> Shown:
        """Draw a page in a window of its own."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable", session)
        size = {"width": width, "height": 844, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", session, features=[scheme])
        self.events.clear()
        self("Page.navigate", session, url=page.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._receive()
        return Shown(self, session, target)


class Shown:
    """A page that is drawn."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression there."""
        found = self._browser("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def requested(self) -> list[str]:
        """What the page has asked for, itself included, whether it got it or not."""
        asked = [e for e in self._browser.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in asked]

    def complaints(self) -> list[str]:
        """What the browser has logged of it: scripts and loads that were refused, errors."""
        return [e["params"]["entry"]["text"] for e in self._browser.events if e["method"] == "Log.entryAdded"]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self._browser("Page.getLayoutMetrics", self._session)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self._browser("Page.captureScreenshot", self._session, captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """The window is gone."""
        self._browser("Target.closeTarget", targetId=self._target)
