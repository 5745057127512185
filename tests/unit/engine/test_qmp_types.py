"""What a monitor answers is used in its form only, and what is asked has one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import incbak
from incbak.engine.qmp_types import ANSWERS, MOST, decoded
from incbak.errors import EngineError

NODE = {"node-name": "n", "drv": "raw", "ro": False, "image": {"virtual-size": 512}}
BITMAP = {"count": 0, "granularity": 65536, "recording": True, "busy": False, "persistent": False}
JOB = {"id": "j", "status": "running", "current-progress": 0, "total-progress": 1}
DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


def test_everything_that_is_asked_has_a_form() -> None:
    asked = {
        name
        for path in Path(incbak.__file__).parent.rglob("*.py")
        if "serve" not in path.parts
        for name in re.findall(r'execute\(\s*"((?:x-debug-)?query-[a-z-]+|qom-get|qom-list)"', path.read_text())
    }
    assert "query-block" in asked
    assert asked - ANSWERS.keys() == set()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-named-block-nodes", [NODE]),
        ("query-named-block-nodes", [NODE | {"dirty-bitmaps": [BITMAP], "file": "/x"}]),
        ("query-block", [{"device": "", "qdev": "/machine/x[0]", "inserted": {"node-name": "n"}}, {"device": "cd0"}]),
        ("query-jobs", [JOB]),
        ("query-version", {"qemu": {"major": 11, "minor": 0, "micro": 0}, "package": ""}),
        ("query-name", {}),
        ("qom-get", True),
        ("qom-get", "pc"),
    ],
)
def test_an_answer_in_its_form_is_given(command: str, answer: object) -> None:
    assert decoded(command, answer) == answer


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-named-block-nodes", None),
        ("query-named-block-nodes", [NODE | {"node-name": 5}]),
        ("query-named-block-nodes", [NODE | {"node-name": "n" * 2000}]),
        ("query-named-block-nodes", [NODE | {"image": {"virtual-size": -1}}]),
        ("query-named-block-nodes", [NODE | {"image": {"virtual-size": 1 << 63}}]),
        ("query-named-block-nodes", [NODE | {"dirty-bitmaps": [BITMAP | {"granularity": 0}]}]),
        ("query-named-block-nodes", [NODE | {"dirty-bitmaps": [BITMAP | {"recording": "no"}]}]),
        ("query-named-block-nodes", [NODE] * (MOST + 1)),
        ("query-block", [{"device": ["vda"]}]),
        ("query-block", [{"device": "vda", "inserted": "yes"}]),
        ("query-jobs", {"id": "j"}),
        ("query-jobs", [JOB | {"current-progress": "many"}]),
        ("query-version", {"qemu": {"major": "7", "minor": 2, "micro": 0}}),
        ("query-status", {"running": 1, "status": "running"}),
        ("query-name", {"name": 7}),
        ("query-name", DEEP),
        ("x-debug-query-block-graph", {"nodes": [], "edges": [{"parent": "1", "child": 2, "name": "file"}]}),
        ("qom-get", {"a": 1}),
        ("qom-get", DEEP),
    ],
)
def test_another_form_is_refused(command: str, answer: object) -> None:
    with pytest.raises(EngineError, match=f"the monitor's answer to {command} is not one of QEMU"):
        decoded(command, answer)


def test_a_field_that_was_not_checked_is_not_there() -> None:
    assert decoded("query-name", {"name": "vm", "other": DEEP}) == {"name": "vm"}


def test_of_a_command_nothing_is_read() -> None:
    assert decoded("job-cancel", DEEP) == {}


def test_a_question_without_a_form_is_not_asked() -> None:
    with pytest.raises(EngineError, match="query-new: nothing is known of its answer"):
        decoded("query-new", {})
