"""Small files that check themselves: a line with the BLAKE3 of what follows, then that."""

from __future__ import annotations

from blake3 import blake3

from incbak.errors import DamagedError


def digested(body: bytes) -> bytes:
    """The file."""
    return blake3(body).hexdigest().encode() + b"\n" + body


def verified_body(data: bytes, what: str, *, hint: str = "") -> bytes:
    """What `digested` was given. Raises `DamagedError` naming ``what`` where it is not what it was."""
    checksum, _, body = data.partition(b"\n")
    if blake3(body).hexdigest().encode() != checksum:
        raise DamagedError(f"{what} does not match its digest", hint=hint)
    return body
