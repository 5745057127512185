"""The disks in what a monitor says, whatever it says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from incbak.engine.base import DiskPlan, EngineDisk
from incbak.engine.qemu_disks import find_disks
from incbak.engine.qemu_graph import Graph
from incbak.engine.qemu_storing import bitmaps_of, is_unflushed, remove_unbelieved
from incbak.errors import EngineError
from incbak.reasons import Reason


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


def _unflushed(*names: str) -> Graph:
    """A filter, an image of three files, and a backing file; those of ``names`` are not flushed."""
    edges = {("t", "file"): "d", ("d", "file"): "f", ("f", "file"): "p", ("d", "data-file"): "x", ("d", "backing"): "b"}
    bits = {"count": 0, "granularity": 65536, "recording": True, "busy": False}
    bitmaps = [{**bits, "name": n, "persistent": n != "m"} for n in ("incbak-1-2", "incbak-1-1", "incbak-2-1", "m")]
    nodes = {n: _node(n) | {"cache": {"no-flush": n in names}, "dirty-bitmaps": bitmaps} for n in "tdfpxb"}
    return Graph(nodes, edges)


@pytest.mark.parametrize(("names", "is_one"), [("d", True), ("p", True), ("x", True), ("tb", False), ("", False)])
def test_what_an_image_writes_to_has_to_be_flushed(names: str, is_one: bool) -> None:
    """A filter above passes flushes on; a backing file is not written."""
    graph = _unflushed(*names)
    assert is_unflushed(graph, "d") is is_one
    reasons = {b.name: b.reason for b in bitmaps_of(graph, "d")}
    assert reasons.pop("m") is None
    assert set(reasons.values()) == {Reason.UNFLUSHED if is_one else None}


def test_a_graph_with_a_cycle_is_looked_at_once() -> None:
    assert not is_unflushed(Graph({"a": _node("a"), "b": _node("b")}, {("a", "file"): "b", ("b", "file"): "a"}), "a")


def test_stored_bitmaps_that_are_not_believed_go_and_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this repository; what QEMU does not flush is flushed here, afterwards."""
    done: list[Any] = []

    async def remove(*what: str) -> None:
        done.append(what)

    monkeypatch.setattr("incbak.engine.qemu_storing.sync_files", done.append)
    for names, expected in (("d", [("d", "incbak-1-1"), ["/srv/d"]]), ("", [])):
        done.clear()
        disk = EngineDisk("d", 1 << 20, "d", bitmaps=bitmaps_of(_unflushed(*names), "d"), extra={"image": "/srv/d"})
        asyncio.run(remove_unbelieved(DiskPlan(disk, "incbak-1-2", 65536), remove))
        assert done == expected
