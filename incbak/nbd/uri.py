"""NBD URIs, as the protocol's ``doc/uri.md`` has them: ``nbd://host:port/name`` and ``nbd+unix:///name?socket=path``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from incbak.errors import UsageError


@dataclass(frozen=True)
class NbdUri:
    """Where an export is: a Unix socket's ``path``, or ``host`` and ``port``."""

    export: str
    path: str | None = None
    host: str | None = None
    port: int = 10809

    def __str__(self) -> str:
        name = quote(self.export, safe="", errors="replace")
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={quote(self.path, errors='replace')}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{name}"


def parse_uri(text: str) -> NbdUri:
    """Raises `UsageError` for what is not an NBD URI, or one with TLS, which is not there yet."""
    try:
        parts = urlsplit(text)
    except ValueError as e:
        raise UsageError(f"not an NBD URI: {text}: {e}") from e
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1:
            raise UsageError(f"no socket in {text}", hint="Write nbd+unix:///EXPORT?socket=PATH.")
        return NbdUri(export, path=sockets[0])
    if parts.scheme == "nbd" and parts.hostname:
        try:
            return NbdUri(export, host=parts.hostname, port=parts.port or 10809)
        except ValueError as e:
            raise UsageError(f"no port number in {text}") from e
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UsageError(f"TLS is not supported yet: {text}")
    raise UsageError(
        f"not an NBD URI: {text}", hint="Write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH."
    )
