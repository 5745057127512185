"""Faults of TLS, on both ends."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_TLS, _SERVER, _CLIENT = (f"incbak/nbd/{name}.py" for name in ("tls", "handshake", "greeting"))


def _tls(*tests: str) -> tuple[str, ...]:
    return unit("nbd/test_tls", *tests)


FAULTS = [
    Fault(
        "tls-not-required",
        _SERVER,
        "        if self.must and not self._tunnel and option not in",
        "        if False and option not in",
        _tls("test_every_option_before_tls_is_refused"),
    ),
    Fault(
        "tls-export-name-without",
        _SERVER,
        "option not in (p.OPT_STARTTLS, p.OPT_ABORT):",
        "option not in (p.OPT_STARTTLS, p.OPT_ABORT, p.OPT_EXPORT_NAME):",
        _tls("test_the_old_way_in_is_shut"),
    ),
    Fault(
        "tls-server-takes-early-bytes",
        _SERVER,
        "        refuse_early_bytes(self.sock)\n",
        "",
        _tls("test_bytes_before_the_handshake_end_the_connection"),
    ),
    Fault(
        "tls-client-takes-early-bytes",
        _CLIENT,
        "        refuse_early_bytes(self.sock)\n",
        "",
        _tls("test_a_server_that_speaks_before_the_handshake"),
    ),
    Fault(
        "tls-remembers-what-came-before",
        _SERVER,
        '        self.dialect, self.chosen = Dialect.SIMPLE, ("", [])\n',
        "",
        _tls("test_what_was_agreed_on_before_tls_is_forgotten"),
    ),
    Fault(
        "tls-client-goes-on-without",
        _CLIENT,
        "        if reply[0] != p.REP_ACK:\n            raise",
        "        if reply[0] != p.REP_ACK:\n            return wire\n            raise",
        _tls("test_a_client_that_was_told_goes_on_with_nothing_else"),
    ),
    Fault(
        "tls-clients-are-not-verified",
        _TLS,
        "        context.verify_mode = ssl.CERT_REQUIRED\n",
        "",
        _tls("test_a_client_must_show_a_certificate"),
    ),
    Fault(
        "tls-client-takes-any-name",
        _TLS,
        "    context.check_hostname = hostname is not None\n",
        "    context.check_hostname = False\n",
        _tls("test_a_server_of_another_name"),
    ),
    Fault(
        "tls-client-takes-any-authority",
        _TLS,
        "    context.check_hostname = hostname is not None\n",
        "    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n",
        _tls("test_a_server_of_another_authority"),
    ),
    Fault(
        "tls-revoked-is-good",
        _TLS,
        "            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF\n",
        "",
        _tls("test_a_certificate_that_was_revoked"),
    ),
    Fault(
        "tls-old-versions",
        _TLS,
        "    context.minimum_version = ssl.TLSVersion.TLSv1_2\n",
        "    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED\n    context.set_ciphers('ALL:@SECLEVEL=0')\n",
        _tls("test_old_versions_of_tls_are_refused"),
    ),
    Fault(
        "tls-asks-for-a-passphrase",
        _TLS,
        ", password=_no_passphrase)",
        ", password=lambda: 'x')",
        _tls("test_certificates_that_cannot_be_used"),
    ),
    Fault(
        "tls-handshake-without-deadline",
        _TLS,
        "        self._outer.settimeout(left)\n",
        "        self._outer.settimeout(600)\n",
        _tls("test_the_handshake_has_a_deadline", "test_a_clients_handshake_has_a_deadline"),
    ),
    Fault(
        "tls-options-without-deadline",
        _SERVER,
        "        self.wire = Wire(tunnel.inner, self.deadline)\n",
        "        self.wire = Wire(tunnel.inner, None)\n",
        _tls("test_the_deadline_holds_for_options_inside_tls"),
    ),
    Fault(
        "tls-last-replies-are-lost",
        "incbak/nbd/server.py",
        "            with closing(negotiation):\n",
        "            if True:\n",
        _tls("test_the_end_of_the_server_lets_requests_end", "test_nothing_is_left_of_a_connection"),
    ),
    Fault(
        "tls-first-option-is-left-lying",
        _TLS,
        '        to_plain, hears = self._opened(b"")  #',
        '        to_plain, hears = b"", True  #',
        _tls("test_an_option_in_one_piece_with_the_end_of_the_handshake"),
    ),
    Fault(
        "tls-hears-whoever-does-not-read",
        _TLS,
        "hears and not to_plain and len(to_outer) < _CONTROL_LIMIT",
        "hears and not to_plain",
        _tls("test_a_peer_that_only_makes_us_answer_is_no_longer_heard"),
    ),
    Fault(
        "tls-lingers-for-ever",
        _TLS,
        "                deadline = time.monotonic() + LINGER\n",
        "                pass\n",
        _tls("test_a_client_that_breaks_off_leaves_nothing_behind"),
    ),
]
