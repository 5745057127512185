"""Lines for cron and units for systemd that fit the configuration. They are printed, and installed by nobody."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from incbak.fleet.config import Config, Vm
from incbak.units import parse_duration

_HARDENING = """UMask=0077
NoNewPrivileges=yes
ProtectSystem=full
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native"""
"""For every unit. ProtectProc and PrivateDevices are left out: images are devices too, and which processes have an
image open is looked up in /proc."""

_NO_COMMANDS = """RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_CHOWN CAP_SYS_PTRACE"""
"""For the units that run no command of the owner: a hook may mount, make a snapshot, or need another capability."""

_STOP = "5min"
"""For a job that is ended: it takes its filters and bitmaps out of the guests that it was copying."""
_LONGEST = 2 * 86400
"""Seconds: of a backup where the configuration has no ``max-duration``, and of the other jobs."""
_JOBS = 2
"""Backups that ``--all`` runs at once."""

_SAMPLE = "5%"


def cron(program: str, common: Sequence[str], config: Config, user: str) -> str:
    """For ``/etc/cron.d``. cron mails what is printed: with -q, warnings and errors only.

    ``common``: options that every command gets.
    """

    def line(when: str, *argv: str) -> str:
        command = shlex.join([program, "-q", *argv, *common])
        return f"{when}  {user}  " + command.replace("%", r"\%")  # to cron, % is the end of the line

    lines = [
        "# /etc/cron.d/incbak",
        "# At night an incremental of every VM; at noon a look whether each has one of the last 26 hours.",
        line("15 2 * * *", "incremental", "--all", "--lock-wait", "30m"),
        line("0 12 * * *", "status", "--all", "--max-age", "26h"),
        "# On Sundays a drill: a sample of each VM's last backup is read as a restore would, and compared.",
        line("15 6 * * 0", "drill", "--all", "--sample", _SAMPLE),
    ]
    if _prunes(config):
        lines += ["# Backups that no rule keeps go.", line("45 5 * * *", "prune", "--all")]
    if config.sync.target:
        lines += ["# What the second place lacks is copied there.", line("30 4 * * *", "sync")]
    return "\n".join([*lines, ""])


def _prunes(config: Config) -> bool:
    return any(config.vm(name).keep for name in config.vms)


def left_out(kind: str, config: Config) -> list[str]:
    """What of the configuration the lines or units do not do, for people."""
    found = []
    vms = {name: config.vm(name) for name in sorted(config.vms)}
    if kind == "cron":
        for service in ("serve", "watch"):
            if names := [name for name, vm in vms.items() if getattr(vm, service)]:
                hint = "cron starts no services; see: incbak schedule show systemd"
                found.append(f"incbak {service} of {', '.join(names)} is left out: {hint}")
    if names := [name for name, vm in vms.items() if not vm.keep]:
        found.append(f"backups of {', '.join(names)} are never pruned: no [vms.NAME.keep] says which stay")
    if not config.sync.target:
        found.append("no backup is copied to a second place: there is no [sync] with a target")
    return found


def systemd(program: str, common: Sequence[str], config: Config, state: Path | None = None) -> dict[str, str]:
    """Units by file name. ``common``: as of `cron`. ``state``: the state directory, if it was given."""
    argv = ("incremental", "--all", "--lock-wait", "30m")
    backup = _job("Incremental backups of all VMs", program, common, *argv, longest=_longest(config))
    units = {"incbak-backup.service": backup, "incbak-backup.timer": _timer("Incremental backups", "02:15")}
    what = "A sample of each VM's last backup is compared"
    units["incbak-drill.service"] = _job(what, program, common, "drill", "--all", "--sample", _SAMPLE)
    units["incbak-drill.timer"] = _timer(what, "06:15", days="Sun ", often="each week")
    if _prunes(config):
        units["incbak-prune.service"] = _job("Backups that no rule keeps go", program, common, "prune", "--all")
        units["incbak-prune.timer"] = _timer("Backups that no rule keeps go", "05:45")
    if config.sync.target:
        what = "Backups are copied to the second place"
        units["incbak-sync.service"] = _job(what, program, common, "sync")
        units["incbak-sync.timer"] = _timer(what, "04:30")
    for name, _ in sorted(config.vms.items()):
        vm = config.vm(name)
        if vm.serve:
            units |= _serve(program, name, vm, _state(vm, state))
        if vm.watch:
            units[f"incbak-watch-{name}.service"] = _watch(program, name, vm, _state(vm, state))
    return units


def _longest(config: Config) -> int:
    """Return the seconds after which no backup of ``--all`` can still be running by its own limit."""
    limits = [parse_duration(config.vm(name).max_duration or f"{_LONGEST}s") for name in config.vms]
    turns = -(-len(limits) // _JOBS)
    return math.ceil(max(limits, default=_LONGEST) * max(turns, 1)) + 3600


def _job(what: str, program: str, common: Sequence[str], *argv: str, longest: int = _LONGEST) -> str:
    return f"""[Unit]
