"""The transmission phase of one connection: the path of every request.

One thread receives into one buffer, takes as many requests from it as are there, and serves what does not wait for
the storage at once; replies are gathered and sent when no further request is in the buffer. What may take long
(a flush, a read that is not in the page cache, a write that must first save old content) goes to the connection's own
few workers, which answer for themselves. So one slow request holds up no fast one, and one bad client no other.
"""

from __future__ import annotations

import logging
import mmap
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence

from incbak.errors import NbdProtocolError
from incbak.nbd import protocol as p
from incbak.nbd.export import Device
from incbak.nbd.handshake import Agreed
from incbak.nbd.protocol import Dialect
from incbak.nbd.replies import Replies, Tag
from incbak.nbd.slots import Slot
from incbak.nbd.wire import bound_waits, poller

log = logging.getLogger(__name__)

BUFFER = 512 << 10
INLINE = 128 << 10
"""Replies to reads up to this size are gathered in the output buffer."""
SEND_TIMEOUT = 30
"""Seconds that a client may not read its replies before it is dropped."""
PAYLOAD_TIMEOUT = 300  # seconds that a client may send nothing within a payload; fewer where others want its slot
WORKERS = 4
IN_FLIGHT = 64
IN_FLIGHT_BYTES = 64 << 20
_NEARLY_FULL = BUFFER - 64
_STATUS_EXTENTS = 8192
_LONGEST_STATUS = 4096  # bytes of a payload that asks for the status of some contexts

Task = Callable[[], None]


class _Budget:
    """How much of a connection may be in flight with its workers; a single large request always may."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._bytes = 0

    def take(self, size: int) -> int:
        """Wait for room, and take it; how many are in flight now."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._count or (self._count < IN_FLIGHT and self._bytes + size <= IN_FLIGHT_BYTES)
            )
            self._count += 1
            self._bytes += size
            return self._count

    def give(self, size: int) -> None:
        """Give it back."""
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify()


