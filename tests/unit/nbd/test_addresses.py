"""Addresses and names that cannot be: a usage error, not a crash, from the command line as from the monitor."""

from __future__ import annotations

import socket

import pytest

from incbak.cli import serve
from incbak.errors import UsageError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri, parse_uri


@pytest.mark.parametrize(
    "uri",
    [
        NbdUri("disk", path="/run/a\0b"),
        NbdUri("disk", path="\ud800"),
        NbdUri("disk", host="a" * 64),
        NbdUri("disk", host="a..b"),
        NbdUri("disk", host="\ud800"),
        NbdUri("disk", host="127.0.0.1", port=99999),
    ],
)
def test_what_can_be_no_address(uri: NbdUri) -> None:
    with pytest.raises(UsageError, match="not an address"):
        NbdClient.connect(uri, timeout=5)


@pytest.mark.parametrize("name", ["\udcff"])
def test_a_name_that_is_no_text_is_not_sent(name: str) -> None:
    """Bytes of a command line that are not UTF-8 come as surrogates."""
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(UsageError, match="not the name of an export"):
        NbdClient.connect(ours, name, timeout=5)
    assert ours.fileno() == -1
    assert str(parse_uri(f"nbd://host/{name}")) == "nbd://host:10809/%3F"
    assert str(NbdUri("x", path=f"/{name}")) == "nbd+unix:///x?socket=/%3F"


@pytest.mark.parametrize("text", ["host:65536", "host:" + "9" * 5000, "host:", "host", ":-1"])
def test_what_is_no_address_to_listen_on(text: str) -> None:
    with pytest.raises(UsageError, match="not HOST:PORT"):
        (getattr(serve, "parse_tcp", None) or serve._address)(text)
