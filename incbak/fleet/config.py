"""The configuration file: TOML, decoded strictly.

::

    [defaults]                      # for every VM; a VM's own value wins
    repository = "/backup"
    lock-wait = "10m"
    trust-after-boot = "sample"     # of block devices, instead of "read": see the README
    strict = true                   # as --strict; a VM's own false wins
    ignore-ctime = true             # as --ignore-ctime, also for the units of serve and watch

    password-file = "/root/backup.pass"   # of an encrypted repository; or password-command = ["/usr/bin/pass", "x"]

    [vms.web1]
    source = "qmp:/run/web1.qmp"    # or an image: "/srv/web1.raw"
    quiesce = true
    agent-socket = "/run/web1.qga"
    attach = ["/etc/libvirt/qemu/web1.xml"]
    metrics = "/var/lib/prometheus/node-exporter/incbak-web1.prom"

    watch = "qmp:/run/web1.watch"   # if incbak watch is to run for it: see incbak schedule

    [vms.web1.serve]                # the disks, if incbak serve is to run for it: see incbak schedule
    vda = "/srv/web1.raw"

    [vms.web1.keep]                 # for incbak prune --all
    daily = 14
    weekly = 8

    [vms.web1.hooks]
    failed = ["/usr/local/bin/page-me"]

    [sync]                          # a second place for the backups, for incbak sync
    target = "/mnt/offsite"
    password-file = "/root/offsite.pass"  # if it is encrypted; or password-command
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from incbak.disk.formats import OFFERED
from incbak.errors import UsageError
from incbak.host import home
from incbak.opening import open_text
from incbak.units import parse_duration, parse_retention, parse_share, parse_size

_LIMIT = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SAMPLE = "sample"
TRUST = ("read", SAMPLE)
"""What shows that a block device is unchanged in another boot or set-up, the default first."""
_UNSAID = ("", (), None)
"""The values of keys that are not there: ``false`` is said."""


class Hooks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Commands with their arguments; empty: none. ``timeout``: a hook that takes longer is killed."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    timeout: str = "10m"


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which backups a prune keeps, as its ``--keep`` options."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: str = ""
    tags: tuple[str, ...] = ()


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What may be said of all VMs; the texts are what the options of the same names take."""

    repository: str = ""
    password_file: str = ""
    password_command: tuple[str, ...] = ()
    state_dir: str = ""
    lock_wait: str = ""
    max_duration: str = ""
    monitor_wait: str = ""
    speed_limit: str = ""
    scratch_dir: str = ""
    scratch_limit: str = ""
    audit: str = ""
    trust_after_boot: str = ""
    strict: bool | None = None
    ignore_ctime: bool | None = None
    keep: Keep | None = None
    hooks: Hooks | None = None


