"""Planted faults of encrypted repositories, and of what a host remembers."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_CIPHER = (
    Fault(
        "cipher-blob-not-bound",
        "incbak/repo/cipher.py",
        '    return digest + bytes([codec]) + raw.to_bytes(8, "little")\n',
        '    return b""\n',
        unit("repo/test_cipher", "test_a_blob_comes_back_and_only_as_what_it_was"),
    ),
    Fault(
        "cipher-clear-blob-taken",
        "incbak/repo/cipher.py",
        "        if codec < _SEALED_BLOB:\n",
        "        if codec < _SEALED_BLOB:\n            return blob.decode(codec, stored, raw)\n        if False:\n",
        unit("repo/test_cipher", "test_a_file_is_bound_to_its_kind_and_name"),
    ),
    Fault(
        "cipher-clear-file-taken",
        "incbak/repo/cipher.py",
        "        if not data.startswith(_MAGIC):\n",
        "        if not data.startswith(_MAGIC):\n            return data\n        if False:\n",
        unit("repo/test_cipher", "test_a_file_is_bound_to_its_kind_and_name"),
    ),
    Fault(
        "cipher-digests-not-keyed",
        "incbak/repo/cipher.py",
        "        return blake3(data, key=self._digests).digest()\n",
        "        return blake3(data).digest()\n",
        unit("repo/test_cipher", "test_names_and_ciphertexts_tell_nothing_of_the_content"),
    ),
    Fault(
        "cipher-tables-not-keyed",
        "incbak/repo/cipher.py",
        "        return blake3(key=self._tables)\n",
        "        return blake3()\n",
        unit("repo/test_cipher", "test_tables_of_another_key_are_not_believed"),
    ),
    Fault(
        "cipher-records-in-clear",
        "incbak/repo/storage/local.py",
        "            data = self.seal.close(kind, name, data)\n",
        "            pass\n",
        unit("repo/test_cipher", "test_nothing_of_what_is_stored_can_be_read"),
    ),
    Fault(
        "cipher-config-not-proven",
        "incbak/repo/repository.py",
        "        if not config.opens(found.master):\n",
        "        if False:\n",
        unit("repo/test_cipher", "test_the_config_is_proven"),
    ),
)

_KEYS = (
    Fault(
        "keys-cost-not-limited",
        "incbak/repo/keys.py",
        "        sound = is_id(key.id) and key.id == name and key.cost.possible\n",
        "        sound = is_id(key.id) and key.id == name\n",
        unit("repo/test_cipher", "test_a_key_cannot_ask_for_all_memory"),
    ),
    Fault(
        "keys-last-one-goes",
        "incbak/repo/keys.py",
        "        stay = [k for k in read_keys(storage)[0] if k.id != names[0]]\n",
        "        stay = read_keys(storage)[0]\n",
        unit("repo/test_cipher", "test_keys_come_and_go"),
    ),
    Fault(
        "keys-import-not-proven",
        "incbak/repo/keys.py",
        "    if not proves(master):\n",
        "    if False:\n",
        unit("repo/test_cipher", "test_an_exported_key_brings_a_repository_back"),
    ),
    Fault(
        "passphrase-asked-without-terminal",
        "incbak/cli/passphrase.py",
        "def _typed_twice() -> bytes:\n    if not (sys.stdin and sys.stdin.isatty()):\n",
        "def _typed_twice() -> bytes:\n    if False:\n",
        ("tests/story/test_encryption.py::test_without_a_passphrase_nothing_is_made",),
    ),
)

_MEMORY = (
    Fault(
        "memory-downgrade-not-refused",
        "incbak/cli/settings.py",
        "        self.memory.refuse_downgrade(path, config)\n",
        "",
        ("tests/story/test_encryption.py::test_one_that_is_not_encrypted_any_more_is_not_used",),
    ),
    Fault(
        "memory-rollback-not-noticed",
        "incbak/repo/memory.py",
        "        if last.pruned or newest > last.seq:\n",
        "        if True:\n",
        unit("repo/test_memory", "test_a_repository_that_was_rolled_back_is_noticed"),
    ),
    Fault(
        "memory-record-not-compared",
        "incbak/repo/memory.py",
        "    return None if blake3(found).hexdigest() == last.record else",
        "    return None if True else",
        unit("repo/test_memory", "test_a_record_that_was_replaced_is_noticed"),
    ),
    Fault(
        "memory-nothing-remembered",
        "incbak/backup/runner.py",
        "            memory.remember(repo, outcome.record)\n",
        "            pass\n",
        ("tests/story/test_encryption.py::test_a_repository_that_was_put_back_is_told",),
    ),
)

FAULTS = (*_CIPHER, *_KEYS, *_MEMORY)
