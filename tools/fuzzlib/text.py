"""What users type: sizes, durations, shares, addresses. Only `UsageError` may come of it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzzlib import mutate
from fuzzlib.case import FuzzTarget, demand
from incbak.bitmap.store import component
from incbak.cli import serve
from incbak.engine.session import Address
from incbak.errors import UsageError
from incbak.nbd.uri import parse_uri
from incbak.units import format_duration, format_size, parse_duration, parse_share, parse_size

_PARSE_TCP = getattr(serve, "parse_tcp", None) or serve._address
_PARSERS: list[Callable[[str], object]] = [
    parse_size, parse_duration, parse_share, parse_uri, Address.parse, _PARSE_TCP, serve._disk, component,
]  # fmt: skip
_SAMPLES = (
    "64k", "1.5G", "65536", "90s", "250ms", "7d", "1%", "0.001", "nbd://host:10809/name", "nbd://[::1]:10809/",
    "nbd+unix:///disk?socket=/run/x.sock", "nbds://host/x", "qmp:/run/vm/qmp.sock", "qmp:127.0.0.1:4444",
    "127.0.0.1:10809", "[::1]:80", "vda=/srv/a.raw", "1e309", "9" * 400, "9" * 5000, "9" * 400 + ".5", "\u0663k",
)  # fmt: skip


class TextTarget(FuzzTarget):
    """Every parser gets every text."""

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.2:
            return (mutate.text(rng) + rng.choice(_SAMPLES) + mutate.text(rng)).encode(errors="surrogatepass")
        data = mutate.mutated(rng, rng.choice(_SAMPLES).encode(), rng.choice(_SAMPLES).encode())
        if rng.random() < 0.3:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice((b"%00", b"%ff", b"..", b"[", b"]", b"@", b"?socket=", b":99999")) + data[at:]
        return data

    def run(self, data: bytes) -> None:
        for given in {data.decode(errors="surrogateescape"), data.decode(errors="replace")}:
            for parse in _PARSERS:
                if parse == Address.parse and len(given) > 4000:
                    continue
                try:
                    found = parse(given)
                except UsageError:
                    continue
                if parse is parse_size:
                    demand(isinstance(found, int) and found >= 0 and format_size(found), "a size")
                elif parse is parse_duration:
                    demand(isinstance(found, float) and found >= 0, "a duration")
                    format_duration(found)  # type: ignore[arg-type]
                elif parse is parse_uri:
                    str(found)
