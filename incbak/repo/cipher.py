"""Encrypted repositories: AES-256-GCM, and keys for each purpose derived from one master key of 32 random bytes.

==================  ==============================================  ================================================
what                how                                             what somebody sees who has the repository
==================  ==============================================  ================================================
blobs (clusters,    GCM, a key for each digest, a random nonce;     sizes after compression; never whether a known
tree pages)         bound to digest, codec and size                 content is there, since digests are keyed
digests             BLAKE3 keyed                                    which clusters are equal to one another
records, notes,     GCM, a key for each file, bound to the kind     how many there are, their sizes and times
condemnations, ...  and the name: none passes for another
pack tables, index  BLAKE3 keyed over them: authenticated, not      digests, sizes, offsets
                    hidden, so that the index is mapped
``config``          its fields with a keyed BLAKE3                  repository id, cluster size
pins, locks         neither                                         ids of backups, names of VMs in those of locks
==================  ==============================================  ================================================

The key of a blob comes from its digest, so no key ever meets enough nonces to repeat one, and a prune copies blobs as
they are. A blob is bound to what it is called: one that is moved, swapped or cut fails, and is then looked for
elsewhere, as any damaged one. Whoever can write to the repository can still delete, and put back what was there before:
`memory` is how a host notices that.
"""

from __future__ import annotations

import os

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from incbak.errors import DamagedError, UsageError
from incbak.repo import blob
from incbak.repo.seal import Seal

NAME = "aes-256-gcm"
KEY = 32
_NONCE, _TAG = 12, 16
_OVERHEAD = _NONCE + _TAG
_SEALED_BLOB = 2
"""Added to the codec of a blob that is encrypted."""
_MAGIC = b"incbak sealed 1\n"


class Cipher(Seal):
    """A seal made of a master key. Raises `UsageError` where the library for it is missing."""

    encrypted = True
    overhead = len(_MAGIC) + _OVERHEAD

    def __init__(self, master: bytes) -> None:
        self._aead = _library()
        self._digests = _derived(master, "incbak 1: digests of content")
        self._blobs = _derived(master, "incbak 1: keys of blobs")
        self._files = _derived(master, "incbak 1: keys of files")
        self._tables = _derived(master, "incbak 1: tables")

    def digest(self, data: bytes | memoryview) -> bytes:
        return blake3(data, key=self._digests).digest()

    def digests(self, clusters: memoryview, step: int) -> NDArray[np.uint8]:
        return blob.digests_of(clusters, step, self.digest)

    def encode(self, digest: bytes, data: bytes | memoryview, level: int = 1) -> tuple[int, bytes]:
        codec, packed = blob.encode(data, level)
        sealed = codec + _SEALED_BLOB
        return sealed, self._encrypt(self._blob_key(digest), packed, _bound(digest, sealed, len(data)))

    def decode(self, digest: bytes, codec: int, stored: bytes | memoryview, raw: int) -> bytes | memoryview:
        if codec < _SEALED_BLOB:
            raise DamagedError("a blob is not encrypted, as all of this repository is")
        packed = self._decrypt(self._blob_key(digest), stored, _bound(digest, codec, raw))
        if packed is None:
            raise DamagedError("a blob does not verify with the repository's key")
        return blob.decode(codec - _SEALED_BLOB, packed, raw)

    def checker(self) -> blake3:
        return blake3(key=self._tables)

    def close(self, kind: str, name: str, data: bytes) -> bytes:
        path = f"{kind}/{name}".encode()
        return _MAGIC + self._encrypt(blake3(path, key=self._files).digest(), data, path)

    def open(self, kind: str, name: str, data: bytes) -> bytes:
        path = f"{kind}/{name}".encode()
        if not data.startswith(_MAGIC):
            raise DamagedError(f"{kind}/{name} is not encrypted, as all of this repository is")
        found = self._decrypt(blake3(path, key=self._files).digest(), data[len(_MAGIC) :], path)
        if found is None:
            raise DamagedError(f"{kind}/{name} does not verify with the repository's key")
        return found

    def _blob_key(self, digest: bytes) -> bytes:
        return blake3(digest, key=self._blobs).digest()

    def _encrypt(self, key: bytes, data: bytes | memoryview, bound: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._aead.encrypt(key, nonce, data, bound)

    def _decrypt(self, key: bytes, data: bytes | memoryview, bound: bytes) -> bytes | None:
        return self._aead.decrypt(key, data[:_NONCE], data[_NONCE:], bound) if len(data) >= _OVERHEAD else None


def wrap(key: bytes, master: bytes, bound: bytes) -> bytes:
    """A master key under another key, bound to what it belongs to."""
    nonce = os.urandom(_NONCE)
    return nonce + _library().encrypt(key, nonce, master, bound)


def unwrap(key: bytes, wrapped: bytes, bound: bytes) -> bytes | None:
    """The master key again; ``None`` when it is another key's, or was changed."""
    return _library().decrypt(key, wrapped[:_NONCE], wrapped[_NONCE:], bound) if len(wrapped) >= _OVERHEAD else None


def _bound(digest: bytes, codec: int, raw: int) -> bytes:
    return digest + bytes([codec]) + raw.to_bytes(8, "little")


def _derived(master: bytes, purpose: str) -> bytes:
    return blake3(master, derive_key_context=purpose).digest()


class _Aead:
    """AES-256-GCM of the library ``cryptography``."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidTag  # an extra, imported only for what is encrypted
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher, self._invalid = AESGCM, InvalidTag

    def encrypt(self, key: bytes, nonce: bytes, data: bytes | memoryview, bound: bytes) -> bytes:
        """Ciphertext and tag."""
        return self._cipher(key).encrypt(nonce, data, bound)

    def decrypt(self, key: bytes, nonce: bytes | memoryview, data: bytes | memoryview, bound: bytes) -> bytes | None:
        """The plain text; ``None`` when the tag does not verify."""
        try:
            return self._cipher(key).decrypt(nonce, data, bound)
        except self._invalid:
            return None


def _library() -> _Aead:
    try:
        return _Aead()
    except ImportError as e:
        raise UsageError("encryption needs the library cryptography", hint="pip install 'incbak[crypt]'") from e
