"""How QEMU connects to a target: once, also through a descriptor of the directory, and it can always be cut."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from incbak.engine.guard import Watch, cut_off
from incbak.engine.qemu_door import Door
from incbak.engine.qemu_guard import Guard
from tests.kit.serve import wait_until

WAIT = 10.0


def connect(path: str | Path) -> socket.socket:
    """As QEMU does."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.close()


def guarded(listener: socket.socket, silence: float) -> tuple[threading.Thread, socket.socket, socket.socket]:
    """A guard in a thread; the owner's end of its control, and the end where connections are handed on."""
    control, owner = socket.socketpair()
    monitor, _ = socket.socketpair()
    handover, handed = socket.socketpair()
    watch = Watch(control, monitor, None, handover, 60, 60, silence)
    watch.add_listener(0, listener)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    assert owner.recv(1) == b"g"
    return thread, owner, handed


def test_one_connection_is_let_in_and_no_second_one(door: Door) -> None:
    thread, owner, handed = guarded(door.give_listener(), 60)
    with closing(connect(f"/proc/self/fd/{door.directory}/{door.name}")) as first:
        _, (fd,), _, _ = socket.recv_fds(handed, 1, 1)
        with closing(socket.socket(fileno=fd)) as ours:
            ours.sendall(b"greeting")
            assert first.recv(8) == b"greeting"
        with pytest.raises(ConnectionRefusedError):
            connect(door.path)
        owner.sendall(b"q")
        thread.join(WAIT)
    with pytest.raises(ConnectionRefusedError):
        connect(door.path)


def test_the_way_leads_nowhere_when_the_number_is_another_directorys(door: Door) -> None:
    """Of the next run too: each has a name of its own."""
    way, fd = f"/proc/self/fd/{door.directory}/{door.name}", os.dup(door.directory)
    door.close()
    another = Door()
    try:
        os.dup2(another.directory, fd)
        for path in (way, f"/proc/self/fd/{fd}/{door.name}"):
            with pytest.raises((FileNotFoundError, NotADirectoryError, ConnectionRefusedError)):
                connect(path)
    finally:
        os.close(fd)
        another.close()


def test_only_the_owner_and_who_has_the_descriptor_get_in(door: Door) -> None:
    assert door.path.parent.parent.stat().st_mode & 0o777 == 0o700
    assert door.path.parent.stat().st_mode & 0o777 == 0o711
    assert door.path.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_an_owner_that_is_silent_or_gone_makes_nobody_wait(door: Door, how: str) -> None:
    """Neither QEMU, which waits for an answer, nor what would connect later."""
    thread, owner, handed = guarded(door.give_listener(), 0.2 if how == "silent" else 60)
    with closing(connect(door.path)) as peer:
        owner.shutdown(socket.SHUT_WR) if how == "gone" else None
        assert peer.recv(1) == b""
    wait_until(lambda: not thread.is_alive() or how == "silent", "the guard ends")
    with pytest.raises(ConnectionRefusedError):
        connect(door.path)
    owner.close()
    thread.join(WAIT)
    handed.close()


def test_a_listener_that_nobody_came_to_is_closed_too(door: Door) -> None:
    listener = door.give_listener()
    thread, owner, handed = guarded(listener, 0.1)
    wait_until(lambda: listener.fileno() < 0, "the guard has closed it")
    with pytest.raises(ConnectionRefusedError):
        connect(door.path)
    owner.sendall(b"q")
    thread.join(WAIT)
    handed.close()


def test_a_peer_that_waits_for_room_notices_the_cut() -> None:
    """QEMU waits for a socket that is writable, and for nothing else."""
    ours, peer = socket.socketpair()
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            peer.send(bytes(65536))
    assert select.select([], [peer], [], 0)[1] == []
    cut_off(ours)
    assert select.select([], [peer], [], WAIT)[1] == [peer]
    with pytest.raises(BrokenPipeError):
        peer.send(b"x")
    ours.close()
    peer.close()


def test_the_guard_process_lets_qemu_in_and_hands_the_connection_on() -> None:
    doors = [Door(), Door()]
    monitor, far = socket.socketpair()

    async def run() -> None:
        async with Guard(monitor, [d.give_listener() for d in doors]) as guard:
            for number, door in enumerate(doors):
                with closing(connect(door.path)) as peer, closing(await guard.accepted(number)) as ours:
                    peer.sendall(b"hello")
                    assert ours.recv(5) == b"hello"

    asyncio.run(asyncio.wait_for(run(), WAIT))
    far.close()
    for door in doors:
        door.close()
