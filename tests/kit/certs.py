"""Certificates for tests, made by the program ``openssl``: an authority, and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.kit.need import need

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
NAMES = "DNS:localhost,IP:127.0.0.1"


def openssl(directory: Path, *arguments: str) -> None:
    need("openssl")
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)


class Authority:
    """Signs; its key stays in ``directory``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        subject = ("-subj", f"/CN=the CA of {directory.name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        openssl(directory, "req", "-x509", *_EC, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2", *subject)

    def issue(self, into: Path, *roles: str, names: str = NAMES, days: int = 2) -> Path:
        """``into`` gets ca-cert.pem, and for each role a certificate with its key; with negative ``days`` expired."""
        into.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / "ca-cert.pem", into)
        for role in roles:
            usage = ("-addext", f"extendedKeyUsage={role}Auth", "-addext", "keyUsage=digitalSignature")
            subject = ("-subj", f"/CN=a {role}", "-addext", f"subjectAltName={names}")
            openssl(into, "req", *_EC, "-keyout", f"{role}-key.pem", "-out", f"{role}-req.pem", *subject, *usage)
            ours = str(self.directory / "ca")
            signed = ("-CA", f"{ours}-cert.pem", "-CAkey", f"{ours}-key.pem", "-copy_extensions", "copyall")
            request = ("-in", f"{role}-req.pem", "-out", f"{role}-cert.pem", "-days", str(days))
            openssl(into, "x509", "-req", *request, *signed)
        return into

    def revoke(self, certificate: Path, into: Path) -> None:
        """``into`` gets a ca-crl.pem that names the certificate."""
        (self.directory / "index.txt").touch()
        (self.directory / "ca.conf").write_text(
            "[ca]\ndefault_ca=here\n[here]\ndatabase=index.txt\ndefault_md=sha256\ndefault_crl_days=2\n"
        )
        common = ("ca", "-config", "ca.conf", "-cert", "ca-cert.pem", "-keyfile", "ca-key.pem")
        openssl(self.directory, *common, "-revoke", str(certificate.absolute()))
        openssl(self.directory, *common, "-gencrl", "-out", str((into / "ca-crl.pem").absolute()))
