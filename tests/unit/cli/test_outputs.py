"""What a user names to be written is never in a repository or in the state directory, whatever is forced."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from incbak.cli.main import cli
from incbak.errors import UsageError
from incbak.repo.outputs import refuse_own
from tests.unit.repo.scene import back_up, new

COMMANDS = {
    "restore": ("restore", "latest", "{}", "--force"),
    "restore --format qcow2": ("restore", "latest", "{}", "--force", "--format", "qcow2"),
    "restore --in-place": ("restore", "latest", "{}", "--in-place"),
    "restore --all": ("restore", "latest", "{}", "--all", "--force"),
    "report": ("report", "--html", "{}"),
    "key export": ("key", "export", "{}"),
    "schedule": ("schedule", "show", "systemd", "--to", "{}"),
    "files cp": ("files", "cp", "latest", "/etc", "{}", "-R", "--force"),
    "full --metrics": ("full", "{image}", "--metrics", "{}"),
    "drill --metrics": ("drill", "--metrics", "{}"),
    "init": ("init", "{}"),
    "export --socket": ("export", "latest", "--socket", "{}"),
    "serve --socket": ("serve", "--name", "vm", "vda={image}", "--socket", "{}"),
    "serve --monitor": ("serve", "--name", "vm", "vda={image}", "--monitor", "{}"),
}
SOCKETS = ("export --socket", "serve --socket", "serve --monitor")


class Scene:
    """A repository in use, another one, and a state directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.repo, self.state, self.image = root, root / "repo", root / "state", root / "a.raw"
        back_up(new(self.repo), [1])
        new(root / "other")
        (self.state / "vm" / "vda").mkdir(parents=True)
        (self.state / "vm" / "vda" / "x.bitmap").write_bytes(b"bitmap")
        self.image.write_bytes(bytes(4096))
        self.before = self.all()

    def all(self) -> dict[str, bytes]:
        """Every file, and its content; every directory."""
        found = sorted(self.root.rglob("*"))
        return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else b"" for p in found}

    def run(self, name: str, target: Path) -> str:
        """Run a command that must be refused, and change nothing; what it said."""
        argv = [part.format(target, image=self.image) for part in COMMANDS[name]]
        result = CliRunner().invoke(cli, ["-r", str(self.repo), "--state-dir", str(self.state), *argv])
        assert isinstance(result.exception, UsageError | SystemExit), (name, result.output, result.exception)
        assert self.all() == self.before
        return f"{result.exception} {result.output}"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_writes_in_a_repository(scene: Scene, name: str) -> None:
    for repository in (scene.repo, scene.root / "other"):
        assert "in the repository" in scene.run(name, repository / "packs" / "x.raw")
        assert any(word in scene.run(name, repository / "packs") for word in ("in the repository", "is a directory"))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in SOCKETS and name != "init"])
def test_no_command_writes_in_the_state_directory(scene: Scene, name: str) -> None:
    said = scene.run(name, scene.state / "vm" / "vda" / "x.bitmap")
    assert f"is in the state directory {scene.state}" in said or "is a file" in said
    scene.run(name, scene.state / "vm")


@pytest.mark.parametrize("name", ["restore", "restore --in-place", "report", "full --metrics"])
def test_nor_by_a_link(scene: Scene, name: str) -> None:
    links = [scene.root / "link", scene.root / "hard", scene.root / "below"]
    links[0].symlink_to(scene.repo / "config")
    links[1].hardlink_to(scene.repo / "config")
    links[2].symlink_to("repo/packs")
    scene.before = scene.all()
    assert "is in the repository" in scene.run(name, links[0])
    assert f"is a hard link of {scene.repo / 'config'}" in scene.run(name, links[1])
    assert "is in the repository" in scene.run(name, links[2] / "x.raw")


def test_a_name_in_the_target_directory_that_leads_into_it(scene: Scene) -> None:
    (scene.root / "out").mkdir()
    (scene.root / "out" / "vda.raw").symlink_to(scene.repo / "config")
    scene.before = scene.all()
    assert "is in the repository" in scene.run("restore", scene.root / "out")
    assert "is in the repository" in scene.run("restore", scene.root / "out" / "vda.raw")


def test_a_repository_that_lost_its_config_and_a_directory_that_is_not_there(scene: Scene) -> None:
    (scene.root / "other" / "config").unlink()
    with pytest.raises(UsageError, match="in the repository"):
        refuse_own(scene.root / "other" / "packs" / "a" / "b" / ".." / "c", {})


def test_a_hard_link_of_a_bitmap(scene: Scene) -> None:
    (scene.root / "twin").hardlink_to(scene.state / "vm" / "vda" / "x.bitmap")
    with pytest.raises(UsageError, match=r"hard link of .*x.bitmap, in the state"):
        refuse_own(scene.root / "twin", {"the state directory": scene.state})


def test_what_is_beside_them_is_allowed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"the repository": scene.repo, "the state directory": scene.state, "nowhere": scene.root / "nowhere"}
    (scene.root / "twin").hardlink_to(scene.image)
    monkeypatch.chdir(scene.root)
    for name in ("x.raw", "new/x.raw", "twin", "repo.raw", "repo/../x.raw", "a\0b"):
        refuse_own(Path(name), own)
