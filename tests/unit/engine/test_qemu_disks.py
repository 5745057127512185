"""The disks in what a monitor says, whatever it says."""

from __future__ import annotations

from typing import Any

import pytest

from incbak.engine.qemu_disks import find_disks
from incbak.engine.qemu_graph import Graph
from incbak.errors import EngineError


def graph(*edges: tuple[str, str], drv: str = "throttle") -> Graph:
    """Filters, with an image ``end``."""
    names = sorted({name for edge in edges for name in edge})
    nodes = [_node(name, "raw" if name == "end" else drv) for name in names]
    below = [{"parent": names.index(a), "child": names.index(b), "name": "file"} for a, b in edges]
    return Graph.of(nodes, {"nodes": [{"id": n, "name": name} for n, name in enumerate(names)], "edges": below})


def _node(name: str, drv: str = "raw", *, ro: bool = False) -> dict[str, Any]:
    return {"node-name": name, "drv": drv, "ro": ro, "image": {"virtual-size": 1 << 20}, "file": f"/srv/{name}"}


def test_the_image_is_below_all_filters() -> None:
    assert graph(("a", "b"), ("b", "c"), ("c", "end")).image("a") == "end"
    assert graph(("incbak-1", "incbak-2"), ("incbak-2", "end")).without_ours("incbak-1") == "end"


@pytest.mark.parametrize("edges", [[("a", "a")], [("a", "b"), ("b", "a")], [("a", "b"), ("b", "c"), ("c", "b")]])
def test_a_cycle_of_filters_is_refused(edges: list[tuple[str, str]]) -> None:
    with pytest.raises(EngineError, match="has a cycle"):
        graph(*edges).image("a")


@pytest.mark.parametrize("end", ["incbak-1", "incbak-2"])
def test_a_cycle_of_our_own_names_is_refused(end: str) -> None:
    with pytest.raises(EngineError, match="has a cycle"):
        graph(("incbak-1", "incbak-2"), ("incbak-2", end)).without_ours("incbak-1")


def test_an_edge_to_nowhere_is_refused() -> None:
    edge = {"parent": 0, "child": 7, "name": "file"}
    with pytest.raises(EngineError, match="an edge to 7, and no such node"):
        Graph.of([_node("a")], {"nodes": [{"id": 0, "name": "a"}], "edges": [edge]})


def _left(device: dict[str, Any], *nodes: dict[str, Any]) -> tuple[str, bool]:
    disks, left = find_disks([device], Graph({n["node-name"]: n for n in nodes}))
    assert not disks
    return left[0].why, left[0].expected


DEVICE = {"device": "vda", "qdev": "/machine/peripheral/vda", "removable": False, "inserted": {"node-name": "a"}}


@pytest.mark.parametrize(
    ("device", "node", "why", "expected"),
    [
        ({"removable": True}, _node("a"), "it is removable", False),
        (
            {"device": "", "qdev": "/machine/x", "inserted": {"node-name": "#block1"}},
            _node("#block1"),
            "no stable",
            False,
        ),
        ({"removable": True}, _node("a", ro=True), "it is removable", True),
        ({"removable": True, "inserted": None}, _node("b"), "it is removable", True),
        ({}, _node("a", ro=True), "it is read-only", True),
        ({"qdev": ""}, _node("a"), "no guest device", True),
    ],
)
def test_a_disk_that_a_user_may_miss_is_told_from_others(
    device: dict[str, Any], node: dict[str, Any], why: str, expected: bool
) -> None:
    said, unasked = _left(DEVICE | device, node)
    assert why in said
    assert unasked == expected
