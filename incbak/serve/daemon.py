"""The process: opens, listens, says that it is ready, waits, ends cleanly. The bounds are in the package docstring."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from incbak.errors import UsageError
from incbak.nbd.server import NbdServer, bind_unix
from incbak.nbd.uri import NbdUri, UriTls
from incbak.serve import systemd
from incbak.serve.export import READ_ONLY_SUFFIX, DiskExport
from incbak.serve.monitor import Monitor
from incbak.serve.opening import Heartbeat, close_tracked, open_tracked
from incbak.serve.schema import QmpError
from incbak.serve.stdio import stdio_socket
from incbak.serve.vm import Vm

log = logging.getLogger(__name__)

CONNECTIONS_END = 10.0
"""Seconds that connections get to finish their requests."""
JOBS_END = 5.0
DRAIN_END = 10.0
SECOND_SIGNAL = 5.0
"""Seconds after a second signal until the process is gone, whatever it waits for."""


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, and where. ``disks`` are (name, image)."""

    name: str
    disks: list[tuple[str, Path]]
    state_dir: Path
    nbd_socket: Path | None = None
    monitor_socket: Path | None = None
    tcp: tuple[str, int] | None = None
    tls: ssl.SSLContext | None = None
    read_only: bool = False
    stdio: bool = False
    scratch_dir: Path = Path("/var/tmp")
    scratch_limit: int | None = None
    max_connections: int = 100
    ignore_ctime: bool = False
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))


class Daemon:
    """One run of ``incbak serve``."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.vm = Vm(options.name, options.scratch_dir, options.scratch_limit)
        self.vm.exports.tls = options.tls
        self._exports: dict[str, DiskExport] = {}
        self._server = NbdServer(lambda: self._exports, max_connections=options.max_connections, tls=options.tls)
        self._places: list[str] = []
        self._signals = 0
        self._caught: tuple[signal.Signals, ...] = ()
        self._monitor_path: Path | None = None

    def run(self) -> int:
        """Serve until told to end. Returns 0 after a clean end, 1 if bitmaps have to be recovered at the next start.

        Raises `IncbakError` when it cannot begin; then everything opened is closed.
        """
        return asyncio.run(self._run())

    async def _run(self) -> int:
        opened = False
        try:
            self._open()
            monitor = Monitor(self.vm)
            wanted = asyncio.Event()
            self._catch_signals()
            self._listen(monitor)
            opened = True
        finally:
            if not opened:
                self._close()
        heartbeat = Heartbeat(self.vm)
        self._say_ready()
        alive = asyncio.create_task(systemd.watchdog())
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._await_end, args=(loop, wanted), daemon=True).start()
        await wanted.wait()
        systemd.notify("STOPPING=1")
        clean = await asyncio.to_thread(self._close)
        heartbeat.stop()
        await monitor.close()
        alive.cancel()
        if self._monitor_path:
            self._monitor_path.unlink(missing_ok=True)
        self._ignore_signals()
        return 0 if clean else 1

    def _await_end(self, loop: asyncio.AbstractEventLoop, wanted: asyncio.Event) -> None:
        self.vm.shutdown_wanted.wait()
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(wanted.set)

    # -- beginning ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        names = [name for name, _path in self.options.disks]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise UsageError(f"disk {twice} is given twice", hint="Give each disk a name of its own.")
        if derived := next((n for n in names if n.endswith(READ_ONLY_SUFFIX)), None):
            hint = f"Choose another name: what ends in {READ_ONLY_SUFFIX} is a disk for reading only."
            raise UsageError(f"not the name of a disk: {derived}", hint=hint)
        for name, path in self.options.disks:
            tracked = open_tracked(self.vm, name, path, self.options.state_dir, read_only=self.options.read_only)
            for export in (DiskExport(tracked), DiskExport(tracked, read_only=True)):
                self._exports[export.name] = export
        if len(names) == 1:
            self._exports[""] = self._exports[names[0]]

    def _listen(self, monitor: Monitor) -> None:
        options = self.options
        handed = systemd.listen_sockets()
        for name, sock in handed:
            (monitor if name == systemd.MONITOR else self._server).add_listener(sock)
            self._places.append(f"{'monitor' if name == systemd.MONITOR else 'nbd'}=fd:{sock.fileno()}")
        if options.monitor_socket and not any(name == systemd.MONITOR for name, _sock in handed):
            monitor.add_listener(bind_unix(options.monitor_socket))
            self._monitor_path = options.monitor_socket
            self._places.append(f"monitor={options.monitor_socket}")
        if options.tcp:
            host, port = self._server.listen_tcp(*options.tcp)
            tls = UriTls() if options.tls else None
            self._places += [str(NbdUri(name, host=host, port=port, tls=tls)) for name, _path in options.disks]
        if options.stdio:
            threading.Thread(target=self._serve_stdio, args=(stdio_socket(),), daemon=True).start()
        elif options.nbd_socket and all(name == systemd.MONITOR for name, _sock in handed):
            path = self._server.listen_unix(options.nbd_socket)
            self._places += [str(NbdUri(name, path=str(path))) for name, _path in options.disks]

    def _serve_stdio(self, sock: object) -> None:
        try:
            self._server.serve_connection(sock)  # type: ignore[arg-type]
        finally:
            self.vm.request_shutdown("guest-shutdown")

    def _say_ready(self) -> None:
        if not self.options.stdio:
            self.options.say("ready: " + " ".join(sorted(self._places, key=lambda p: p.startswith("monitor="))))
        systemd.notify(f"READY=1\nSTATUS=serving {len(self.options.disks)} disks of {self.vm.name}")

    # -- ending ---------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # as under nohup
        self._caught = (signal.SIGTERM, signal.SIGINT, *hangup)
        for number in self._caught:
            with suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self._on_signal)

    def _ignore_signals(self) -> None:
        """Keep the exit code: a signal between the clean end and that of the process would kill it as a failure."""
        loop = asyncio.get_running_loop()
        for number in self._caught:
            with suppress(NotImplementedError, RuntimeError, ValueError):
                if loop.remove_signal_handler(number):
                    signal.signal(number, signal.SIG_IGN)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 2:
            print(f"incbak: ending within {SECOND_SIGNAL:g} s", file=sys.stderr, flush=True)
            timer = threading.Timer(SECOND_SIGNAL, os._exit, (1,))
            timer.daemon = True
            timer.start()
        self.vm.request_shutdown("host-signal")

    def _close(self) -> bool:
        deadline = time.monotonic() + CONNECTIONS_END
        self._server.stop(CONNECTIONS_END)
        self.vm.exports.stop(max(deadline - time.monotonic(), 1.0))
        self._end_jobs()
        for point in self.vm.points.values():
            point.discard()
        clean = True
        for tracked in self.vm.disks.values():
            clean &= close_tracked(tracked, DRAIN_END, ignore_ctime=self.options.ignore_ctime)
        for target in self.vm.targets.values():
            target.abort()
        return clean

    def _end_jobs(self) -> None:
        deadline = time.monotonic() + JOBS_END
        jobs = self.vm.jobs.all()
        for job in jobs:
            with suppress(QmpError):
                job.cancel()
        for job in jobs:
            if not job.wait(max(deadline - time.monotonic(), 0)):
                log.error("job %s does not end", job.id)
