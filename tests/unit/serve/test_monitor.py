"""The monitor: QMP as QEMU speaks it, whatever a client sends; compared with a real QEMU where one is there."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.serve.stream import MAX_BYTES, MAX_DEPTH, Splitter, StreamError
from tests.kit.need import need
from tests.kit.serve import Serve, raw_image, serving, wait_until

SIZE = 1 << 20


class Raw:
    """A monitor connection byte by byte."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self._rest = b""
        self.greeting = self.next()

    def send(self, data: bytes | dict[str, object]) -> None:
        self.sock.sendall(data if isinstance(data, bytes) else json.dumps(data).encode())

    def next(self) -> dict[str, Any]:
        """The next message."""
        while b"\n" not in self._rest:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ask(self, command: str, arguments: object = None) -> dict[str, Any]:
        """The answer to a command; events are passed over."""
        self.send({"execute": command} | ({} if arguments is None else {"arguments": arguments}))
        while "event" in (answer := self.next()):
            pass
        return answer

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    directory = tmp_path_factory.mktemp("monitor")
    with serving(directory, {"vda": raw_image(directory / "a.raw", SIZE)}) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture
def raw(serve: Serve) -> Iterator[Raw]:
    made = Raw(serve.monitor)
    yield made
    made.close()


@pytest.fixture
def ready(raw: Raw) -> Raw:
    assert raw.ask("qmp_capabilities") == {"return": {}}
    return raw


def _error(answer: dict[str, Any]) -> tuple[str, str]:
    return answer["error"]["class"], answer["error"]["desc"]


def test_greeting_and_capabilities(raw: Raw) -> None:
    assert raw.greeting["QMP"]["capabilities"] == []
    assert raw.greeting["QMP"]["version"]["package"].startswith("incbak")
    assert _error(raw.ask("query-block")) == (
        "CommandNotFound",
        "Expecting capabilities negotiation with 'qmp_capabilities'",
    )
    assert _error(raw.ask("qmp_capabilities", {"enable": ["oob"]}))[0] == "GenericError"
    assert raw.ask("qmp_capabilities") == {"return": {}}
    assert _error(raw.ask("qmp_capabilities"))[0] == "CommandNotFound"
    assert raw.ask("query-name") == {"return": {"name": "vm"}}


def test_ids_come_back_also_with_errors(ready: Raw) -> None:
    for identity in (7, "x", None, {"a": [1]}):
        ready.send({"execute": "query-name", "id": identity})
        assert ready.next() == {"return": {"name": "vm"}, "id": identity}
        ready.send({"execute": "nope", "id": identity})
        assert ready.next()["id"] == identity


def test_no_newline_is_needed_and_many_commands_may_come_at_once(ready: Raw) -> None:
    ready.send(b'{"execute":"query-name"}{"execute":"query-status"}   {"execute":')
    assert ready.next() == {"return": {"name": "vm"}}
    assert ready.next()["return"]["running"] is True
    ready.send(b'"query-name"}')
    assert ready.next() == {"return": {"name": "vm"}}


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"]}\n",
        b'{"execute": query-name}\n',
        b'{"execute": "\xff\xfe"}\n',
        b"{" * (MAX_DEPTH + 2),
        b'{"a":' + b"[" * (MAX_DEPTH + 2),
        b'{"execute": 1}',
        b'{"execute": "query-name", "arguments": []}',
        b'{"execute": "query-name", "extra": 1}',
        b"{}",
        b'{"id": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda g: repr(g[:24]),
)
def test_garbage_is_answered_with_an_error_and_the_client_goes_on(ready: Raw, garbage: bytes) -> None:
    """faults row 73."""
    ready.send(garbage)
    assert _error(ready.next())[0] == "GenericError"
    time.sleep(0.05)
    ready.send({"execute": "query-name", "id": "after"})
    while (answer := ready.next()).get("id") != "after":
        assert "error" in answer
    assert answer["return"] == {"name": "vm"}


