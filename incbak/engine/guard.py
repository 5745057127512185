"""A process of its own that undoes what a dead incbak would leave behind. Run as a script; imports nothing of incbak.

``guard.py watch CONTROL MONITOR AGENT HANDOVER WINDOW FREEZE SILENCE LISTENER...`` (descriptors, AGENT -1 for none, and
seconds) accepts one connection of QEMU on each LISTENER and hands it on over HANDOVER, with the listener's number as a
byte. It reads single bytes from CONTROL:

- ``h``: the owner is alive. After SILENCE seconds without any byte, or at the end of file, the connections are cut and
  the listeners closed, so that no drain in QEMU waits for them.
- ``s``: the VM is about to be stopped. At the end of file, or WINDOW seconds later, ``cont`` goes to MONITOR; at the
  end of file only if the VM is ``paused`` then, since any other state is not the owner's stop. QEMU may be busy with
  ``stop`` for long (it flushes the disks), and drops the commands of a monitor that is closed: so after the end of file
  it is asked again and again until an answer says that the VM is not stopped by the owner any more.
- ``c``: it runs again. The answer is ``c``; or ``r`` if the guard has resumed it, so that there is no point in time.
- ``f``: the guest's file systems are about to be frozen. At the end of file, or FREEZE seconds later, AGENT thaws them.
- ``t``: they are thawed. The answer is ``t``; or ``r`` if the guard has done it.
- ``q``: the end.

``guard.py child CONTROL COMMAND...`` runs a command that must not outlive its owner: at the end of file it gets
SIGTERM, and after `_PATIENCE` SIGKILL.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

_CONT = b'{"execute": "cont", "id": "incbak-guard-cont"}\n'
_STATUS = b'{"execute": "query-status", "id": "incbak-guard"}\n'
_THAW = b'{"execute": "guest-fsfreeze-thaw"}\n'
_RESET = b"\xff"  # ends a message that was cut off
_ANSWER_SECONDS = 5.0
_ORPHAN_SECONDS = 600.0  # for which QEMU's answer is awaited when the owner is gone
_LEAVE_SECONDS = 1.0
_LONGEST_ANSWER = 4096
_PATIENCE = 60.0
_MOST_READS = 4096
_NEVER = float("inf")


class Watch:
    """The state of ``watch``."""

    def __init__(
        self,
        control: socket.socket,
        monitor: socket.socket,
        agent: socket.socket | None,
        handover: socket.socket | None,
        window: float,
        freeze: float,
        silence: float,
    ) -> None:
        self._control, self._monitor, self._agent = control, monitor, agent
        self._window, self._freeze, self._silence = window, freeze, silence
        self._handover = handover
        self._listeners: dict[int, tuple[int, socket.socket]] = {}
        self._sinks: list[socket.socket] = []
        self._resume_at = self._thaw_at = _NEVER
        self._cut_at = time.monotonic() + silence
        self._resumed = self._thawed = False

    def add_listener(self, number: int, sock: socket.socket) -> None:
        """A socket on which one connection is accepted, which is cut when the owner is gone."""
        self._listeners[sock.fileno()] = number, sock

    def _accept(self, number: int, listener: socket.socket) -> None:
        del self._listeners[listener.fileno()]
        with suppress(OSError):
            with listener:
                connection, _ = listener.accept()
            self._sinks.append(connection)
            if self._handover:
                socket.send_fds(self._handover, [bytes([number])], [connection.fileno()])

    def run(self) -> None:
        """Until the owner says ``q`` or is gone."""
        self._control.sendall(b"g")
        while True:
            wait = min(self._resume_at, self._thaw_at, self._cut_at) - time.monotonic()
            awaited = [self._control.fileno(), *self._listeners]
            ready = _ready(awaited, wait)
            now = time.monotonic()
            if now >= self._resume_at:
                self._resume(orphan=False)
            if now >= self._thaw_at:
                self._thaw()
            if not ready:
                if now >= self._cut_at:
                    self._cut()
                continue
            for fd in ready:
                if fd in self._listeners:
                    self._accept(*self._listeners[fd])
            if self._control.fileno() in ready and not all(self._take(bytes([byte])) for byte in self._receive()):
                return

    def _receive(self) -> bytes:
        try:
            return self._control.recv(64) or b"x"
        except OSError:
            return b"x"

    def _take(self, byte: bytes) -> bool:
        self._cut_at = time.monotonic() + self._silence
        if byte == b"s":
            self._resume_at = time.monotonic() + self._window
        elif byte == b"c":
            self._resume_at = _NEVER
            with suppress(OSError):
                self._control.sendall(b"r" if self._resumed else b"c")
            self._resumed = False
        elif byte == b"f":
            self._thaw_at = time.monotonic() + self._freeze
        elif byte == b"t":
            self._thaw_at = _NEVER
            with suppress(OSError):
                self._control.sendall(b"r" if self._thawed else b"t")
            self._thawed = False
        elif byte in b"xq":
            self._end(orphan=byte == b"x")
            return False
        return True

    def _end(self, orphan: bool) -> None:
        if orphan:
            self._cut()  # first: what QEMU is busy with may wait for a target
        if self._thaw_at != _NEVER:
            self._thaw()
        if self._resume_at != _NEVER or (orphan and self._resumed):
            self._resume(orphan)

    def _resume(self, orphan: bool) -> None:
        self._resume_at, self._resumed = _NEVER, True
        with suppress(OSError):
            if orphan:
                self._resume_surely()
            else:  # the answers are the owner's, who has the monitor yet
                self._monitor.sendall(_CONT)

    def _resume_surely(self) -> None:
        """Give ``cont`` to a VM that the owner has stopped. Its connection may be open yet, and take answers away."""
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while time.monotonic() < deadline:
            self._monitor.settimeout(_ANSWER_SECONDS)
            self._monitor.sendall(_RESET + _STATUS)
            status = self._wait_answer(b'"incbak-guard"')
            if status and b'"paused"' not in status:
                return
            if status:
                self._monitor.sendall(_CONT)
                if self._wait_answer(b'"incbak-guard-cont"'):
                    return
        self._monitor.sendall(_CONT)

    def _thaw(self) -> None:
        """The agent takes one command after the other, so this is also right while it freezes."""
        self._thaw_at, self._thawed = _NEVER, True
        if self._agent:
            with suppress(OSError):
                self._agent.settimeout(_ANSWER_SECONDS)
                self._agent.sendall(_RESET + _THAW)
                time.sleep(_LEAVE_SECONDS)  # an agent may drop what comes from a peer that is gone again

    def _wait_answer(self, ident: bytes) -> bytes:
        """Return the line that answers the command ``ident``; nothing if there was none in time.

        Raises `OSError` when QEMU is gone.
        """
        seen, deadline = b"", time.monotonic() + _ANSWER_SECONDS
        with suppress(TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                self._monitor.settimeout(left)
                if not (data := self._monitor.recv(1 << 16)):
                    raise ConnectionResetError
                *lines, seen = (seen + data).split(b"\n")
                seen = seen[-_LONGEST_ANSWER:]
                if found := [line for line in lines if ident in line]:
                    return found[0]
        return b""

    def _cut(self) -> None:
        self._cut_at = _NEVER
        for _, listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        for sock in self._sinks:
            cut_off(sock)


def _ready(awaited: list[int], seconds: float) -> list[int]:
    """Return those of these descriptors that have something to read, or an end, within a time.

    By poll(2): the numbers of descriptors may be larger than select(2) takes.
    """
    poll = select.poll()
    for fd in awaited:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if seconds == _NEVER else max(int(seconds * 1000) + 1, 0))]


def cut_off(sock: socket.socket) -> None:
    """End a Unix connection so that its peer notices even while it waits for room to send.

    A peer in that wait is not woken by the shutdown (on Linux the socket does not poll as writable then, and QEMU does
    not look for a hang-up), but by the room that reading makes; and then its request fails.
    """
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        for _ in range(_MOST_READS):
            if not sock.recv(1 << 16, socket.MSG_DONTWAIT):
                return


def _watch(arguments: list[str]) -> int:
    control, monitor, agent, handover, window, freeze, silence, *listeners = arguments
    sockets = [socket.socket(fileno=int(fd)) for fd in (control, monitor, handover)]
    to_agent = socket.socket(fileno=int(agent)) if int(agent) >= 0 else None
    watch = Watch(sockets[0], sockets[1], to_agent, sockets[2], float(window), float(freeze), float(silence))
    for number, fd in enumerate(listeners):
        watch.add_listener(number, socket.socket(fileno=int(fd)))
    watch.run()
    return 0


def _child(arguments: list[str]) -> int:
    control, *command = arguments
    end = int(control)
    os.set_inheritable(end, False)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    exited = os.pidfd_open(process.pid)
    while True:
        ready = _ready([end, exited], _NEVER)
        if exited in ready:
            return process.wait()
        if not os.read(end, 64):
            break
    process.terminate()
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    """See the module's docstring."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, lambda *_: None)  # a handler, unlike SIG_IGN, does not pass on to a child
    modes = {"watch": _watch, "child": _child}
    return modes[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
