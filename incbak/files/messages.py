"""What `library` and `worker` say to each other: a length of four bytes and a message in MessagePack.

One request at a time. The answer is any number of the messages that fit it, and `Done` or `Failed` in the end; in
between comes `Need`, which is answered with a frame of a byte (0: here it is, 1: it cannot be read) and the content.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
LARGEST = 17 << 20
"""No frame is longer."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Any of these."""


class Volumes(Message, frozen=True):
    """Asks what is on the disk."""


class Mount(Message, frozen=True):
    """Asks to read the file system ``system`` that begins at byte ``start``; `Done` has its root."""

    start: int
    system: str


class List(Message, frozen=True):
    """Asks for the entries of a directory."""

    inode: int


class Fetch(Message, frozen=True):
    """Asks for the first ``size`` bytes of a file; what is zero is not sent."""

    inode: int
    size: int


class Need(Message, frozen=True):
    """The worker needs these bytes of the disk."""

    offset: int
    length: int


class Volume(Message, frozen=True):
    """A partition, or the whole disk as number 0; in bytes. The rest as in `systems.System`."""

    number: int
    start: int
    length: int
    system: str
    readable: bool
    note: str


class Node(Message, frozen=True):
    """An entry of a directory. ``mtime`` in nanoseconds; ``target`` of a symlink."""

    name: bytes
    inode: int
    kind: str
    mode: int
    size: int
    mtime: int
    target: bytes


class Piece(Message, frozen=True):
    """Content of a file."""

    offset: int
    data: bytes


class Done(Message, frozen=True):
    """That was all."""

    root: int = 0


class Failed(Message, frozen=True):
    """It cannot be read, because of ``why``."""

    why: str


Request = Volumes | Mount | List | Fetch
Reply = Need | Volume | Node | Piece | Done | Failed


def send(sock: socket.socket, payload: bytes) -> None:
    """One frame."""
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


def receive(sock: socket.socket) -> bytes:
    """One frame. Raises `EOFError` when the other side is gone, `ValueError` for a frame that is too long."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if length > LARGEST:
        raise ValueError(f"a message of {length} bytes")
    return bytes(_exactly(sock, length))


def _exactly(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of messages of ``kind``, strictly."""
    return msgspec.msgpack.Decoder(kind)
