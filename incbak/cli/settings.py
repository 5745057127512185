"""The options that every command takes, before or after the command's name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from incbak import host
from incbak.cli.passphrase import Passphrase
from incbak.errors import DurabilityError, UsageError, WrongPassphraseError
from incbak.fleet.config import Config, Defaults, Vm, default_path, load
from incbak.repo import outputs
from incbak.repo.memory import Memory
from incbak.repo.repository import Repository
from incbak.report.console import Console
from incbak.report.printable import one_line as one_line
from incbak.report.printable import printable as printable

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the common options said."""

    repository: Path | None = None
    state: Path | None = None
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    config: Path | None = None
    vm: Vm | None = None
    """What the configuration says of the VM that the command is about."""
    typed: set[str] = field(default_factory=set)
    """Which of these were given on the command line."""

    @property
    def state_dir(self) -> Path:
        """Where bitmaps are."""
        return self.state or host.default_state_dir()

    def configuration(self) -> Config:
        """What the configuration file says; nothing where none was named and there is none."""
        path = self.config or default_path()
        return load(path) if self.config or path.exists() else Config()

    def repository_named(self) -> Path | None:
        """On the command line, in the environment, or for all VMs in the configuration, if anywhere."""
        if self.repository is None and (named := self.configuration().defaults.repository):
            return Path(named)
        return self.repository

    def repository_path(self) -> Path:
        """Raises `UsageError` when none was given."""
        if (path := self.repository_named()) is None:
            hint = "Give -r DIR, set INCBAK_REPOSITORY, or write it into the configuration."
            raise UsageError("no repository was given", hint=hint)
        return path

    @property
    def memory(self) -> Memory:
        """What this host remembers of repositories; nothing where there is no state directory."""
        try:
            return Memory(self.state_dir)
        except UsageError:
            return Memory(None)

    @cached_property
    def passphrase(self) -> Passphrase:
        """Of the repository: the environment says where it is, or the configuration.

        A configuration that cannot be read is a warning: it must not prevent a restore.
        """
        try:
            said = self.vm or self.configuration().defaults
        except UsageError as e:
            click.echo(one_line(f"incbak: cannot look up a passphrase in the configuration: {e}"), err=True)
            said = Defaults()
        return Passphrase(said.password_file, said.password_command)

    def open(self) -> Repository:
        """The repository. Raises as `Repository.open`, `DamagedError` when it was encrypted and is not now, and
        `WrongPassphraseError` when it is not encrypted and a passphrase is configured for it."""
        return self._open(self.repository_path(), self.passphrase)

    def open_other(self, path: Path, passphrase: Passphrase) -> Repository:
        """Another repository than that of the options. Raises as `open`."""
        return self._open(path, passphrase)

    def _open(self, path: Path, passphrase: Passphrase) -> Repository:
        config = Repository.look(path)[1]
        self.memory.refuse_downgrade(path, config)
        if not config.cipher and (source := passphrase.source):
            what = f"the repository {path} is not encrypted, and a passphrase is configured for it ({source})"
            hint = f"Somebody may have replaced it. If it is meant to be plain, do not set {source}."
            raise WrongPassphraseError(what, hint=hint)
        repo = Repository.open(path, passphrase, self.memory.key(config))
        if config.cipher:
            with suppress(DurabilityError, OSError):
                self.memory.note_place(path, config, repo.key)
        return repo

    def refuse_own(self, path: Path, *, socket: bool = False) -> None:
        """Raise `UsageError` where nothing is written whatever is forced, as `outputs.refuse_own` says.

        A ``socket`` may be in the state directory, where those of users without a runtime directory are.
        """
        own: dict[str, Path] = {}
        with suppress(UsageError):
            own["the repository"] = self.repository_path()
        with suppress(UsageError):
            own |= {} if socket else {"the state directory": self.state_dir}
        outputs.refuse_own(path, own)

    def reporter(self) -> Console:
        """For the library's events."""
        return Console(-1 if self.quiet else int(self.verbose))

    def say(self, text: str, *, lines: bool = False) -> None:
        """A result for people, on stdout, in one line or several; not with ``--quiet`` or ``--json``."""
        if not self.quiet and not self.json:
            click.echo(printable(text) if lines else one_line(text))

    def tell(self, what: dict[str, Any]) -> None:
        """A result for scripts: one line of JSON on stdout."""
        click.echo(json.dumps(what))


def settings() -> Settings:
    """Of the command that runs."""
    return click.get_current_context().ensure_object(Settings)


def _keep(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        here = ctx.ensure_object(Settings)
        from_environment = ctx.get_parameter_source(param.name or "") is ParameterSource.ENVIRONMENT
        if value not in (None, False) and not (from_environment and getattr(here, name)):
            setattr(here, name, value)
            if not from_environment:
                here.typed.add(name)
        return value

    return callback


def _config(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """One that is named on the command line is read at once: each command ends with 2 if it is not as it should be.

    One in the environment or at its default place may be damaged while somebody restores: who needs it reads it.
    """
    kept = _keep("config")(ctx, param, value)
    if value and ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
        load(value)
    return kept


def common(command: F) -> F:
    """Decorate a command (or the group) with the common options."""
    path = click.Path(path_type=Path, readable=False)  # not looked at before it is needed
    options = (
        click.option(
            "-r", "--repository", type=path, metavar="DIR", envvar="INCBAK_REPOSITORY",
            help="The repository.  [env: INCBAK_REPOSITORY]",
            callback=_keep("repository"), expose_value=False,
        ),
        click.option(
            "--state-dir", type=path, metavar="DIR", help="Where bitmaps are kept.  [env: INCBAK_STATE_DIR]",
            callback=_keep("state"), expose_value=False,
        ),
        click.option(
            "--config", type=path, metavar="FILE", envvar="INCBAK_CONFIG",
            help="The configuration.  [env: INCBAK_CONFIG]",
            callback=_config, expose_value=False,
        ),
        click.option(
            "-q", "--quiet", is_flag=True, help="Print nothing but warnings and errors.",
            callback=_keep("quiet"), expose_value=False,
        ),
        click.option(
            "-v", "--verbose", is_flag=True, help="Print more.", callback=_keep("verbose"), expose_value=False
        ),
        click.option(
            "--json", is_flag=True, help="Print one JSON object per line.", callback=_keep("json"), expose_value=False
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


trusts_backing = click.option(
    "--trust-backing",
    multiple=True,
    metavar="NAME",
    help="A backing file that never changes, as a warning names it, of which nothing is known here; may be repeated.",
)
"""Decorate a command that judges a bitmap: what it says of a disk that stands on something unknown."""

ignores_ctime = click.option(
    "--ignore-ctime",
    is_flag=True,
    help="Of a file: leave its ctime out of what shows that nobody wrote. For managers of VMs that change its owner.",
)
"""Decorate a command that records what an image was when its owner let go of it."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return bool(os.environ.get("INCBAK_DEBUG"))
