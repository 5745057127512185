"""What a guest agent sends is at most a reason why the guest was not frozen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from incbak.engine import agent
from incbak.engine.agent import Agent
from incbak.errors import EngineError

Answer = Callable[[dict[str, Any]], bytes]
DEEP = b"[" * 30_000 + b"]" * 30_000


def honest(request: dict[str, Any]) -> bytes:
    if request["execute"] == "guest-sync":
        return json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
    return b'{"return": 2}\n'


@asynccontextmanager
async def agent_at(path: Path, answer: Answer) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            while line := (await reader.readline()).strip(b"\xff\r\n"):
                writer.write(answer(json.loads(line)))
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()


async def frozen(path: Path, answer: Answer) -> int:
    async with agent_at(path, answer):
        found = await Agent.connect(path)
        try:
            return await found.freeze()
        finally:
            await found.close()


def freezing(answer: bytes) -> Answer:
    return lambda request: answer if request["execute"] == "guest-fsfreeze-freeze" else honest(request)


def test_a_guest_that_freezes(tmp_path: Path) -> None:
    assert asyncio.run(frozen(tmp_path / "a", honest)) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b'{"return": "many"}\n',
        b'{"return": [1]}\n',
        b'{"return": -1}\n',
        b'{"return": true}\n',
        b'{"return": 1' + b"0" * 5000 + b"}\n",
        b'{"return": ' + DEEP + b"}\n",
        b'{"error": "no"}\n',
        b'{"error": {"desc": 5}}\n',
        b'{"error": {"class": "GenericError", "desc": "' + b"x" * 60_000 + b'"}}\n',
        b"{}\n",
        b"[]\n",
        b"5\n",
        b"\xfe\xfe\n",
        b"x" * 300_000 + b"\n",
        b"\n" * 100_000,
        b"",
    ],
)
def test_any_answer_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(agent, "FREEZE_SECONDS", 0.1)
    with pytest.raises(EngineError, match="guest-fsfreeze-freeze") as caught:
        asyncio.run(frozen(tmp_path / "a", freezing(answer)))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "before",
    [
        b'{"return": 7}\n',
        b'{"return": {"a": 1}}\n{"error": {"desc": "busy"}}\n',
        b'{"return": "cut o\n',
        b'{"return": "cut \xff',
        DEEP + b"\n\xff",
    ],
)
def test_what_is_not_ours_is_skipped(tmp_path: Path, before: bytes) -> None:
    assert asyncio.run(frozen(tmp_path / "a", lambda r: (before if "sync" in r["execute"] else b"") + honest(r))) == 2


@pytest.mark.parametrize("answer", [b"5\n" * 5000, b"\n" * 5000, b"", b"x" * 300_000, b'{"return": 1}\n', DEEP + b"\n"])
def test_one_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.2)
    with pytest.raises(EngineError, match="guest-sync"):
        asyncio.run(frozen(tmp_path / "a", lambda _: answer))


def test_one_that_lies_has_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="guest-fsfreeze-freeze: the guest agent's answer cannot be read"):
        asyncio.run(frozen(tmp_path / "a", freezing(b'{"return": [1]}\n')))


def test_one_that_goes_away(tmp_path: Path) -> None:
    async def gone() -> None:
        server = await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "a")
        async with server:
            await Agent.connect(tmp_path / "a")

    with pytest.raises(EngineError, match=r"went away|reset|Broken pipe"):
        asyncio.run(gone())
