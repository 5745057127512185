# mypy: ignore-errors
"""What runs inside the guest: takes commands as JSON lines on a virtio port, answers and reports on it.

Writers are threads. Each record is written and synced, then reported as ``{"ack": WRITER, "n": N}``. A failed write is
reported as ``{"failed": WRITER, ...}`` and ends the writer.
"""

import fcntl
import json
import mmap
import os
import struct
import sys
import threading
import time
import zlib

import records

BLKDISCARD, BLKZEROOUT, BLKGETSIZE64, FIFREEZE, FITHAW = 0x1277, 0x127F, 0x80081272, 0xC0045877, 0xC0045878


def _read(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return b""


def devices():
    """Serial number -> device path, for virtio, NVMe, SCSI and IDE disks."""
    found = {}
    for name in os.listdir("/sys/block"):
        top = f"/sys/block/{name}"
        serial = _read(f"{top}/serial") or _read(f"{top}/device/serial") or _read(f"{top}/device/vpd_pg80")[4:]
        if serial.strip():
            found[serial.strip(b" \n\0").decode()] = f"/dev/{name}"
    return found


_paths = {}


def path_of(serial):
    """The device with this serial number, remembered: a look through sysfs takes long without KVM."""
    if not os.path.exists(_paths.get(serial, "")):
        _paths.clear()
        _paths.update(devices())
    return _paths[serial]


class Port:
    def __init__(self):
        deadline = time.monotonic() + 30
        while not (names := [n for n in os.listdir("/dev") if n.startswith("vport")]):
            if time.monotonic() > deadline:
                raise SystemExit("no virtio port")
            time.sleep(0.01)
        self.fd = os.open(f"/dev/{names[0]}", os.O_RDWR)
        self.lock = threading.Lock()

    def say(self, **message):
        data = json.dumps(message).encode() + b"\n"
        with self.lock:
            while data:
                data = data[os.write(self.fd, data) :]

    def lines(self):
        rest = b""
        while True:
            data = os.read(self.fd, 65536)
            if not data:
                time.sleep(0.02)  # nobody is connected on the other side
                continue
            *whole, rest = (rest + data).split(b"\n")
            yield from whole


class Writer(threading.Thread):
    def __init__(self, port, name, stream, slots, targets, pause=0.0, first=0, burst=0):
        super().__init__(daemon=True)
        self.port, self.label, self.stream, self.slots, self.pause = port, name, stream, slots, pause
        self.targets, self.n, self.burst = targets, first, burst
        self.begun = None  # when the write in flight began
        self.times = []
        self.failed = None
        self.ending = False

    def run(self):
        block = mmap.mmap(-1, records.SIZE)
        files = []
        try:
            for t in self.targets:
                direct = 0 if "file" in t else os.O_DIRECT
                path = t.get("file") or path_of(t["disk"])
                files.append((os.open(path, os.O_RDWR | os.O_CREAT | direct), t.get("base", 0), t.get("spacing", 4096)))
            while not self.ending:
                self._one(files, block)
                if self.pause:
                    time.sleep(self.pause)
        except OSError as e:
            self.failed = f"record {self.n}: {e}"
            self.port.say(failed=self.label, n=self.n, error=str(e))
        finally:
            for fd, _, _ in files:
                os.close(fd)

    def _one(self, files, block):
        target, slot = records.place(self.n, len(files), self.slots)
        fd, base, spacing = files[target]
        block[:] = records.make(self.stream, self.n)
        self.begun = time.monotonic()
        if os.pwritev(fd, [block], base + slot * spacing) != records.SIZE:
            raise OSError("short write")
        os.fsync(fd)
        self.times.append(time.monotonic() - self.begun)
        self.begun = None
        self.port.say(ack=self.label, n=self.n)
        self.n += 1

    def figures(self):
        now, begun = time.monotonic(), self.begun
        times, self.times = sorted(self.times), []
        flight = now - begun if begun is not None else 0.0
        at = lambda q: times[min(int(len(times) * q), len(times) - 1)] if times else 0.0  # noqa: E731
        return {"next": self.n, "failed": self.failed, "in_flight": flight, "count": len(times),
                "p50": at(0.5), "p99": at(0.99), "max": max(at(1.0), flight)}  # fmt: skip


class Guest:
    def __init__(self):
        self.port = Port()
        self.writers = {}

    def do_devices(self):
        return devices()

    def do_start(self, writer, **options):
        self.writers[writer] = Writer(self.port, writer, **options)
        self.writers[writer].start()

    def do_stop(self, writer):
        w = self.writers[writer]
        w.ending = True
        w.join(60)
        return {**w.figures(), "alive": w.is_alive()}

    def do_figures(self, writer):
        return self.writers[writer].figures()

    def do_write(self, disk, offset, length, fill=1, sync=True):
        fd = os.open(path_of(disk), os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, length) as data:
                data[:] = bytes([fill]) * length
                begun = time.monotonic()
                if os.pwritev(fd, [data], offset) != length:
                    raise OSError("short write")
                if sync:
                    os.fsync(fd)
                return time.monotonic() - begun
        finally:
            os.close(fd)

    def do_range(self, disk, what, offset, length):
        fd = os.open(path_of(disk), os.O_RDWR)
        try:
            request = {"discard": BLKDISCARD, "zero": BLKZEROOUT}[what]
            fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))
            os.fsync(fd)
        finally:
            os.close(fd)

    def do_size(self, disk):
        with open(path_of(disk), "rb") as f:
            return struct.unpack("Q", fcntl.ioctl(f, BLKGETSIZE64, bytes(8)))[0]

    def do_crc(self, disk):
        crc = 0
        fd = os.open(path_of(disk), os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 1 << 20) as block:
                while n := os.readv(fd, [block]):
                    crc = zlib.crc32(block[:n], crc)
        finally:
            os.close(fd)
        return crc

    def do_numbers(self, stream, slots, targets):
        """The newest record on targets, after checking that none before it is missing."""
        images = []
        for t in targets:
            with open(t.get("file") or path_of(t["disk"]), "rb") as f:
                blocks = []
                for slot in range(slots):
                    f.seek(t.get("base", 0) + slot * t.get("spacing", 4096))
                    blocks.append(f.read(records.SIZE).ljust(records.SIZE, b"\0"))
            images.append(blocks)
        return records.check(images, stream, slots, -1)

    def do_mount(self, disk, directory, kind="ext4"):
        os.makedirs(directory, exist_ok=True)
        return self._run("mount", "-t", kind, path_of(disk), directory)

    def do_unmount(self, directory):
        return self._run("umount", directory)

    def do_run(self, *argv, **named):
        return self._run(*named.get("argv", argv))

    def do_frozen(self, directory, freeze):
        fd = os.open(directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FIFREEZE if freeze else FITHAW, 0)
        finally:
            os.close(fd)

    def do_sync(self):
        os.sync()

    def do_poweroff(self):
        os.sync()
        self._run("poweroff", "-f")

    def do_reboot(self):
        self._run("reboot", "-f")

    def _run(self, *argv):
        status = os.spawnv(os.P_WAIT, "/bin/busybox", ["busybox", *argv])
        if status:
            raise OSError(f"{argv} ended with {status}")

    def serve(self):
        self.port.say(ready=True, devices=devices(), uptime=time.monotonic())
        for line in self.port.lines():
            request = json.loads(line)
            if request.get("sync") is False:  # many at once: a thread for each would take longer than the write
                self._answer(request)
            else:
                threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request):
        number = request.pop("id")
        try:
            self.port.say(id=number, result=getattr(self, "do_" + request.pop("do"))(**request))
        except Exception as e:  # noqa: BLE001
            self.port.say(id=number, error=f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    sys.stdout = sys.stderr
    Guest().serve()