Description={what}

[Service]
Type=oneshot
ExecStart={_line(program, "-q", *argv, *common)}
TimeoutStartSec={longest}
TimeoutStopSec={_STOP}
Nice=10
IOSchedulingClass=best-effort
IOSchedulingPriority=7
{_HARDENING}
"""


def _timer(what: str, time: str, *, days: str = "", often: str = "each night") -> str:
    return f"""[Unit]
Description={what}, {often}

[Timer]
OnCalendar={days}*-*-* {time}
RandomizedDelaySec=10m
Persistent=yes

[Install]
WantedBy=timers.target
"""


def _serve(program: str, name: str, vm: Vm, state: Sequence[str]) -> dict[str, str]:
    """The service, and its sockets: they are there while it is started anew, and clients wait instead of failing."""
    service = f"incbak-serve-{name}"
    sockets = {f"{service}-{kind}.socket": file for kind, file in (("nbd", "nbd.sock"), ("monitor", "qmp.sock"))}
    units = {f"{service}.service": _serve_service(program, name, vm, state, " ".join(sockets))}
    for (unit, file), kind in zip(sockets.items(), ("nbd", "monitor"), strict=True):
        units[unit] = f"""[Unit]
Description=The {kind} socket of the VM {name}

[Socket]
ListenStream=/run/incbak/{name}/{file}
FileDescriptorName={kind}
SocketMode=0600
DirectoryMode=0700
Service={service}.service

[Install]
WantedBy=sockets.target
"""
    return units


def _serve_service(program: str, name: str, vm: Vm, state: Sequence[str], sockets: str) -> str:
    disks = [f"{disk}={image}" for disk, image in vm.serve.items()]
    command = _line(program, "serve", "--name", name, *state, *_trust(vm), *disks)
    return f"""[Unit]
Description=Disks of the VM {name}, tracked by incbak
Requires={sockets}
After={sockets}
Before=shutdown.target

[Service]
Type=notify
Sockets={sockets}
ExecStart={command}
Restart=on-failure
WatchdogSec=5min
TimeoutStopSec=2min
OOMScoreAdjust=-500
{_HARDENING}
{_NO_COMMANDS}

[Install]
WantedBy=multi-user.target
"""


def _watch(program: str, name: str, vm: Vm, state: Sequence[str]) -> str:
    command = _line(program, "watch", vm.watch, "--name", name, "--start", *state, *_trust(vm))
    return f"""[Unit]
Description=Dirty bitmaps of the VM {name}, kept over its shutdowns by incbak

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
WatchdogSec=5min
{_HARDENING}
{_NO_COMMANDS}

[Install]
WantedBy=multi-user.target
"""


def _state(vm: Vm, given: Path | None) -> Sequence[str]:
    """What was given wins over the configuration, as of any command."""
    where = str(given or vm.state_dir)
    return ("--state-dir", where) if where else ()


def _trust(vm: Vm) -> Iterator[str]:
    if vm.ignore_ctime:
        yield "--ignore-ctime"


def _line(*argv: str) -> str:
    """As systemd reads it: quoted, with its specifiers and variables doubled."""
    return " ".join(_quoted(arg.replace("%", "%%").replace("$", "$$")) for arg in argv)


def _quoted(arg: str) -> str:
    if arg and not set(arg) & set(" \t\"'\\;"):
        return arg
    return '"' + arg.replace("\\", "\\\\").replace('"', '\\"') + '"'