class Vm(Defaults, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """One VM, by the name under which its backups are kept."""

    source: str
    disks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    attach: tuple[str, ...] = ()
    quiesce: bool = False
    agent_socket: str = ""
    metrics: str = ""
    watch: str = ""
    format: str = ""
    allow_backing: tuple[str, ...] = ()
    trust_backing: tuple[str, ...] = ()
    serve: dict[str, str] = {}


class Sync(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Where ``incbak sync`` copies backups to."""

    target: str = ""
    password_file: str = ""
    password_command: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    defaults: Defaults = Defaults()
    vms: dict[str, Vm] = {}
    sync: Sync = Sync()

    def vm(self, name: str) -> Vm:
        """With the defaults filled in. Raises `KeyError`."""
        vm = self.vms[name]
        values = {f: getattr(vm, f) for f in Defaults.__struct_fields__}
        values = {f: getattr(self.defaults, f) if own in _UNSAID else own for f, own in values.items()}
        return msgspec.structs.replace(vm, **values)


_NO_HOME = Path("/nonexistent")
"""Where Debian has the homes of users that have none."""


def default_path() -> Path:
    """``/etc/incbak/incbak.toml`` for root, else below the XDG configuration directory; it need not exist."""
    if os.geteuid() == 0:
        return Path("/etc/incbak/incbak.toml")
    place = os.environ.get("XDG_CONFIG_HOME") or (home() or _NO_HOME) / ".config"
    return Path(place) / "incbak" / "incbak.toml"


def load(path: Path) -> Config:
    """Read and check the file. Raises `UsageError` that names the file, the key, and what is expected."""
    try:
        with open_text(path) as file:
            _check_owner(path, os.fstat(file.fileno()))
            raw = file.read(_LIMIT + 1)
    except OSError as e:
        raise UsageError(f"cannot read the configuration {path}: {e.strerror}") from e
    if len(raw) > _LIMIT:
        raise UsageError(f"the configuration {path} is larger than {_LIMIT} bytes")
    try:
        tree = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{path}: {e}", hint="It must be TOML, in UTF-8.") from e
    config = _decoded(path, tree)
    for key, trouble, hint in _troubles(config):
        raise UsageError(f"{path}: {key}: {trouble}", hint=hint)
    return config


def _check_owner(path: Path, info: os.stat_result) -> None:
    """It names commands that we run: nobody else may write them."""
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
        hint = f"It names commands to be run. Try: chown {os.geteuid()} {path}; chmod go-w {path}"
        raise UsageError(f"the configuration {path} can be written by others", hint=hint)


def _decoded(path: Path, tree: Mapping[str, Any]) -> Config:
    tables: list[tuple[str, Any, type[msgspec.Struct]]] = [
        ("defaults", tree.get("defaults", {}), Defaults),
        ("sync", tree.get("sync", {}), Sync),
    ]
    vms = tree.get("vms", {})
    if not isinstance(vms, dict):
        raise UsageError(f"{path}: vms: expected a table for each VM", hint="Write [vms.NAME].")
    tables += [(f"vms.{name}", table, Vm) for name, table in vms.items()]
    for key in tree.keys() - {"defaults", "vms", "sync"}:
        raise UsageError(f"{path}: {key}: no such key", hint="There are [defaults], [vms.NAME] and [sync].")
    found: dict[str, Any] = {}
    for key, table, kind in tables:
        try:
            found[key] = msgspec.convert(table, kind)
        except msgspec.ValidationError as e:
            what, _, where = str(e).partition(" - at `$")
            raise UsageError(f"{path}: {key}{where.rstrip('`')}: {what[:1].lower()}{what[1:]}") from e
    defaults, sync = found.pop("defaults"), found.pop("sync")
    return Config(defaults, {key.removeprefix("vms."): vm for key, vm in found.items()}, sync)


def _troubles(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong, what to do) for each value that no command would take."""
    yield from _shared("defaults", config.defaults)
    yield from _passwords("sync", config.sync)
    yield from _relative("sync", {"target": config.sync.target})
    if config.sync != Sync() and not config.sync.target:
        yield "sync.target", "missing", "Write the path of the other repository."
    yield from _one_source(config)
    for name, vm in config.vms.items():
        key = f"vms.{name}"
        if not _NAME.fullmatch(name):
            yield key, "not a name of a VM", "Use letters, digits, and . _ - between them."
        yield from _shared(key, vm)
        if not vm.source.startswith("qmp:") and not vm.source.startswith("/"):
            yield f"{key}.source", f"neither a monitor nor an absolute path: {vm.source!r}", "qmp:/run/x.qmp, or /x.raw"
        if vm.watch and not vm.watch.startswith("qmp:/"):
            yield f"{key}.watch", f"not the Unix socket of a monitor: {vm.watch!r}", "Write qmp:/path/of/socket."
        if vm.quiesce != bool(vm.agent_socket):
            yield f"{key}.quiesce", "goes together with agent-socket", "Give both, or none."
        paths = {"agent-socket": vm.agent_socket, "metrics": vm.metrics}
        if vm.format and vm.format not in OFFERED:
            yield f"{key}.format", f"not a format of an image: {vm.format!r}", f"There are: {', '.join(OFFERED)}."
        if vm.source.startswith("qmp:") and (vm.format or vm.allow_backing):
            what = "format" if vm.format else "allow-backing"
            yield f"{key}.{what}", "is for an image, not for a monitor", "Leave it out: QEMU knows what its disks are."
        paths |= {f"allow-backing[{n}]": path for n, path in enumerate(vm.allow_backing)}
        paths |= {f"attach[{n}]": path for n, path in enumerate(vm.attach)}
        paths |= {f"serve.{disk}": path for disk, path in vm.serve.items()}
        yield from _relative(key, paths)


def _one_source(config: Config) -> Iterator[tuple[str, str, str]]:
    """Two VMs are not one: unless each of them has disks of its own."""
    seen: dict[str, list[str]] = {}
    for name, vm in config.vms.items():
        for other in seen.setdefault(os.path.normpath(vm.source), []):
            theirs = config.vms[other].disks
            if not (vm.disks and theirs) or set(vm.disks) & set(theirs):
                yield f"vms.{name}.source", f"it is also the source of {other}", "Give each VM its own, or name disks."
        seen[os.path.normpath(vm.source)].append(name)


def _shared(key: str, values: Defaults) -> Iterator[tuple[str, str, str]]:
    paths = {"repository": values.repository, "state-dir": values.state_dir, "scratch-dir": values.scratch_dir}
    yield from _passwords(key, values)
    yield from _relative(key, paths)
    parsed: Mapping[str, tuple[str, Callable[[str], Any]]] = {
        "lock-wait": (values.lock_wait, parse_duration),
        "max-duration": (values.max_duration, parse_duration),
        "monitor-wait": (values.monitor_wait, parse_duration),
        "speed-limit": (values.speed_limit.removesuffix("/s"), parse_size),
        "scratch-limit": (values.scratch_limit, parse_size),
        "audit": (values.audit, parse_share),
        "keep.within": (values.keep.within if values.keep else "", parse_retention),
        "hooks.timeout": (values.hooks.timeout if values.hooks else "", parse_duration),
    }
    for name, (text, parse) in parsed.items():
        try:
            if text:
                parse(text)
        except UsageError as e:
            yield f"{key}.{name}", str(e), e.hint
    if values.trust_after_boot and values.trust_after_boot not in TRUST:
        yield f"{key}.trust-after-boot", f"no such way: {values.trust_after_boot!r}", f"There are: {', '.join(TRUST)}."
    if values.keep and any(isinstance(n, int) and n < 0 for n in msgspec.structs.astuple(values.keep)):
        yield f"{key}.keep", "a number below 0", "Leave the rule out instead."
    if hooks := values.hooks:
        commands = {"before": hooks.before, "after": hooks.after, "failed": hooks.failed}
        yield from _relative(f"{key}.hooks", {name: command[0] for name, command in commands.items() if command})


def _passwords(key: str, values: Defaults | Sync) -> Iterator[tuple[str, str, str]]:
    if values.password_file and values.password_command:
        yield f"{key}.password-command", "there is a password-file too", "Leave one, so that it is clear which counts."
    yield from _relative(
        key, {"password-file": values.password_file, "password-command": (*values.password_command, "")[0]}
    )


def _relative(key: str, paths: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, path in paths.items():
        if path and not path.startswith("/"):
            yield f"{key}.{name}", f"not an absolute path: {path!r}", "cron and systemd start elsewhere than you do."
