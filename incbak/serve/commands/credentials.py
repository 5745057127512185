"""``object-add`` and ``object-del``: certificates for targets, the one kind of object there is."""

from __future__ import annotations

from pathlib import Path

from incbak.nbd.tls import client_context
from incbak.serve.commands.registry import Args, command
from incbak.serve.schema import BOOL, STR, Enum, Fields, Opt, QmpError
from incbak.serve.vm import Vm

_X509: Fields = {
    "qom-type": Enum("tls-creds-x509"),
    "id": STR,
    "dir": STR,
    "endpoint": Opt(Enum("client", "server")),
    "verify-peer": Opt(BOOL),
}


@command("object-add", _X509)
def object_add(vm: Vm, args: Args) -> object:
    """Certificates in a directory, looked at now; for ``tls-creds`` of ``blockdev-add``."""
    name = args["id"]
    if name in vm.credentials:
        raise QmpError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    if args.get("endpoint", "client") != "client":
        raise QmpError("Parameter 'endpoint' does not support 'server': see incbak serve --tls-certs")
    if not args.get("verify-peer", True):
        raise QmpError("Parameter 'verify-peer' does not support 'false': servers are always verified")
    directory = Path(args["dir"]).absolute()
    client_context(directory, hostname=None)
    vm.credentials[name] = directory
    return None


@command("object-del", {"id": STR})
def object_del(vm: Vm, args: Args) -> object:
    """Targets that use them keep the directory's name for when they have to connect again."""
    if vm.credentials.pop(args["id"], None) is None:
        raise QmpError(f"object '{args['id']}' not found")
    return None