class Connection:
    """One client in transmission; `run` returns when it is gone."""

    def __init__(
        self, sock: socket.socket, device: Device, agreed: Agreed, slot: Slot, relieve: Callable[[], None]
    ) -> None:
        """``relieve``: called when a large payload is about to come."""
        self.sock, self.device, self._slot, self._relieve = sock, device, slot, relieve
        slot.reader, slot.heard = device.read_only, time.monotonic()
        self.replies = Replies(agreed.dialect)
        self._data_head, self._pack_data_head = self.replies.data_head, self.replies.pack_data_head
        self._extended = agreed.dialect is Dialect.EXTENDED
        self.contexts, self._has_contexts = agreed.contexts, bool(agreed.contexts)
        self.size, self.read_only = device.size, device.read_only
        self._send_lock, self._budget = threading.Lock(), _Budget()
        self._rest: Callable[..., None] = getattr(device, "rest", lambda *_: None)
        self._waiting = poller(sock)
        self._out, self._out_len, self._dead = bytearray(BUFFER), 0, False
        self._out_view = memoryview(self._out)
        self._large: bytearray | mmap.mmap = bytearray(0)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        sock.settimeout(None)
        bound_waits(sock, SEND_TIMEOUT, socket.SO_SNDTIMEO)
        bound_waits(sock, PAYLOAD_TIMEOUT, socket.SO_RCVTIMEO)

    def run(self) -> None:
        """Serve until the client disconnects or breaks the protocol (`NbdProtocolError`)."""
        try:
            self._receive()
        except (ConnectionError, BlockingIOError):
            pass
        finally:
            self._finish()

    def _finish(self) -> None:
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.join()

    # -- receiving ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        view = memoryview(buf := bytearray(BUFFER))
        start = end = 0
        recv_into, extended = self.sock.recv_into, self._extended
        form, wanted = (p.EXT_REQUEST, p.EXT_REQUEST_MAGIC) if extended else (p.REQUEST, p.REQUEST_MAGIC)
        unpack, head, special = form.unpack_from, form.size, 0xFFFF ^ (p.CMD_PAYLOAD if extended else 0)
        device_write, may_block, size = self.device.write, self.device.may_block, self.size
        out, pack_into, pack_chunk_into = self._out, p.SIMPLE.pack_into, p.EXT_CHUNK.pack_into
        writable, slot, now = not self.read_only, self._slot, time.monotonic
        while not self._dead:
            if end - start < head:
                if self._out_len:
                    self._flush_out()
                if start:
                    view[: end - start] = bytes(view[start:end])
                    start, end = 0, end - start
                try:
                    got = recv_into(view[end:])
                except BlockingIOError:
                    continue  # between requests a client may be silent for ever
                if not got:
                    if end:
                        raise NbdProtocolError("the client went away within a request")
                    return
                end += got
                slot.heard = now()
                continue
            magic, flags, command, cookie, offset, length = unpack(buf, start)
            start += head
            if magic != wanted:
                raise NbdProtocolError("a request has a wrong magic number")
            if command == p.WRITE or (extended and flags & p.CMD_PAYLOAD):  # QEMU 10 writes without the flag
                if length > p.MAX_PAYLOAD:
                    raise NbdProtocolError(f"a payload of {length} bytes is over the advertised maximum")
                if end - start >= length:
                    payload = view[start : start + length]
                    start += length
                elif self._unwanted(command, flags, offset, length):
                    payload = self._skip(view, end - start, length)
                    start = end = 0
                else:
                    payload = self._payload(view[start:end], length)
                    start = end = 0
                if command != p.WRITE:
                    self._with_payload(command, flags, (cookie, offset), payload)
                elif (
                    not flags & special
                    and writable
                    and length
                    and offset + length <= size
                    and not may_block(offset, length)
                ):
                    try:
                        device_write(payload, offset)
                    except OSError as e:
                        self._answer((cookie, offset), p.wire_error(e.errno))
                        continue
                    at = self._out_len
                    if at > _NEARLY_FULL:
                        self._flush_out()
                        at = 0
                    if extended:
                        pack_chunk_into(out, at, p.EXT_CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_NONE, cookie, offset, 0)
                        self._out_len = at + 32
                    else:
                        pack_into(out, at, p.SIMPLE_MAGIC, 0, cookie)
                        self._out_len = at + 16
                else:
                    self._slow_write(flags, cookie, offset, length, payload)
            elif command == p.DISC:
                self._flush_out()
                return
            else:
                self._other(command, flags, cookie, offset, length)

    def _payload(self, have: memoryview, length: int) -> memoryview:
        """A payload that is not whole in the receive buffer, in a buffer of its own that grows to the largest."""
        if self._out_len:
            self._flush_out()
        self._relieve() if length > BUFFER else None
        if len(self._large) < length:
            self._large = mmap.mmap(-1, length)  # takes memory as bytes arrive, not when they are announced
        view = memoryview(self._large)[:length]
        done = len(have)
        view[:done] = have
        self._come(view, done, length)
        return view

    def _unwanted(self, command: int, flags: int, offset: int, length: int) -> bool:
        """Whether a payload that has not come yet cannot matter, whatever it is: it takes no memory then."""
        if command == p.WRITE:
            return self._refuse(command, flags, offset, length) != 0
        return length > _LONGEST_STATUS

    def _skip(self, scratch: memoryview, have: int, length: int) -> memoryview:
        """Take the rest of a payload off the wire, and forget it."""
        if self._out_len:
            self._flush_out()
        done = have
        while done < length:
            piece = min(length - done, len(scratch))
            self._come(scratch, 0, piece)
            done += piece
        return scratch[:0]

    def _come(self, view: memoryview, done: int, length: int) -> None:
        """Receive ``view[done:length]``; it has to go on."""
        slot = self._slot
        slot.half = max(done, 1)
        try:
            while done < length:
                got = self.sock.recv_into(view[done:length])
                if not got:
                    raise NbdProtocolError("the client went away within a payload")
                done += got
                if done < length:
                    slot.half, slot.heard = done, time.monotonic()
        finally:
            slot.half = 0

    # -- dispatch -------------------------------------------------------------------------------------------------

    def _slow_write(self, flags: int, cookie: int, offset: int, length: int, payload: memoryview) -> None:
        """A write that is refused (its payload may be gone), or has a flag, or may wait."""
        tag = cookie, offset
        if (error := self._refuse(p.WRITE, flags, offset, length)) or not length:
            self._answer(tag, error)
            return
        data = memoryview(bytes(payload))

        def task() -> None:
            self.device.write(data, offset)
            if flags & p.CMD_FUA:
                self.device.flush()

        self._work(tag, task, size=length)

    def _with_payload(self, command: int, flags: int, tag: Tag, payload: memoryview) -> None:
        """What is no write and has a payload all the same: a block status of some contexts, or refused."""
        if command == p.DISC:
            raise NbdProtocolError("the client's farewell has a payload")
        asked = p.status_payload(payload, [number for number, _name in self.contexts])
        length, wanted = asked or (0, [])
        if error := self._refuse(command, flags, tag[1], length):  # also where nothing can be asked
            self._answer(tag, error, command)
            return
        contexts = [context for context in self.contexts if context[0] in wanted]
        self._work(tag, lambda: self._status(tag, flags, length, contexts), command=p.STATUS, answers=True)

    def _refuse(self, command: int, flags: int, offset: int, length: int) -> int:
        return p.refuse(command, flags, offset, length, self.size, self.read_only, self._has_contexts, self._extended)

    def _other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        error = p.refuse(command, flags, offset, length, self.size, self.read_only, self._has_contexts, self._extended)
        if error:
            self._answer((cookie, offset), error, command)
        elif command == p.READ:
            self._read(cookie, offset, length)
        elif not length and command != p.FLUSH:
            self._answer((cookie, offset), 0)
        else:
            self._slow_other(command, flags, (cookie, offset), length)

    def _slow_other(self, command: int, flags: int, tag: Tag, length: int) -> None:
        if command == p.STATUS:
            contexts = self.contexts
            self._work(tag, lambda: self._status(tag, flags, length, contexts), command=command, answers=True)
        elif command == p.FLUSH:
            self._work(tag, self.device.flush)
        else:
            self._work(tag, lambda: self._change(command, flags, tag[1], length))

    def _change(self, command: int, flags: int, offset: int, length: int) -> None:
        if command == p.TRIM:
            self.device.trim(offset, length)
        elif command == p.CACHE:
            self.device.cache(offset, length)
        else:
            unmap, fast = not flags & p.CMD_NO_HOLE, bool(flags & p.CMD_FAST_ZERO)
            self.device.write_zeroes(offset, length, unmap=unmap, fast=fast)
        if flags & p.CMD_FUA:
            self.device.flush()

    def _read(self, cookie: int, offset: int, length: int) -> None:
        if not length:
            self._answer((cookie, offset), 0, p.READ)
            return
        if length <= INLINE:
            head = self._data_head
            if self._out_len + head + length > BUFFER:
                self._flush_out()
            at = self._out_len + head
            try:
                if self.device.read_nowait(self._out_view[at : at + length], offset):
                    self._pack_data_head(self._out, self._out_len, cookie, offset, length)
                    self._out_len = at + length
                    return
            except OSError as e:
                self._answer((cookie, offset), p.wire_error(e.errno), p.READ)
                return
        self._slow(cookie, offset, length)

    def _slow(self, cookie: int, offset: int, length: int) -> None:
        tag = cookie, offset
        self._work(tag, lambda: self._slow_read(tag, length), command=p.READ, size=length, answers=True)

    def _slow_read(self, tag: Tag, length: int) -> None:
        head = self._data_head
        buf = bytearray(head + length)
        self.device.read_into(memoryview(buf)[head:], tag[1])
        self._pack_data_head(buf, 0, *tag, length)
        self._send(buf)

    def _status(self, tag: Tag, flags: int, length: int, contexts: Sequence[tuple[int, str]]) -> None:
        replies, limit = [], 1 if flags & p.CMD_REQ_ONE else _STATUS_EXTENTS
        for number, context in contexts:
            extents = self.device.status(tag[1], length, context, limit)
            cut = [(min(size, length), state) for size, state in extents]
            replies.append(self.replies.status(tag, number, cut, last=number == contexts[-1][0]))
        self._send(b"".join(replies))

    # -- workers --------------------------------------------------------------------------------------------------

    def _work(self, tag: Tag, action: Task, *, command: int = p.WRITE, size: int = 0, answers: bool = False) -> None:
        """Let a worker do it, holding ``size`` bytes; it answers, unless the action ``answers`` itself."""
        if self._out_len:
            self._flush_out()
        in_flight = self._budget.take(size)

        def task() -> None:
            try:
                action()
                if not answers:
                    self._send(self.replies.done(tag, command))
            except (ConnectionError, BlockingIOError):
                self._drop()
            except OSError as e:
                self._send_error(tag, p.wire_error(e.errno), command)
            except Exception:
                log.exception("NBD connection ended by an error of our own")
                self._drop()
            finally:
                self._budget.give(size)

        if in_flight > len(self._workers) < WORKERS:
            worker = threading.Thread(target=self._worker, name="nbd-worker", daemon=True)
            self._workers.append(worker)
            worker.start()
        self._tasks.put(task)

    def _worker(self) -> None:
        while task := self._tasks.get():
            task()

    def _send_error(self, tag: Tag, error: int, command: int) -> None:
        try:
            self._send(self.replies.error(tag, error, command))
        except OSError:
            self._drop()

    def _drop(self) -> None:
        self._dead = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # -- replies --------------------------------------------------------------------------------------------------

    def _answer(self, tag: Tag, error: int, command: int = p.WRITE) -> None:
        """Add a reply to those that wait to be sent."""
        if self._out_len > _NEARLY_FULL:
            self._flush_out()
        reply = self.replies.error(tag, error, command) if error else self.replies.done(tag, command)
        self._out[self._out_len : self._out_len + len(reply)] = reply
        self._out_len += len(reply)

    def _flush_out(self) -> None:
        length, self._out_len = self._out_len, 0
        self._rest(self._waiting)
        with self._send_lock:
            self.sock.sendall(self._out_view[:length])

    def _send(self, data: bytes | bytearray) -> None:
        self._rest()
        with self._send_lock:
            self.sock.sendall(data)
