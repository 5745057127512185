"""The nodes that keep a migration from being completed beside a backup go again, or it is said that they stay."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from incbak.engine.qemu_migration import MigrationBlocker
from incbak.engine.session import CommandFailed, Session


class Qemu:
    """Takes nodes; refuses what is done to ``refused``."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.nodes = refused, list[str]()

    async def execute(self, command: str, arguments: Mapping[str, Any], **_: Any) -> Any:
        name = str(arguments["node-name"])
        if (command, name) == ("blockdev-add", self.refused) or (command, name) == ("blockdev-del", self.refused):
            raise CommandFailed(command, "GenericError", "in use")
        if command == "blockdev-add":
            assert {arguments.get("file"), arguments.get("target")} - {None} <= set(self.nodes)
            self.nodes.append(name)
        else:
            assert name == self.nodes.pop(), "what is on top goes first"
        return {}


def test_what_was_added_goes_from_the_top() -> None:
    qemu = Qemu()
    blocker = MigrationBlocker(cast(Session, qemu), "b-")
    asyncio.run(blocker.add())
    assert qemu.nodes == ["b-n", "b-o", "b-m"]
    assert asyncio.run(blocker.remove()) == []
    assert qemu.nodes == []


def test_what_qemu_keeps_is_said() -> None:
    qemu = Qemu()
    blocker = MigrationBlocker(cast(Session, qemu), "b-")
    asyncio.run(blocker.add())
    qemu.refused, qemu.nodes = "b-m", ["b-n", "b-o"]
    (left,) = asyncio.run(blocker.remove())
    assert "b-m" in left
    assert "in use" in left


def test_a_node_that_cannot_be_added_leaves_no_others() -> None:
    qemu = Qemu("b-m")
    blocker = MigrationBlocker(cast(Session, qemu), "b-")
    with pytest.raises(CommandFailed):
        asyncio.run(blocker.add())
    asyncio.run(blocker.remove())
    assert qemu.nodes == []
