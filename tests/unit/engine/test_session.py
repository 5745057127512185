"""A session with a monitor that does what it likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from incbak.engine import qmp_client
from incbak.engine.session import Address, CommandFailed, EngineGone, Session
from incbak.errors import EngineError

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
RESET = {"event": "RESET", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}

Answer = Callable[[dict[str, Any]], list[object]]
"""From a request to what is sent: bytes as they are, anything else as JSON."""


def returned(request: dict[str, Any], value: object = None) -> dict[str, object]:
    return {"return": {} if value is None else value} | {k: v for k, v in request.items() if k == "id"}


@asynccontextmanager
async def monitor(path: Path, answer: Answer, greeting: object = GREETING) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(what: object) -> None:
            writer.write(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\r\n")

        send(greeting)
        buffer = ""
        with suppress(asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                buffer += data.decode()
                while buffer:
                    request, end = json.JSONDecoder().raw_decode(buffer)
                    buffer = buffer[end:].lstrip()
                    for what in [returned(request)] if request["execute"] == "qmp_capabilities" else answer(request):
                        send(what)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()


async def asked(path: Path, answer: Answer, greeting: object = GREETING) -> Any:
    """The answer to ``query-name``, or how the session failed."""
    async with monitor(path, answer, greeting):
        session = await Session.connect(Address(path=str(path)), timeout=5)
        try:
            return await session.execute("query-name", timeout=5)
        finally:
            await session.close()


def test_an_answer(tmp_path: Path) -> None:
    assert asyncio.run(asked(tmp_path / "q", lambda r: [returned(r, {"name": "vm", "more": 1})])) == {"name": "vm"}


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "message",
    [
        b'{"return": ' + DEEP + b"}\n",
        b"[]\n",
        b'"text"\n',
        b"\xff\xfe\n",
        b"{}}\n",
        b'{"return": 1' + b"0" * 5000 + b', "id": NaN}\n',
        b'{"return": {}, "id": ["a"]}\n',
        b'{"event": {"a": 1}}\n',
        b'{"event": "RESET", "data": 5}\n',
        b'{"error": 5}\n',
        b'{"return": "' + b"x" * (11 << 20) + b'"}\n',
        b'{"return": "' + b"x" * (25 << 20),
    ],
    ids=["deep", "list", "text", "not-utf-8", "two", "numbers", "id", "event", "data", "error", "long", "no-end"],
)
def test_what_is_no_message_ends_the_session(tmp_path: Path, message: bytes) -> None:
    with pytest.raises(EngineGone, match="the engine went away during query-name"):
        asyncio.run(asked(tmp_path / "q", lambda _: [message]))


@pytest.mark.parametrize("error", [5, {"class": 1, "desc": "x"}, {"desc": DEEP.decode()}])
def test_an_error_of_another_form(tmp_path: Path, error: object) -> None:
    with pytest.raises(EngineError):
        asyncio.run(asked(tmp_path / "q", lambda r: [{"error": error, "id": r["id"]}]))


def test_a_reason_is_not_as_long_as_the_engine_likes(tmp_path: Path) -> None:
    error = {"class": "GenericError", "desc": "x" * 1_000_000}
    with pytest.raises(CommandFailed, match="query-name: xxx") as caught:
        asyncio.run(asked(tmp_path / "q", lambda r: [{"error": error, "id": r["id"]}]))
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("greeting", [{}, [], {"QMP": 5}, {"QMP": {"version": 1, "capabilities": {}}}, b"{{{{\n"])
def test_a_greeting_of_another_form(tmp_path: Path, greeting: object) -> None:
    with pytest.raises(EngineError, match=r"^monitor "):
        asyncio.run(asked(tmp_path / "q", lambda r: [returned(r)], greeting))


def test_events_are_kept_up_to_a_bound(tmp_path: Path) -> None:
    """By nobody but who listens, and of them the newest; a guest can make as many as it likes."""
    many = 3 * qmp_client.MOST_EVENTS

    def answer(request: dict[str, Any]) -> list[object]:
        return [*({**RESET, "data": {"n": n}} for n in range(many)), returned(request)]

    async def flooded() -> None:
        async with monitor(tmp_path / "q", answer):
            session = await Session.connect(Address(path=str(tmp_path / "q")))
            heard, other = session.listen("RESET"), session.listen("SHUTDOWN")
            await session.execute("query-name")
            assert other.empty()
            assert not heard.history
            events = heard.clear()
            assert [e["data"] for e in events] == [{"n": n} for n in range(many - qmp_client.MOST_EVENTS, many)]
            assert session._client.events.empty()
            assert not session._client.events.history
            await session.close()

    asyncio.run(flooded())