def test_a_message_without_end_is_bounded(ready: Raw) -> None:
    """faults row 73: the memory for one client is bounded, and the others do not notice."""
    ready.send(b'{"execute": "' + b"x" * (2 * MAX_BYTES))
    assert "longer than" in _error(ready.next())[1]


def test_two_clients_and_one_that_leaves_in_the_middle(serve: Serve, ready: Raw) -> None:
    other = Raw(serve.monitor)
    other.send(b'{"execute": "qmp_capa')
    third = Raw(serve.monitor)
    third.close()
    assert ready.ask("query-name") == {"return": {"name": "vm"}}
    other.send(b'bilities"}')
    assert other.next() == {"return": {}}
    assert ready.ask("block-dirty-bitmap-add", {"node": "vda", "name": "two"}) == {"return": {}}
    assert _error(other.ask("block-dirty-bitmap-add", {"node": "vda", "name": "two"})) == (
        "GenericError",
        "Bitmap already exists: two",
    )
    other.close()
    assert ready.ask("block-dirty-bitmap-remove", {"node": "vda", "name": "two"}) == {"return": {}}


def test_a_client_that_does_not_read_holds_nobody_up(serve: Serve, ready: Raw) -> None:
    """faults row 68."""
    lazy = Raw(serve.monitor)
    lazy.send({"execute": "qmp_capabilities"})
    lazy.sock.setblocking(False)
    ask = b'{"execute":"query-named-block-nodes"}' * 200
    for _ in range(200):
        try:
            lazy.sock.send(ask)
        except BlockingIOError:
            break
        except (BrokenPipeError, ConnectionResetError):
            break
    assert ready.ask("query-name") == {"return": {"name": "vm"}}
    lazy.close()


def test_unknown_things_are_named(ready: Raw) -> None:
    assert _error(ready.ask("nonsense")) == ("CommandNotFound", "The command nonsense has not been found")
    assert _error(ready.ask("query-name", {"bogus": 1})) == ("GenericError", "Parameter 'bogus' is unexpected")
    actions = [{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "x", "what": 1}}]
    assert _error(ready.ask("transaction", {"actions": actions})) == (
        "GenericError",
        "Parameter 'actions[0].data.what' is unexpected",
    )


def test_events_come_to_every_client_that_has_negotiated(serve: Serve, ready: Raw, tmp_path: Path) -> None:
    silent = Raw(serve.monitor)
    actions = [
        {"type": "blockdev-backup", "data": {"device": "vda", "target": "none", "sync": "full"}},
    ]
    assert "error" in ready.ask("transaction", {"actions": actions})
    silent.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        silent.next()
    silent.close()


# -- beside a real QEMU --------------------------------------------------------------------------------------------

SAME: list[tuple[str, object]] = [
    ("nonsense", None),
    ("query-name", {"bogus": 1}),
    ("qmp_capabilities", None),
    ("block-dirty-bitmap-add", {"node": "nowhere", "name": "b"}),
    ("block-dirty-bitmap-add", {"node": "vda"}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": 5}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": ""}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "g", "granularity": 1000}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "g", "granularity": 256}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "g", "granularity": -1}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "g", "persistent": "yes"}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "dup"}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "dup"}),
    ("block-dirty-bitmap-add", {"node": "vda", "name": "n" * 1024}),
    ("block-dirty-bitmap-remove", {"node": "vda", "name": "nope"}),
    ("block-dirty-bitmap-clear", {"node": "nowhere", "name": "nope"}),
    ("block-dirty-bitmap-merge", {"node": "vda", "target": "dup", "bitmaps": ["nope"]}),
    ("block-dirty-bitmap-merge", {"node": "vda", "target": "dup", "bitmaps": "nope"}),
    ("blockdev-backup", {"device": "nowhere", "target": "t", "sync": "full", "job-id": "j"}),
    ("blockdev-backup", {"device": "vda", "target": "nowhere", "sync": "full", "job-id": "j"}),
    ("blockdev-backup", {"device": "vda", "target": "nowhere", "sync": "sideways", "job-id": "j"}),
    ("blockdev-backup", {"device": "vda", "sync": "full"}),
    ("blockdev-del", {"node-name": "nowhere"}),
    ("block-job-cancel", {"device": "nowhere"}),
    ("job-cancel", {"id": "nowhere"}),
    ("job-dismiss", {"id": "nowhere"}),
    ("transaction", {"actions": [{"type": "abort", "data": {}}]}),
    ("transaction", {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "a"}}, 5]}),
    ("transaction", {"actions": [{"type": "fly", "data": {}}]}),
    ("transaction", {"actions": {}}),
    ("transaction", {"actions": []}),
]


