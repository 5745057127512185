"""Faults of extended headers, on both ends, and of requests over terabytes."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_CONNECTION, _PROTOCOL, _HANDSHAKE, _GREETING, _CLIENT = (
    f"incbak/nbd/{name}.py" for name in ("connection", "protocol", "handshake", "greeting", "client")
)
_EXPORT, _CBW, _DISK = (f"incbak/{name}.py" for name in ("serve/export", "serve/cbw", "disk/file"))


def _server(*tests: str) -> tuple[str, ...]:
    return unit("nbd/test_extended", *tests)


def _client(*tests: str) -> tuple[str, ...]:
    return unit("nbd/test_client_extended", *tests)


def _long(*tests: str) -> tuple[str, ...]:
    return unit("serve/test_long_requests", *tests)


_WIRE = (
    Fault(
        "ext-payload-of-others-not-drained",
        _CONNECTION,
        "command == p.WRITE or (extended and flags & p.CMD_PAYLOAD)",
        "command == p.WRITE or (extended and flags & p.CMD_PAYLOAD and command == p.STATUS)",
        _server("test_the_payload_of_a_refused_request_is_drained"),
    ),
    Fault(
        "ext-write-without-the-flag-not-drained",
        _CONNECTION,
        "command == p.WRITE or (extended and flags & p.CMD_PAYLOAD)",
        "(flags & p.CMD_PAYLOAD if extended else command == p.WRITE)",
        _server("test_a_write_without_the_flag_is_a_write"),
    ),
    Fault(
        "ext-payload-flag-in-another-dialect",
        _PROTOCOL,
        "(_ALLOWED_EXTENDED if extended else _ALLOWED_FLAGS)",
        "_ALLOWED_EXTENDED",
        _server("test_without_extended_headers_there_are_no_such_payloads"),
    ),
    Fault(
        "ext-status-of-contexts-twice",
        _PROTOCOL,
        "    if len(set(wanted)) != count or not",
        "    if not",
        _server("test_a_choice_of_contexts_that_cannot_be"),
    ),
    Fault(
        "ext-status-of-unknown-contexts",
        _PROTOCOL,
        " or not set(wanted) <= set(known):\n",
        ":\n",
        _server("test_a_choice_of_contexts_that_cannot_be"),
    ),
    Fault(
        "ext-status-past-the-end",
        _CONNECTION,
        "        length, wanted = asked or (0, [])\n",
        "        length, wanted = asked or (0, [])\n        length = min(length, self.size - tag[1])\n",
        _server("test_a_choice_of_contexts_that_cannot_be"),
    ),
    Fault(
        "ext-the-old-way-in",
        _HANDSHAKE,
        "        if export is None or self.dialect is Dialect.EXTENDED:",
        "        if export is None:",
        _server("test_the_old_way_in_is_shut"),
    ),
    Fault(
        "ext-back-to-structured",
        _HANDSHAKE,
        "        elif option == p.OPT_STRUCTURED and self.dialect is Dialect.EXTENDED:\n",
        "        elif False:\n",
        _server("test_nothing_leads_back_from_extended_headers"),
    ),
    Fault(
        "ext-client-falls-back-without-go",
        _GREETING,
        " and self._offer.dialect is not Dialect.EXTENDED:",
        ":",
        _client("test_extended_headers_without_go"),
    ),
    Fault(
        "ext-client-takes-another-offset",
        _CLIENT,
        "            if request and request.offset != offset:\n",
        "            if False:\n",
        _client("test_a_block_status_that_cannot_be", "test_an_answer_to_a_read_that_cannot_be"),
    ),
    Fault(
        "ext-client-believes-the-count",
        _CLIENT,
        "            fits &= p.U32.unpack_from(body, 4)[0] * p.EXT_EXTENT.size == len(extents)\n",
        "            pass\n",
        _client("test_a_block_status_that_cannot_be"),
    ),
    Fault(
        "ext-client-without-limit-on-extents",
        _CLIENT,
        "(_MAX_STATUS if request.contexts else _MAX_REPLY)",
        "(1 << 62 if request.contexts else _MAX_REPLY)",
        _client("test_a_block_status_that_cannot_be"),
    ),
    Fault(
        "ext-client-sends-long-requests-short",
        _CLIENT,
        "        if request.length > self.longest:\n",
        "        if False:\n",
        _client("test_longer_than_32_bits_can_tell_is_not_sent"),
    ),
)

_PIECES = (
    Fault(
        "long-request-in-one-piece",
        _EXPORT,
        "            part = min(PIECE, end - offset)\n            with self",
        "            part = end - offset\n            with self",
        _long("test_it_comes_in_pieces_and_all_of_it_is_recorded", "test_a_transaction_gets_in_between"),
    ),
    Fault(
        "long-request-holds-the-gate",
        _EXPORT,
        "        while offset < end:\n            part = min(PIECE, end - offset)\n"
        "            with self.tracked.gate.joined():\n",
        "        self.tracked.gate.joined().__enter__()\n        while offset < end:\n"
        "            part = min(PIECE, end - offset)\n            if True:\n",
        _long("test_a_transaction_gets_in_between"),
    ),
    Fault(
        "long-request-is-recorded-in-part",
        _EXPORT,
        "                self.tracked.before_write(offset, part, spent)\n                spent",
        "                self.tracked.before_write(offset, min(part, 1 << 20), spent)\n                spent",
        _long("test_it_comes_in_pieces_and_all_of_it_is_recorded"),
    ),
    Fault(
        "long-request-syncs-each-region",
        _EXPORT,
        "        if length > PIECE:\n",
        "        if False:\n",
        _long("test_one_sync_for_all_its_regions"),
    ),
    Fault(
        "long-request-forgets-what-it-spent",
        _EXPORT,
        "                spent += time.monotonic() - began\n",
        "",
        _long("test_each_piece_says_what_was_spent"),
    ),
    Fault(
        "cbw-bound-on-waiting-only",
        _CBW,
        "                if time.monotonic() > deadline:\n                    raise self._late()\n",
        "",
        _long("test_the_bound_on_saving_is_for_all_of_it"),
    ),
    Fault(
        "cbw-passes-parts-of-clusters",
        _CBW,
        "        first = -(-start >> self._shift)\n",
        "        first = start >> self._shift\n",
        _long("test_holes_are_passed_and_data_is_saved"),
    ),
    Fault(
        "cbw-passes-data",
        _CBW,
        "self.disk.extents(start, end - start) if e.zero]\n            finally",
        "self.disk.extents(start, end - start)]\n            finally",
        _long("test_holes_are_passed_and_data_is_saved"),
    ),
    Fault(
        "status-of-all-at-once",
        _EXPORT,
        "_FIRST_WINDOW = 64\n",
        "_FIRST_WINDOW = 1 << 24\n",
        _long("test_the_worst_bitmap_is_told_in_bounded_memory"),
    ),
    Fault(
        "overlay-maps-all-at-once",
        "incbak/export/overlay.py",
        "_WINDOW = 4 << 30\n",
        "_WINDOW = 1 << 50\n",
        unit("export/test_export", "test_the_map_of_a_terabyte_takes_no_memory"),
    ),
    Fault(
        "cache-without-limit",
        _EXPORT,
        "        end = offset + min(length, CACHE_LIMIT)\n",
        "        end = offset + length\n",
        _long("test_cache_is_a_hint"),
    ),
    Fault(
        "fast-zeroes-by-writing",
        _DISK,
        "        return any(self._fallocate(mode, offset, length) for mode in modes)\n",
        "        self.write_zeroes(offset, length, unmap=unmap)\n        return True\n",
        _long("test_no_fast_zeroes_where_the_storage_has_none"),
    ),
    Fault(
        "fast-zeroes-of-a-device-in-the-kernel",
        _DISK,
        "(() if self.is_block else (_ZERO_RANGE,))",
        "(_ZERO_RANGE,)",
        _long("test_a_device_zeroes_a_range_by_writing"),
    ),
    Fault(
        "read-only-export-takes-writes",
        _EXPORT,
        "        return TrackedDevice(self.tracked, read_only=self.read_only)\n",
        "        return TrackedDevice(self.tracked, read_only=self.tracked.read_only)\n",
        unit("serve/test_daemon", "test_the_read_only_export_of_a_writable_disk"),
    ),
)

FAULTS = [*_WIRE, *_PIECES]
