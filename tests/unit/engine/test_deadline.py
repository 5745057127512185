"""A peer is not blamed for time in which this process did not run."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from incbak.engine.deadline import deadline

STOPPED = 0.6  # seconds for which the loop does not run, as if by SIGSTOP


async def asked(stopped: Callable[[socket.socket], Awaitable[None]], seconds: float) -> tuple[bytes, float]:
    """What a peer's line is within the deadline, and how long that took."""
    ours, peer = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    began = time.monotonic()
    try:
        async with deadline(seconds):
            waiting = asyncio.create_task(stopped(peer))
            line = await reader.readline()
            await waiting
        return line, time.monotonic() - began
    finally:
        peer.close()
        writer.close()


def test_what_came_while_the_loop_did_not_run_is_an_answer() -> None:
    async def stopped(peer: socket.socket) -> None:
        time.sleep(STOPPED)
        peer.sendall(b"answer\n")

    assert asyncio.run(asked(stopped, 0.2))[0] == b"answer\n"


def test_after_a_stop_the_peer_has_the_time_anew() -> None:
    async def stopped(peer: socket.socket) -> None:
        time.sleep(STOPPED)
        await asyncio.sleep(0.2)
        peer.sendall(b"answer\n")

    assert asyncio.run(asked(stopped, 0.3))[0] == b"answer\n"


def test_a_silent_peer_is_given_up() -> None:
    async def stopped(_: socket.socket) -> None:
        pass

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(asked(stopped, 0.2))
    assert 0.2 <= time.monotonic() - began < 5


def test_a_silent_peer_is_given_up_however_often_the_loop_is_stopped() -> None:
    async def stopped(peer: socket.socket) -> None:
        for _ in range(20):
            time.sleep(STOPPED)
            await asyncio.sleep(0)
        peer.sendall(b"answer\n")

    with pytest.raises(TimeoutError):
        asyncio.run(asked(stopped, 0.2))


def test_a_cancellation_from_outside_stays_one() -> None:
    async def main() -> None:
        async def wait() -> None:
            async with deadline(60):
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
