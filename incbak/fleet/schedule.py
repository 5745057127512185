"""Lines for cron and units for systemd that fit the configuration. They are printed, and installed by nobody."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from incbak.fleet.config import Config, Vm

_HARDENING = """NoNewPrivileges=yes
ProtectSystem=full
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictRealtime=yes
LockPersonality=yes"""


def cron(program: str, config: Path, user: str) -> str:
    """For ``/etc/cron.d``. cron mails what is printed: with -q, warnings and errors only."""
    command = f"{shlex.quote(program)} -q incremental --all --lock-wait 30m --config {shlex.quote(str(config))}"
    checking = f"{shlex.quote(program)} -q status --all --max-age 26h --config {shlex.quote(str(config))}"
    return "\n".join(
        [
            "# /etc/cron.d/incbak",
            "# At night an incremental of every VM; at noon a look whether each has one of the last 26 hours.",
            f"15 2 * * *  {user}  {_percent(command)}",
            f"0 12 * * *  {user}  {_percent(checking)}",
            "",
        ]
    )


def _percent(command: str) -> str:
    return command.replace("%", r"\%")  # to cron, % is the end of the line


def systemd(program: str, path: Path, config: Config) -> dict[str, str]:
    """Units by file name."""
    units = {
        "incbak-backup.service": _backup(program, path),
        "incbak-backup.timer": _timer(),
    }
    for name, _ in sorted(config.vms.items()):
        vm = config.vm(name)
        if vm.serve:
            units[f"incbak-serve-{name}.service"] = _serve(program, name, vm)
        if vm.watch:
            units[f"incbak-watch-{name}.service"] = _watch(program, name, vm)
    return units


def _backup(program: str, config: Path) -> str:
    command = _line(program, "-q", "incremental", "--all", "--lock-wait", "30m", "--config", str(config))
    return f"""[Unit]
Description=Incremental backups of all VMs

[Service]
Type=oneshot
ExecStart={command}
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
{_HARDENING}
"""


def _timer() -> str:
    return """[Unit]
Description=Incremental backups of all VMs, each night

[Timer]
OnCalendar=*-*-* 02:15
RandomizedDelaySec=10m
Persistent=yes

[Install]
WantedBy=timers.target
"""


def _serve(program: str, name: str, vm: Vm) -> str:
    disks = [f"{disk}={image}" for disk, image in vm.serve.items()]
    command = _line(program, "serve", "--name", name, *_state(vm), *disks)
    return f"""[Unit]
Description=Disks of the VM {name}, tracked by incbak
Before=shutdown.target

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
TimeoutStopSec=2min
OOMScoreAdjust=-500
{_HARDENING}

[Install]
WantedBy=multi-user.target
"""


def _watch(program: str, name: str, vm: Vm) -> str:
    command = _line(program, "watch", vm.watch, "--name", name, "--start", *_state(vm))
    return f"""[Unit]
Description=Dirty bitmaps of the VM {name}, kept over its shutdowns by incbak

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
{_HARDENING}

[Install]
WantedBy=multi-user.target
"""


def _state(vm: Vm) -> Iterator[str]:
    if vm.state_dir:
        yield from ("--state-dir", vm.state_dir)


def _line(*argv: str) -> str:
    """As systemd reads it: quoted, with its specifiers and variables doubled."""
    return " ".join(_quoted(arg.replace("%", "%%").replace("$", "$$")) for arg in argv)


def _quoted(arg: str) -> str:
    if arg and not set(arg) & set(" \t\"'\\;"):
        return arg
    return '"' + arg.replace("\\", "\\\\").replace('"', '\\"') + '"'
