"""A monitor that is busy in every way there is, and sockets that are none."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak.engine.detect import Source, open_engine
from incbak.engine.dial import connect_unix, is_agent_socket
from incbak.engine.session import Address, EngineSilent, Session
from incbak.errors import UsageError

WAIT = 10.0


@pytest.fixture
def full(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener whose backlog has no room."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        first.connect(str(tmp_path / "qmp"))
        yield listener


def test_a_full_backlog_is_waited_for(full: socket.socket, tmp_path: Path) -> None:
    got: list[socket.socket] = []
    thread = threading.Thread(target=lambda: got.append(connect_unix(str(tmp_path / "qmp"), WAIT)))
    thread.start()
    for _ in range(2):
        full.accept()[0].close()
    thread.join(WAIT)
    assert len(got) == 1
    got[0].close()


def test_a_backlog_that_stays_full_is_a_busy_monitor(full: socket.socket, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(EngineSilent, match="is busy"):
        asyncio.run(Session.connect(Address(path=str(tmp_path / "qmp")), timeout=0.3))
    assert 0.25 < time.monotonic() - begun < WAIT


@pytest.mark.parametrize(
    ("chardev", "user", "agent"),
    [
        ("socket,path=SOCK,server=on,id=c", "virtserialport,chardev=c,name=AGENT.0", True),
        ("socket,id=c,path=SOCK", '{"driver":"virtserialport","chardev":"c","name":"AGENT.0"}', True),
        ("socket,id=c,path=SOCK", "virtserialport,chardev=d,name=AGENT.0", False),
        ("socket,id=c,path=SOCKET", "virtserialport,chardev=c,name=AGENT.0", False),
    ],
)
def test_the_agents_socket_is_known_by_the_command_line(tmp_path: Path, chardev: str, user: str, agent: bool) -> None:
    path = str(tmp_path / "s")
    words = ["-chardev", chardev.replace("SOCK", path), "-device", user.replace("AGENT", "org.qemu.guest_agent")]
    command = [sys.executable, "-c", "print(flush=True); input()", *words, "-mon", "chardev=c,mode=control"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert is_agent_socket(path, process.pid) == agent
        process.communicate(b"\n")


def test_the_agents_socket_is_known_by_its_name_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "org.qemu.guest_agent.0"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with pytest.raises(UsageError, match="is the socket of the guest agent"):
            asyncio.run(Session.connect(Address(path=str(path)), timeout=WAIT))


def test_a_socket_given_as_an_image_is_answered_with_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "web1.qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with pytest.raises(UsageError, match="is a socket") as refused:
            asyncio.run(open_engine(Source(str(path), tmp_path)))
    assert f"qmp:{path}" in refused.value.hint
