"""The options of whatever serves NBD over TCP."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from incbak.errors import UsageError
from incbak.nbd.tls import server_context
from incbak.nbd.uri import NbdUri, UriTls

F = TypeVar("F", bound=Callable[..., Any])


def serves_tls(command: F) -> F:
    """Decorate a command with ``--tls-certs`` and ``--tls-verify-peer``."""
    verify = click.option(
        "--tls-verify-peer", is_flag=True, help="Clients must show a certificate that the CA in DIR has signed."
    )
    certs = click.option(
        "--tls-certs",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Clients on TCP must use TLS; on a Unix socket they may. DIR has server-cert.pem and server-key.pem, and "
        "ca-cert.pem to verify clients.",
    )
    return certs(verify(command))


def tls_of(certs: Path | None, verify_peer: bool) -> ssl.SSLContext | None:
    """What the options ask for. Raises `UsageError`."""
    if certs is None:
        if verify_peer:
            raise UsageError("--tls-verify-peer without --tls-certs", hint="Name the directory of the certificates.")
        return None
    return server_context(certs, verify_peer=verify_peer)


def tcp_uri(name: str, address: tuple[str, int], tls: ssl.SSLContext | None) -> str:
    """Where an export is, for a person: a client adds its own ``tls-certificates``."""
    return str(NbdUri(name, host=address[0], port=address[1], tls=UriTls() if tls else None))
