"""NBD URIs, as the protocol's ``doc/uri.md`` has them: ``nbd://host:port/name`` and ``nbd+unix:///name?socket=path``.

With TLS the schemes are ``nbds`` and ``nbds+unix``, and libnbd's parameters say how: ``tls-certificates=DIR`` (a CA to
believe, and perhaps a certificate to show; without it the system's CAs count) and ``tls-hostname=NAME`` (whom the
certificate has to name; without it the host, and on a Unix socket nobody).
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from incbak.errors import UsageError


@dataclass(frozen=True)
class UriTls:
    """How a client is to do TLS."""

    certificates: str | None = None
    hostname: str | None = None

    @property
    def query(self) -> str:
        """As parameters of a URI."""
        given = {"tls-certificates": self.certificates, "tls-hostname": self.hostname}
        return "&".join(f"{k}={quote(v, errors='replace')}" for k, v in given.items() if v is not None)


@dataclass(frozen=True)
class NbdUri:
    """Where an export is: a Unix socket's ``path``, or ``host`` and ``port``."""

    export: str
    path: str | None = None
    host: str | None = None
    port: int = 10809
    tls: UriTls | None = None

    def __str__(self) -> str:
        name = quote(self.export, safe="", errors="replace")
        scheme, query = ("nbds", self.tls.query) if self.tls else ("nbd", "")
        if self.path is not None:
            socket = f"socket={quote(self.path, errors='replace')}"
            return f"{scheme}+unix:///{name}?{'&'.join(filter(None, [socket, query]))}"
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{name}{'?' if query else ''}{query}"


def parse_uri(text: str) -> NbdUri:
    """Raises `UsageError` for what is not an NBD URI, or asks of TLS what cannot be had."""
    try:
        parts = urlsplit(text)
    except ValueError as e:
        raise UsageError(f"not an NBD URI: {text}: {e}") from e
    export = unquote(parts.path.removeprefix("/"))
    query = parse_qs(parts.query, keep_blank_values=True)
    if parts.scheme in ("nbd+unix", "nbds+unix"):
        sockets = query.get("socket", [])
        if len(sockets) != 1:
            raise UsageError(f"no socket in {text}", hint="Write nbd+unix:///EXPORT?socket=PATH.")
        return NbdUri(export, path=sockets[0], tls=_tls(parts.scheme, query, text))
    if parts.scheme in ("nbd", "nbds") and parts.hostname:
        try:
            port = parts.port or 10809
        except ValueError as e:
            raise UsageError(f"no port number in {text}") from e
        return NbdUri(export, host=parts.hostname, port=port, tls=_tls(parts.scheme, query, text))
    raise UsageError(
        f"not an NBD URI: {text}",
        hint="Write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds with TLS.",
    )


def _tls(scheme: str, query: dict[str, list[str]], text: str) -> UriTls | None:
    """What is asked of TLS is had or refused, never left out."""
    asked = {name: values for name, values in query.items() if name.startswith("tls-")}
    hint = "Write nbds://HOST/EXPORT?tls-certificates=DIR."
    for name, values in asked.items():
        if not scheme.startswith("nbds") or name not in ("tls-certificates", "tls-hostname") or len(values) != 1:
            raise UsageError(f"cannot take {name} in {text}", hint=hint)
    if not scheme.startswith("nbds"):
        return None
    return UriTls(*(asked.get(name, [None])[0] for name in ("tls-certificates", "tls-hostname")))
