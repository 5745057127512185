"""TLS with other people's software: libnbd's and QEMU's clients on our server, our client on their servers."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak.errors import NbdError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri, UriTls, parse_uri
from tests.interop.test_nbd_peers import exercise, started
from tests.kit.certs import Authority
from tests.kit.cli import Incbak
from tests.kit.need import need
from tests.kit.qmp import Qmp, QmpFailed
from tests.kit.serve import Serve, raw_image, serving

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def certs(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority.issue(tmp_path_factory.mktemp("certs"), "server", "client")


@pytest.fixture(scope="module")
def served(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serve, NbdUri]]:
    """A disk behind a server that wants TLS and a certificate of its clients."""
    directory = tmp_path_factory.mktemp("serve")
    image = directory / "vda.raw"
    with image.open("wb") as f:
        f.truncate(SIZE)
    options = ("--tcp", "127.0.0.1:0", "--tls-certs", str(certs), "--tls-verify-peer")
    with serving(directory, {"vda": image}, *options) as started_now:
        (text,) = [word for word in started_now.ready.split() if word.startswith("nbds://")]
        yield started_now, parse_uri(text)
        assert started_now.stop() == 0, "the server had died, or did not end well"


def with_certs(uri: NbdUri, certs: Path) -> str:
    return str(NbdUri(uri.export, host=uri.host, port=uri.port, tls=UriTls(str(certs))))


def qemu(uri: NbdUri, certs: Path) -> list[str]:
    """Options that name the disk to a QEMU tool."""
    creds = f"tls-creds-x509,id=tls0,endpoint=client,dir={certs}"
    where = (
        f"driver=nbd,server.type=inet,server.host={uri.host},server.port={uri.port},export={uri.export},tls-creds=tls0"
    )
    return ["--object", creds, "--image-opts", where]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    need(command[0])
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_nbdinfo_and_nbdcopy(served: tuple[Serve, NbdUri], certs: Path, tmp_path: Path) -> None:
    _serve, uri = served
    told = run("nbdinfo", "--json", with_certs(uri, certs))
    assert told.returncode == 0, told.stderr
    assert '"TLS": true' in told.stdout
    data = bytes(range(256)) * (SIZE // 256)
    (tmp_path / "in").write_bytes(data)
    done = run("nbdcopy", "--flush", str(tmp_path / "in"), with_certs(uri, certs))
    assert done.returncode == 0, done.stderr
    done = run("nbdcopy", "--connections=4", with_certs(uri, certs), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == data


def test_qemu_img_and_qemu_io(served: tuple[Serve, NbdUri], certs: Path, tmp_path: Path) -> None:
    _serve, uri = served
    done = run("qemu-io", *qemu(uri, certs), "-c", "write -P 5 1M 700k", "-c", "read -P 5 1M 700k", "-c", "flush")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout
    out = tmp_path / "out.raw"
    done = run("qemu-img", "convert", *qemu(uri, certs), "-O", "raw", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[MIB : MIB + 700 * 1024] == b"\5" * 700 * 1024


@pytest.mark.parametrize("which", ["nothing", "other", "expired", "plain"])
def test_clients_that_are_refused(
    served: tuple[Serve, NbdUri], authority: Authority, certs: Path, tmp_path: Path, which: str
) -> None:
    """Without a certificate, with one of another authority, with one that is over, without TLS; the server goes on."""
    serve, uri = served
    theirs = tmp_path / which
    if which == "nothing":
        authority.issue(theirs)
    elif which == "other":
        Authority(tmp_path / "ca").issue(theirs, "client")
    elif which == "expired":
        authority.issue(theirs, "client", days=-1)
    if which == "plain":
        address = f"nbd://{uri.host}:{uri.port}/vda"
        commands = [["nbdinfo", "--size", address], ["qemu-img", "info", address]]
    else:
        commands = [["nbdinfo", "--size", with_certs(uri, theirs)], ["qemu-img", "info", *qemu(uri, theirs)]]
    for command in commands:
        refused = run(*command)
        assert refused.returncode != 0, refused.stdout
        assert str(SIZE) not in refused.stdout
    good = run("nbdinfo", "--size", with_certs(uri, certs))
    assert good.stdout == f"{SIZE}\n", good.stderr
    assert serve.process.poll() is None


def test_a_server_that_is_over_is_refused_by_them(authority: Authority, tmp_path: Path) -> None:
    certs = authority.issue(tmp_path / "certs", "server", "client", days=-1)
    image = tmp_path / "vda.raw"
    image.write_bytes(bytes(MIB))
    with serving(tmp_path, {"vda": image}, "--tcp", "127.0.0.1:0", "--tls-certs", str(certs)) as serve:
        (text,) = [word for word in serve.ready.split() if word.startswith("nbds://")]
        for command in (
            ["nbdinfo", with_certs(parse_uri(text), certs)],
            ["qemu-img", "info", *qemu(parse_uri(text), certs)],
        ):
            assert run(*command).returncode != 0


def test_our_client_on_nbdkit(certs: Path, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    options = ("--tls=require", f"--tls-certificates={certs}", "--tls-verify-peer")
    with started(socket, "nbdkit", "-f", "-U", socket, *options, "memory", str(SIZE)) as uri:
        exercise(NbdUri(uri.export, path=uri.path, tls=UriTls(str(certs), "localhost")), SIZE)
        with pytest.raises(NbdError, match="Hostname mismatch"):
            NbdClient.connect(NbdUri("", path=uri.path, tls=UriTls(str(certs), "elsewhere")))
        with pytest.raises(NbdError, match="TLS"):
            NbdClient.connect(uri)


def test_our_client_on_qemu_nbd(certs: Path, tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as f:
        f.truncate(SIZE)
    socket = tmp_path / "s"
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={certs},verify-peer=yes"
    options = ("--object", creds, "--tls-creds", "tls0", "-t", "-f", "raw", "-e", "4", "-k", socket)
    with started(socket, "qemu-nbd", *options, tmp_path / "disk.raw") as uri:
        exercise(NbdUri("", path=uri.path, tls=UriTls(str(certs), "localhost")), SIZE)


# -- through the commands ----------------------------------------------------------------------------------------------


def test_a_backup_is_exported_and_restored_through_tls(
    served: tuple[Serve, NbdUri], authority: Authority, certs: Path, tmp_path: Path
) -> None:
    """``export`` to nbdcopy, ``restore`` to ``incbak serve``; the wrong certificates restore nothing."""
    _serve, uri = served
    incbak, image = Incbak(tmp_path), tmp_path / "disk.raw"
    data = random.Random(1).randbytes(SIZE)
    image.write_bytes(data)
    incbak("init", incbak.repo)
    incbak("full", image, "--name", "web1")
    process = incbak.popen("export", "latest", "--tcp", "127.0.0.1:0", "--tls-certs", certs, "--tls-verify-peer")
    assert process.stdout
    exported = parse_uri(process.stdout.readline().split()[1])
    assert exported.tls
    try:
        done = run("nbdcopy", with_certs(exported, certs), str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out").read_bytes() == data
        assert run("nbdinfo", f"nbd://{exported.host}:{exported.port}/{exported.export}").returncode != 0
    finally:
        process.terminate()
        _out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    stranger = Authority(tmp_path / "ca").issue(tmp_path / "stranger", "client")
    refused = incbak.run("restore", "latest", with_certs(uri, stranger))
    assert refused.code == 1
    assert "TLS handshake failed" in refused.err
    assert "Look at the certificates" in refused.err
    incbak("restore", "latest", with_certs(uri, certs))
    done = run("nbdcopy", with_certs(uri, certs), str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-certs", "{dir}/none"], "cannot read .*none/server-cert.pem: No such file or directory"),
        (["--tls-verify-peer"], "--tls-verify-peer without --tls-certs"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "export"])
def test_certificates_are_looked_at_before_anything_is_opened(
    tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    incbak, image = Incbak(tmp_path), tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    given = ["--name", "x", f"vda={image}"] if command == "serve" else ["latest"]
    ran = incbak.run(command, "--tcp", "127.0.0.1:0", *(o.format(dir=tmp_path) for o in options), *given)
    assert ran.code == 2
    assert re.search(message, ran.err)
    assert not incbak.state.exists()


def test_a_backup_job_to_a_target_through_tls(certs: Path, authority: Authority, tmp_path: Path) -> None:
    """``object-add`` and ``blockdev-add`` as QEMU has them, to a server of QEMU's own."""
    target, socket = raw_image(tmp_path / "target.raw", SIZE), tmp_path / "target.sock"
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={certs},verify-peer=yes"
    options = ("--object", creds, "--tls-creds", "tls0", "-t", "-f", "raw", "-e", "4", "-k", socket)
    data = random.Random(2).randbytes(SIZE)
    image = tmp_path / "vda.raw"
    image.write_bytes(data)
    stranger = Authority(tmp_path / "ca").issue(tmp_path / "stranger", "client")
    with started(socket, "qemu-nbd", *options, target), serving(tmp_path, {"vda": image}) as serve:
        with Qmp(serve.monitor) as qmp:
            x509 = {"qom_type": "tls-creds-x509", "endpoint": "client"}
            server = {"type": "unix", "path": str(socket)}
            node = {"driver": "nbd", "node_name": "t0", "server": server}
            with pytest.raises(QmpFailed, match=r"cannot read .*/none/ca-cert.pem"):
                qmp("object-add", **x509, id="c", dir=str(tmp_path / "none"))
            with pytest.raises(QmpFailed, match="No TLS credentials with id 'c'"):
                qmp("blockdev-add", **node, tls_creds="c")
            with pytest.raises(QmpFailed, match="TLS hostname is only supported"):
                qmp("blockdev-add", **node, tls_hostname="localhost")
            qmp("object-add", **x509, id="c", dir=str(certs))
            qmp("object-add", **x509, id="other", dir=str(stranger))
            with pytest.raises(QmpFailed, match="duplicate"):
                qmp("object-add", **x509, id="c", dir=str(certs))
            with pytest.raises(QmpFailed, match="TLS"):
                qmp("blockdev-add", **node)
            with pytest.raises(QmpFailed, match="TLS handshake failed"):
                qmp("blockdev-add", **node, tls_creds="other")
            with pytest.raises(QmpFailed, match="Hostname mismatch"):
                qmp("blockdev-add", **node, tls_creds="c", tls_hostname="elsewhere")
            qmp("blockdev-add", **node, tls_creds="c", tls_hostname="localhost")
            qmp("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
            end = qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
            assert "error" not in end["data"]
            qmp("blockdev-del", node_name="t0")
            qmp("object-del", id="c")
            with pytest.raises(QmpFailed, match="object 'c' not found"):
                qmp("object-del", id="c")
        assert serve.stop() == 0
    assert target.read_bytes() == data
