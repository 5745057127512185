"""Commands about the process as a whole."""

from __future__ import annotations

from incbak import __version__
from incbak.serve.commands.registry import COMMANDS, Args, command
from incbak.serve.vm import Vm


def version() -> dict[str, object]:
    """A VersionInfo: the QEMU version whose schema is followed, and who we are."""
    return {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": f"incbak {__version__}"}


@command("query-version")
def query_version(vm: Vm, args: Args) -> object:
    """Who we are."""
    return version()


@command("query-commands")
def query_commands(vm: Vm, args: Args) -> object:
    """Every command there is."""
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


@command("query-status")
def query_status(vm: Vm, args: Args) -> object:
    """The guest is not ours to stop: always running."""
    return {"status": "running", "singlestep": False, "running": True}


@command("query-name")
def query_name(vm: Vm, args: Args) -> object:
    """The VM's name."""
    return {"name": vm.name}


@command("quit")
def quit_(vm: Vm, args: Args) -> object:
    """A clean shutdown, as on SIGTERM."""
    vm.request_shutdown("host-qmp-quit")
    return None