def test_errors_are_those_of_qemu(ready: Raw, tmp_path: Path) -> None:
    """The same commands to `incbak serve` and to qemu-system: the same classes and the same texts."""
    need("qemu-system-x86_64")
    path = tmp_path / "qemu.sock"
    command = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-machine", "none"]
    command += ["-qmp", f"unix:{path},server=on,wait=off"]
    command += ["-blockdev", f"driver=null-co,node-name=vda,size={SIZE}"]
    with subprocess.Popen(command) as process:
        try:
            wait_until(path.exists, "QEMU's monitor")
            qemu = Raw(path)
            assert qemu.ask("qmp_capabilities") == {"return": {}}
            theirs, ours = {}, {}
            for command_name, arguments in SAME:
                key = f"{command_name} {json.dumps(arguments)[:90]}"
                theirs[key], ours[key] = (m.ask(command_name, arguments) for m in (qemu, ready))
            qemu.close()
        finally:
            process.kill()
    assert ours == theirs
    ready.ask("block-dirty-bitmap-remove", {"node": "vda", "name": "dup"})


@pytest.mark.parametrize(
    "server",
    [
        {"type": "inet", "host": "127.0.0.1", "port": "9" * 5000},
        {"type": "inet", "host": "127.0.0.1", "port": "65536"},
        {"type": "inet", "host": "127.0.0.1", "port": "-1"},
        {"type": "inet", "host": "a..b", "port": "1"},
        {"type": "inet", "host": "\ud800", "port": "1"},
        {"type": "unix", "path": "/run/a\0b"},
        {"type": "unix", "path": "\ud800"},
    ],
)
@pytest.mark.parametrize("export", ["x", "\ud800"])
def test_a_server_that_can_be_none_is_refused(ready: Raw, server: dict[str, str], export: str) -> None:
    """No error of our own, and the monitor goes on."""
    answer = ready.ask("blockdev-add", {"driver": "nbd", "node-name": "t", "server": server, "export": export})
    cls, text = _error(answer)
    assert cls == "GenericError"
    assert "internal error" not in text
    assert ready.ask("query-status")["return"]


# -- the splitter --------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=6), _JSON, max_size=4), max_size=5), st.data())
def test_any_cut_of_the_stream_gives_the_same_objects(messages: list[dict[str, object]], data: st.DataObject) -> None:
    stream = b" \n".join(json.dumps(m, ensure_ascii=False).encode("utf-8", "surrogatepass") for m in messages)
    splitter, found, at = Splitter(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream)))
        splitter.feed(stream[at : at + size])
        at += size
        while (one := splitter.take()) is not None:
            found.append(one)
    assert found == [json.dumps(m, ensure_ascii=False).encode("utf-8", "surrogatepass") for m in messages]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_garbage_raises_stream_errors_only(pieces: list[bytes]) -> None:
    splitter = Splitter()
    for piece in pieces:
        splitter.feed(piece)
        for _ in range(60):
            try:
                if splitter.take() is None:
                    break
            except StreamError:
                pass
        else:
            pytest.fail("the splitter does not come to an end")
